"""LoRA-finetuning with every method by one flag, and its checkpoint opened with the method."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llava.model.builder import load_pretrained_model
from llava.reduction import available
from llava.train.settings.parsing import parse_args
from llava.train.train import train
from tests.methods_table import NAMES, flag
from tests.tiny_world import SIDE, TinyWorld, make_readable, make_tiny_world

FLAGS = {name: flag(name) for name in NAMES}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    world = make_tiny_world(tmp_path_factory.mktemp("world"), llm_layers=4)
    make_readable(world.clip)
    return world


@pytest.mark.parametrize("name", FLAGS)
def test_lora_with_each_method(name: str, world: TinyWorld, tmp_path: Path) -> None:
    flags = world.flags(tmp_path, lora_enable=True, lora_r=4, lora_alpha=8, reduction=FLAGS[name])
    trainer = train(parse_args(flags))
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    patches = trainer.model.get_vision_tower().num_patches
    for entry in logs if name not in available()["decoder"] else ():
        assert 1 <= entry["visual_tokens_min"] <= entry["visual_tokens"] <= entry["visual_tokens_max"] <= patches + 1
    (method,) = json.loads((tmp_path / "config.json").read_text())["reduction"].values()
    assert method["name"] == name
    _, model, *_ = load_pretrained_model(tmp_path, world.llm, device="cpu", dtype=torch.float32)
    pixels = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    texts = {"texts": ["what color is it"]}
    ids = torch.tensor([[1, 50, -200, 60, 61]])
    with torch.no_grad():
        reduced = model(input_ids=ids, images=pixels, **texts).logits
        trained = trainer.model.eval()(input_ids=ids, images=pixels, **texts).logits
    assert reduced.shape[1] < 4 + patches
    torch.testing.assert_close(reduced, trained, atol=1e-4, rtol=1e-4)


def test_another_methods_checkpoint_is_not_gone_on_from(world: TinyWorld, tmp_path: Path) -> None:
    saves = {"lora_enable": True, "lora_r": 4, "save_strategy": "steps", "save_steps": 1}
    train(parse_args(world.flags(tmp_path, **saves, max_steps=1)))
    with pytest.raises(
        ValueError, match=r"checkpoint-1 was written by a run with other settings:\n  reduction: none -> .*'fastv'"
    ):
        train(parse_args(world.flags(tmp_path, **saves, reduction=FLAGS["fastv"])))
