"""What each mode trains, in which optimizer group and at which rate, by name."""

from __future__ import annotations

import importlib.metadata
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llava.train.modeling import NOT_QUANTIZED, load_model, load_tokenizer, quantization, read_config, run_kind
from llava.train.settings.parsing import check_args, parse_args
from llava.train.trainer import LLaVATrainer
from tests.tiny_world import TinyWorld, make_tiny_world

LORA = {"lora_enable": True, "lora_r": 4, "lora_alpha": 8}
RATE, PROJECTOR_RATE, TOWER_RATE, DECAY = 1e-2, 3e-4, 2e-6, 0.1
PATTERNS: dict[str, Callable[[str], bool]] = {
    "llm": lambda name: bool(re.match(r"(model\.(layers|embed_tokens|norm)|lm_head)\b", name)),
    "adapters": lambda name: bool(re.match(r"base_model\.model\.model\.layers\..*\.lora_[AB]\.default\.weight$", name)),
    "projector": lambda name: "mm_projector." in name,
    # Blocks after the layer that is read are never run.
    "tower": lambda name: "vision_tower.vision_tower." in name and not re.search(r"layers\.2\.|post_layernorm", name),
}
MODES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "full": ({}, {"llm", "projector"}),
    "full, projector frozen": ({"freeze_mm_mlp_adapter": True}, {"llm"}),
    "full, with tower": ({"unfreeze_mm_vision_tower": True}, {"llm", "projector", "tower"}),
    "full, language model frozen": ({"freeze_backbone": True}, {"projector"}),
    "lora": (LORA, {"adapters", "projector"}),
    "lora, projector frozen": ({**LORA, "freeze_mm_mlp_adapter": True}, {"adapters"}),
    "lora, with tower": ({**LORA, "unfreeze_mm_vision_tower": True}, {"adapters", "projector", "tower"}),
    "projector": ({"tune_mm_mlp_adapter": True}, {"projector"}),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return make_tiny_world(tmp_path_factory.mktemp("world"))


def groups_of(flags: list[str]) -> tuple[dict[tuple[float, float], set[str]], list[str]]:
    """(rate, weight decay) -> names in the optimizer; and the names of all weights."""
    arguments = parse_args(flags)
    model = load_model(arguments, read_config(arguments), load_tokenizer(arguments))
    trainer = LLaVATrainer(kind=run_kind(arguments), model=model, args=arguments.training)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups: dict[tuple[float, float], set[str]] = {}
    for group in trainer.create_optimizer().param_groups:
        members = {names[id(parameter)] for parameter in group["params"]}
        assert not members & set().union(*groups.values())
        groups.setdefault((group["lr"], group["weight_decay"]), set()).update(members)
    return groups, list(names.values())


@pytest.mark.parametrize("own_rates", [False, True], ids=["one rate", "own rates"])
@pytest.mark.parametrize("mode", MODES)
def test_parameter_groups(mode: str, own_rates: bool, world: TinyWorld, tmp_path: Path) -> None:
    settings, parts = MODES[mode]
    rates = dict.fromkeys(parts, RATE)
    if own_rates:
        rates |= {"projector": PROJECTOR_RATE} if "projector" in parts else {}
        rates |= {"tower": TOWER_RATE} if "tower" in parts else {}
        settings = {**settings, **({"mm_projector_lr": PROJECTOR_RATE} if "projector" in parts else {})}
        settings |= {"mm_vision_tower_lr": TOWER_RATE} if "tower" in parts else {}
    groups, names = groups_of(world.flags(tmp_path, **settings, learning_rate=RATE, weight_decay=DECAY))
    expected: dict[tuple[float, float], set[str]] = {}
    for name in names:
        for part in parts:
            if PATTERNS[part](name):
                decays = not (name.endswith("bias") or "norm" in name)
                expected.setdefault((rates[part], DECAY if decays else 0.0), set()).add(name)
    assert {key: group for key, group in groups.items() if group} == expected
    assert set(itertools.chain(*expected.values()))


# QLoRA -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
def test_qlora_without_bitsandbytes_names_the_extra(bits: int, world: TinyWorld, tmp_path: Path) -> None:
    flags = world.flags(tmp_path, **LORA, bits=bits)
    with pytest.raises(
        ValueError, match=rf'--bits {bits} needs the package bitsandbytes.*pip install "llava\[qlora\]"'
    ):
        check_args(flags)


def test_qlora_quantizes_the_language_model_only(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = parse_args(world.flags(tmp_path, **LORA, bf16=True)).training
    assert quantization(training) == {}
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9" if name == "bitsandbytes" else version(name))
    training.bits, training.quant_type, training.double_quant = 4, "fp4", False
    config = quantization(training)["quantization_config"]
    assert (config.load_in_4bit, config.load_in_8bit) == (True, False)
    assert (config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == ("fp4", False)
    assert config.bnb_4bit_compute_dtype == torch.bfloat16
    assert config.llm_int8_skip_modules == NOT_QUANTIZED
    training.bits = 8
    config = quantization(training)["quantization_config"]
    assert (config.load_in_4bit, config.load_in_8bit) == (False, True)
