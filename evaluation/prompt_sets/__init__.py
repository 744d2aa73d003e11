"""Prompt sets: fixed texts with fixed seeds, and what each text states about the image."""
