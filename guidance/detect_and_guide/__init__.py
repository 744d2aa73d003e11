"""Detect-and-Guide (Li et al., CVPR 2025): attention maps, guideline tokens, and guidance where they detect a concept."""
