"""The demo world: its renderer and the networks of its bundled model, for nodes, evaluation and tools."""
