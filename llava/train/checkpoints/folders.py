"""The folders `checkpoint-STEP` of a run: which are whole, which are kept, and what to say when the disk is full.

A checkpoint is written under another name and renamed, so one that a killed run leaves behind is seldom torn. It
can be all the same: files that a crashed machine had not yet flushed, a copy that broke off, a removal that was
killed. So each checkpoint lists its files and their sizes, and is compared with the list before it is used.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from llava.files import LIST_FILE, read_file_list, remove_listed, set_aside, size_of

logger = logging.getLogger(__name__)

STATE_FILE = "trainer_state.json"
# What torch.save says where the disk is full; the errno does not reach Python.
TORCH_WRITE_ERRORS = ("PytorchStreamWriter", "inline_container")


class CannotWriteError(OSError):
    """Files of a run could not be written; the message says which, and what is left."""


def flaw_of(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None where it is whole.

    One without `files.json`, as other programs write it, counts as whole if it has `trainer_state.json`.
    """
    if not (folder / STATE_FILE).is_file():
        return f"{STATE_FILE} is missing"
    try:
        sizes = read_file_list(folder) or {}
    except ValueError as error:
        return str(error).removeprefix(f"{folder}{os.sep}")
    for name, size in sizes.items():
        path = folder / name
        if size is None:
            continue
        if not path.is_file():
            return f"{name} is missing"
        if size_of(path) != size:
            return f"{name} has {size_of(path):,} bytes of {size:,}"
    return None


def checkpoints_of(output_dir: str | Path) -> list[tuple[int, Path]]:
    """Steps and folders of all checkpoints of a run, whole or not, by step."""
    found = []
    for path in Path(output_dir).glob("checkpoint-*"):
        step = path.name.removeprefix("checkpoint-")
        if step.isdigit() and path.is_dir():
            found.append((int(step), path))
    return sorted(found)


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The newest `checkpoint-STEP` of a run that is whole, or None; newer ones that are torn get a warning."""
    for _, path in reversed(checkpoints_of(output_dir)):
        flaw = flaw_of(path)
        if flaw is None:
            return str(path)
        logger.warning("%s is not whole and is skipped: %s", path, flaw)
    return None


def remove_old_checkpoints(output_dir: str | Path, step: int, limit: int | None, keep: str | None = None) -> None:
    """After `checkpoint-STEP` was written, leave the newest `limit` whole ones up to it.

    Torn ones go too: they would take the place of whole ones. Newer ones than STEP are not touched: they belong
    to a run that went on from another checkpoint. Nor are those that another program wrote, links, and what someone
    else put into a checkpoint.

    Args:
        output_dir: of the run.
        step: of the checkpoint that was just written.
        limit: how many to leave; None or 0: all.
        keep: a checkpoint that stays in any case (the best one).
    """
    if not limit or limit < 0:
        return
    older = [path for number, path in checkpoints_of(output_dir) if number <= step and _is_own(path)]
    whole = [path for path in older if flaw_of(path) is None]
    stay = {path.resolve() for path in whole[-limit:]} | ({Path(keep).resolve()} if keep else set())
    for path in older:
        if path.resolve() not in stay:
            with contextlib.suppress(OSError, ValueError):  # the run goes on, with less room
                remove_listed(path)


def make_room(checkpoint: Path) -> None:
    """Remove a checkpoint that is about to be written again; what this program did not write gets another name."""
    if _is_own(checkpoint):
        with contextlib.suppress(ValueError):  # of a torn list: nobody knows what is whose
            remove_listed(checkpoint)
    if checkpoint.exists() or checkpoint.is_symlink():
        set_aside(checkpoint)


def _is_own(checkpoint: Path) -> bool:
    return (checkpoint / LIST_FILE).is_file() and not checkpoint.is_symlink()


@contextlib.contextmanager
def write_errors_named(target: Path, output_dir: str | Path) -> Iterator[None]:
    """Turn what the libraries raise when a file can't be written into one error that says what is left.

    Args:
        target: what is written inside.
        output_dir: of the run, whose last whole checkpoint the message names.

    Raises:
        CannotWriteError: in place of OSError and its like.
    """
    try:
        yield
    except CannotWriteError:
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        # Others are no errors of writing: the device's memory is full, or a rank is lost in a collective.
        if isinstance(error, RuntimeError) and not any(word in str(error) for word in TORCH_WRITE_ERRORS):
            raise
        last = last_complete_checkpoint(output_dir)
        left = f"{last} is whole: start the same command again to go on from it" if last else "no checkpoint is whole"
        raise CannotWriteError(f"{target} could not be written: {error} ({_free_space(target)}). {left}") from error


def _free_space(path: Path) -> str:
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        usage = shutil.disk_usage(path)
    except OSError as error:
        return f"free space unknown: {error}"
    return f"{usage.free / 1e9:.1f} GB of {usage.total / 1e9:.1f} GB are free there"


def read_state(checkpoint: str | Path) -> dict[str, Any]:
    """transformers' record of a run, as a checkpoint has it.

    Raises:
        ValueError: it can't be read.
    """
    file = Path(checkpoint) / STATE_FILE
    try:
        state: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no valid JSON: {error}") from error
    return state
