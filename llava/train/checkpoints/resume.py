"""Whether a checkpoint, and what else lies in `output_dir`, belongs to a run.

Each checkpoint keeps the settings that shape its run. A run that goes on from it must have the same: what differs is
named, and refused where the result would be neither run's, unless `--resume_changed` asks for it.
"""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import yaml

from llava.data.dataset import LazySupervisedDataset
from llava.files import ADAPTER_CONFIG, ADAPTER_FILES, NON_LORA_FILE, PROJECTOR_FILES
from llava.model.weights import WEIGHT_FILES
from llava.reduction import ReductionConfig
from llava.train.checkpoints.folders import STATE_FILE, flaw_of, last_complete_checkpoint, read_state
from llava.train.checkpoints.saving import RunKind
from llava.train.modeling import run_kind
from llava.train.settings.arguments import parse_pinpoints, split_names, zero_stage
from llava.train.settings.parsing import Arguments
from llava.train.settings.problems import SettingsError
from llava.train.settings.values import NO_WORDS

logger = logging.getLogger(__name__)

RUN_CONFIG_FILE = "train_config.yaml"
SETTINGS_FILE = "run_settings.json"

# With another one of these the checkpoint's weights or its optimizer's state do not fit.
FIXED = (
    "bits",
    "freeze_backbone",
    "freeze_mm_mlp_adapter",
    "fsdp",
    "lora_bias",
    "lora_r",
    "mm_projector_type",
    "mm_use_im_start_end",
    "optim",
    "optim_args",
    "unfreeze_mm_vision_tower",
)
# The optimizer's state brings its own; see `LLaVATrainer._load_optimizer_and_scheduler`.
RATES = (
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "learning_rate",
    "mm_projector_lr",
    "mm_vision_tower_lr",
    "weight_decay",
)
# With another one of these the steps that follow are not those of the run that was begun.
SHAPING = (
    *RATES,
    "average_tokens_across_devices",
    "bf16",
    "data_seed",
    "dataloader_drop_last",
    "fp16",
    "gradient_accumulation_steps",
    "group_by_modality_length",
    "image_aspect_ratio",
    "image_tokens_estimate",
    "label_smoothing_factor",
    "lora_alpha",
    "lora_dropout",
    "max_grad_norm",
    "max_frames",
    "mm_patch_merge_type",
    "mm_vision_select_feature",
    "mm_vision_select_layer",
    "model_max_length",
    "neftune_noise_alpha",
    "num_frames",
    "per_device_train_batch_size",
    "seed",
    "streaming",
    "tokens_per_batch",
    "train_sampling_strategy",
    "version",
    "video_fps",
)
STREAMED = ("data_path", "dataloader_num_workers", "shuffle_buffer_size")  # shape the order of a stream
NOTED = (
    "data_path",
    "dataloader_num_workers",
    "deepspeed",
    "feature_cache",
    "image_folder",
    "max_steps",
    "num_train_epochs",
    "on_bad_sample",
    "packing",
    "save_steps",
    "video_folder",
)


# How far a run goes, and what it says and keeps on the way; with other values of these it is the same run.
NOT_SHAPING = (
    "dataloader_num_workers",
    "disable_tqdm",
    "logging_steps",
    "max_steps",
    "num_train_epochs",
    "output_dir",  # the folder itself, however it is spelled, wherever it was copied to
    "preflight_seconds",
    "report_to",
    "resume_changed",
    "resume_from_checkpoint",
    "run_name",
    "save_steps",
    "save_strategy",
    "save_total_limit",
)


def run_settings(arguments: Arguments, reduction: ReductionConfig, dataset: Any, processes: int) -> dict[str, Any]:
    """The settings of a run that a checkpoint of it keeps, as plain JSON data.

    Args:
        arguments: of the run, with settings filled in by `read_config`.
        reduction: the methods of its model.
        dataset: of the run; None where it is not known.
        processes: how many train.
    """
    flags = {**vars(arguments.training), **vars(arguments.model), **vars(arguments.data)}
    names = {*FIXED, *SHAPING, *STREAMED, *NOTED}
    settings = {name: getattr(flags.get(name), "value", flags.get(name)) for name in sorted(names)}
    settings |= {
        "fsdp": flags["fsdp"] or None,
        "image_grid_pinpoints": parse_pinpoints(flags["image_grid_pinpoints"]),
        "kind": run_kind(arguments).value,
        "lr_scheduler_type": getattr(flags["lr_scheduler_type"], "value", flags["lr_scheduler_type"]),
        "model_name_or_path": _place(flags["model_name_or_path"]),
        "processes": processes,
        "reduction": reduction.to_dict(),
        "video_tower": _place(flags["video_tower"]),
        "vision_tower": _place(flags["vision_tower"]),
        "warmup": flags["warmup_steps"] or flags["warmup_ratio"],
        "zero_stage": zero_stage(flags["deepspeed"]) if flags["deepspeed"] else None,
    }
    if isinstance(dataset, LazySupervisedDataset):
        settings["data"] = describe_data(dataset)
    plain: dict[str, Any] = json.loads(json.dumps(settings, default=str))
    return plain


