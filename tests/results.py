"""What must be true of the folders that a run on the tiny world writes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llava.model.builder import load_pretrained_model
from llava.train.checkpoints.saving import part_of
from llava.train.settings.parsing import parse_args
from llava.train.train import train
from tests.tiny_world import SIDE, TinyWorld

KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"lora_enable": True, "lora_r": 4, "lora_alpha": 8},
    "projector": {"tune_mm_mlp_adapter": True, "version": "plain"},
}
CHANGED = {
    "full": {"language_model", "projector"},
    "lora": {"adapters", "projector"},
    "projector": {"projector"},
}
FILES = {
    "full": {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"},
    "lora": {
        "adapter_model.safetensors",
        "adapter_config.json",
        "non_lora_trainables.bin",
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    },
    "projector": {"mm_projector.bin", "config.json"},
}


def make_projector(world: TinyWorld, reduction: str = "none") -> Path:
    """A folder with a projector, trained for one step."""
    folder = world.root / f"projector-{abs(hash(reduction))}"
    settings = {**KINDS["projector"], "data_path": world.captions, "reduction": reduction, "max_steps": 1}
    train(parse_args(world.flags(folder, **settings)))
    return folder


def losses(folder: Path) -> dict[int, float]:
    """Logged losses by step."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


def check_losses(folder: Path, steps: int) -> None:
    """Every step has a finite loss."""
    logged = losses(folder)
    assert list(logged) == list(range(1, steps + 1))
    assert all(math.isfinite(loss) and loss > 0 for loss in logged.values())


def open_model(folder: Path, base: Path | None) -> Any:
    """The model of a folder on the CPU; the folder's own tokenizer must be there too."""
    tokenizer, model, _, _ = load_pretrained_model(
        str(folder), None if base is None else str(base), device="cpu", dtype=torch.float32
    )
    assert tokenizer("a").input_ids
    return model


def changed_parts(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    """Parts of a model whose weights differ from those of `before` by more than bfloat16 rounds."""
    parts = set()
    for name, weight in model.named_parameters():
        plain = name.replace("base_model.model.", "").replace(".base_layer.", ".")
        if "lora_" in name:
            parts |= {"adapters"} if "lora_B" in name and weight.any() else set()
        elif not torch.equal(weight.bfloat16(), before[plain].bfloat16()):
            parts.add(part_of(name))
    return parts


def check_folder(folder: Path, kind: str, world: TinyWorld, start: Path) -> None:
    """A checkpoint or result opens by itself and answers; only what its kind trains has changed since `start`.

    Args:
        folder: checkpoint-N or output folder.
        kind: key of `KINDS`.
        world: gives the base.
        start: folder of the projector that the run began with.
    """
    assert FILES[kind] <= {path.name for path in folder.iterdir()}
    before = dict(open_model(start, world.llm).named_parameters())
    model = open_model(folder, None if kind == "full" else world.llm)
    assert changed_parts(model, before) == CHANGED[kind]
    pixels = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[1, 50, -200, 60, 61]]), images=pixels).logits
    assert logits.isfinite().all()
