"""Checks of the data: every sample, or as many images as a time allows."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX, VIDEO_TOKEN_INDEX
from llava.data.dataset import LazySupervisedDataset
from llava.data.feature_cache import NotCachedError
from llava.data.media.videos import is_video_file
from llava.data.samples import IMAGE, VIDEO, BadSampleError
from llava.train.preflight.findings import ERROR, NAMED, NOTE, WARNING, Report, name_samples
from llava.train.settings.arguments import require_package
from llava.video import MissingReaderError

CHUNK = 512
"""Rows that are read from the table at a time."""
LOOKED_AT = 64
"""Samples that are read before a run in search of one that teaches something; mostly the first does."""
LENGTH, CUT, FEATURES = "length", "answers cut off", "features"

VisualCounter = Callable[[tuple[int, int] | None], int]
"""Visual tokens of an image of (width, height) pixels."""


@dataclass
class Tally:
    """Samples with one defect."""

    count: int = 0
    labels: list[str] = field(default_factory=list)  # of the first ones
    example: str = ""  # what is wrong with the first

    def add(self, row: dict[str, Any], reason: str) -> None:
        self.count += 1
        if len(self.labels) < NAMED:
            self.labels.append(label(row))
        self.example = self.example or reason


@dataclass
class Lengths:
    """Tokens of a sample when its images are in place.

    Attributes:
        total: all of them.
        learned: those with a label that the limit leaves.
    """

    total: int
    learned: int


def label(row: dict[str, Any]) -> str:
    """What a report calls a sample: its id, otherwise its place."""
    sample = json.loads(row["sample"])
    has_id = isinstance(sample, dict) and "id" in sample
    return f"{sample['id']!r:.100}" if has_id else f"index {row['index']} of {row['file']}"


def check_images_exist(dataset: LazySupervisedDataset, report: Report, seconds: float, threads: int = 16) -> None:
    """Look for the images, in an order drawn at random, until all are found or the time is over.

    Missing files are errors, or warnings where bad samples are skipped; what is missing in the run's feature cache is
    an error.

    Args:
        dataset: its rows need not be good.
        report: gets the findings.
        seconds: time limit.
        threads: that ask the file system at the same time.
    """
    deadline = time.monotonic() + seconds
    tally, uncached, seen = Tally(), Tally(), 0
    with ThreadPoolExecutor(threads) as pool:
        for chunk in row_chunks(dataset, with_images=True, shuffled=True):
            if time.monotonic() > deadline:
                report.add(IMAGE, f"{seconds:g} s were enough to look for the images of {seen} samples only", NOTE)
                break
            results = pool.map(lambda one: _missing(dataset, one[0], one[1]), chunk)
            for (row, *_), problem in zip(chunk, results, strict=True):
                if problem is not None:
                    (uncached if isinstance(problem, NotCachedError) else tally).add(row, str(problem))
            seen += len(chunk)
    _report_tally(report, IMAGE, tally, _level(dataset))
    _report_tally(report, FEATURES, uncached, ERROR)


def check_reader(dataset: LazySupervisedDataset) -> None:
    """Raise ValueError where a clip is a video file, and PyAV, which reads such files, is not installed."""
    if importlib.util.find_spec("av") is not None:
        return
    for row, folder, _ in chain.from_iterable(row_chunks(dataset, with_images=True)):
        with contextlib.suppress(BadSampleError):
            for clip in dataset.maker.clips(row, folder):
                if is_video_file(clip):
                    require_package("av", f"the video file {clip} of sample {label(row)}")


def check_samples(
    dataset: LazySupervisedDataset,
    report: Report,
    count_visual: VisualCounter | None,
    max_length: int,
    threads: int = 16,
) -> int:
    """Read every sample as training will: its images, its tokens, and what the length limit leaves of them.

    Args:
        dataset: its rows need not be good.
        report: gets the findings.
        count_visual: of an image; None where the model is unknown, so that no lengths are checked.
        max_length: `model_max_length`.
        threads: that read at the same time.

    Returns:
        Tokens of the longest sample, as it is trained on; `max_length` where none can be.
    """
    tallies: dict[str, Tally] = {}
    cut, unlearned = Tally(), Tally()
    lengths: list[int] = []
    with (
        ThreadPoolExecutor(threads) as pool,
        tqdm(total=len(dataset.places()), desc="reading all samples", disable=None) as progress,
    ):
        for chunk in row_chunks(dataset):
            progress.update(len(chunk))
            results = pool.map(lambda one: _examine(dataset, one[0], one[1], count_visual, max_length), chunk)
            for (row, *_), result in zip(chunk, results, strict=True):
                if isinstance(result, BadSampleError):
                    tallies.setdefault(result.kind, Tally()).add(row, str(result))
                    continue
                lengths.append(result.total)
                if result.total > max_length:
                    cut.add(row, "")
                if not result.learned:
                    unlearned.add(row, "")
    for kind, tally in tallies.items():
        _report_tally(report, kind, tally, _level(dataset))
    if count_visual is not None and lengths:
        _report_lengths(report, np.array(lengths), cut, unlearned, max_length)
        return min(max(lengths), max_length)
    return max_length


def check_learnable(
    dataset: LazySupervisedDataset, report: Report, count_visual: VisualCounter | None, max_length: int
) -> None:
    """Look for one sample that teaches something, among some that are drawn at random.

    Args:
        dataset: its rows need not be good.
        report: gets an error where there is none.
        count_visual: of an image.
        max_length: `model_max_length`.
    """
    seen = 0
    for row, folder, _ in islice(chain.from_iterable(row_chunks(dataset, shuffled=True)), LOOKED_AT):
        result = _examine(dataset, row, folder, count_visual, max_length)
        if isinstance(result, Lengths) and result.learned:
            return
        seen += 1
    report.add(
        CUT,
        f"none of {seen} samples that were drawn at random can be read and has a token to learn among the first "
        f"{max_length}: raise --model_max_length or mend the data",
    )


def _report_lengths(report: Report, lengths: np.ndarray, cut: Tally, unlearned: Tally, max_length: int) -> None:
    median, high, longest = np.percentile(lengths, [50, 99, 100]).astype(int)
    report.add(
        LENGTH,
        f"{len(lengths)} samples, visual tokens included: median {median}, 99 % up to {high}, longest {longest} "
        f"tokens; model_max_length {max_length}",
        NOTE,
    )
    if cut.count:
        names = name_samples(cut.labels, cut.count)
        report.add(LENGTH, f"{names} longer than model_max_length={max_length}, and will be cut", WARNING)
    if unlearned.count:
        names = name_samples(unlearned.labels, unlearned.count)
        report.add(
            CUT,
            f"{names} without a token to learn among the first {max_length}: raise --model_max_length or remove them",
        )


def _report_tally(report: Report, kind: str, tally: Tally, level: str) -> None:
    if tally.count:
        report.add(kind, f"{name_samples(tally.labels, tally.count)}; the first: {tally.example}", level)


def _level(dataset: LazySupervisedDataset) -> str:
    return ERROR if dataset.maker.on_bad_sample == "stop" else WARNING


def row_chunks(
    dataset: LazySupervisedDataset,
    with_images: bool = False,
    shuffled: bool = False,
    places: np.ndarray | None = None,
) -> Iterator[list[tuple[dict[str, Any], str | None, int]]]:
    """Rows, their image folders and places in the table, each once, whatever their weight.

    Args:
        with_images: leave out rows with nothing to see.
        shuffled: in an order of chunks drawn at random, so that a part stands for the whole.
        places: rows of the table that are meant; None: all.
    """
    places = dataset.places() if places is None else places
    if with_images:
        images, clips = (dataset.table.data.column(name).to_numpy()[places] for name in ("images", "clips"))
        places = places[(images > 0) | (clips > 0)]
    chunks = np.split(places, range(CHUNK, len(places), CHUNK))
    order = np.random.default_rng(0).permutation(len(chunks)) if shuffled else range(len(chunks))
    for number in order:
        chunk = chunks[number]
        columns = dataset.table[chunk.tolist()]
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        yield [
            (row, dataset.source_of(place).image_folder, place) for row, place in zip(rows, chunk.tolist(), strict=True)
        ]


def _missing(dataset: LazySupervisedDataset, row: dict[str, Any], folder: str | None) -> ValueError | None:
    """What is wrong with the first image of a row that is not there, or that may not be opened."""
    try:
        dataset.maker.check_images(row, folder)
    except ValueError as error:
        return error
    return None


def _examine(
    dataset: LazySupervisedDataset,
    row: dict[str, Any],
    folder: str | None,
    count_visual: VisualCounter | None,
    max_length: int,
) -> Lengths | BadSampleError:
    maker = dataset.maker
    try:
        if row["problem"] is not None:
            raise BadSampleError(row["problem"], row["kind"])
        sizes = [image.size for image in maker.images(row, folder)]
        frames = [len(clip) for clip in maker.read_clips(row, folder, label(row))]
        ids, labels = maker.tokens(json.loads(row["sample"]), label(row))
    except BadSampleError as error:
        return error
    except MissingReaderError as error:
        return BadSampleError(f"{label(row)}: {error}", VIDEO)
    images = [count_visual(size) if count_visual else 1 for size in sizes]
    clips = [count * count_visual(None) if count_visual else 1 for count in frames]
    return measure(ids, labels, images, max_length, clips)


def measure(
    ids: torch.Tensor, labels: torch.Tensor, visual: list[int], max_length: int, clips: Sequence[int] = ()
) -> Lengths:
    """Length of a sample with its images and clips in place.

    Args:
        ids: [S], IMAGE_TOKEN_INDEX where an image goes, VIDEO_TOKEN_INDEX where a clip goes.
        labels: [S].
        visual: tokens of each image.
        max_length: tokens that are kept.
        clips: tokens of each clip.
    """
    widths = torch.ones_like(ids)
    for marker, counts in ((IMAGE_TOKEN_INDEX, visual), (VIDEO_TOKEN_INDEX, clips)):
        if len(counts):
            widths[ids == marker] = torch.tensor(counts)
    ends = widths.cumsum(0)
    # The first token has no logits before it, so its label is never used.
    learned = (labels != IGNORE_INDEX) & (ends <= max_length) & (ends > 1)
    return Lengths(int(ends[-1]), int(learned.sum()))
