"""Safety functions: differentiable scores of unsafe image content, and a fast decoder for them."""
