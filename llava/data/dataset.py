"""LLaVA's training data: samples of {"id", "image" (optional), "conversations"}, from files of any kind and weight.

All samples are checked before the first is used, without opening an image, so that a mistake in a file is found before
a run has cost anything. They lie in Arrow files that are mapped into memory; see `llava.data.table`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from llava.conversation import get_template
from llava.data.items import ItemMaker
from llava.data.media.images import IMAGE_ACCESS
from llava.data.rejects import Rejects
from llava.data.sources import DataPath, DataSource, parse_data_path
from llava.data.table import import_datasets, load_table
from llava.video import Sampling

logger = logging.getLogger(__name__)

IMAGE_LENGTH = 128
"""Words that an image counts for in `lengths`: LLaVA's allowance, used for grouping samples only."""


class LazySupervisedDataset(Dataset[dict[str, Any]]):
    """Conversations about images, for supervised training; images are read when a sample is asked for.

    An item is a dict of `input_ids` and `labels` (LongTensor [S]), `images` (a tensor for each, in the order
    of their `<image>`: [3, H, W], or tiles [T, 3, H, W] with anyres), `image_sizes` ((width, height) in
    pixels), `videos` (a tensor [F, 3, H, W] for each clip, in the order of their `<video>`), `text` (what a reducer
    that reads it is given, without marks) and `id`.

    Args:
        data_path: see `llava.data.sources.parse_data_path`.
        tokenizer: of the language model.
        image_processor: of the vision tower; may be None where no sample has an image.
        version: name of the prompt template.
        image_folder: folder or URL that image files are looked up in.
        image_access: where their names may lead; see `llava.data.media.images.IMAGE_ACCESS`.
        image_aspect_ratio: None or "square", "pad", "anyres"; see `llava.mm_utils.process_images`.
        image_grid_pinpoints: resolutions for anyres.
        mm_use_im_start_end: surround images by `<im_start>` and `<im_end>`.
        text: what `text` holds: "question", the human's words, a line a turn; or "conversation", all of the prompt
            with system prompt and answers.
        on_bad_sample: "stop": an error for a sample that cannot be trained on. "skip": a placeholder in its place, one
            token without a label, so that all other samples keep their places.
        rejects: where skipped samples are written.
        seed: of the choice of samples where a weight is no whole number.
        cache_dir: of converted files; default: $HF_DATASETS_CACHE.
        judge: False: malformed samples raise nothing until they are asked for, whatever `on_bad_sample` says.
        video_folder: folder or URL that clips are looked up in; default: `image_folder`.
        sampling: which frames of a clip are taken.
        mm_video_tower: the model's tower for frames, if it has one: then they are cropped, see `process_video`.

    Raises:
        ValueError: see `read_records` and `check_sample`; also an unknown template or image_aspect_ratio, and
            no samples at all. From an item: an image that cannot be read. All name the sample.
    """

    def __init__(
        self,
        data_path: DataPath,
        tokenizer: Any,
        image_processor: Any = None,
        *,
        version: str,
        image_folder: str | Path | None = None,
        image_access: str = IMAGE_ACCESS[0],
        image_aspect_ratio: str | None = None,
        image_grid_pinpoints: str | Sequence[Sequence[int]] | None = None,
        mm_use_im_start_end: bool = False,
        text: str = "question",
        on_bad_sample: str = "stop",
        rejects: Rejects | None = None,
        seed: int = 0,
        cache_dir: str | None = None,
        judge: bool = True,
        video_folder: str | Path | None = None,
        sampling: Sampling | None = None,
        mm_video_tower: str | None = None,
    ) -> None:
        get_template(version)
        self.sources = parse_data_path(data_path)
        self._load(version, seed, cache_dir)
        self.maker = ItemMaker(
            tokenizer,
            image_processor,
            version=version,
            image_folder=image_folder,
            image_access=image_access,
            image_aspect_ratio=image_aspect_ratio,
            image_grid_pinpoints=image_grid_pinpoints,
            mm_use_im_start_end=mm_use_im_start_end,
            text=text,
            on_bad_sample=on_bad_sample,
            rejects=rejects,
            video_folder=video_folder,
            sampling=sampling,
            mm_video_tower=mm_video_tower,
        )
        if judge:
            self._judge_bad_samples()
        if self.column("images").any() or self.column("clips").any():
            self.maker.check_image_options()

    def _load(self, version: str, seed: int, cache_dir: str | None) -> None:
        """Set the table, where each source begins in it, and which rows are seen in which order."""
        tables, lengths = [], []
        for source in self.sources:
            parts = [load_table(file, version, cache_dir) for file in source.files()]
            tables += parts
            lengths.append(sum(map(len, parts)))
        self.table = import_datasets().concatenate_datasets(tables)
        self._starts = np.cumsum([0, *lengths[:-1]])
        self._order: np.ndarray | None = None  # None: all rows, as they come
        if any(source.weight != 1 for source in self.sources):
            chosen = [
                start + weighted_choice(length, source.weight, seed)
                for source, start, length in zip(self.sources, self._starts, lengths, strict=True)
            ]
            self._order = np.concatenate(chosen)
            if not len(self._order):
                raise ValueError(f"the weights of data_path leave none of {sum(lengths)} samples; raise them")
        images, clips = (int((self.column(name) > 0).sum()) for name in ("images", "clips"))
        logger.info("%d samples, %d with images, %d with clips", len(self), images, clips)

    def _judge_bad_samples(self) -> None:
        """Stop at the first bad sample, or say how many will be skipped."""
        bad = np.flatnonzero(self.column("problem", valid=True))
        if not len(bad):
            return
        first = self.row(int(bad[0]))
        if self.maker.on_bad_sample == "stop":
            raise ValueError(first["problem"])
        if len(bad) == len(self):
            raise ValueError(f"none of the {len(self)} samples can be trained on; the first: {first['problem']}")
        logger.warning("%d of %d samples are malformed and will be skipped", len(bad), len(self))

    def __len__(self) -> int:
        return len(self.table) if self._order is None else len(self._order)

    @property
    def frames_of_a_clip(self) -> int:
        """Frames that are taken of a clip: the most, or `num_frames` where their rate alone is set."""
        sampling = self.maker.sampling
        most = sampling.num_frames if sampling.fps is None else sampling.max_frames or sampling.num_frames
        return min(most, sampling.max_frames or most)

    @property
    def bounds_frames(self) -> bool:
        """Whether no clip has more frames than `frames_of_a_clip`."""
        return self.maker.sampling.fps is None or self.maker.sampling.max_frames is not None

    def column(self, name: str, valid: bool = False) -> np.ndarray:
        """A column of all samples, in their order; with `valid` whether each has a value there."""
        values = self.table.data.column(name)
        array: np.ndarray = (values.is_valid() if valid else values).to_numpy()
        return array if self._order is None else array[self._order]

    @property
    def lengths(self) -> list[int]:
        """Length of each sample in words, an image and each frame of a clip counting for `IMAGE_LENGTH`."""
        pictures = self.column("images") + self.frames_of_a_clip * self.column("clips")
        length: list[int] = (self.column("words") + IMAGE_LENGTH * pictures).tolist()
        return length

    @property
    def modality_lengths(self) -> list[int]:
        """`lengths`, negative for samples with nothing to see, as LLaVA's sampler by modality wants them."""
        signs = np.where((self.column("images") > 0) | (self.column("clips") > 0), 1, -1)
        length: list[int] = (signs * np.maximum(self.lengths, 1)).tolist()
        return length

    def row(self, index: int) -> dict[str, Any]:
        """The table's row of a sample."""
        row: dict[str, Any] = self.table[self._place(index)]
        return row

    def sample(self, index: int) -> dict[str, Any]:
        """The sample as its file has it."""
        decoded: dict[str, Any] = json.loads(self.row(index)["sample"])
        return decoded

    def places(self) -> np.ndarray:
        """Rows of the table that are samples, each once, in rising order."""
        return np.arange(len(self.table)) if self._order is None else np.unique(self._order)

    def of_samples(self, values: np.ndarray) -> np.ndarray:
        """Values of the rows that `places` names, for all samples in their order."""
        return values if self._order is None else values[np.searchsorted(self.places(), self._order)]

    def source_of(self, place: int) -> DataSource:
        """The source that a row of the table comes from."""
        return self.sources[int(np.searchsorted(self._starts, place, side="right")) - 1]

    def _place(self, index: int) -> int:
        """Row of the table."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        index %= len(self)
        return index if self._order is None else int(self._order[index])

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.maker.item(self.row(index), self.source_of(self._place(index)).image_folder)


def weighted_choice(count: int, weight: float, seed: int) -> np.ndarray:
    """Which of `count` samples are seen in an epoch: all of them int(weight) times, and a part of them once more.

    Returns:
        Indices, round(count * weight) of them; the part is drawn by `seed` and stays in order.
    """
    whole = int(weight)
    drawn = np.random.default_rng(seed).permutation(count)[: round(count * (weight - whole))]
    return np.concatenate([*[np.arange(count)] * whole, np.sort(drawn)]).astype(np.int64)
