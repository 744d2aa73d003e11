"""Safe Denoiser (Kim et al., NeurIPS 2025) and the ways it decides what resembles a negation set."""
