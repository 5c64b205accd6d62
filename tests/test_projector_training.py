"""Both stages with each of the projector's methods: what learns, at which rate, and what is written and read."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from llava.model.builder import load_pretrained_model
from llava.train.checkpoints.saving import part_of
from llava.train.merge import merge_checkpoint
from llava.train.trainer import parameter_group_names
from tests.test_training import LORA, PROJECTOR, build, logits, run, trained_names
from tests.tiny_world import TinyWorld, make_tiny_world

METHODS = {
    "stf-release": "{name: stf, mbtf: 1}",
    "stf-paper": "{name: stf, mbtf: 3, variant: paper}",
    "avgpool": "avgpool",
    "token_concat": "token_concat",
}
STF = METHODS["stf-release"]
PARTS = ("mm_projector.0", "mm_projector.2", "mm_projector_crosslayer.0", "mm_projector_crosslayer.2")
STF_NAMES = {f"model.{part}.{kind}" for part in PARTS for kind in ("weight", "bias")}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return make_tiny_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def pretrained(world: TinyWorld) -> Path:
    """`mm_projector.bin` of STF, with its config.json beside it."""
    run(world, world.root / "stf", **PROJECTOR, reduction=STF)
    return world.root / "stf" / "mm_projector.bin"


def read_bin(path: Path) -> dict[str, Tensor]:
    return torch.load(path, weights_only=True)


def changed_parts(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {part_of(name) for name, weight in after.items() if not torch.equal(weight, before[name])}


def weights_of(model: Any) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("name", METHODS)
def test_two_stages(name: str, world: TinyWorld, tmp_path: Path) -> None:
    """The projector alone, then the projector and the language model; never the tower."""
    settings: dict[str, Any] = {"reduction": METHODS[name]}
    start, _ = build(world, tmp_path / "start", **PROJECTOR, **settings)
    first = run(world, tmp_path / "first", **PROJECTOR, **settings)
    assert changed_parts(weights_of(start), weights_of(first.model)) == {"projector"}
    written = read_bin(tmp_path / "first" / "mm_projector.bin")
    assert written.keys() == {n for n, _ in start.named_parameters() if part_of(n) == "projector"}

    settings["pretrain_mm_mlp_adapter"] = tmp_path / "first" / "mm_projector.bin"
    start, _ = build(world, tmp_path / "start", **settings)
    assert all(torch.equal(start.get_parameter(n), weight) for n, weight in written.items())
    second = run(world, tmp_path / "second", **settings)
    assert changed_parts(weights_of(start), weights_of(second.model)) == {"projector", "language_model"}
    learned = {n for n, weight in second.model.named_parameters() if not torch.equal(weight, start.get_parameter(n))}
    assert learned >= written.keys()
    torch.testing.assert_close(
        logits(tmp_path / "second"), second.model.eval()(**one_prompt()).logits[0, -1], atol=1e-4, rtol=1e-4
    )


def one_prompt() -> dict[str, Tensor]:
    """What `logits` asks."""
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return {"input_ids": torch.tensor([[1, 50, -200, 60, 61]]), "images": pixels}


def test_the_projectors_rate_is_that_of_both_modules(world: TinyWorld, tmp_path: Path) -> None:
    model, _ = build(world, tmp_path, reduction=STF)
    groups = parameter_group_names(model, trained_names(model), {"projector"})
    assert set(groups["projector", True]) == STF_NAMES
    trainer = run(world, tmp_path, reduction=STF, mm_projector_lr=3e-4, max_steps=1, lr_scheduler_type="constant")
    named = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    own = [group for group in trainer.optimizer.param_groups if group["lr"] == 3e-4]
    assert {named[id(parameter)] for group in own for parameter in group["params"]} == STF_NAMES


def test_lora_writes_both_modules_and_merges(world: TinyWorld, pretrained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "lora"
    run(world, folder, **LORA, reduction=STF, pretrain_mm_mlp_adapter=pretrained, learning_rate=0.05)
    others = read_bin(folder / "non_lora_trainables.bin")
    assert {name.removeprefix("base_model.model.") for name in others} == STF_NAMES
    before = read_bin(pretrained)
    assert not any(torch.equal(others[f"base_model.model.{name}"], before[name]) for name in STF_NAMES)
    merge_checkpoint(str(folder), tmp_path / "merged", model_base=str(world.llm))
    torch.testing.assert_close(logits(tmp_path / "merged"), logits(folder, world.llm), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("settings", [PROJECTOR, LORA, {}], ids=["projector", "lora", "full"])
def test_an_interrupted_run_goes_on(settings: dict[str, Any], world: TinyWorld, tmp_path: Path) -> None:
    schedule = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2, "reduction": METHODS["stf-paper"]}
    whole = run(world, tmp_path, **settings, **schedule)
    for file in tmp_path.glob("*.*"):
        if file.is_file():
            file.unlink()
    again = run(world, tmp_path, **settings, **schedule)
    for name, weight in whole.model.named_parameters():
        torch.testing.assert_close(again.model.get_parameter(name), weight, atol=1e-5, rtol=0)


def test_the_projectors_file_tells_the_method(
    world: TinyWorld, pretrained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By the config.json beside it, or, where there is none, by its weights; what the run names goes first."""
    with caplog.at_level(logging.INFO, "llava"):
        model, _ = build(world, tmp_path / "run", pretrain_mm_mlp_adapter=pretrained)
    assert model.config.reduction == {"projector": {"name": "stf", "mbtf": 1}}
    assert re.search(r"mm_projector.bin was trained with .*'stf'.*: the run takes that method", caplog.text)
    alone = tmp_path / "mm_projector.bin"
    torch.save(read_bin(pretrained), alone)
    model, _ = build(world, tmp_path / "run", pretrain_mm_mlp_adapter=alone)
    assert model.config.reduction["projector"] == {"name": "stf", "variant": "release", "kernel": 2, "mbtf": 1}
    with_decoder = "{name: fastv, layer: 1}"  # leaves the projector open
    model, _ = build(world, tmp_path / "run", pretrain_mm_mlp_adapter=alone, reduction=with_decoder)
    assert model.config.reduction["projector"] == {"name": "stf", "variant": "release", "kernel": 2, "mbtf": 1}
    assert model.config.reduction["decoder"] == {"name": "fastv", "layer": 1}
    for other in ("none", "avgpool"):
        with pytest.raises(ValueError, match=r"unexpected \(4\): mm_projector_crosslayer.*wrong shape|crosslayer"):
            build(world, tmp_path / "run", pretrain_mm_mlp_adapter=alone, reduction=other)


