"""Sampling engine: the correction interface, sampling runs, the host's hooks, two-pass sampling, traces and messages."""
