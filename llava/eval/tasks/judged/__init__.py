"""Benchmarks with open questions, whose answers a model grades."""
