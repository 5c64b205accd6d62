"""What belongs together: a checkpoint and the run that goes on from it, a folder and its kind, adapter and base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from llava.model.builder import load_pretrained_model
from llava.reduction import ReductionConfig
from llava.train.checkpoints.resume import (
    SETTINGS_FILE,
    check_checkpoint,
    check_result,
    checkpoint_to_resume,
    run_settings,
)
from llava.train.checkpoints.saving import RunKind
from llava.train.merge import merge_checkpoint
from llava.train.modeling import read_config
from llava.train.preflight.doctor import examine
from llava.train.settings.parsing import check_args, parse_args
from llava.train.settings.problems import SettingsError
from llava.train.train import train
from tests.tiny_world import ROOT, TinyWorld, make_tiny_world

LORA = {"lora_enable": True, "lora_r": 2, "max_steps": 1}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return make_tiny_world(tmp_path_factory.mktemp("world"))


# A checkpoint and a run ------------------------------------------------------------------------------------------


def settings_of(world: TinyWorld, processes: int = 1, **settings: Any) -> dict[str, Any]:
    arguments = check_args(world.flags(world.root / "out", **settings))
    read_config(arguments)
    return run_settings(arguments, ReductionConfig.parse(arguments.model.reduction), None, processes)


def compare(world: TinyWorld, folder: Path, old: dict[str, Any], new: dict[str, Any], allowed: str | None) -> None:
    """Go on, with `new` settings, from a checkpoint that a run with `old` ones wrote."""
    (folder / SETTINGS_FILE).write_text(json.dumps(settings_of(world, **old)))
    (folder / "optimizer.pt").write_bytes(b"")
    check_checkpoint(str(folder), settings_of(world, **new), allowed)


CHOSEN: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "learning_rate": ({}, {"learning_rate": 1e-3}),
    "lr_scheduler_type": ({}, {"lr_scheduler_type": "cosine"}),
    "warmup": ({}, {"warmup_ratio": 0.1}),
    "seed": ({}, {"seed": 3}),
    "bf16": ({}, {"bf16": True}),
    "per_device_train_batch_size": ({}, {"per_device_train_batch_size": 1}),
    "gradient_accumulation_steps": ({}, {"gradient_accumulation_steps": 2}),
    "processes": ({}, {"processes": 2}),
    "mm_vision_select_layer": ({}, {"mm_vision_select_layer": -1}),
    "model_max_length": ({}, {"model_max_length": 256}),
    "lora_alpha": (LORA, {**LORA, "lora_alpha": 4}),
    "version": ({}, {"version": "plain"}),
    "image_aspect_ratio": ({}, {"image_aspect_ratio": "square"}),
    "data_path": ({"streaming": True}, {"streaming": True, "data_path": "captions.json"}),
}


@pytest.mark.parametrize("name", CHOSEN)
def test_another_run_is_refused_unless_it_is_asked_for(
    name: str, world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(world.root)
    old, new = CHOSEN[name]
    compare(world, tmp_path, old, old, None)
    assert not caplog.records
    with pytest.raises(SettingsError, match=rf"(?s)  {name}: .* -> .*--resume_changed {name}"):
        compare(world, tmp_path, old, new, None)
    compare(world, tmp_path, old, new, f"seed, {name}")
    assert f"{name} changed since" in caplog.text


ZERO2 = {"deepspeed": str(ROOT / "scripts/zero2.json")}
FIXED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "zero_stage": (ZERO2, {}),
    "optim": ({}, {"optim": "sgd"}),
    "kind": ({}, {"lora_enable": True}),
    "lora_r": ({"lora_enable": True}, {"lora_enable": True, "lora_r": 2}),
    "mm_projector_type": ({}, {"mm_projector_type": "linear"}),
    "reduction": ({"reduction": "prumerge"}, {}),
    "mm_projector_lr": ({}, {"mm_projector_lr": 1e-3}),
    "processes": (ZERO2, {**ZERO2, "processes": 2}),
    "unfreeze_mm_vision_tower": ({}, {"unfreeze_mm_vision_tower": True}),
}


@pytest.mark.parametrize("name", FIXED)
def test_what_cannot_be_gone_on_from_is_refused(name: str, world: TinyWorld, tmp_path: Path) -> None:
    old, new = FIXED[name]
    for allowed in (None, name):
        with pytest.raises(SettingsError, match=rf"(?s)  {name}: .* -> .*{name}: the checkpoint is of no use"):
            compare(world, tmp_path, old, new, allowed)


def test_what_shapes_nothing_may_change(world: TinyWorld, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    new = {"max_steps": 9, "save_steps": 7, "dataloader_num_workers": 2, "logging_steps": 5}
    compare(world, tmp_path, {}, new, None)
    assert "max_steps changed since" in caplog.text
    assert "2 -> 9" in caplog.text


def test_a_checkpoint_without_settings_or_optimizer(world: TinyWorld, tmp_path: Path) -> None:
    """As an earlier version wrote it: its files show the kind, its config.json the method."""
    (tmp_path / "config.json").write_text(json.dumps({"reduction": {"encoder": {"name": "prumerge"}}}))
    (tmp_path / "mm_projector.bin").write_bytes(b"")
    settings = settings_of(world, tune_mm_mlp_adapter=True, reduction="prumerge")
    with pytest.raises(SettingsError, match=r"optimizer: its state is not in the checkpoint.*\n.*--resume_changed opt"):
        check_checkpoint(str(tmp_path), settings, None)
    check_checkpoint(str(tmp_path), settings, "optimizer")
    with pytest.raises(SettingsError, match="kind: projector -> full"):
        check_checkpoint(str(tmp_path), settings_of(world, reduction="prumerge"), "optimizer")
    with pytest.raises(SettingsError, match=r"reduction: \{.*prumerge.*\} -> none"):
        check_checkpoint(str(tmp_path), settings_of(world, tune_mm_mlp_adapter=True), "optimizer")
    with pytest.raises(SettingsError, match="--resume_changed colour: no setting"):
        check_checkpoint(None, settings, "colour")


def test_a_run_goes_on_with_another_rate(world: TinyWorld, tmp_path: Path) -> None:
    """The optimizer's state brings the old rate; with --resume_changed the new one counts."""
    flags: dict[str, Any] = {"tune_mm_mlp_adapter": True, "save_strategy": "steps", "save_steps": 2}
    train(parse_args(world.flags(tmp_path, **flags)))
    data = world.root / "fewer.json"
    data.write_text(json.dumps(json.loads(world.data.read_text())[:10]))
    longer = {**flags, "max_steps": 4}
    with pytest.raises(ValueError, match=r"(?s)data: 12 samples with 8 .* -> 10 samples with 7 .*resume_changed data"):
        train(parse_args(world.flags(tmp_path, **longer, data_path=data)))
    changed = {"learning_rate": 1e-3, "weight_decay": 0.1, "resume_changed": "learning_rate,weight_decay"}
    trainer = train(parse_args(world.flags(tmp_path, **longer, **changed)))
    assert trainer is not None
    rates = [line["learning_rate"] for line in trainer.state.log_history if "loss" in line]
    assert rates == pytest.approx([1e-2, 5e-3, 5e-4, 2.5e-4])  # linear to 0: over 2 steps, then over 4
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {0.1, 0.0}
    assert json.loads((tmp_path / "checkpoint-4" / SETTINGS_FILE).read_text())["learning_rate"] == 1e-3


