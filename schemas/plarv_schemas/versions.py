"""Versions of what is written down. A reader accepts every version up to its own."""

__all__ = ["JOURNAL_VERSION", "SCHEMA_VERSION", "SNAPSHOT_VERSION"]

SCHEMA_VERSION = 1
"""Of the four event types: their columns and what these mean."""

JOURNAL_VERSION = 1
"""Of the bytes of a journal segment."""

SNAPSHOT_VERSION = 2
"""Of a fold's snapshot. One of another version is never resumed: the log is folded again
instead.
"""
