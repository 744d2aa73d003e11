"""Cost of each method beside the plain KSampler, in one process."""
