"""From a command line to checked arguments: what can be refused is refused before any weight is read."""

from __future__ import annotations

import dataclasses
import difflib
import logging
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NoReturn

from transformers import HfArgumentParser

from llava.train.arguments import (
    DataArguments,
    ModelArguments,
    TrainingArguments,
    check_training,
    read_deepspeed_config,
    require_package,
    split_names,
    zero_stage,
)
from llava.train.legacy import translate_legacy

logger = logging.getLogger(__name__)

GROUPS = (ModelArguments, DataArguments, TrainingArguments)


@dataclass(frozen=True)
class Arguments:
    """The settings of a run.

    Attributes:
        model: what is trained.
        data: what it is trained on.
        training: how it is trained.
        given: flags that differ from their defaults, as they were given.
    """

    model: ModelArguments
    data: DataArguments
    training: TrainingArguments
    given: dict[str, Any]


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def flag_names() -> list[str]:
    """Names of all flags, sorted."""
    return sorted({f.name for group in GROUPS for f in dataclasses.fields(group) if f.init})


def parse_args(argv: list[str]) -> Arguments:
    """Read LLaVA's and transformers' flags.

    Args:
        argv: `--name value` or `--name=value`; of a flag given twice the last counts.

    Raises:
        ValueError: an unknown flag, a value that does not fit, settings that contradict each other, a missing
            file or package.
    """
    values, given = _parse(argv)
    return Arguments(
        ModelArguments(**_values_of(ModelArguments, values)),
        DataArguments(**_values_of(DataArguments, values)),
        TrainingArguments(**_values_of(TrainingArguments, values)),
        given,
    )


def check_args(argv: list[str]) -> None:
    """Refuse what `parse_args` would refuse, without starting what belongs to a run (process groups, devices)."""
    values, _ = _parse(argv)
    ModelArguments(**_values_of(ModelArguments, values))
    DataArguments(**_values_of(DataArguments, values))
    check_training(SimpleNamespace(**values))


def _parse(argv: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """All settings by flag name, and those that differ from their defaults; checked against each other."""
    parser = _Parser(GROUPS, allow_abbrev=False, description="Train LLaVA.")
    names = flag_names()
    namespace, unknown = parser.parse_known_args(translate_legacy(argv, names))
    if unknown:
        flags = [word for word in unknown if word.startswith("--")]
        raise ValueError(unknown_names_message("flag", flags or unknown, names))
    values = vars(namespace)
    check_contradictions(values)
    check_packages(values)
    warn_of_unused(values)
    given = {k: v for k, v in values.items() if v != parser.get_default(k) and k != "local_rank"}
    return values, given


def to_flags(values: dict[str, Any]) -> list[str]:
    """Settings as a command line for `parse_args`; None stands for a flag's default and is left out."""
    return [f"--{name}={value}" for name, value in values.items() if value is not None]


def resolved(arguments: Arguments) -> dict[str, Any]:
    """All settings of a run by flag name, defaults filled in, as plain data."""
    training = arguments.training.to_dict()
    return {**dataclasses.asdict(arguments.model), **dataclasses.asdict(arguments.data), **training}


def unknown_names_message(kind: str, unknown: Iterable[str], known: Collection[str]) -> str:
    """An error text that lists unknown names, each with the known names that resemble it."""
    parts = []
    for word in unknown:
        name = word.removeprefix("--").partition("=")[0].replace("-", "_")
        near = difflib.get_close_matches(name, known, n=3)
        parts.append(f"{word!r}" + (f" (did you mean {', '.join(near)}?)" if near else ""))
    return f"unknown {kind}: {'; '.join(parts)}"


def check_contradictions(values: dict[str, Any]) -> None:
    """Raise a ValueError that names two settings which cannot both be meant.

    Args:
        values: all settings by flag name, of the types that the parser gives.
    """
    lora, projector_only = values["lora_enable"], values["tune_mm_mlp_adapter"]
    quantized = values["bits"] in (4, 8)
    zero3 = zero_stage(values["deepspeed"]) == 3
    frozen_projector = values["freeze_mm_mlp_adapter"]
    tower = values["unfreeze_mm_vision_tower"]
    grouped = values["group_by_modality_length"]
    rules = {
        "--bits 4 or 8 freezes the language model: add --lora_enable True to train adapters": (quantized and not lora),
        "--bits 4 or 8 does not go with ZeRO-3, which cannot split such weights: use scripts/zero2.json": (
            quantized and zero3
        ),
        "--tune_mm_mlp_adapter trains the projector only, --lora_enable the language model: leave one out": (
            projector_only and lora
        ),
        "--tune_mm_mlp_adapter trains the projector, --freeze_mm_mlp_adapter freezes it: leave one out": (
            projector_only and frozen_projector
        ),
        "--tune_mm_mlp_adapter saves the projector only: --unfreeze_mm_vision_tower trains for nothing": (
            projector_only and tower
        ),
        "--lora_weight_path has no effect without --lora_enable True": (values["lora_weight_path"] and not lora),
        "--mm_projector_lr has no effect on a projector that --freeze_mm_mlp_adapter freezes": (
            values["mm_projector_lr"] is not None and frozen_projector
        ),
        "--mm_vision_tower_lr has no effect without --unfreeze_mm_vision_tower True": (
            values["mm_vision_tower_lr"] is not None and not tower
        ),
        "--fp16 and --bf16 exclude each other": values["fp16"] and values["bf16"],
        "--group_by_modality_length and --train_sampling_strategy both choose the order: leave one out": (
            grouped and values["train_sampling_strategy"] != "random"
        ),
        "--global_batch_size derives --gradient_accumulation_steps: leave that out, or set --global_batch_size 0": (
            values["global_batch_size"] and values["gradient_accumulation_steps"] != 1
        ),
        "--packing needs flash_attention_2 or sdpa: leave out --attn_implementation eager": (
            values["packing"] and values["attn_implementation"] == "eager"
        ),
        "--fsdp saves whole models only: use --deepspeed for LoRA or projector runs": (
            values["fsdp"] and (lora or projector_only)
        ),
    }
    for message, broken in rules.items():
        if broken:
            raise ValueError(message)


def warn_of_unused(values: dict[str, Any]) -> None:
    """Log a warning for a setting that has no effect."""
    norm, config = values["max_grad_norm"], values["deepspeed"]
    unusual = norm != TrainingArguments.max_grad_norm
    if config and unusual and "gradient_clipping" not in read_deepspeed_config(config):
        logger.warning(
            '--max_grad_norm %s has no effect: %s has no "gradient_clipping"; add "gradient_clipping": "auto"',
            norm,
            config,
        )


def check_packages(values: dict[str, Any]) -> None:
    """Raise a ValueError that names the extra to install where a setting needs a package that is missing."""
    if values["bits"] in (4, 8):
        require_package("bitsandbytes", f"--bits {values['bits']}")
    if values["deepspeed"]:
        require_package("deepspeed", "--deepspeed")
    if values["attn_implementation"] == "flash_attention_2":
        require_package("flash_attn", "--attn_implementation flash_attention_2")
    for tracker in ("wandb", "tensorboard"):
        if tracker in split_names(values["report_to"] or ""):
            require_package(tracker, f"--report_to {tracker}")


def _values_of(group: type, values: dict[str, Any]) -> dict[str, Any]:
    return {f.name: values[f.name] for f in dataclasses.fields(group) if f.init}
