"""A run as one HTML file that stands by itself: what happened, when, where it began."""
