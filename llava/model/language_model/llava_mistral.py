"""LLaVA on Mistral."""

from __future__ import annotations

from torch import nn
from transformers import MistralConfig, MistralForCausalLM, MistralModel

from llava.model.language_model.config import LlavaConfigMixin
from llava.model.llava_arch import LlavaMetaForCausalLM, LlavaMetaModel


class LlavaMistralConfig(LlavaConfigMixin, MistralConfig):
    """MistralConfig with LLaVA's mm_* keys and `reduction`."""

    model_type = "llava_mistral"


class LlavaMistralModel(LlavaMetaModel, MistralModel):
    """Mistral's layers with vision modules."""

    config_class = LlavaMistralConfig


class LlavaMistralForCausalLM(LlavaMetaForCausalLM, MistralForCausalLM):
    """LLaVA with Mistral as its language model."""

    config_class = LlavaMistralConfig
    has_plain_head = True

    def __init__(self, config: LlavaMistralConfig) -> None:
        # Past MistralForCausalLM's own constructor, which would build the layers a second time.
        super(MistralForCausalLM, self).__init__(config)
        self.model = LlavaMistralModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
