"""LoRA-finetuning with every method by one flag, and its checkpoint opened with the method."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import CLIPModel

from llava.model.builder import load_pretrained_model
from llava.reduction import available
from llava.train.settings.config import load_config
from llava.train.settings.parsing import parse_args
from llava.train.train import train
from tests.methods_table import NAMES, flag
from tests.tiny_world import ROOT, SIDE, TinyWorld, make_readable, make_tiny_world

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


def test_visionzips_tuning_starts_at_a_finished_checkpoint(world: TinyWorld, tmp_path: Path) -> None:
    """As its recipe says: the projector alone, on a part of the data; the rest is the checkpoint's."""
    flags, _ = load_config(ROOT / "configs" / "visionzip" / "finetune_projector.yaml")
    said = dict(flag[2:].split("=", 1) for flag in flags)
    assert "pretrain_mm_mlp_adapter" not in said
    (data,) = json.loads(said["data_path"])
    finished, tuned = tmp_path / "llava", tmp_path / "tuned"
    train(parse_args(world.flags(finished)))
    settings = {
        "model_name_or_path": finished,
        "tune_mm_mlp_adapter": said["tune_mm_mlp_adapter"],
        "data_path": json.dumps([{**data, "path": str(world.data), "weight": 0.5}]),
        "reduction": FLAGS["visionzip"],
    }
    train(parse_args(world.flags(tuned, **settings)))
    _, before, *_ = load_pretrained_model(finished, device="cpu", dtype=torch.float32)
    _, after, *_ = load_pretrained_model(tuned, finished, device="cpu", dtype=torch.float32)
    assert after.get_model().encoder_reducer.method == "visionzip"
    weights = dict(after.named_parameters())
    for name, weight in before.named_parameters():
        assert torch.equal(weight, weights[name]) != ("mm_projector" in name), name
    assert data["weight"] == 0.1


@pytest.mark.parametrize("name", available()["tower"])
def test_a_tower_that_is_trained(name: str, world: TinyWorld, tmp_path: Path) -> None:
    """With the blocks in which the method acts checkpointed; each that is read learns."""
    settings = {"unfreeze_mm_vision_tower": True, "gradient_checkpointing": True, "max_steps": 1}
    trainer = train(parse_args(world.flags(tmp_path, **settings, reduction=FLAGS[name])))
    own = trainer.model.get_vision_tower().vision_tower.state_dict()
    start = CLIPModel.from_pretrained(world.clip).vision_model.state_dict()
    changed = {key for key, weight in own.items() if not torch.equal(weight, start[key].to(weight.dtype))}
    assert {f"encoder.layers.{i}.self_attn.v_proj.weight" for i in (0, 1)} | {
        "embeddings.position_embedding.weight"
    } <= (changed)


def test_another_methods_checkpoint_is_not_gone_on_from(world: TinyWorld, tmp_path: Path) -> None:
    saves = {"lora_enable": True, "lora_r": 4, "save_strategy": "steps", "save_steps": 1}
    train(parse_args(world.flags(tmp_path, **saves, max_steps=1)))
    with pytest.raises(
        ValueError, match=r"checkpoint-1 was written by a run with other settings:\n  reduction: none -> .*'fastv'"
    ):
        train(parse_args(world.flags(tmp_path, **saves, reduction=FLAGS["fastv"])))