def _place(path: str | None) -> str | None:
    return str(Path(path).resolve()) if path and Path(path).exists() else path


def describe_data(dataset: LazySupervisedDataset) -> str:
    """What tells two sets of samples, or two orders of one, apart without reading them; the same wherever they lie."""
    words, images, clips = (np.ascontiguousarray(dataset.column(name)) for name in ("words", "images", "clips"))
    mark = zlib.crc32(images.tobytes(), zlib.crc32(words.tobytes()))
    shown = f"{int(images.sum())} images"
    if clips.any():  # otherwise the words of runs that began before there were any
        mark, shown = zlib.crc32(clips.tobytes(), mark), f"{shown}, {int(clips.sum())} clips"
    return f"{len(dataset)} samples with {shown} and {int(words.sum())} words ({mark:08x})"


# Checkpoints -----------------------------------------------------------------------------------------------------


def checkpoint_to_resume(training: Any) -> str | None:
    """The checkpoint that is asked for, otherwise the last whole one in `output_dir`; None without any.

    Raises:
        ValueError: the one that is asked for is not there or not whole.
    """
    asked = training.resume_from_checkpoint
    if asked and asked.lower() in NO_WORDS:
        begun = last_complete_checkpoint(training.output_dir)
        if begun:
            raise ValueError(
                f"--resume_from_checkpoint {asked}, but {begun} is in the way: remove the checkpoints, or give the run "
                "an --output_dir of its own"
            )
        return None
    if asked and asked.lower() != "true":
        flaw = flaw_of(Path(asked)) if Path(asked).is_dir() else "no such folder"
        if flaw:
            raise ValueError(
                f"--resume_from_checkpoint {asked}: {flaw}; leave the flag out to go on from the last whole one"
            )
        checkpoint: str | None = asked
    else:
        checkpoint = last_complete_checkpoint(training.output_dir)
    if checkpoint:
        logger.info("resuming from %s", checkpoint)
    return checkpoint


def check_checkpoint(checkpoint: str | None, settings: Mapping[str, Any], allowed: str | None) -> None:
    """Compare the settings of a run with those of the checkpoint that it goes on from; what differs is logged.

    Args:
        checkpoint: folder, or None.
        settings: from `run_settings`.
        allowed: names that may differ, separated by commas: `--resume_changed`.

    Raises:
        SettingsError: what differs makes the checkpoint useless for this run, or was not asked for.
    """
    names = [name for name in split_names(allowed or "") if name]
    unknown = [name for name in names if name not in (*settings, "optimizer", "data", *NOTED)]
    if unknown:
        raise SettingsError([f"--resume_changed {', '.join(unknown)}: no setting that checkpoints are compared by"])
    if checkpoint is None:
        return
    old = read_settings(Path(checkpoint))
    changed = {
        name: f"{_text(old[name])} -> {_text(new)}" for name, new in settings.items() if _differs(name, old, new)
    }
    if not has_optimizer(Path(checkpoint)):
        changed["optimizer"] = "its state is not in the checkpoint -> a new one"
    fixed = {name: text for name, text in changed.items() if is_fixed(name, old, settings)}
    refused = {name: text for name, text in changed.items() if shapes(name, settings) and name not in names}
    if fixed or refused:
        raise SettingsError([_refusal(checkpoint, fixed, refused)])
    for name, text in changed.items():
        logger.warning("%s changed since %s: %s", name, checkpoint, text)


def _differs(name: str, old: Mapping[str, Any], new: Any) -> bool:
    return name in old and old[name] != new


