"""Which LLaVA class a config's `model_type` stands for; all are made known to transformers' Auto classes."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM

from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaConfig, LlavaLlamaForCausalLM
from llava.model.language_model.llava_mistral import LlavaMistralConfig, LlavaMistralForCausalLM
from llava.model.language_model.llava_qwen import (
    LlavaQwen2Config,
    LlavaQwen2ForCausalLM,
    LlavaQwen3Config,
    LlavaQwen3ForCausalLM,
    LlavaQwenConfig,
    LlavaQwenForCausalLM,
)

_BACKBONES: tuple[Any, ...] = (
    LlavaLlamaForCausalLM,
    LlavaMistralForCausalLM,
    LlavaQwen2ForCausalLM,
    LlavaQwen3ForCausalLM,
)
_CLASSES: dict[str, Any] = {name: cls for cls in _BACKBONES for name in cls.model_types()}

for _cls in _BACKBONES:
    AutoConfig.register(_cls.config_class.model_type, _cls.config_class)
    AutoModelForCausalLM.register(_cls.config_class, _cls)


def llava_class_for(model_type: str) -> Any:
    """The LLaVA class for a config's `model_type`, that of a language model or of a LLaVA checkpoint.

    Raises:
        ValueError: no LLaVA exists on this kind of language model.
    """
    if model_type not in _CLASSES:
        raise ValueError(
            f"no LLaVA on a language model of model_type {model_type!r}; known: {', '.join(sorted(_CLASSES))}"
        )
    return _CLASSES[model_type]


__all__ = [
    "LlavaConfig",
    "LlavaLlamaConfig",
    "LlavaLlamaForCausalLM",
    "LlavaMistralConfig",
    "LlavaMistralForCausalLM",
    "LlavaQwen2Config",
    "LlavaQwen2ForCausalLM",
    "LlavaQwen3Config",
    "LlavaQwen3ForCausalLM",
    "LlavaQwenConfig",
    "LlavaQwenForCausalLM",
    "llava_class_for",
]
