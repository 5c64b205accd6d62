"""LLaVA's language models: thin subclasses of transformers' own, one a family."""

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

# Language model's own model_type -> LLaVA on it.
_BACKBONES: dict[str, Any] = {
    "llama": LlavaLlamaForCausalLM,
    "mistral": LlavaMistralForCausalLM,
    "qwen2": LlavaQwen2ForCausalLM,
    "qwen3": LlavaQwen3ForCausalLM,
}
_CLASSES: dict[str, Any] = {
    **_BACKBONES,
    **{cls.config_class.model_type: cls for cls in _BACKBONES.values()},
    "llava": LlavaLlamaForCausalLM,  # what releases before v1.5 wrote
}

for _cls in _BACKBONES.values():
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
