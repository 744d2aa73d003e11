"""Gradients through the host's models in inference mode, and decoders for safety functions."""
