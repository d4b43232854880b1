"""The engine: twelve detectors, one policy, and the pure fold that joins them."""
