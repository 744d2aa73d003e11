"""The mathematics of the methods: pure functions on tensors, with torch as the only dependency besides safetensors for files."""
