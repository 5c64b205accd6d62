"""The pictures of a run's data, each once, however many samples show it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from llava.data.dataset import LazySupervisedDataset
from llava.data.feature_cache import picture_key
from llava.data.items import open_picture
from llava.data.samples import sample_name
from llava.train.preflight.samples import row_chunks

SAMPLED = 32
"""Pictures that stand for all where a mean is enough."""


@dataclass(frozen=True)
class Picture:
    """One picture of the data.

    Attributes:
        key: see `picture_key`.
        place: row of the table that it was first seen in.
        number: of it among the row's.
    """

    key: bytes
    place: int
    number: int


def list_pictures(dataset: LazySupervisedDataset, threads: int = 16) -> list[Picture]:
    """All pictures of the samples that can be trained on, each once, in their order.

    Raises:
        ValueError: a file is missing, and bad samples stop the run.
    """
    found: dict[bytes, Picture] = {}
    with ThreadPoolExecutor(threads) as pool:
        for chunk in row_chunks(dataset, with_images=True):
            results = pool.map(lambda one: _keys(dataset, one[0], one[1]), chunk)
            for (_, _, place), keys in zip(chunk, results, strict=True):
                for number, key in enumerate(keys):
                    found.setdefault(key, Picture(key, place, number))
    return list(found.values())


def _keys(dataset: LazySupervisedDataset, row: dict[str, Any], folder: str | None) -> list[bytes]:
    if row["problem"] is not None:
        return []
    try:
        return [picture_key(picture) for picture in dataset.maker.pictures(row, folder)]
    except ValueError as error:
        if dataset.maker.on_bad_sample == "stop":
            raise ValueError(f"{_name(row)}: {error}") from error
        return []  # such a sample is skipped in training, too


def _name(row: dict[str, Any]) -> str:
    return sample_name(json.loads(row["sample"]), row["index"], row["file"])


@dataclass(frozen=True)
class Decoded:
    """A picture as the tower takes it, or why it can't be read.

    Attributes:
        pixels: [3, H, W] or [tiles, 3, H, W].
        size: (width, height) of the picture in pixels.
    """

    picture: Picture
    pixels: Tensor | None = None
    size: tuple[int, int] = (0, 0)
    problem: str = ""


class Pictures(Dataset[Decoded]):
    """Pictures, decoded when they are asked for."""

    def __init__(self, dataset: LazySupervisedDataset, pictures: Sequence[Picture]) -> None:
        self._dataset, self._pictures = dataset, pictures

    def __len__(self) -> int:
        return len(self._pictures)

    def some(self) -> Pictures:
        """About `SAMPLED` of them, evenly spaced."""
        return Pictures(self._dataset, self._pictures[:: max(1, -(-len(self._pictures) // SAMPLED))])

    def __getitem__(self, index: int) -> Decoded:
        one, maker = self._pictures[index], self._dataset.maker
        row = self._dataset.table[one.place]
        picture = maker.pictures(row, self._dataset.source_of(one.place).image_folder)[one.number]
        try:
            image = open_picture(picture, one.number)
            return Decoded(one, maker.process(image), image.size)
        except ValueError as error:
            if maker.on_bad_sample == "stop":
                raise ValueError(f"{_name(row)}: {error}") from error
            return Decoded(one, problem=str(error))
