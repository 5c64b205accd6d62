"""The model that is timed: a checkpoint, or one with random weights and the sizes of a known one."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from llava.cost.bench.workload import StandInWords, stand_in_tokenizer
from llava.cost.sizes import open_model
from llava.files import ADAPTER_CONFIG
from llava.model.builder import load_pretrained_model
from llava.model.weights import weight_files
from llava.reduction.base import Reducers
from llava.reduction.budget import ModelShape
from llava.reduction.config import ReductionConfig

logger = logging.getLogger(__name__)


@dataclass
class Method:
    """A method with the modules that it needs, to be put into the model.

    Attributes:
        name: as the user gave it.
        reduction: what it is.
        reducers: made of it.
        projector: modules between the tower and the language model.
    """

    name: str
    reduction: ReductionConfig
    reducers: Reducers
    projector: dict[str, nn.Module]


class Subject:
    """A model that takes several methods in turn.

    Args:
        model: LLaVA's, in eval mode.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.optimizer: torch.optim.Optimizer | None = None

    def prepare(self, name: str, reduction: ReductionConfig) -> Method:
        """Give the model a method, with a new projector where it needs another one.

        Raises:
            ValueError: the method does not suit the model.
        """
        inner = self.model.get_model()
        if not reduction.projector and ReductionConfig.of_model(self.model.config).projector:
            self.model.config.reduction = {}
        inner.set_reduction(reduction)
        return Method(name, reduction, inner.reducers(), inner.projector_modules())

    def learn(self, trains: str, methods: Iterable[Method], rank: int = 128) -> None:
        """Prepare the model for training as the recipes do, with gradient checkpointing; the tower stays frozen.

        Args:
            trains: "all", projector and language model; or "lora", projector and adapters on the language model.
            methods: whose projectors learn.
            rank: of the adapters.
        """
        model = self.model.requires_grad_(False).train()
        if trains == "lora":
            layers = model.get_model().layers
            names = {name.rpartition(".")[2] for name, part in layers.named_modules() if isinstance(part, nn.Linear)}
            targets = rf"model\.layers\..*\.({'|'.join(sorted(names))})"
            get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))
        else:
            model.get_model().layers.requires_grad_(True)
            model.lm_head.requires_grad_(True)
        projectors = [module for method in methods for module in method.projector.values()]
        for module in projectors:
            module.requires_grad_(True)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        parameters = {*model.parameters(), *(p for module in projectors for p in module.parameters())}
        self.optimizer = torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=1e-5)

    def use(self, method: Method) -> None:
        """Put a method that was prepared into the model."""
        inner = self.model.get_model()
        inner._set_projector(method.projector)
        self.model.config.reduction = method.reduction.to_dict()
        inner._set_reducers(method.reducers)


def open_subject(
    model: str,
    reductions: Iterable[ReductionConfig],
    device: torch.device,
    dtype: torch.dtype,
    attention: str | None = None,
    vision_tower: str | None = None,
) -> Subject:
    """The model to be timed.

    Args:
        model: a checkpoint; or a config.json, or a name of `llava.cost.presets`, for random weights.
        reductions: methods that it is to take, one after another.
        device, dtype: where and in what it runs.
        attention: eager, sdpa or flash_attention_2; None: transformers' choice.
        vision_tower: folder in place of the config's.

    Raises:
        ValueError: it can't be opened.
    """
    if (Path(model) / ADAPTER_CONFIG).is_file():
        raise ValueError(f"{model} is a LoRA adapter, which holds no whole model to time: llava merge it first")
    text = next((one for one in reductions if one.build_all(ModelShape()).needs.clip_text), None)
    if Path(model).is_dir() and weight_files(Path(model)):
        reduction = None if text is None else text.to_dict()
        _, opened, _, _ = load_pretrained_model(
            model,
            device=device,
            dtype=dtype,
            vision_tower=vision_tower,
            attn_implementation=attention,
            reduction=reduction,
        )
        return Subject(opened)
    logger.info("%s: no weights there, they are drawn at random", model)
    return Subject(_random_model(model, text, device, dtype, attention, vision_tower))


def _random_model(
    model: str,
    text: ReductionConfig | None,
    device: torch.device,
    dtype: torch.dtype,
    attention: str | None,
    vision_tower: str | None,
) -> Any:
    planned = open_model(model, vision_tower)
    config = type(planned.config).from_dict(planned.config.to_dict())
    config.reduction = {} if text is None else text.to_dict()
    if attention is not None:
        config._attn_implementation = attention
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            made = type(planned)(config).eval()
    finally:
        torch.set_default_dtype(before)
    made.tokenizer = StandInWords(made.config.vocab_size)
    tower = made.get_model().get_vision_tower()
    if tower.text_tower is not None:
        tower.text_tower._tokenizer = stand_in_tokenizer(tower.text_tower.config.vocab_size)
    return made
