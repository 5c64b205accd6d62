"""LLaVA on Qwen2 and Qwen3."""

from __future__ import annotations

from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Model, Qwen3Config, Qwen3ForCausalLM, Qwen3Model

from llava.model.llava_arch import LlavaMetaForCausalLM, LlavaMetaModel


class LlavaQwen2Config(Qwen2Config):
    """Qwen2Config with LLaVA's mm_* keys and `reduction`."""

    model_type = "llava_qwen"


class LlavaQwen2Model(LlavaMetaModel, Qwen2Model):
    """Qwen2's layers with vision modules."""

    config_class = LlavaQwen2Config


class LlavaQwen2ForCausalLM(LlavaMetaForCausalLM, Qwen2ForCausalLM):
    """LLaVA with Qwen2 as its language model."""

    config_class = LlavaQwen2Config

    def __init__(self, config: LlavaQwen2Config) -> None:
        # Past Qwen2ForCausalLM's own constructor, which would build the layers a second time.
        super(Qwen2ForCausalLM, self).__init__(config)
        self.model = LlavaQwen2Model(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class LlavaQwen3Config(Qwen3Config):
    """Qwen3Config with LLaVA's mm_* keys and `reduction`."""

    model_type = "llava_qwen3"


class LlavaQwen3Model(LlavaMetaModel, Qwen3Model):
    """Qwen3's layers with vision modules."""

    config_class = LlavaQwen3Config


class LlavaQwen3ForCausalLM(LlavaMetaForCausalLM, Qwen3ForCausalLM):
    """LLaVA with Qwen3 as its language model."""

    config_class = LlavaQwen3Config

    def __init__(self, config: LlavaQwen3Config) -> None:
        # Past Qwen3ForCausalLM's own constructor, which would build the layers a second time.
        super(Qwen3ForCausalLM, self).__init__(config)
        self.model = LlavaQwen3Model(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
