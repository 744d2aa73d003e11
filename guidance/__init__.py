"""Mathematics of the methods: pure functions on tensors. Imports torch only; no file access, nothing of the host."""
