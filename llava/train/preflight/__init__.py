"""Checks of a run before it costs anything: its data, its checkpoints, its memory and its disk."""
