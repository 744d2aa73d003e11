"""What a user drags into a workflow: one file per family of nodes, without mathematics and without the host's internals."""
