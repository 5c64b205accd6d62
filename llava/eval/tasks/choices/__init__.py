"""Benchmarks that ask for one of several options, or for yes or no."""
