"""Where the log goes and how it is read again: exports and replays."""
