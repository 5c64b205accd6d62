"""Checks of a run's feature cache: whether it fits and is complete, and what disk one would take."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llava.data.dataset import LazySupervisedDataset
from llava.data.feature_cache import Manifest
from llava.train.feature_key import check_cache_fits, check_fixed, inner_model, use_feature_cache
from llava.train.pictures import Pictures, list_pictures
from llava.train.preflight.findings import NOTE, Report
from llava.train.preflight.memory import GIB
from llava.train.preflight.models import stand_in
from llava.train.preflight.samples import FEATURES, check_images_exist
from llava.train.settings.parsing import Arguments


def check_feature_cache(arguments: Arguments, model: Any, dataset: LazySupervisedDataset, report: Report) -> None:
    """Look for every picture in the cache, and state its disk.

    Args:
        arguments: of the run, with `feature_cache` set.
        model: from `build_without_weights`.
        dataset: of the run, whose rows need not be good; it still reads pixels afterwards.
        report: gets the findings.
    """
    folder = Path(str(arguments.data.feature_cache))
    with report.catch(FEATURES):
        check_fixed(model)
        if Manifest.read(folder) is None:
            state_disk(arguments, model, dataset)
        use_feature_cache(dataset, arguments)
        try:
            check_cache_fits(dataset, model, arguments)
            problems = len(report.errors)
            check_images_exist(dataset, report, seconds=float("inf"))
            cache = dataset.maker.feature_cache
            if cache is not None and len(report.errors) == problems:
                text = f"{folder} holds all pictures of the data ({len(cache)}, {cache.total_bytes / GIB:.2f} GiB)"
                report.add(FEATURES, text, NOTE)
        finally:
            dataset.maker.feature_cache = None


def state_disk(arguments: Arguments, model: Any, dataset: LazySupervisedDataset) -> None:
    """Say what a cache that is not there yet will take.

    Raises:
        ValueError: always: the run cannot begin without it.
    """
    folder = Path(str(arguments.data.feature_cache)).absolute()
    pictures = list_pictures(dataset)
    tiles = [1]
    if arguments.data.image_aspect_ratio == "anyres":
        some = Pictures(dataset, pictures).some()
        decoded = [one for one in map(some.__getitem__, range(len(some))) if one.pixels is not None]
        tiles = [len(one.pixels) for one in decoded if one.pixels is not None] or tiles
    each = tile_bytes(arguments, model) * sum(tiles) / len(tiles)
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    most = "up to" if inner_model(model).reducers().are_adaptive else "about"
    raise ValueError(
        f"--feature_cache {folder} holds no features yet: llava cache-features makes them. {len(pictures)} pictures "
        f"take {most} {len(pictures) * each / GIB:.2f} GiB ({each / 1024:.1f} KiB each); "
        f"{shutil.disk_usage(existing).free / GIB:.2f} GiB are free in {existing}"
    )


def tile_bytes(arguments: Arguments, model: Any) -> float:
    """Bytes of the features of one tile; of an adaptive method, of all its patches."""
    inner = inner_model(model)
    tower, reducers = inner.get_vision_tower(), inner.reducers()
    tokens = tower.num_patches
    if not reducers.are_adaptive:
        tokens = stand_in(tower).reduced(replace(reducers, projector=None)).features.shape[1]
    blocks = len(set(tower.blocks_read(inner.projector_reducer)))
    dtype: torch.dtype = getattr(torch, arguments.data.feature_cache_dtype)
    return float(tokens * blocks * tower.hidden_size * dtype.itemsize)
