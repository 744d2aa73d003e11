"""The sampling engine: the correction interface, the state of a run, the host's hooks, traces and node messages."""
