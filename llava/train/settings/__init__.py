"""The settings of a run: flags and YAML, their types, ranges and contradictions, and the names of older releases."""
