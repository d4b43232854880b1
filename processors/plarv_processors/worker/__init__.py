"""The Faust workers of a fleet: detectors as agents, the policy as an app of its own."""
