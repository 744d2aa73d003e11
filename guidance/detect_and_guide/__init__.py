"""Detect-and-Guide (Li et al., CVPR 2025): detection maps, guideline tokens and guidance."""
