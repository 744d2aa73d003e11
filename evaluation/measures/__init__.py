"""Measures of what a method removed, what it preserved, and how certain the figures are."""
