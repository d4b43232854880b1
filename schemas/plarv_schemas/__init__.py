"""What travels: step events, control events, verdicts, actions, and how they are written down."""
