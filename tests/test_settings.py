"""Settings of the wrong kind or range: every one is named, by the parser and by the doctor, before anything is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llava.data.sources import parse_data_path
from llava.reduction import ReductionConfig
from llava.train.preflight.doctor import examine
from llava.train.settings.arguments import TrainingArguments
from llava.train.settings.config import load_config
from llava.train.settings.parsing import check_args, parse_args
from llava.train.settings.problems import SettingsError
from llava.train.train import train
from tests.tiny_world import ROOT, TinyWorld, make_tiny_world, run_command


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return make_tiny_world(tmp_path_factory.mktemp("world"))


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"learning_rate": -1}, "--learning_rate -1.0: expected a number 0 or more"),
    ({"learning_rate": 0}, "--learning_rate 0 trains nothing"),
    ({"label_smoothing_factor": 0.1}, "--label_smoothing_factor does not go with images"),
    ({"dataloader_persistent_workers": True}, "--dataloader_persistent_workers needs --dataloader_num_workers above 0"),
    ({"learning_rate": "nan"}, "--learning_rate nan: expected a finite number"),
    ({"mm_projector_lr": -1}, "--mm_projector_lr -1.0: expected"),
    ({"per_device_train_batch_size": 0}, "--per_device_train_batch_size 0: expected a number 1 or more"),
    ({"gradient_accumulation_steps": 0}, "--gradient_accumulation_steps 0: expected"),
    ({"num_train_epochs": 0}, "--num_train_epochs 0.0: expected a number above 0"),
    ({"num_train_epochs": "inf"}, "--num_train_epochs inf: expected a finite number"),
    ({"max_steps": 0}, "--max_steps 0: expected at least 1, or -1"),
    ({"save_strategy": "steps", "save_steps": 0}, "--save_steps 0.0: expected a whole number of steps"),
    ({"save_strategy": "steps", "save_steps": 1.5}, "--save_steps 1.5: expected a whole number of steps"),
    ({"logging_steps": -1}, "--logging_steps -1.0: expected"),
    ({"save_total_limit": -1}, "--save_total_limit -1: expected"),
    ({"dataloader_num_workers": -1}, "--dataloader_num_workers -1: expected"),
    ({"dataloader_prefetch_factor": 2}, "--dataloader_prefetch_factor has no effect"),
    ({"adam_beta1": 1}, "--adam_beta1 1.0: expected a number from 0 to below 1"),
    ({"warmup_ratio": 1}, "--warmup_ratio 1.0: expected"),
    ({"seed": -1}, "--seed -1: expected"),
    ({"model_max_length": 0}, "--model_max_length 0: expected"),
    ({"lora_dropout": 1}, "--lora_dropout 1.0: expected"),
    ({"preflight_seconds": "nan"}, "--preflight_seconds nan: expected"),
    ({"global_batch_size": -4}, "--global_batch_size -4: expected"),
    ({"mm_projector_type": "mlp0x_gelu"}, "--mm_projector_type mlp0x_gelu: expected linear, mlpNx_gelu"),
    ({"image_grid_pinpoints": "[(0, 336)]"}, r"--image_grid_pinpoints \[\(0, 336\)\]: expected pairs"),
    ({"image_grid_pinpoints": "[]"}, r"--image_grid_pinpoints \[\]: expected pairs"),
    ({"lr_scheduler_type": "cosine_with_min_lr"}, "--lr_scheduler_type cosine_with_min_lr .*min_lr"),
    ({"lr_scheduler_kwargs": "{"}, "--lr_scheduler_kwargs {: not valid JSON"),
    ({"lr_scheduler_kwargs": '{"cycles": 1}'}, "--lr_scheduler_kwargs .*cycles"),
    ({"activation_checkpointing_kwargs": "x"}, "--activation_checkpointing_kwargs x: not valid JSON"),
    ({"accelerator_config": "gone.json"}, "--accelerator_config gone.json: not valid JSON"),
    ({"deepspeed": ROOT}, "--deepspeed .*: no JSON file"),
    ({"deepspeed": '{"zero_optimization": 3}'}, '"zero_optimization" needs a "stage" from 0 to 3'),
    ({"lora_r": "x" * 5000}, r"--lora.r: invalid int value: 'x+ \.\.\. x+'"),
    ({"eval_strategy": "steps"}, "--eval_strategy steps: a training run has no data to evaluate on"),
    ({"load_best_model_at_end": True}, "--load_best_model_at_end .* need evaluations"),
    ({"bf16": "maybe"}, "--bf16: Truthy value expected"),
    ({"fp16": True, "use_cpu": True}, "--fp16 True needs a GPU"),
    ({"output_dir": "$HOME/out"}, r"--output_dir \$HOME/out: no shell replaces variables here"),
    ({"output_dir": "[a,b]"}, r"--output_dir \[a,b\]: expected one path"),
    ({"output_dir": "~nobody-of-this-name/out"}, "--output_dir ~nobody.*: there is no such user"),
    ({"output_dir": "x" * 300}, "--output_dir 'xxx.*': no file system takes such a name"),
    ({"output_dir": ROOT / "README.md"}, r"--output_dir .*README\.md is a file"),
    ({"output_dir": ROOT / "README.md" / "out"}, r"--output_dir .*README\.md is a file"),
    ({"vision_tower": "[a]"}, r"--vision_tower \[a\]: expected one path"),
    ({"image_folder": "$DATA"}, r"--image_folder \$DATA: no shell"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG, ids=[str(settings)[:60] for settings, _ in WRONG])
def test_a_wrong_value_names_its_flag(settings: dict[str, Any], message: str, world: TinyWorld, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=message) as caught:
        check_args(world.flags(tmp_path / "out", **settings))
    assert len(caught.value.problems) == 1


def test_all_problems_are_told_at_once(world: TinyWorld, tmp_path: Path) -> None:
    wrong = {"learning_rate": -1, "nosuch": 1, "bf16": "maybe", "image_folder": "gone", "optim": "adamx", "lora_r": 0}
    wrong |= {"num_gpus": "two", "hostfile": "gone", "per_device_train_batch_size": 0, "reduction": "prunemerge"}
    settings = dict(flag[2:].split("=", 1) for flag in world.flags(tmp_path / "out"))
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps({**settings, **wrong}))
    errors = [finding.line() for finding in examine(file, []).errors]
    assert all(line.startswith("error: settings: ") for line in errors)
    assert len(errors) == len(wrong)
    for name in wrong:
        assert any(name in line or str(wrong[name]) in line for line in errors), (name, errors)


@pytest.mark.parametrize("flag", ["save_strategy", "eval_strategy", "logging_strategy"])
def test_yamls_no_is_a_choice(flag: str, world: TinyWorld, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(f"{flag}: no\n")
    flags, _ = load_config(tmp_path / "a.yaml")
    training = check_args([*world.flags(tmp_path / "out"), *flags]).training
    assert getattr(training, flag) == "no"


def test_yamls_no_is_none(world: TinyWorld, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "lora_bias: no\nreport_to: off\nreduction: no\ndeepspeed: null\nlora_weight_path: no"
    )
    flags, _ = load_config(tmp_path / "a.yaml")
    arguments = check_args([*world.flags(tmp_path / "out"), *flags])
    assert (arguments.training.lora_bias, arguments.training.report_to) == ("none", "none")
    assert not ReductionConfig.parse(arguments.model.reduction)
    assert not arguments.training.lora_weight_path


def test_scientific_notation(world: TinyWorld, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("learning_rate: 2e-5\nmax_steps: 1e3\nreduction: {encoder: {name: prumerge}}\n")
    flags, _ = load_config(tmp_path / "a.yaml", ["reduction.encoder.ratio=0.000001", "weight_decay=1e-06"])
    arguments = check_args([*world.flags(tmp_path / "out"), *flags])
    assert (arguments.training.learning_rate, arguments.training.max_steps) == (2e-5, 1000)
    assert arguments.training.weight_decay == 1e-6
    assert ReductionConfig.parse(arguments.model.reduction).encoder["ratio"] == 1e-6
    assert parse_data_path(json.dumps({"path": str(world.data), "weight": 1e-6}))[0].weight == 1e-6


def test_home_is_written_out(world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(world.root))
    paths = {"model_name_or_path": "~/llm", "vision_tower": "~/clip", "image_folder": "~/images", "output_dir": "~/out"}
    arguments = check_args(world.flags(tmp_path, **paths))
    assert arguments.model.model_name_or_path == str(world.llm)
    assert arguments.model.vision_tower == str(world.clip)
    assert arguments.data.image_folder == str(world.images)
    assert arguments.training.output_dir == str(world.root / "out")


def test_the_template_is_llavas_by_default(world: TinyWorld, tmp_path: Path) -> None:
    """LLaVA's own default, v0, names no template there either, and means vicuna_v1."""
    assert check_args(world.flags(tmp_path, version=None)).model.version == "v1"


