"""Prompts for the demo model: one with the unwanted concept, and one without."""

STAR = "a yellow star in the center on a black plain background, flat style"
HEART = "a red heart on the left on a grey striped background, dotted style"
