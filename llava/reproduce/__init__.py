"""A paper from the downloads to the report: what the steps of scripts/reproduce need, and running them in order."""
