"""The training commands of LLaVA's forks run as they stand in their repositories, but for paths."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.launch_commands import PRUMERGE, PYRAMIDDROP, STF_FINETUNE, STF_PRETRAIN, TRIM, LaunchCommand
from tests.ranks import Ranks
from tests.results import check_losses, make_projector
from tests.tiny_world import make_readable, make_tiny_world, run_command

DROPPING_LAYERS = 25  # of a language model in which PyramidDrop drops after 8, 16 and 24
BLOCKS = 16  # of a vision tower of which STF fuses 8


def check_result(command: LaunchCommand, output: Path) -> None:
    """Two steps were taken, and the model has the repository's method."""
    check_losses(output, 2)
    config = json.loads((output / "config.json").read_text())
    assert config["reduction"] == command.reduction, command.origin


@pytest.mark.slow
def test_commands_that_name_train_mem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    world = make_tiny_world(tmp_path / "world", clip_layers=BLOCKS)
    make_readable(world.clip)
    projector = make_projector(world) / "mm_projector.bin"

    def start(command: LaunchCommand, projector: Path) -> tuple[LaunchCommand, Path, Ranks]:
        output = tmp_path / command.origin.replace("/", "-").replace(", ", "-")
        return command, output, Ranks(command.flags(world, output, projector), log=output.with_suffix(".log"))

    runs = [start(command, projector) for command in (STF_PRETRAIN, PRUMERGE, TRIM)]
    for command, output, run in runs:
        assert run.join(timeout=300) == [0], f"{command.origin}:\n{run.printed()[-4000:]}"
        check_result(command, output)
    command, output, run = start(STF_FINETUNE, runs[0][1] / "mm_projector.bin")
    assert run.join(timeout=300) == [0], run.printed()[-4000:]
    check_result(command, output)


@pytest.mark.slow
def test_pyramiddrops_command_through_the_shell(tmp_path: Path) -> None:
    world = make_tiny_world(tmp_path / "world", llm_layers=DROPPING_LAYERS)
    projector = make_projector(world) / "mm_projector.bin"
    line = PYRAMIDDROP.shell(world, tmp_path / "out", projector)
    result = run_command(["bash", "-c", line], DS_ACCELERATOR="cpu", WANDB_MODE="disabled")
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    check_result(PYRAMIDDROP, tmp_path / "out")
