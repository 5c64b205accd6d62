"""The llava-hf layouts of transformers: opened, written, and turned back into LLaVA's."""
