"""Mathematics of the methods: pure functions on tensors. Imports torch only; no file access, no ComfyUI."""
