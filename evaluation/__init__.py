"""Drives a real ComfyUI with this pack and measures what the methods do."""
