"""Evaluation: drives a real ComfyUI with this pack, judges the images that it makes, and writes figures."""
