"""Benchmarks whose questions want a word or a phrase, compared with right answers."""
