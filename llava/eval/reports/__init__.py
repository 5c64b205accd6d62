"""The papers' tables as data, and runs of `llava eval` beside them: `llava report`."""
