"""Benches: the cost of each method beside the plain KSampler, measured in one process."""
