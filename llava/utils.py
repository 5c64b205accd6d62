"""Names of LLaVA's module of this name that its programs import."""

from __future__ import annotations


def disable_torch_init() -> None:
    """Do nothing: LLaVA's programs call it to save time, and transformers draws no weight that a checkpoint fills."""
