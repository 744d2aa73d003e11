"""The demo world: its renderer and the small networks of its bundled model. Used by nodes, evaluation and tools."""
