"""The run folder, checkpoints, metrics, and the session that a loop trains in."""
