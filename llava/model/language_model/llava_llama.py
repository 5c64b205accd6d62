"""LLaVA on Llama and Vicuna."""

from __future__ import annotations

from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from llava.model.language_model.config import LlavaConfigMixin
from llava.model.llava_arch import LlavaMetaForCausalLM, LlavaMetaModel


class LlavaLlamaConfig(LlavaConfigMixin, LlamaConfig):
    """LlamaConfig with LLaVA's mm_* keys and `reduction`."""

    model_type = "llava_llama"


class LlavaLlamaModel(LlavaMetaModel, LlamaModel):
    """Llama's layers with vision modules."""

    config_class = LlavaLlamaConfig


class LlavaLlamaForCausalLM(LlavaMetaForCausalLM, LlamaForCausalLM):
    """LLaVA with Llama as its language model."""

    config_class = LlavaLlamaConfig
    has_plain_head = True
    older_model_types = ("llava",)  # what releases before v1.5 wrote

    def __init__(self, config: LlavaLlamaConfig) -> None:
        # Past LlamaForCausalLM's own constructor, which would build the layers a second time.
        super(LlamaForCausalLM, self).__init__(config)
        self.model = LlavaLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


LlavaConfig = LlavaLlamaConfig
"""LLaVA's name of it."""