def test_a_run_that_shall_not_go_on(world: TinyWorld, tmp_path: Path) -> None:
    training = check_args(world.flags(tmp_path, resume_from_checkpoint=False)).training
    assert checkpoint_to_resume(training) is None
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "trainer_state.json").write_text("{}")
    with pytest.raises(ValueError, match=r"--resume_from_checkpoint False, but .*checkpoint-1 is in the way"):
        checkpoint_to_resume(training)


# A folder and a kind ---------------------------------------------------------------------------------------------

RESULTS = {
    RunKind.LORA: ["adapter_config.json", "adapter_model.safetensors", "non_lora_trainables.bin"],
    RunKind.FULL: ["model.safetensors.index.json", "model-00001-of-00001.safetensors"],
    RunKind.PROJECTOR: ["mm_projector.bin"],
}


@pytest.mark.parametrize("kind", RunKind)
@pytest.mark.parametrize("other", RunKind)
def test_another_kinds_result_is_not_written_over(kind: RunKind, other: RunKind, tmp_path: Path) -> None:
    for name in RESULTS[other]:
        (tmp_path / name).write_bytes(b"")
    if kind is other:
        check_result(str(tmp_path), kind)
        return
    with pytest.raises(ValueError, match=rf"holds {RESULTS[other][0]} of another kind of run \({other.value}\)"):
        check_result(str(tmp_path), kind)


