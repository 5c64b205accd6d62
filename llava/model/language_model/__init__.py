"""LLaVA's language models: thin subclasses of transformers' own, a file a family, and what runs their layers."""
