"""Train and serve LLaVA-style models with fewer visual tokens."""

__version__ = "0.1.0"
