"""The `llava` command."""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from llava import cli
from llava.model.builder import load_pretrained_model
from llava.reduction import available
from llava.train.launching import launch
from llava.train.launching.launch import ENTRY, launch_command
from llava.train.settings.config import LaunchOptions
from llava.train.settings.parsing import parse_args
from llava.train.train import train
from tests.tiny_world import SIDE, TinyWorld, make_tiny_world, run_command, run_python

LLAVA = str(Path(sys.executable).with_name("llava"))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return make_tiny_world(tmp_path_factory.mktemp("world"))


def recipe(world: TinyWorld, folder: Path, **settings: object) -> Path:
    file = folder / "recipe.yaml"
    flags = dict(flag[2:].split("=", 1) for flag in world.flags(folder / "out", **settings))
    file.write_text(json.dumps(flags))
    return file


def test_the_help_lists_commands_that_exist() -> None:
    result = CliRunner().invoke(cli.app, ["--help"])
    assert result.exit_code == 0
    for command in ("train", "eval", "report", "merge", "convert"):
        assert command in result.output
        assert CliRunner().invoke(cli.app, [command, "--help"]).exit_code == 0


def test_methods_are_listed_and_described() -> None:
    result = CliRunner().invoke(cli.app, ["methods"])
    assert result.exit_code == 0, result.output
    rows = {row.split("|")[1].strip(" `"): row for row in result.stdout.splitlines()[2:]}
    assert sorted(rows) == sorted(name for names in available().values() for name in names)
    assert rows["visionzip"].startswith("| `visionzip` | encoder | dominant=None, contextual=None, tokens=None")
    assert "| 64 |" in rows["tome"] and rows["stf"].endswith("| yes |")
    described = {name: CliRunner().invoke(cli.app, ["methods", name]).stdout for name in rows}
    assert "| contextual token | mean of target and members |" in described["visionzip"]
    assert "dominant=None  # tokens kept as they are" in described["visionzip"]
    assert "| centre | sum over the neighbours |" in described["prumerge"]
    assert "ratio=None  # of the patches: int(P * ratio) are kept" in described["prumerge_plus"]
    assert CliRunner().invoke(cli.app, ["methods", "nothing"]).exit_code != 0


def test_train_in_this_process(world: TinyWorld, tmp_path: Path) -> None:
    file = recipe(world, tmp_path, tune_mm_mlp_adapter=True, version="plain", data_path=world.captions)
    result = run_command([LLAVA, "train", str(file), "max_steps=1", "num_gpus=1"])
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out" / "mm_projector.bin").is_file()
    assert "training 1,856 of" in result.stderr
    shown, log = result.stderr.splitlines(), tmp_path / "out" / "logs" / "rank-0.log"
    assert str(log) in shown[0]
    assert all(re.match(r"\d\d:\d\d:\d\d \w", line) for line in shown) and len(shown) < 10
    assert result.stdout == ""
    assert "training 1,856 of" in log.read_text()


def test_version() -> None:
    result = CliRunner().invoke(cli.app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"llava {importlib.metadata.version('llava')}\n")


@pytest.mark.slow
def test_train_under_torchrun_without_deepspeed(world: TinyWorld, tmp_path: Path) -> None:
    file = recipe(world, tmp_path, lora_enable=True, lora_r=2, max_steps=1)
    result = run_command([LLAVA, "train", str(file), "num_gpus=2"])
    assert result.returncode == 0, result.stderr
    alone = tmp_path / "alone"
    train(parse_args(world.flags(alone, lora_enable=True, lora_r=2, max_steps=1, per_device_train_batch_size=4)))
    first = [
        json.loads((f / "trainer_state.json").read_text())["log_history"][0]["loss"] for f in (tmp_path / "out", alone)
    ]
    assert first[0] == pytest.approx(first[1], rel=1e-4)


def test_an_error_is_one_line(world: TinyWorld, tmp_path: Path) -> None:
    file = recipe(world, tmp_path, version="nosuch")
    result = run_command([LLAVA, "train", str(file)])
    assert result.returncode == 2
    assert result.stderr.startswith("error: --version: unknown conversation template 'nosuch'; known: ")
    assert "Traceback" not in result.stderr
    assert "Traceback" in run_command([LLAVA, "--debug", "train", str(file)]).stderr