# An adapter and a base -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(world: TinyWorld) -> Path:
    train(parse_args(world.flags(world.root / "adapter", **LORA, reduction="prumerge")))
    return world.root / "adapter"


@pytest.fixture(scope="module")
def merged(world: TinyWorld, adapter: Path) -> Path:
    merge_checkpoint(str(adapter), world.root / "merged")
    return world.root / "merged"


def test_an_adapter_brings_its_method(world: TinyWorld, adapter: Path, tmp_path: Path) -> None:
    unset = dict.fromkeys(["mm_projector_type", "mm_vision_select_layer"])
    arguments = check_args(world.flags(tmp_path, **LORA, lora_weight_path=adapter, **unset))
    read_config(arguments)
    assert ReductionConfig.parse(arguments.model.reduction).to_dict() == {"encoder": {"name": "prumerge"}}
    assert (arguments.model.mm_projector_type, arguments.model.mm_vision_select_layer) == ("mlp2x_gelu", -2)
    added = "{encoder: {name: prumerge}, decoder: {name: fastv, layer: 1}}"
    read_config(check_args(world.flags(tmp_path, **LORA, lora_weight_path=adapter, reduction=added)))


@pytest.mark.parametrize("settings", [{"reduction": "none"}, {"reduction": "trim"}, {"mm_vision_select_layer": -1}])
def test_an_adapter_of_another_model(settings: dict[str, Any], world: TinyWorld, adapter: Path, tmp_path: Path) -> None:
    (name,) = settings
    with pytest.raises(ValueError, match=rf"--lora_weight_path .* was trained with {name}=.*leave --{name} out"):
        read_config(check_args(world.flags(tmp_path, **LORA, lora_weight_path=adapter, **settings)))


def test_an_adapter_counts_once(world: TinyWorld, adapter: Path, merged: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"adapter has been merged into .*merged already and would count twice"):
        load_pretrained_model(str(adapter), str(merged), device="cpu")
    start = {"model_name_or_path": merged, "lora_weight_path": adapter}
    with pytest.raises(ValueError, match=r"adapter has been merged into .*merged already and would count twice"):
        read_config(check_args(world.flags(tmp_path, **LORA, **start)))
    train(parse_args(world.flags(tmp_path / "second", **LORA, model_name_or_path=merged)))
    merge_checkpoint(str(tmp_path / "second"), tmp_path / "twice")
    first = json.loads((merged / "config.json").read_text())["merged_adapters"]
    both = json.loads((tmp_path / "twice" / "config.json").read_text())["merged_adapters"]
    assert (len(first), len(both)) == (1, 2)
    assert both[0] == first[0]


def test_a_model_with_an_adapter_says_how_to_write_it(adapter: Path, tmp_path: Path) -> None:
    model = load_pretrained_model(str(adapter), device="cpu")[1]
    with pytest.raises(ValueError, match="a LoRA adapter that is not merged: open it with merge_lora=True"):
        model.save_pretrained(tmp_path / "written")
    assert not (tmp_path / "written").exists()
    load_pretrained_model(str(adapter), device="cpu", merge_lora=True)[1].save_pretrained(tmp_path / "written")
    assert (tmp_path / "written" / "model.safetensors").is_file()


def test_the_doctor_knows_what_lies_in_the_folder(world: TinyWorld, adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "out")
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(dict(flag[2:].split("=", 1) for flag in world.flags(tmp_path / "out"))))
    errors = [finding.line() for finding in examine(file, []).errors]
    assert any("holds adapter_config.json of another kind of run (lora)" in line for line in errors), errors
