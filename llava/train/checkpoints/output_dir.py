"""The folder of a run: whose it is, whether it can be written, and that one run at a time writes there."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object

from llava.data.rejects import REJECTS_FILE, REJECTS_PARTS
from llava.files import (
    CHECKPOINT_FILES,
    LIST_FILE,
    adopt_checkpoint,
    check_apart,
    check_writable,
    foreign_files,
    note_files,
    places_read,
    remove_leftovers,
)
from llava.lock import holder, lock
from llava.train.checkpoints.folders import STATE_FILE
from llava.train.checkpoints.resume import RUN_CONFIG_FILE, check_result, kinds_in
from llava.train.logs.divergence import SAMPLES_FILE
from llava.train.logs.metrics_file import METRICS_FILE
from llava.train.logs.run_info import RUN_INFO_FILE
from llava.train.logs.trackers import WANDB_FILE
from llava.train.modeling import run_kind
from llava.train.settings.parsing import Arguments

LOCK_FILE = ".lock"
RUN_FILES = (
    RUN_CONFIG_FILE,
    RUN_INFO_FILE,
    METRICS_FILE,
    STATE_FILE,
    REJECTS_FILE,
    REJECTS_PARTS,
    SAMPLES_FILE,
    WANDB_FILE,
)
"""What a run writes besides its checkpoints and its result, again and again."""

logger = logging.getLogger(__name__)


def check_output_dir(arguments: Arguments) -> None:
    """Refuse an `output_dir` in which a run would destroy something, or that it can't write. Nothing is changed.

    A folder of an earlier run will do, with whatever else lies in it.

    Args:
        arguments: of the run.

    Raises:
        ValueError: it is, lies in or holds a place that the run reads; a stranger's file or the result of another kind
            of run is in the way; or nothing can be written there.
    """
    model, folder = arguments.model, Path(arguments.training.output_dir)
    read = places_read(model.model_name_or_path or "", None, model.vision_tower, model.video_tower)
    inputs = {"model": read.pop("source"), **{name.replace("source", "model"): place for name, place in read.items()}}
    inputs |= {
        "projector's file": model.pretrain_mm_mlp_adapter,
        "adapter of lora_weight_path": arguments.training.lora_weight_path,
    }
    check_apart(folder, "output_dir", inputs)
    check_writable(folder, "output_dir")
    check_result(folder, run_kind(arguments))
    _check_not_converted(folder)
    if _is_of_an_older_run(folder):
        return
    foreign = foreign_files(folder, (*CHECKPOINT_FILES, *RUN_FILES))
    if foreign:
        raise ValueError(
            f"output_dir {folder} holds {foreign[0].name}, which no run of this program wrote there, or which was "
            "changed since, and which would be replaced; move it away, or choose another folder"
        )


def _check_not_converted(folder: Path) -> None:
    """Refuse a folder that `llava convert` or `llava merge` wrote, which is a run's result only by its files."""
    result = next(iter(kinds_in(folder).values()), None)
    if result and (folder / LIST_FILE).exists() and not (folder / RUN_CONFIG_FILE).exists():
        raise ValueError(
            f"output_dir {folder} holds {result} of a checkpoint that no training run wrote there (llava convert or "
            "merge did), and which would be replaced; choose another folder"
        )


def check_free(arguments: Arguments) -> None:
    """Raise a ValueError where another run writes to `output_dir`; nothing is changed or waited for."""
    folder = Path(arguments.training.output_dir)
    owner = holder(folder / LOCK_FILE)
    if owner is not None:
        raise ValueError(f"output_dir {folder} is in use by {owner}")


@contextlib.contextmanager
def holding_output_dir(arguments: Arguments) -> Iterator[None]:
    """Check `output_dir`, and keep other runs out of it while the block runs; every process of a run must call it.

    Raises:
        ValueError: on every process; see `check_output_dir`, or another run is writing there, or files of an earlier
            one can't be read.
    """
    training = arguments.training
    folder = Path(training.output_dir)
    with contextlib.ExitStack() as stack:
        problems: list[str] = []
        if training.should_save:
            try:
                check_output_dir(arguments)
                stack.enter_context(lock(folder / LOCK_FILE, f"output_dir {folder}"))
                _take_over(folder)
            except ValueError as error:
                problems.append(str(error))
            except OSError as error:  # a file that can't be read, say
                problems.append(f"output_dir {folder}: {error}")
        if training.world_size > 1:
            problems = gather_object(problems)
        if problems:
            raise ValueError(problems[0])
        yield


def _take_over(folder: Path) -> None:
    """Tidy up after an earlier run of the folder, whose lock is held."""
    remove_leftovers(folder)
    if _is_of_an_older_run(folder):
        adopt_checkpoint(folder)
        note_files(folder, dict.fromkeys(RUN_FILES))


def _is_of_an_older_run(folder: Path) -> bool:
    """Whether a version of this program that did not list its files wrote a run there."""
    if (folder / LIST_FILE).exists():
        return False
    try:
        info: Any = json.loads((folder / RUN_INFO_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(info, dict) and {"command", "config", "versions"} <= info.keys()
