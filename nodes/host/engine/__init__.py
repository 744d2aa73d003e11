"""Sampling engine: correction interface, runs, the host's hooks, two-pass sampling, traces, messages."""
