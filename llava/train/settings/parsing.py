"""From a command line to checked arguments: what can be refused is refused before any weight is read."""

from __future__ import annotations

import dataclasses
import difflib
import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, NoReturn

from transformers import HfArgumentParser

from llava.train.settings.arguments import (
    DataArguments,
    ModelArguments,
    TrainingArguments,
    check_training,
    read_deepspeed_config,
    require_package,
    split_names,
    zero_stage,
)
from llava.train.settings.legacy import name_and_value, split_flags, translate_legacy
from llava.train.settings.problems import Problems
from llava.train.settings.values import plain_text

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
        SettingsError: unknown flags, values that do not fit, settings that contradict each other, missing files
            and packages: all of them.
    """
    checked = check_args(argv)
    values: dict[str, Any] = {**vars(checked.training)}
    return replace(checked, training=TrainingArguments(**_values_of(TrainingArguments, values)))


def check_args(argv: list[str]) -> Arguments:
    """Refuse what `parse_args` would refuse, without starting what belongs to a run (process groups, devices).

    Returns:
        The settings, those of `TrainingArguments` as they were given, in an object without its methods.

    Raises:
        SettingsError: with all problems of the settings.
    """
    problems = Problems()
    parser = _Parser(GROUPS, allow_abbrev=False, description="Train LLaVA.")
    values, unread = _read_values(parser, argv, problems)
    model = problems.check(ModelArguments, **_values_of(ModelArguments, values))
    data = problems.check(DataArguments, **_values_of(DataArguments, values))
    training: Any = SimpleNamespace(**values)
    problems.check(check_training, training)
    check_contradictions(values, problems)
    check_packages(values, problems)
    problems.drop(f"--{name} is missing" for name in unread)
    problems.raise_all()
    warn_of_unused(values)
    given = {k: v for k, v in values.items() if v != parser.get_default(k) and k != "local_rank"}
    return Arguments(model, data, training, given)


def _read_values(parser: HfArgumentParser, argv: list[str], problems: Problems) -> tuple[dict[str, Any], list[str]]:
    """All settings by flag name, each read for itself; and the names of those that cannot be, which are noted."""
    names = flag_names()
    actions = {option: action for action in parser._actions for option in action.option_strings}
    readable: list[str] = []
    unread: list[str] = []
    unknown: list[str] = []
    for words in split_flags(translate_legacy(argv, names)):
        unread.append(name_and_value(words)[0])
        with problems.catch():
            plain = _plain_words(actions, words)
            if not plain:  # what was given before is not meant either
                readable = [word for word in readable if not word.startswith(f"--{name_and_value(words)[0]}=")]
            left = parser.parse_known_args(plain)[1]
            readable += plain if not left else []
            unknown += [word for word in left if word.startswith("--")] or left
            unread.pop()
    if unknown:
        problems.add(unknown_names_message("flag", unknown, names))
    return vars(parser.parse_args(readable)), unread


def _plain_words(actions: Mapping[str, Any], words: list[str]) -> list[str]:
    """A flag with its value as its type reads it; nothing where the value says "not given"."""
    name, value = name_and_value(words)
    action = actions.get(f"--{name}")
    if action is None or action.nargs in (0, "+") or (len(words) == 1 and "=" not in words[0]):
        return words
    text = plain_text(action, value)
    return [] if text is None else [f"--{name}={text}"]


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


def check_contradictions(values: dict[str, Any], problems: Problems) -> None:
    """Note every two settings which cannot both be meant.

    Args:
        values: all settings by flag name, of the types that the parser gives.
        problems: gets a sentence for each.
    """
    zero3 = problems.check(zero_stage, values["deepspeed"]) == 3
    for message, broken in (_rules_of_training(values, zero3) | _rules_of_data(values)).items():
        if broken:
            problems.add(message)


def _rules_of_training(values: dict[str, Any], zero3: bool) -> dict[str, Any]:
    """What learns and how: for each sentence whether it is to be said."""
    lora, projector_only = values["lora_enable"], values["tune_mm_mlp_adapter"]
    quantized = values["bits"] in (4, 8)
    frozen_projector = values["freeze_mm_mlp_adapter"]
    tower = values["unfreeze_mm_vision_tower"]
    return {
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
        "--learning_rate 0 trains nothing: give a rate, or one for the projector with --mm_projector_lr": (
            not values["learning_rate"] and not values["mm_projector_lr"] and not values["mm_vision_tower_lr"]
        ),
        "--load_best_model_at_end and --save_strategy best need evaluations, which a training run does not make: "
        "leave them out, and use llava eval on its checkpoints": (
            values["load_best_model_at_end"] or str(values["save_strategy"]) == "best"
        ),
        f"--eval_strategy {values['eval_strategy']}: a training run has no data to evaluate on: leave it out, and use "
        "llava eval on its checkpoints": str(values["eval_strategy"]) != "no",
        "--fp16 and --bf16 exclude each other": values["fp16"] and values["bf16"],
        "--fsdp saves whole models only: use --deepspeed for LoRA or projector runs": (
            values["fsdp"] and (lora or projector_only)
        ),
    }


def _rules_of_data(values: dict[str, Any]) -> dict[str, Any]:
    """What is read, and in which batches: for each sentence whether it is to be said."""
    tower, grouped = values["unfreeze_mm_vision_tower"], values["group_by_modality_length"]
    budget = values["tokens_per_batch"]
    return {
        "--dataloader_prefetch_factor has no effect without --dataloader_num_workers: leave it out": (
            values["dataloader_prefetch_factor"] is not None and not values["dataloader_num_workers"]
        ),
        "--group_by_modality_length and --train_sampling_strategy both choose the order: leave one out": (
            grouped and values["train_sampling_strategy"] != "random"
        ),
        "--streaming has no end: say with --max_steps how long to train": (
            values["streaming"] and values["max_steps"] <= 0
        ),
        "--streaming knows no lengths, so --group_by_modality_length cannot sort by them: leave one out": (
            values["streaming"] and grouped
        ),
        "--streaming has an order of its own, so --train_sampling_strategy has no effect: leave one out": (
            values["streaming"] and values["train_sampling_strategy"] != "random"
        ),
        "--global_batch_size derives --gradient_accumulation_steps: leave that out, or set --global_batch_size 0": (
            values["global_batch_size"] and values["gradient_accumulation_steps"] != 1
        ),
        "--label_smoothing_factor does not go with images, which make rows longer than their labels: leave it out": (
            values["label_smoothing_factor"]
        ),
        "--dataloader_persistent_workers needs --dataloader_num_workers above 0: leave it out": (
            values["dataloader_persistent_workers"] and not values["dataloader_num_workers"]
        ),
        "--packing needs flash_attention_2 or sdpa: leave out --attn_implementation eager": (
            values["packing"] and values["attn_implementation"] == "eager"
        ),
        "--tokens_per_batch fills rows without padding, which needs packing: leave out --packing False and "
        "--attn_implementation eager": (
            budget and (values["packing"] is False or values["attn_implementation"] == "eager")
        ),
        f"--tokens_per_batch {budget} is less than --model_max_length {values['model_max_length']}, which a sample may "
        "have: raise the one or lower the other": 0 < budget < values["model_max_length"],
        "--tokens_per_batch fixes the tokens of a step, --global_batch_size its samples: set --global_batch_size 0 and "
        "choose --gradient_accumulation_steps": budget and values["global_batch_size"],
        "--streaming knows no lengths, so --tokens_per_batch cannot fill rows by them: leave one out": (
            budget and values["streaming"]
        ),
        "--tokens_per_batch and --train_sampling_strategy both choose the order: leave one out": (
            budget and values["train_sampling_strategy"] != "random"
        ),
        "--image_tokens_estimate has no effect without --tokens_per_batch": (
            values["image_tokens_estimate"] and not budget
        ),
        "--feature_cache holds what a frozen vision tower made: leave it out with --unfreeze_mm_vision_tower True": (
            values["feature_cache"] and tower
        ),
        "--feature_cache holds all images of the data, and --streaming is for data that no disk holds: leave one out": (
            values["feature_cache"] and values["streaming"]
        ),
    }


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


def check_packages(values: dict[str, Any], problems: Problems) -> None:
    """Note the extra to install where a setting needs a package that is missing."""
    needs = {
        "bitsandbytes": values["bits"] in (4, 8) and f"--bits {values['bits']}",
        "deepspeed": values["deepspeed"] and "--deepspeed",
        "flash_attn": values["attn_implementation"] == "flash_attention_2"
        and "--attn_implementation flash_attention_2",
    }
    trackers = problems.check(split_names, values["report_to"] or "") or ()
    needs |= {name: f"--report_to {name}" for name in ("wandb", "tensorboard") if name in trackers}
    for package, wanted_by in needs.items():
        if wanted_by:
            problems.check(require_package, package, wanted_by)


def _values_of(group: type, values: dict[str, Any]) -> dict[str, Any]:
    return {f.name: values[f.name] for f in dataclasses.fields(group) if f.init}
