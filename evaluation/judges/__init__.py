"""The judge of the demo world: its network, its weights, and the location of shapes."""