def is_fixed(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether nothing can go on from a checkpoint in which this setting, which has changed, is another one."""
    if name in ("processes", *RATES):
        # DeepSpeed's state is of as many processes, and brings its own rates; without it groups come and go with these.
        own_group = name.startswith("mm_") and (old.get(name) is None) != (new.get(name) is None)
        return new["zero_stage"] is not None or own_group
    return name in (*FIXED, "kind", "reduction", "zero_stage")


def shapes(name: str, settings: Mapping[str, Any]) -> bool:
    """Whether a run with another value of this setting is another run."""
    return name not in NOTED or (bool(settings["streaming"]) and name in STREAMED)


def _refusal(checkpoint: str, fixed: Mapping[str, str], refused: Mapping[str, str]) -> str:
    lines = [f"  {name}: {text}" for name, text in {**refused, **fixed}.items()]
    if fixed:
        mend = (
            f"{', '.join(fixed)}: the checkpoint is of no use for such a run; give it an --output_dir of its own, or "
            "the checkpoint's settings"
        )
    else:
        mend = (
            "give the run the checkpoint's settings or an --output_dir of its own, or say that it is meant: "
            f"--resume_changed {','.join(refused)}"
        )
    return f"{checkpoint} was written by a run with other settings:\n" + "\n".join(lines) + f"\n{mend}"


def _text(value: Any) -> str:
    return "none" if value in (None, {}, []) else str(value)


def read_settings(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says of its run; of one without `run_settings.json`, what its other files show."""
    file = checkpoint / SETTINGS_FILE
    try:
        if file.is_file():
            settings: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            return settings
        logger.info("%s has no %s: only its method and its files are compared", checkpoint, SETTINGS_FILE)
        config = checkpoint / "config.json"
        found: dict[str, Any] = {}
        if config.is_file():
            kept = SimpleNamespace(**json.loads(config.read_text(encoding="utf-8")))
            found["reduction"] = ReductionConfig.of_model(kept).to_dict()
    except ValueError as error:
        raise ValueError(f"{file if file.is_file() else config} is no valid JSON: {error}") from error
    kinds = kinds_in(checkpoint)
    if len(kinds) == 1:
        found["kind"] = next(iter(kinds)).value
    return found


def has_optimizer(checkpoint: Path) -> bool:
    """Whether a checkpoint holds an optimizer's state, DeepSpeed's, FSDP's or torch's own."""
    return any(next(checkpoint.glob(pattern), None) for pattern in ("optimizer*", "global_step*"))


# Results ---------------------------------------------------------------------------------------------------------


def kinds_in(folder: Path) -> dict[RunKind, str]:
    """The kinds of runs whose results lie in a folder, each with a file that shows it."""
    shows = {
        RunKind.LORA: (ADAPTER_CONFIG, *ADAPTER_FILES, NON_LORA_FILE),
        RunKind.FULL: (*WEIGHT_FILES, "model-*.safetensors", "pytorch_model-*.bin"),
        RunKind.PROJECTOR: PROJECTOR_FILES,
    }
    found = {kind: [path.name for name in names for path in folder.glob(name)] for kind, names in shows.items()}
    return {kind: names[0] for kind, names in found.items() if names}


def check_result(output_dir: str | Path, kind: RunKind) -> None:
    """Refuse a folder with the result of another kind of run, which would be opened in place of this run's.

    Raises:
        ValueError: names a file of it.
    """
    others = {other: name for other, name in kinds_in(Path(output_dir)).items() if other is not kind}
    if others:
        other, name = next(iter(others.items()))
        raise ValueError(
            f"--output_dir {output_dir} holds {name} of another kind of run ({other.value}), which would be opened in "
            f"place of this run's result ({kind.value}): name another folder, or remove that result"
        )


def is_finished(arguments: Arguments) -> bool:
    """True where `output_dir` holds the result of this run after as many steps or epochs as are asked for.

    With other settings it is another run's; and whoever names a checkpoint wants to train from there again.

    Raises:
        ValueError: files of this result are missing or torn, as after a copy that broke off; or its settings or its
            state can't be read.
    """
    training, kind = arguments.training, run_kind(arguments)
    folder, asked = Path(training.output_dir), training.resume_from_checkpoint
    names_checkpoint = bool(asked) and asked.lower() != "true"
    is_whole = all((folder / name).is_file() for name in (STATE_FILE, RUN_CONFIG_FILE)) and kind in kinds_in(folder)
    if names_checkpoint or not is_whole or not _same_run(folder / RUN_CONFIG_FILE, arguments.given):
        return False
    state = read_state(folder)
    step, epoch = state["global_step"], state["epoch"] or 0.0
    by_steps = training.max_steps > 0
    wanted, reached = (training.max_steps, step) if by_steps else (training.num_train_epochs, epoch + 1e-6)
    if step < state["max_steps"] or reached < wanted:
        return False
    flaw = flaw_of(folder)
    if flaw:
        raise ValueError(
            f"{folder} holds the result of this run, but {flaw}: bring the file back, or remove {folder / STATE_FILE} "
            "to train again"
        )
    logger.info(
        "%s holds the result of this run, after step %d (epoch %.4g), its last: nothing is left to do. A larger %s "
        "goes on from its last checkpoint; another run needs an --output_dir of its own",
        folder,
        step,
        epoch,
        "--max_steps" if by_steps else "--num_train_epochs",
    )
    return True


def _same_run(file: Path, given: dict[str, Any]) -> bool:
    own = yaml.safe_load(yaml.safe_dump(given))
    try:
        kept = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        kept = None
    if not isinstance(kept, dict):
        raise ValueError(
            f"{file} is not valid YAML with the settings of the result beside it: bring it back, or name another "
            "--output_dir"
        )
    return all(kept.get(name) == own.get(name) for name in (kept | own).keys() - set(NOT_SHAPING))