def test_both_modules_are_demanded(world: TinyWorld, pretrained: Path, tmp_path: Path) -> None:
    weights = read_bin(pretrained)
    plain = {name: weight for name, weight in weights.items() if "crosslayer" not in name}
    torch.save(plain, tmp_path / "mm_projector.bin")
    with pytest.raises(ValueError, match=r"missing \(4\): mm_projector_crosslayer.0.bias"):
        build(world, tmp_path / "run", pretrain_mm_mlp_adapter=tmp_path / "mm_projector.bin", reduction=STF)
    torch.save({**weights, "model.mm_projector.4.bias": torch.ones(1)}, tmp_path / "mm_projector.bin")
    with pytest.raises(ValueError, match=r"unexpected \(1\): mm_projector.4.bias"):
        build(world, tmp_path / "run", pretrain_mm_mlp_adapter=tmp_path / "mm_projector.bin", reduction=STF)


def test_finetuning_goes_on_from_a_checkpoint_with_its_method_or_another(
    world: TinyWorld, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(world, tmp_path / "stf", reduction=STF)
    weights = load_file(tmp_path / "stf" / "model.safetensors")
    given = {"model_name_or_path": tmp_path / "stf", "mm_projector_type": None}
    model, _ = build(world, tmp_path / "run", **given)
    assert all(torch.equal(model.get_parameter(name), weights[name]) for name in STF_NAMES)
    assert "its projector starts anew" not in caplog.text
    model, _ = build(world, tmp_path / "run", **given, reduction="{name: fastv, layer: 1}")
    assert model.config.reduction == {"projector": {"name": "stf", "mbtf": 1}, "decoder": {"name": "fastv", "layer": 1}}
    assert "its projector starts anew" not in caplog.text
    model, _ = build(world, tmp_path / "run", **given, reduction="none")
    assert "its projector starts anew" in caplog.text
    assert model.get_model().mm_projector_crosslayer is None
    assert all(weight.dtype == torch.float32 for weight in model.get_model().mm_projector.parameters())


def test_a_projector_without_weights_is_no_trouble(world: TinyWorld, tmp_path: Path) -> None:
    """mm_projector_type counts where neighbours are averaged."""
    trainer = run(world, tmp_path, reduction="avgpool", mm_projector_type="linear", max_steps=1)
    assert isinstance(trainer.model.get_model().mm_projector, torch.nn.Linear)
    opened = load_pretrained_model(tmp_path, device="cpu")[1]
    assert opened.config.reduction == {"projector": {"name": "avgpool"}}
