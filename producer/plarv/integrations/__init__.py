"""Argus in the frameworks that people train with: each is imported when it is asked for."""