def test_fp16_without_a_gpu(tmp_path: Path) -> None:
    if torch.accelerator.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="--fp16 True needs a GPU, and this run has none"):
        TrainingArguments(output_dir=str(tmp_path), fp16=True)


def test_a_hostfile_that_does_not_exist(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("hostfile: hosts\n")
    with pytest.raises(ValueError, match="hostfile=hosts: no such file"):
        load_config(tmp_path / "a.yaml")
    script = ["bash", "scripts/v1_5/finetune.sh"]
    result = run_command(script, HOSTFILE="hosts", DS_ACCELERATOR="cpu")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "HOSTFILE=hosts: no such file" in result.stderr


@pytest.mark.parametrize("reduction", ["prumerge", "none", "trim_more", '{"encoder": {"name": "prumerge"}}'])
def test_two_methods_in_the_environment(reduction: str) -> None:
    result = run_command(["bash", "scripts/v1_5/finetune.sh"], METHOD="trim", REDUCTION=reduction, DS_ACCELERATOR="cpu")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert f"METHOD=trim and REDUCTION={reduction} ask for different methods" in result.stderr


# Runs that learn nothing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_max_length": 8}, "none of 12 samples .* has a token to learn among the first 8"),
        ({"model_max_length": 8, "preflight_seconds": 0}, "nothing was learned in 2 steps, and no model is written"),
        ({"model_max_length": 8, "streaming": True, "max_steps": 11}, "nothing was learned in 10 steps"),
        ({"dataloader_drop_last": True, "per_device_train_batch_size": 20}, "leaves no batch of 12 samples"),
    ],
    ids=["checked", "unchecked", "streamed", "no batch"],
)
def test_nothing_to_learn(settings: dict[str, Any], message: str, world: TinyWorld, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        train(parse_args(world.flags(tmp_path / "out", tune_mm_mlp_adapter=True, **settings)))
    assert not (tmp_path / "out" / "mm_projector.bin").exists()
