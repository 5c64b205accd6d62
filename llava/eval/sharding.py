"""Answer the questions of tasks in several processes, one for each device; a run that is killed goes on.

Every process appends its answers to a file of its own. A later run reads all of them and deals what is left out to its
own processes, however many there are.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from llava.eval.answering import Answerer, VqaOptions
from llava.eval.questions import Question, read_jsonl
from llava.eval.tasks import get_task
from llava.messages import set_up_messages
from llava.model.builder import load_pretrained_model
from llava.reduction.config import ReductionConfig
from llava.reduction.options import values_of

MODEL_FILE = "model.json"
_FAILED = 3  # exit code of a process whose error was handed on


@dataclass(frozen=True, kw_only=True)
class Source:
    """How to open a checkpoint; see `load_pretrained_model`."""

    model_path: str
    model_base: str | None = None
    vision_tower: str | None = None
    reduction: Any = None
    dtype: torch.dtype | None = None

    def open(self, device: str) -> tuple[Any, Any, Any]:
        """Tokenizer, model and image processor, on a device."""
        tokenizer, model, processor, _ = load_pretrained_model(
            self.model_path,
            self.model_base,
            vision_tower=self.vision_tower,
            reduction=self.reduction,
            device=device,
            dtype=self.dtype,
        )
        return tokenizer, model, processor


@dataclass(frozen=True, kw_only=True)
class TaskRun:
    """One task of a run.

    Attributes:
        name: of the task.
        data: folder of all tasks' files.
        limit: so many of its questions; None: all.
        options: how they are put.
        folder: for the answers.
    """

    name: str
    data: Path
    limit: int | None
    options: VqaOptions
    folder: Path

    def questions(self) -> list[Question]:
        """Its questions."""
        return get_task(self.name).questions(self.data)[: self.limit]

    def answered(self) -> dict[int, dict[str, Any]]:
        """What earlier processes have answered: by the question's number, the fields of `Answer` and seconds.

        A last line without its end was being written when its process was killed; it is left out.
        """
        rows: dict[int, dict[str, Any]] = {}
        for file in sorted(self.folder.glob("answers-*.jsonl")):
            whole = file.read_bytes().rpartition(b"\n")
            if whole[2]:
                file.write_bytes(whole[0] + whole[1])
            rows |= {row.pop("index"): row for _, row in read_jsonl(file)}
        return rows


Todo = Sequence[tuple[TaskRun, Sequence[int]]]
"""Tasks, each with the numbers of the questions to answer."""


def answer_all(source: Source, devices: Sequence[str], todo: Todo) -> None:
    """Answer questions on all devices, a process for each; in this process where there is one device.

    Args:
        source: the checkpoint.
        devices: such as ["cuda:0", "cuda:1"].
        todo: what to answer.

    Raises:
        ValueError: the checkpoint, an image or a clip can't be read.
        ChildProcessError: a process ended without a word, as one does that is killed for memory.
    """
    todo = [(run, numbers) for run, numbers in todo if numbers]
    if not todo:
        return
    if len(devices) == 1:
        answer_share(source, devices[0], 0, todo)
        return
    context = multiprocessing.get_context("spawn")
    errors = context.SimpleQueue()
    dealt = [deal(numbers, len(devices), run.options.batch_size) for run, numbers in todo]
    processes = []
    for rank, device in enumerate(devices):
        own = [(run, parts[rank]) for (run, _), parts in zip(todo, dealt, strict=True)]
        processes.append(context.Process(target=_process, args=(source, device, rank, own, errors), name=device))
    try:
        for process in processes:
            process.start()
        _wait(processes, errors)
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()


def cut(numbers: Sequence[int], size: int) -> list[Sequence[int]]:
    """Batches of `size`; the last may be smaller."""
    return [numbers[start : start + size] for start in range(0, len(numbers), size)]


def deal(numbers: Sequence[int], parts: int, size: int) -> list[list[int]]:
    """Batches of `size` are dealt out to `parts` processes in turn; each has its own in order."""
    batches = cut(numbers, size)
    return [[number for batch in batches[part::parts] for number in batch] for part in range(parts)]


def answer_share(source: Source, device: str, rank: int, todo: Todo) -> None:
    """Answer questions on one device.

    Raises:
        ValueError: the checkpoint, an image or a clip can't be read.
    """
    tokenizer, model, processor = source.open(device)
    for run, numbers in todo:
        answerer = Answerer(tokenizer, model, processor, run.options)
        if rank == 0:
            (run.folder / MODEL_FILE).write_text(json.dumps(describe(model, run.options)), encoding="utf-8")
        _answer_task(answerer, run, numbers, rank)


def describe(model: Any, options: VqaOptions) -> dict[str, Any]:
    """What a result says of the model that was opened, and of how it is shown clips."""
    methods, reducers, device = (
        ReductionConfig.of_model(model.config).to_dict(),
        model.get_model().reducers(),
        model.device,
    )
    return {
        "reduction": {site: {**method, **values_of(getattr(reducers, site))} for site, method in methods.items()},
        "dtype": str(model.dtype).removeprefix("torch."),
        "image_aspect_ratio": getattr(model.config, "image_aspect_ratio", None),
        "frames": asdict(options.sampling(model.config)),
        "attention": model.config._attn_implementation,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def _answer_task(answerer: Answerer, run: TaskRun, numbers: Sequence[int], rank: int) -> None:
    questions, batches = run.questions(), cut(numbers, run.options.batch_size)
    answers = answerer.answer_all([[questions[number] for number in batch] for batch in batches])
    target = run.folder / f"answers-{rank}-{uuid.uuid4().hex[:8]}.jsonl"
    before = time.perf_counter()
    with (
        target.open("a", encoding="utf-8") as file,
        tqdm(total=len(numbers), desc=run.name, disable=None if rank == 0 else True) as progress,
    ):
        for batch, given in zip(batches, answers, strict=True):
            seconds, before = time.perf_counter() - before, time.perf_counter()
            for number, answer in zip(batch, given, strict=True):
                row = {"index": number, **asdict(answer), "seconds": seconds / len(batch)}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            progress.update(len(batch))
            _leave_without_parent()


def _process(source: Source, device: str, rank: int, todo: Todo, errors: Any) -> None:
    """The life of one process; what a user can mend is handed to the parent."""
    set_up_messages()
    if device == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // 2))
    try:
        answer_share(source, device, rank, todo)
    except (ValueError, OSError) as error:
        errors.put(str(error))
        sys.exit(_FAILED)


def _wait(processes: Sequence[Any], errors: Any) -> None:
    """Until all have ended, or one has failed."""
    waiting = list(processes)
    while waiting:
        waiting[0].join(0.2)
        for process in [process for process in waiting if process.exitcode]:
            if not errors.empty():
                raise ValueError(errors.get())
            raise ChildProcessError(
                f"the process on {process.name} ended with exit code {process.exitcode}; its own message stands above, "
                "or it was killed for memory: try a smaller batch size. The same command goes on from here"
            )
        waiting = [process for process in waiting if process.exitcode is None]


def _leave_without_parent() -> None:
    """A process whose parent was killed has nobody to answer for."""
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        os._exit(_FAILED)
