"""One correction per method: what it needs of a step, when it is active, and what it changes."""
