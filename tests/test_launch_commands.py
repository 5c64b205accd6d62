"""The training commands of LLaVA's forks run as they stand in their repositories, but for paths."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.launch_commands import PRUMERGE, PYRAMIDDROP, STF_FINETUNE, STF_PRETRAIN, TRIM, LaunchCommand
from tests.ranks import Ranks
from tests.results import check_losses, make_projector
from tests.tiny_world import TinyWorld, make_readable, make_tiny_world

LAYERS = 25  # of the language model: PyramidDrop drops after 8, 16 and 24
BLOCKS = 9  # of the vision tower: STF fuses 8


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    world = make_tiny_world(tmp_path_factory.mktemp("world"), LAYERS, BLOCKS)
    make_readable(world.clip)
    return world


def start(command: LaunchCommand, world: TinyWorld, output: Path, projector: Path | None) -> Ranks:
    os.environ["WANDB_MODE"] = "disabled"
    return Ranks(command.flags(world, output, projector), log=output.with_suffix(".log"))


def check(run: Ranks, command: LaunchCommand, output: Path) -> None:
    assert run.join() == [0], f"{command.origin}:\n{run.printed()[-4000:]}"
    check_losses(output, 2)
    config = json.loads((output / "config.json").read_text())
    assert config["reduction"] == command.reduction, command.origin


import time


@pytest.mark.parametrize("c", [PRUMERGE, TRIM, PYRAMIDDROP, STF_PRETRAIN])
def test_x(world: TinyWorld, tmp_path: Path, c) -> None:
    t = time.time()
    p = make_projector(world) / "mm_projector.bin"
    print("proj", time.time() - t)
    t = time.time()
    check(start(c, world, tmp_path / "o", p), c, tmp_path / "o")
    print(c.origin, time.time() - t)
