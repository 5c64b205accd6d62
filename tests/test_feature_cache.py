"""Stored features in place of pixels: the same losses, no image opened, and no cache that does not fit."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from llava import cli
from llava.data import items
from llava.data.feature_cache import SHARDS, FeatureCache, NotCachedError, ShardWriter, picture_key
from llava.data.stored_features import StoredFeatures, join_features, join_images
from llava.model.multimodal_encoder.vision_tower import VisionTower
from llava.train import cache_features
from llava.train.settings.parsing import parse_args, to_flags
from llava.train.train import train
from tests.tiny_world import TinyWorld, make_readable, make_tiny_world

ANYRES = {
    "image_aspect_ratio": "anyres",
    "image_grid_pinpoints": "[(32, 64), (64, 32)]",
    "mm_patch_merge_type": "spatial_unpad",
}
PYRAMID = "pyramiddrop: {name: pyramiddrop, layers: [1], ratios: [0.5]}"
RUNS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "prumerge": {"reduction": "prumerge"},
    "prumerge, fixed": {"reduction": "{name: prumerge, ratio: 0.5}"},
    "spatial": {"reduction": "{name: spatial, rows: 2, columns: 2}"},
    "stf": {"reduction": "{name: stf, mbtf: [3, 1]}"},
    "avgpool": {"reduction": "avgpool"},
    "anyres": {**ANYRES, "gradient_accumulation_steps": 2},
    "anyres, prumerge": {**ANYRES, "reduction": "prumerge"},
    "anyres, stf": {**ANYRES, "reduction": "{name: stf, mbtf: 1}"},
    "packed, pyramiddrop": {"reduction": "{name: pyramiddrop, layers: [1], ratios: [0.5]}", "packing": True},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    world = make_tiny_world(tmp_path_factory.mktemp("world"))
    make_readable(world.clip)
    return world


def flags(world: TinyWorld, folder: Path, **settings: Any) -> list[str]:
    """Of a run of float32 features beside its output."""
    values = {"feature_cache": folder.parent / "cache", "feature_cache_dtype": "float32", "max_steps": 3, **settings}
    return world.flags(folder, **values)


def losses(world: TinyWorld, folder: Path, **settings: Any) -> list[float]:
    trainer = train(parse_args(flags(world, folder, **settings)))
    assert trainer is not None
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture
def no_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on nothing opens an image or runs the tower."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("pixels are not needed")

    monkeypatch.setattr(items, "open_picture", refuse)
    monkeypatch.setattr(VisionTower, "forward", refuse)
    monkeypatch.setattr("llava.train.preflight.samples.LOOKED_AT", 0)


# Losses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS)
def test_losses_are_those_from_pixels(name: str, world: TinyWorld, tmp_path: Path, request: Any) -> None:
    settings = {**RUNS[name], "preflight_seconds": 0}
    expected = losses(world, tmp_path / "pixels", feature_cache=None, **settings)
    cache_features.main(flags(world, tmp_path / "stored", **settings))
    request.getfixturevalue("no_pixels")
    assert losses(world, tmp_path / "stored", **settings) == pytest.approx(expected, abs=1e-5)
