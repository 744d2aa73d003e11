"""The only rooms that touch ComfyUI's internals: hooks and their order, latent spaces, model folders, bundled models."""
