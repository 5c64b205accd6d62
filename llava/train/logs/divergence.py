"""Runs that diverge: losses that are NaN or infinite, step after step, and which samples they began with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava.data.samples import sample_name
from llava.files import atomic_folder
from llava.train.checkpoints.folders import last_complete_checkpoint

SAMPLES_FILE = "diverged.json"
NAMED_SAMPLES = 4  # in the message; the file has all


class DivergedError(ValueError):
    """A run is stopped because its loss or its weights are NaN or infinite; the message says what is left."""


class LossWatch:
    """Counts how many steps in a row had a loss that is NaN or infinite, without waiting for the device.

    With loss scaling (fp16) the loss is taken before it is scaled: a step that is skipped because its scaled gradients
    overflow does not count.
    """

    def __init__(self) -> None:
        self._finite: Tensor | None = None  # all micro-batches of this step
        self._in_a_row: Tensor | None = None

    def note(self, loss: Tensor) -> None:
        """Take the loss of a micro-batch."""
        finite = loss.detach().isfinite().all()
        self._finite = finite if self._finite is None else self._finite & finite

    def end_step(self) -> None:
        """The micro-batches since the last call were one step."""
        if self._finite is not None:
            count = 0 if self._in_a_row is None else self._in_a_row
            self._in_a_row = torch.where(self._finite, 0, count + 1)
            self._finite = None

    def read(self, device: torch.device) -> Tensor:
        """Steps in a row, up to now, [1] float64."""
        count = 0 if self._in_a_row is None else self._in_a_row
        return torch.as_tensor(count, dtype=torch.float64, device=device).reshape(1)


def diverged(first: int, last: int, output_dir: str, samples: dict[int, list[str]]) -> DivergedError:
    """The error of a run whose loss was not finite in the steps `first` to `last`.

    Args:
        first: step, counted from 1.
        last: step.
        output_dir: of the run, whose last whole checkpoint is named.
        samples: from `samples_of_steps`.
    """
    return DivergedError(
        f"the loss was NaN or infinite in steps {first} to {last}: the run has diverged. "
        f"{_samples_text(first, output_dir, samples)}{what_is_left(output_dir)}; --stop_after_nonfinite_steps 0 would "
        "not stop here"
    )


def what_is_left(output_dir: str | Path) -> str:
    """What to do after a run has diverged."""
    last = last_complete_checkpoint(output_dir)
    begins = f"goes on from the last good checkpoint, {last}" if last else "begins anew, since there is no checkpoint"
    return f"The same command {begins}: first lower --learning_rate, raise --warmup_ratio or mend the samples"


def _samples_text(first: int, output_dir: str, samples: dict[int, list[str]]) -> str:
    if not samples:
        return "Its samples are not known, since the data is streamed or sorted by transformers. "
    names = samples[first]
    more = f" and {len(names) - NAMED_SAMPLES} more" if len(names) > NAMED_SAMPLES else ""
    return (
        f"Step {first} had {', '.join(names[:NAMED_SAMPLES])}{more}; {Path(output_dir, SAMPLES_FILE)} lists the "
        "samples of this step and the one before. "
    )


def write_samples(output_dir: str, samples: dict[int, list[str]]) -> None:
    """Write what `samples_of_steps` found, if anything, to `diverged.json`."""
    if samples:
        with atomic_folder(Path(output_dir)) as folder:
            (folder / SAMPLES_FILE).write_text(json.dumps(samples, indent=1), encoding="utf-8")


def samples_of_steps(trainer: Any, steps: list[int]) -> dict[int, list[str]]:
    """Names of the samples that all ranks together saw in some steps; empty where their order is not known.

    Args:
        trainer: an LLaVATrainer in training.
        steps: counted from 1.
    """
    sampler, dataset, args = trainer.sampler, trainer.train_dataset, trainer.args
    if sampler is None:
        return {}
    micro_batches = len(trainer.callback_handler.train_dataloader)
    in_epoch = -(-micro_batches // args.gradient_accumulation_steps)
    size = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
    found = {}
    for step in steps:
        epoch, place = divmod(step - 1, in_epoch)
        rows = [dataset.row(index) for index in sampler.samples_of_step(epoch, place, size)]
        found[step] = [sample_name(json.loads(row["sample"]), row["index"], row["file"]) for row in rows]
    return found
