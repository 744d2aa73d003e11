"""Differentiable scores of unsafe image content, and what makes images of latents for them."""
