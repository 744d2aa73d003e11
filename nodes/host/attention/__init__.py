"""Captures attention, records it for learning, learns guideline tokens and makes detection maps."""
