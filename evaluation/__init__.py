"""Drives a real ComfyUI with this pack, judges the images it makes, and writes figures."""
