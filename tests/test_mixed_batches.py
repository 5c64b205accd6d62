"""Ranks and micro-batches without images: nobody waits for them, with DDP and with ZeRO-3."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llava.reduction import available
from llava.train.settings.parsing import parse_args
from llava.train.train import train
from tests.ranks import Ranks, zero_flags
from tests.results import KINDS, check_losses, losses
from tests.tiny_world import TinyWorld, make_tiny_world

METHODS = {
    "baseline": "none",
    "prumerge": "prumerge",
    "m3": "{name: m3, scales: [1, 4]}",
    "mqt": "{name: mqt, tokens: 6}",
    "pyramiddrop": "{name: pyramiddrop, layers: [1], ratios: [0.25]}",
    **({"stf": "{name: stf, kernel: 2, mbtf: [3, 1]}"} if "stf" in available()["projector"] else {}),
}
TOWER = {"unfreeze_mm_vision_tower": True}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return make_tiny_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def data(world: TinyWorld) -> Path:
    """With an image, without, with, without, ...: with one sample a batch, the second rank never sees an image."""
    samples = json.loads(world.data.read_text())
    with_image = [sample for sample in samples if "image" in sample]
    without = [sample for sample in samples if "image" not in sample]
    mixed = [sample for i in range(8) for sample in (with_image[i % len(with_image)], without[i % len(without)])]
    file = world.root / "alternating.json"
    file.write_text(json.dumps(mixed))
    return file


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "kind", "method", "changes"),
    [
        (0, "full", "baseline", {**TOWER, "gradient_checkpointing": True}),  # DDP may then not look for unused weights
        (0, "lora", "prumerge", TOWER),
        (0, "full", "pyramiddrop", {}),
        (0, "projector", "baseline", {"version": "v1"}),
        (3, "full", "baseline", {}),
        (3, "lora", "prumerge", TOWER),
        (3, "full", "pyramiddrop", {"gradient_checkpointing": True}),
        (3, "full", "m3", {**TOWER, "gradient_checkpointing": True}),
        (3, "lora", "mqt", {}),
        *([(0, "full", "stf", {}), (3, "lora", "stf", {})] if "stf" in METHODS else []),
    ],
)
def test_a_rank_that_sees_text_only(
    stage: int, kind: str, method: str, changes: dict[str, Any], world: TinyWorld, data: Path, tmp_path: Path
) -> None:
    """Two ranks, two micro-batches a step; the losses are those of one process that sees all of them."""
    settings = {**KINDS[kind], **changes, **zero_flags(stage), "reduction": METHODS[method], "data_path": data}
    settings |= {"train_sampling_strategy": "sequential", "max_steps": 2, "lora_dropout": 0.0}
    small = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    run = Ranks(world.flags(tmp_path / "run", **settings, **small), 2, log=tmp_path / "log")
    assert run.join() == [0, 0], run.printed()[-4000:]
    check_losses(tmp_path / "run", steps=2)
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert line["image_tokens"] > 0  # of all ranks together: one has none
    alone = {**settings, "per_device_train_batch_size": 4, "deepspeed": None}
    train(parse_args(world.flags(tmp_path / "alone", **alone)))
    expected, actual = losses(tmp_path / "alone"), losses(tmp_path / "run")
    assert actual[1] == pytest.approx(expected[1], rel=2e-2 if stage else 1e-5)
    if not stage:
        assert actual[2] == pytest.approx(expected[2], rel=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_micro_batches_of_text_only(method: str, world: TinyWorld, data: Path, tmp_path: Path) -> None:
    """With and without images by turns, in one process: as one large batch."""
    settings = {"reduction": METHODS[method], "data_path": data, "train_sampling_strategy": "sequential"}
    settings |= {"max_steps": 1, "optim": "sgd"}
    logged = []
    for name, batch in {"one": (4, 1), "by turns": (1, 4)}.items():
        sizes = {"per_device_train_batch_size": batch[0], "gradient_accumulation_steps": batch[1]}
        trainer = train(parse_args(world.flags(tmp_path / name, **settings, **sizes)))
        logged.append({k: trainer.state.log_history[0][k] for k in ("loss", "grad_norm")})
    assert logged[0] == pytest.approx(logged[1], rel=1e-3)
