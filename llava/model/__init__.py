"""The model; LLaVA's classes by the names under which its programs import them from here."""

import importlib
from typing import Any

# Imported when they are asked for: modules below this package are imported without all language models.
__all__ = [
    "LlavaConfig",
    "LlavaLlamaForCausalLM",
    "LlavaMistralConfig",
    "LlavaMistralForCausalLM",
    "LlavaQwenConfig",
    "LlavaQwenForCausalLM",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.language_model.families"), name)
