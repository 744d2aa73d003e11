"""Mathematics that several methods share: changes, noise levels, references, the papers' schedule."""
