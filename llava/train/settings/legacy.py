"""Flags of LLaVA's and its forks' launch commands, in today's words.

Those commands carry flags that transformers 5 renamed or dropped, and some name their method by one of their own. A
flag is translated only where it is not known as it stands.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass

from llava.reduction.config import trim_flag
from llava.reduction.released import M3_KEY, MQT_KEY, MQT_TYPE_KEY, TRIM_KEY, m3_method, mqt_method

logger = logging.getLogger(__name__)

TRUE_WORDS = ("true", "yes", "t", "y", "1", "")


@dataclass(frozen=True)
class Legacy:
    """What became of a flag.

    Attributes:
        flag: its name today; None where it is gone.
        value: turns the old value into the new one; None from it drops the flag.
        note: what the log says where the flag is dropped.
    """

    flag: str | None = None
    value: Callable[[str], str | None] = str
    note: str = "transformers dropped it"


def _if_true(value: str) -> Callable[[str], str | None]:
    return lambda text: value if text.lower() in TRUE_WORDS else None


LEGACY_FLAGS: dict[str, Legacy] = {
    TRIM_KEY: Legacy("reduction", trim_flag),
    M3_KEY: Legacy("reduction", lambda text: json.dumps(m3_method(text)) if text else None),
    MQT_KEY: Legacy("reduction", lambda text: json.dumps(mqt_method(text)) if text else None),
    MQT_TYPE_KEY: Legacy(note="num_visual_tokens names the method"),
    "tune_mm_query_abstractor": Legacy("tune_mm_mlp_adapter"),
    "pretrain_mm_query_abstractor": Legacy("pretrain_mm_mlp_adapter"),
    "image_tower": Legacy("vision_tower"),  # Video-LLaVA's
    "tokenizer_model_max_length": Legacy("model_max_length"),  # Video-LLaVA's, of a row with its visual tokens
    "evaluation_strategy": Legacy("eval_strategy"),
    "no_cuda": Legacy("use_cpu"),
    "per_gpu_train_batch_size": Legacy("per_device_train_batch_size"),
    "per_gpu_eval_batch_size": Legacy("per_device_eval_batch_size"),
    "group_by_length": Legacy("train_sampling_strategy", _if_true("group_by_length")),
    "adafactor": Legacy("optim", _if_true("adafactor")),
    "xpu_backend": Legacy("ddp_backend"),
    "push_to_hub_model_id": Legacy("hub_model_id"),
    "push_to_hub_token": Legacy("hub_token"),
    "dispatch_batches": Legacy("accelerator_config", lambda text: f'{{"dispatch_batches": {text.lower()}}}'),
    "split_batches": Legacy("accelerator_config", lambda text: f'{{"split_batches": {text.lower()}}}'),
    "save_safetensors": Legacy(note="weights are always written as safetensors"),
    "overwrite_output_dir": Legacy(note="a run goes on from output_dir/checkpoint-*; remove them to start afresh"),
    "logging_dir": Legacy(note="set the environment variable TENSORBOARD_LOGGING_DIR"),
    "half_precision_backend": Legacy(note="--bf16 and --fp16 choose by themselves"),
    "fp16_backend": Legacy(note="--bf16 and --fp16 choose by themselves"),
    "fp16_opt_level": Legacy(note="--bf16 and --fp16 choose by themselves"),
    "fsdp_min_num_params": Legacy(note="set it in --fsdp_config"),
    "fsdp_transformer_layer_cls_to_wrap": Legacy(note="set it in --fsdp_config"),
    **{
        name: Legacy()
        for name in (
            "ddp_bucket_view",
            "include_inputs_for_metrics",
            "include_tokens_per_second",
            "jit_mode_eval",
            "mp_parameters",
            "past_index",
            "push_to_hub_organization",
            "ray_scope",
            "sharded_ddp",
            "torchdynamo",
            "tpu_metrics_debug",
            "tpu_num_cores",
            "use_ipex",
            "use_legacy_prediction_loop",
            "use_mps_device",
        )
    },
}
# Values that were renamed: flag -> old value -> new value.
LEGACY_VALUES = {"optim": {"adamw_hf": "adamw_torch", "adamw_apex_fused": "adamw_torch_fused"}}


def translate_legacy(argv: list[str], known: Collection[str]) -> list[str]:
    """Rewrite a command line for the installed transformers, with a line of log for each change.

    Args:
        argv: flags as `--name value` or `--name=value`.
        known: names that are understood as they are.

    Returns:
        The command line; what is not legacy is untouched and in its place.
    """
    result: list[str] = []
    for words in split_flags(argv):
        name, value = name_and_value(words)
        legacy = LEGACY_FLAGS.get(name) if name not in known else None
        new_value = LEGACY_VALUES.get(name, {}).get(value)
        if legacy is not None:
            result += _translated(name, value, legacy)
        elif name == "data_path" and _names_several(words):
            result.append(f"--data_path={json.dumps(words[1:])}")  # as Video-LLaVA's commands name them
        elif new_value is not None:
            logger.info("--%s %s is called %s today", name, value, new_value)
            result.append(f"--{name}={new_value}")
        else:
            result += words
    return result


def _names_several(words: list[str]) -> bool:
    """Whether a flag's values are names of their own, rather than one text with commas or brackets that has spaces."""
    return len(words) > 2 and not any("," in word or word[0] in "[{" for word in words[1:] if word)


def _translated(name: str, value: str, legacy: Legacy) -> list[str]:
    if legacy.flag is None:
        logger.warning("--%s is ignored: %s", name, legacy.note)
        return []
    new_value = legacy.value(value)
    if new_value is None:
        return []
    logger.info("--%s %s is --%s %s today", name, value, legacy.flag, new_value)
    return [f"--{legacy.flag}={new_value}" if new_value else f"--{legacy.flag}"]


def split_flags(argv: list[str]) -> list[list[str]]:
    """The words of a command line, each flag with the values after it."""
    groups: list[list[str]] = []
    for word in argv:
        if word.startswith("--") or not groups or "=" in groups[-1][0]:
            groups.append([word])
        else:
            groups[-1].append(word)
    return groups


def name_and_value(words: list[str]) -> tuple[str, str]:
    """Name and value of a flag: those of `--name=value`, or of `--name value`."""
    flag, equals, value = words[0].partition("=")
    return flag.removeprefix("--").replace("-", "_"), value if equals else " ".join(words[1:])
