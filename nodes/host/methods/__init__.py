"""Corrections, one per method: when it is active, what it needs of a step, how it changes the prediction."""
