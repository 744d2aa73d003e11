"""Model folders, encoded negation sets and their cache, safety models, the bundled demo model."""
