"""Studies behind the fidelity pages in docs/, one command each."""
