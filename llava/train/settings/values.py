"""What a single setting may be: the range of each number, paths, and words that YAML reads as something else."""

from __future__ import annotations

import json
import math
import os
from argparse import Action
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava.data.sources import is_url
from llava.reduction.options import Within
from llava.train.settings.problems import Problems

NO_WORDS = ("false", "no", "off")
"""What YAML's `no` becomes on its way through a boolean, and its like."""
NOTHING_WORDS = (*NO_WORDS, "none", "null", "")
LONGEST_NAME = 255  # bytes of a file's name, on the usual file systems


# Numbers ---------------------------------------------------------------------------------------------------------


COUNT, NOT_NEGATIVE, POSITIVE = Within(1), Within(0), Within(0, excludes_least=True)
FRACTION, SEED = Within(0, 1, excludes_most=True), Within(0, 2**32 - 1)

RANGES = {
    **dict.fromkeys(
        (
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "eval_accumulation_steps",
            "model_max_length",
            "lora_r",
            "lora_alpha",
            "shuffle_buffer_size",
            "num_frames",
            "max_frames",
            "dataloader_prefetch_factor",
            "torch_empty_cache_steps",
            "ddp_timeout",
            "ddp_bucket_cap_mb",
        ),
        COUNT,
    ),
    **dict.fromkeys(
        (
            "learning_rate",
            "mm_projector_lr",
            "mm_vision_tower_lr",
            "weight_decay",
            "max_grad_norm",
            "warmup_steps",
            "eval_delay",
            "neftune_noise_alpha",
            "dataloader_num_workers",
            "global_batch_size",
            "image_tokens_estimate",
            "preflight_seconds",
            "save_total_limit",
            "stop_after_nonfinite_steps",
            "tokens_per_batch",
        ),
        NOT_NEGATIVE,
    ),
    **dict.fromkeys(("num_train_epochs", "adam_epsilon"), POSITIVE),
    **dict.fromkeys(
        ("adam_beta1", "adam_beta2", "lora_dropout", "warmup_ratio", "label_smoothing_factor"),
        FRACTION,
    ),
    **dict.fromkeys(("seed", "data_seed"), SEED),
}
INTERVALS = {"logging_steps": "logging_strategy", "save_steps": "save_strategy", "eval_steps": "eval_strategy"}
"""Steps between two events, or a part of all steps; and the strategy that makes them count."""


def check_numbers(values: Mapping[str, Any], problems: Problems) -> None:
    """Note every number that no run can have.

    Args:
        values: settings by flag name; what is missing or None is left to its default.
        problems: gets a sentence for each.
    """
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if not math.isfinite(value):
            problems.add(f"--{name} {value}: expected a finite number")
        elif name in RANGES and value not in RANGES[name]:
            problems.add(f"--{name} {value}: expected a number {RANGES[name]}")
        elif name == "max_steps" and value < 1 and value != -1:
            problems.add(f"--max_steps {value}: expected at least 1, or -1 to train for --num_train_epochs")
        elif name in INTERVALS and str(values.get(INTERVALS[name], "steps")) == "steps":
            _check_interval(name, value, problems)


def _check_interval(name: str, value: float, problems: Problems) -> None:
    if value <= 0 or (value > 1 and value != int(value)):
        problems.add(f"--{name} {value}: expected a whole number of steps, or a part of all steps between 0 and 1")


# Paths -----------------------------------------------------------------------------------------------------------

PATHS = (
    "cache_dir",
    "deepspeed",
    "feature_cache",
    "fsdp_config",
    "image_folder",
    "lora_weight_path",
    "model_name_or_path",
    "output_dir",
    "pretrain_mm_mlp_adapter",
    "resume_from_checkpoint",
    "video_folder",
    "video_tower",
    "vision_tower",
)
HOLDS_JSON = ("deepspeed", "fsdp_config")  # path of a file, or its content
JSON_FLAGS = (
    "accelerator_config",
    "activation_checkpointing_kwargs",
    "gradient_checkpointing_kwargs",
    "lr_scheduler_kwargs",
)


def read_path(flag: str, text: str) -> str:
    """A path as it is meant, `~` written out; a URL or a hub's name stays as it is.

    Args:
        flag: as the error names it, e.g. "--output_dir".
        text: as it was given.

    Raises:
        ValueError: no shell has replaced its variables, it is a list, or no file system can have it.
    """
    if "\0" in text or "\n" in text or any(len(os.fsencode(part)) > LONGEST_NAME for part in text.split("/")):
        raise ValueError(f"{flag} {text[:80]!r}: no file system takes such a name")
    if is_url(text):
        return text
    path = os.path.expanduser(text)  # noqa: PTH111 (it leaves an unknown user as it is, and a URL's slashes)
    if path.startswith("~"):
        raise ValueError(f"{flag} {text}: there is no such user on this machine; write the folder itself")
    if "$" in path and not Path(path).exists():
        raise ValueError(
            f"{flag} {text}: no shell replaces variables here; write the path itself, or in YAML ${{oc.env:NAME}}"
        )
    if path[:1] in ("[", "{") and not Path(path).exists():
        raise ValueError(f"{flag} {text}: expected one path")
    return path


# Words -----------------------------------------------------------------------------------------------------------


def plain_text(action: Action, text: str) -> str | None:
    """The text of a flag as its type reads it; None for "not given".

    YAML reads `no` as a boolean and 1e3 as a fraction; here they are a choice and a whole number again.

    Args:
        action: of the parser.
        text: as it was given.

    Raises:
        ValueError: a path that cannot be one, or broken JSON.
    """
    name = action.dest
    if action.type is int:
        return _whole_number(text)
    if name in PATHS and not (name in HOLDS_JSON and text.lstrip().startswith("{")):
        return _path_text(name, text)
    if name in JSON_FLAGS:
        return _json_text(name, text)
    if name == "packing" and text.lower() == "auto":
        return None
    if text.lower() in NO_WORDS:
        choices = [*(action.choices or ())]
        if "no" in choices:
            return "no"
        return "none" if name in ("lora_bias", "report_to", "reduction") else text
    return text


def _whole_number(text: str) -> str:
    """1e3 and 1000.0 as 1000; what is no whole number stays for the parser to refuse."""
    try:
        return str(int(text))
    except ValueError:
        pass
    try:
        number = float(text)
    except ValueError:
        return text
    return str(int(number)) if number.is_integer() else text


def _path_text(name: str, text: str) -> str | None:
    if text.lower() in NOTHING_WORDS and name != "resume_from_checkpoint":
        return None
    if text.lower() == "true" and name != "resume_from_checkpoint":
        raise ValueError(f"--{name} {text}: expected a path")
    return read_path(f"--{name}", text)


def _json_text(name: str, text: str) -> str | None:
    if text.lower() in NOTHING_WORDS:
        return None
    if (
        name == "accelerator_config"
        and not text.lstrip().startswith("{")
        and Path(read_path(f"--{name}", text)).is_file()
    ):
        return text
    try:
        is_object = isinstance(json.loads(text), dict)
    except ValueError as error:
        raise ValueError(f"--{name} {text}: not valid JSON: {error}") from error
    if not is_object:
        raise ValueError(f"--{name} {text}: expected a JSON object")
    return text
