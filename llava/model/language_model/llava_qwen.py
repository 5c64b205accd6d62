"""LLaVA on Qwen2 and Qwen3."""

from __future__ import annotations

from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Model, Qwen3Config, Qwen3ForCausalLM, Qwen3Model

from llava.model.language_model.config import LlavaConfigMixin
from llava.model.llava_arch import LlavaMetaForCausalLM, LlavaMetaModel


class LlavaQwenConfig(LlavaConfigMixin, Qwen2Config):
    """Qwen2Config with LLaVA's mm_* keys and `reduction`."""

    model_type = "llava_qwen"


class LlavaQwenModel(LlavaMetaModel, Qwen2Model):
    """Qwen2's layers with vision modules."""

    config_class = LlavaQwenConfig


class LlavaQwenForCausalLM(LlavaMetaForCausalLM, Qwen2ForCausalLM):
    """LLaVA with Qwen2 as its language model."""

    config_class = LlavaQwenConfig
    has_plain_head = True

    def __init__(self, config: LlavaQwenConfig) -> None:
        # Past Qwen2ForCausalLM's own constructor, which would build the layers a second time.
        super(Qwen2ForCausalLM, self).__init__(config)
        self.model = LlavaQwenModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class LlavaQwen3Config(LlavaConfigMixin, Qwen3Config):
    """Qwen3Config with LLaVA's mm_* keys and `reduction`."""

    model_type = "llava_qwen3"


class LlavaQwen3Model(LlavaMetaModel, Qwen3Model):
    """Qwen3's layers with vision modules."""

    config_class = LlavaQwen3Config


class LlavaQwen3ForCausalLM(LlavaMetaForCausalLM, Qwen3ForCausalLM):
    """LLaVA with Qwen3 as its language model."""

    config_class = LlavaQwen3Config
    has_plain_head = True

    def __init__(self, config: LlavaQwen3Config) -> None:
        # Past Qwen3ForCausalLM's own constructor, which would build the layers a second time.
        super(Qwen3ForCausalLM, self).__init__(config)
        self.model = LlavaQwen3Model(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


LlavaQwen2Config, LlavaQwen2ForCausalLM = LlavaQwenConfig, LlavaQwenForCausalLM
"""Names that tell Qwen2 from Qwen3; those without a number are LLaVA-NeXT's, and what config.json names."""
