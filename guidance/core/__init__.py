"""What several methods share: composition of changes, noise levels, reference latents, the papers' schedule, epsilon space."""
