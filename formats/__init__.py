"""Files that users keep, and how images are read: negation sets, guideline tokens, latents, image layouts."""
