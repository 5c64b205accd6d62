"""The training commands of LLaVA's forks run as they stand in their repositories, but for paths."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llava.train.settings.config import load_config
from tests.launch_commands import (
    PRUMERGE,
    PYRAMIDDROP,
    STF_FINETUNE,
    STF_PRETRAIN,
    TRIM,
    VIDEO_LLAVA_FINETUNE,
    VIDEO_LLAVA_LORA,
    VIDEO_LLAVA_PRETRAIN,
    LaunchCommand,
)
from tests.ranks import Ranks
from tests.results import check_losses, make_projector
from tests.test_arguments import settings_without_deepspeed
from tests.tiny_world import ROOT, make_readable, make_tiny_world, run_command

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


# What a recipe says otherwise than the release's command: the batch by itself, and how it is shared out and reported.
SHARED_OUT = {
    "deepspeed",
    "global_batch_size",
    "gradient_accumulation_steps",
    "report_to",
    "cache_dir",
    "lr_scheduler_kwargs",
}


@pytest.mark.parametrize(
    ("command", "stage"),
    [(VIDEO_LLAVA_PRETRAIN, "pretrain"), (VIDEO_LLAVA_FINETUNE, "finetune"), (VIDEO_LLAVA_LORA, "finetune_lora")],
)
def test_video_llavas_commands_are_its_recipes(command: LaunchCommand, stage: str, tmp_path: Path) -> None:
    """Several files for --data_path, --image_tower, and the length of a row with a clip's tokens."""
    world = make_tiny_world(tmp_path / "world")
    projector = tmp_path / "mm_projector.bin"
    projector.write_bytes(b"")
    theirs = settings_without_deepspeed(command.flags(world, tmp_path / "out", projector))
    data = json.loads(theirs["data_path"])
    assert len(data) == (2 if stage == "pretrain" else 3) and set(data) <= {str(world.data), str(world.captions)}
    paths = {"model_name_or_path": world.llm, "vision_tower": world.clip, "video_tower": world.clip}
    paths |= {"image_folder": world.images, "video_folder": world.images, "output_dir": tmp_path / "out"}
    paths |= {} if stage == "pretrain" else {"pretrain_mm_mlp_adapter": projector}
    given = [f"{name}={path}" for name, path in paths.items()]
    recipe = ROOT / "configs" / "video_llava" / f"{stage}.yaml"
    mine = settings_without_deepspeed(load_config(recipe, [*given, f"data_path={json.dumps(data)}", "max_steps=2"])[0])
    differing = {name for name in mine if mine[name] != theirs[name]}
    assert differing <= SHARED_OUT | {"num_frames"}
    assert (mine["num_frames"], theirs["num_frames"], mine["model_max_length"]) == (8, None, 3072)
    assert mine["global_batch_size"] == 8 * theirs["per_device_train_batch_size"]
