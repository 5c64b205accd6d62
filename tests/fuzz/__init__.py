"""Random settings, data, checkpoints, places and signals against real commands on the tiny world.

`python -m tests.fuzz --minutes 10 --seed 1` runs it; CONTRIBUTING.md says how to read what it finds.
"""
