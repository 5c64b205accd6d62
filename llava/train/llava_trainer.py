"""LLaVA's module of this name: the trainer, made as LLaVA's programs make it."""

from __future__ import annotations

from typing import Any

from llava.train import trainer
from llava.train.checkpoints.saving import RunKind


class LLaVATrainer(trainer.LLaVATrainer):
    """`llava.train.trainer.LLaVATrainer` that takes a tokenizer, and sees by itself what is trained.

    Args:
        model: a LLaVA model, or PEFT's wrapper of one.
        args: of `llava.train.settings.arguments.TrainingArguments`.
        tokenizer: of the language model; today's word is `processing_class`.
        kind: default: LoRA where the model is PEFT's, the projector where its config says `tune_mm_mlp_adapter`.
        kwargs: those of transformers' Trainer.
    """

    def __init__(
        self, model: Any = None, args: Any = None, *, tokenizer: Any = None, kind: RunKind | None = None, **kwargs: Any
    ) -> None:
        if tokenizer is not None:
            kwargs["processing_class"] = tokenizer
        super().__init__(kind=kind or _kind_of(model), model=model, args=args, **kwargs)


def _kind_of(model: Any) -> RunKind:
    if hasattr(model, "peft_config"):
        return RunKind.LORA
    return RunKind.PROJECTOR if getattr(model.config, "tune_mm_mlp_adapter", False) else RunKind.FULL
