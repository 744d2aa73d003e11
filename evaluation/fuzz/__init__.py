"""Generators of hostile input, with the checks of what the pack answers."""