def test_a_wrong_key_is_found_before_anything_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("lernin_rate: 1\n")
    monkeypatch.setattr(launch, "supervise", lambda *args, **kwargs: pytest.fail("started"))
    with pytest.raises(ValueError, match="did you mean learning_rate"):
        launch.train_from_config(str(file), [])


def test_how_a_run_is_launched() -> None:
    python = sys.executable
    assert launch_command(["--bf16=True"], LaunchOptions(num_gpus=1)) is None
    with_torchrun = launch_command(["--bf16=True"], LaunchOptions(num_gpus=2, master_port=1234))
    torchrun = [python, "-m", "llava.train.launching.torchrun", "--nproc_per_node", "2", "--master_port", "1234"]
    assert with_torchrun == [*torchrun, str(ENTRY), "--bf16=True"]
    flags, quiet = ["--deepspeed=scripts/zero2.json"], ["--log_level", "critical"]
    one = launch_command(flags, LaunchOptions(num_gpus=1))
    assert one == [python, "-m", "deepspeed.launcher.runner", *quiet, "--num_gpus", "1", str(ENTRY), *flags]
    many = launch_command(flags, LaunchOptions(hostfile="hosts"))
    assert many == [python, "-m", "deepspeed.launcher.runner", *quiet, "--hostfile", "hosts", str(ENTRY), *flags]
    with pytest.raises(ValueError, match="hostfile is read by DeepSpeed's launcher"):
        launch_command([], LaunchOptions(hostfile="hosts"))


def test_merge_writes_a_full_checkpoint(world: TinyWorld, tmp_path: Path) -> None:
    train(parse_args(world.flags(tmp_path / "lora", lora_enable=True, lora_r=2, reduction="prumerge")))
    result = CliRunner().invoke(cli.app, ["merge", str(tmp_path / "lora"), str(tmp_path / "full")])
    assert result.exit_code == 0, result.exception
    weights = load_file(tmp_path / "full" / "model.safetensors")
    assert not any("lora" in name for name in weights)
    pixels = torch.randn(1, 3, SIDE, SIDE)
    answers = []
    for folder in ("lora", "full"):
        _, model, _, _ = load_pretrained_model(str(tmp_path / folder), device="cpu", dtype=torch.float32)
        assert model.config.reduction == {"encoder": {"name": "prumerge"}}
        with torch.no_grad():
            answers.append(model(input_ids=torch.tensor([[1, -200, 60]]), images=pixels).logits)
    torch.testing.assert_close(*answers, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="dtype 'int4': choose one of auto, float16"):
        CliRunner().invoke(cli.app, ["merge", "a", "b", "--dtype", "int4"], catch_exceptions=False)


def test_eval_answers_questions(world: TinyWorld, tmp_path: Path) -> None:
    train(parse_args(world.flags(tmp_path / "run", max_steps=1)))
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps({"question_id": 0, "image": "red.png", "text": "What color?"}) + "\n")
    answers = tmp_path / "answers.jsonl"
    options = ["--question-file", str(questions), "--answers-file", str(answers), "--max-new-tokens", "2"]
    command = ["eval", str(tmp_path / "run"), *options, "--image-folder", str(world.images)]
    result = CliRunner().invoke(cli.app, command)
    assert result.exit_code == 0, result.exception
    assert json.loads(answers.read_text())["question_id"] == 0


def test_a_process_with_gloo_leaves_in_order(tmp_path: Path) -> None:
    """It has run its exit handlers, has written its output, and ends with the code it was given."""
    program = """
import atexit, os, sys, torch
from llava.train.launching.process import leave
atexit.register(lambda: open(sys.argv[1], "w").write("handled"))
torch.distributed.init_process_group("gloo", init_method="file://" + sys.argv[1] + ".store", rank=0, world_size=1)
torch.distributed.all_gather_into_tensor(torch.zeros(4), torch.ones(4), async_op=True)
sys.stdout.write("written")
leave(3)
"""
    result = run_python("-c", program, tmp_path / "file")
    assert (result.returncode, result.stdout) == (3, "written"), result.stderr
    assert (tmp_path / "file").read_text() == "handled"


def test_the_command_starts_quickly() -> None:
    """Asking for help must not import torch."""
    result = run_python("-c", "import sys, llava.cli; sys.exit('torch' in sys.modules)")
    assert result.returncode == 0
