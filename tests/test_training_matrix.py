"""{full, LoRA, projector} x {no DeepSpeed, ZeRO-2, ZeRO-3} x {baseline, a method a site}, on two ranks where sharded.

The baseline under ZeRO runs in tests/test_resume.py, with the same checks.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llava.reduction import available
from llava.train.settings.parsing import parse_args
from llava.train.train import train
from tests.ranks import train_in_ranks, zero_flags
from tests.results import KINDS, check_folder, check_losses, make_projector
from tests.tiny_world import TinyWorld, make_tiny_world

METHODS = {"none": "none", "prumerge": "prumerge", "pyramiddrop": "{name: pyramiddrop, layers: [1], ratios: [0.25]}"}
if "stf" in available()["projector"]:
    METHODS["stf"] = "{name: stf, kernel: 2, mbtf: [3, 1]}"
CELLS = [
    pytest.param(kind, stage, method, marks=pytest.mark.slow if stage else [])
    for stage in (0, 2, 3)
    for kind in KINDS
    for method in METHODS
    if not (stage and method == "none")
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return make_tiny_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def projectors(world: TinyWorld) -> dict[str, Path]:
    """For each method the folder of a projector to start from."""
    return {name: make_projector(world, reduction) for name, reduction in METHODS.items()}


@pytest.mark.parametrize(("kind", "stage", "method"), CELLS)
def test_cell(
    kind: str, stage: int, method: str, world: TinyWorld, projectors: dict[str, Path], tmp_path: Path
) -> None:
    """Exit code 0; finite losses; the right parts changed; the checkpoint on the way and the result open alone."""
    settings: dict[str, Any] = {**KINDS[kind], "reduction": METHODS[method], **zero_flags(stage)}
    settings["pretrain_mm_mlp_adapter"] = projectors[method] / "mm_projector.bin"
    settings["data_path"] = world.captions if kind == "projector" else world.data
    folder = tmp_path / "run"
    flags = world.flags(folder, **settings, save_strategy="steps", save_steps=1, max_steps=2)
    if stage:
        train_in_ranks(flags, 2, tmp_path / "log")
    else:
        train(parse_args(flags))
    check_losses(folder, steps=2)
    for part in (folder / "checkpoint-1", folder):
        check_folder(part, kind, world, projectors[method])
        reduction = json.loads((part / "config.json").read_text()).get("reduction") or {}
        assert [site["name"] for site in reduction.values()] == ([] if method == "none" else [method])
