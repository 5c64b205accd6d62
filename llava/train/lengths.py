"""How many tokens each sample of a run has when its images are in place, without opening one."""

from __future__ import annotations

import json
import logging
from itertools import chain
from typing import Any

import numpy as np
from accelerate.utils import gather_object

from llava.data.dataset import LazySupervisedDataset
from llava.data.samples import BadSampleError
from llava.mm_utils import parse_grid_pinpoints
from llava.train.preflight.models import VisualCount, build_without_weights
from llava.train.preflight.samples import label, measure, row_chunks
from llava.train.settings.parsing import Arguments

logger = logging.getLogger(__name__)


def sample_lengths(arguments: Arguments, config: Any, dataset: LazySupervisedDataset) -> list[int]:
    """Tokens of each sample, up to `model_max_length`; every process must call it, and reads its share.

    Exact where a method keeps a fixed number of tokens. With anyres an image counts for the most that it may have, and
    with an adaptive method for `image_tokens_estimate`, or for all that it had before.

    Args:
        arguments: of the run.
        config: from `read_config`.
        dataset: of the run.

    Raises:
        BadSampleError: a sample that cannot be trained on, where such samples stop the run.
        ValueError: clips may have any number of frames.
    """
    training = arguments.training
    count = None
    if dataset.column("images").any() or dataset.column("clips").any():
        count = VisualCount(build_without_weights(arguments, config), arguments)
    visual = 0 if count is None else tokens_of_an_image(arguments, count)
    clip = 0 if count is None else dataset.frames_of_a_clip * tokens_of_a_frame(arguments, count)
    if dataset.column("clips").any() and not dataset.bounds_frames:
        raise ValueError(
            "--tokens_per_batch fills rows by lengths, and --video_fps alone does not say how many frames a clip has: "
            "set --max_frames"
        )
    places = dataset.places()
    share = np.array_split(places, training.world_size)[training.process_index]
    rows = chain.from_iterable(row_chunks(dataset, places=share))
    own = [_length(dataset, row, visual, clip, training.model_max_length) for row, *_ in rows]
    shares = gather_object([own]) if training.world_size > 1 else [own]
    lengths: list[int] = dataset.of_samples(np.array(list(chain.from_iterable(shares)))).tolist()
    return lengths


def tokens_of_an_image(arguments: Arguments, count: VisualCount) -> int:
    """The most tokens that an image has in the language model, or what is expected of an adaptive method."""
    training, data = arguments.training, arguments.data
    if count.is_adaptive and training.image_tokens_estimate:
        return training.image_tokens_estimate
    if count.is_adaptive:
        logger.warning(
            "the method is adaptive, so --tokens_per_batch counts all tokens of an image and leaves rows emptier than "
            "they could be: say with --image_tokens_estimate how many stay (image_tokens in an earlier run's log)"
        )
    if data.image_aspect_ratio == "anyres" and data.image_grid_pinpoints:
        return max(count.count(tuple(size)) for size in parse_grid_pinpoints(data.image_grid_pinpoints))
    return count.count((1, 1))


def tokens_of_a_frame(arguments: Arguments, count: VisualCount) -> int:
    """The same of a frame of a clip, which is never tiled, and may have a class token."""
    return (arguments.training.image_tokens_estimate if count.is_adaptive else 0) or count.count(None)


def _length(dataset: LazySupervisedDataset, row: dict[str, Any], visual: int, clip: int, max_length: int) -> int:
    try:
        if row["problem"] is not None:
            raise BadSampleError(row["problem"], row["kind"])
        ids, labels = dataset.maker.tokens(json.loads(row["sample"]), label(row))
    except BadSampleError:
        if dataset.maker.on_bad_sample == "stop":
            raise
        return 1  # the placeholder's
    images, clips = [visual] * int(row["images"]), [clip] * int(row["clips"])
    return min(measure(ids, labels, images, max_length, clips).total, max_length)
