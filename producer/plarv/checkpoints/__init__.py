"""Three slots of checkpoints: staged in memory, written in the background, certified by the
engine.
"""
