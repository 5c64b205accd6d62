"""Runs whose loss or weights become NaN or infinite."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava.model.weights import NonFiniteWeightsError, is_finite, raise_for_nonfinite
from llava.train.logs.divergence import DivergedError, LossWatch
from llava.train.settings.parsing import parse_args
from llava.train.train import train
from llava.train.trainer import LLaVATrainer
from tests.results import KINDS
from tests.tiny_world import TinyWorld, make_tiny_world

PROJECTOR = {"tune_mm_mlp_adapter": True, "version": "plain"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return make_tiny_world(tmp_path_factory.mktemp("world"))


def flags(world: TinyWorld, folder: Path, **settings: Any) -> list[str]:
    return world.flags(folder, **{**PROJECTOR, "data_path": world.captions, "max_steps": 8, **settings})


def lines(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`spoil(step, ...)`: from the update of a step on, the projector is NaN; `seen` has each step's samples."""
    seen: dict[int, list[str]] = {}

    def spoil(step: int) -> dict[int, list[str]]:
        whole, compute = LLaVATrainer.create_optimizer, LLaVATrainer.compute_loss

        def create_optimizer(self: Any, *args: Any, **kwargs: Any) -> Any:
            optimizer = whole(self, *args, **kwargs)

            def after(*_: Any) -> None:
                if self.state.global_step + 1 == step:
                    next(p for p in self.model.parameters() if p.requires_grad).data.flatten()[0] = math.nan

            optimizer.register_step_post_hook(after)
            return optimizer

        def compute_loss(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            text = self.processing_class.batch_decode(inputs["input_ids"].clamp(min=0), skip_special_tokens=True)
            seen.setdefault(self.state.global_step + 1, []).extend(text)
            return compute(self, model, inputs, *args, **kwargs)

        monkeypatch.setattr(LLaVATrainer, "create_optimizer", create_optimizer)
        monkeypatch.setattr(LLaVATrainer, "compute_loss", compute_loss)
        return seen

    return spoil


def test_a_diverged_run_stops(spoil: Any, world: TinyWorld, tmp_path: Path) -> None:
    """The update of step 3 spoils the weights."""
    seen = spoil(3)
    with pytest.raises(DivergedError) as error:
        train(parse_args(flags(world, tmp_path, gradient_accumulation_steps=2)))
    message = str(error.value)
    assert "the loss was NaN or infinite in steps 4 to 6: the run has diverged" in message
    assert "begins anew, since there is no checkpoint" in message
    logged = lines(tmp_path)
    assert [line["loss"] is None for line in logged] == [False, False, False, True, True, True]
    assert [line["not_finite"]["loss"] for line in logged[3:]] == ["nan"] * 3
    named = json.loads((tmp_path / "diverged.json").read_text())
    assert list(named) == ["3", "4"]
    samples = json.loads(world.captions.read_text())
    for step, names in named.items():
        indices = [int(name.partition("(index ")[2].partition(" ")[0]) for name in names]
        answers = [samples[index]["conversations"][1]["value"] for index in indices]
        assert len(answers) == 4
        assert all(answer in text for answer, text in zip(answers, seen[int(step)], strict=True))
    assert all(name in message for name in named["4"])
    assert not any(name in message for name in set(named["3"]) - set(named["4"]))


def test_a_good_checkpoint_keeps_its_place(spoil: Any, world: TinyWorld, tmp_path: Path) -> None:
    """The weights are looked at before they are published, also where no line of log is due yet."""
    spoil(3)
    saving = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1, "logging_steps": 20}
    with pytest.raises(DivergedError) as error:
        train(parse_args(flags(world, tmp_path, **saving)))
    assert "after step 4 4 weights hold NaN or infinity, so none is written: model.mm_projector.0" in str(error.value)
    assert f"goes on from the last good checkpoint, {tmp_path}/checkpoint-2: first lower" in str(error.value)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["checkpoint-2"]
    assert not (tmp_path / "mm_projector.bin").exists()


def test_nan_that_passes(world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a step is skipped: it stands in the log, and the lines after it have their own loss."""
    whole = LLaVATrainer.training_step

    def training_step(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = whole(self, *args, **kwargs)
        if self.state.global_step in (1, 2):
            loss = loss * math.inf
            self._meter.losses._finite = torch.tensor(False)
        return loss

    monkeypatch.setattr(LLaVATrainer, "training_step", training_step)
    trainer = train(parse_args(flags(world, tmp_path, max_steps=4)))
    losses = [line["loss"] for line in lines(tmp_path) if "loss" in line]
    assert losses[1:3] == [None, None]
    assert losses[0] > 0
    assert losses[3] > 0
    json.loads((tmp_path / "trainer_state.json").read_text(), parse_constant=pytest.fail)
    assert trainer.state.global_step == 4


def test_gradients_that_overflow_do_not_stop_a_run(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the first steps with fp16: the scaled gradients are infinite, the step is skipped, the loss is finite."""

    def clip(self: Any, model: Any) -> torch.Tensor:
        model.zero_grad()
        return torch.tensor(math.inf)

    monkeypatch.setattr(LLaVATrainer, "_clip_grad_norm", clip)
    train(parse_args(flags(world, tmp_path, max_steps=5)))
    logged = lines(tmp_path)[:5]
    assert all(line["loss"] > 0 for line in logged)
    assert all(line["not_finite"] == {"grad_norm": "inf"} for line in logged)
    assert (tmp_path / "mm_projector.bin").exists()


def test_steps_in_a_row() -> None:
    """Counted on the device: tensors of the meta device have no values to wait for."""
    watch, device = LossWatch(), torch.device("cpu")
    counts = []
    for step in ((1.0,), (math.nan, 1.0), (1.0, math.inf), (-math.inf,), (2.0, 3.0), (math.nan,)):
        for loss in step:
            watch.note(torch.tensor(loss))
        watch.end_step()
        counts.append(int(watch.read(device)))
    assert counts == [0, 1, 2, 3, 0, 1]
    watch.end_step()  # no micro-batch: as on_step_end after evaluation
    assert int(watch.read(device)) == 1
    watch = LossWatch()
    for _ in range(2):
        watch.note(torch.ones((), device="meta"))
        watch.end_step()


def test_never_stop(spoil: Any, world: TinyWorld, tmp_path: Path) -> None:
    """With 0 the run goes to its end; NaN weights are no result all the same."""
    spoil(1)
    with pytest.raises(DivergedError, match="after step 5 4 weights hold NaN or infinity"):
        train(parse_args(flags(world, tmp_path, max_steps=5, stop_after_nonfinite_steps=0)))
    assert not (tmp_path / "mm_projector.bin").exists()
    with pytest.raises(ValueError, match="--stop_after_nonfinite_steps -1: expected"):
        parse_args(flags(world, tmp_path, stop_after_nonfinite_steps=-1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_finite_weights(dtype: torch.dtype, value: float) -> None:
    weight = torch.full((3, 70), torch.finfo(dtype).max, dtype=dtype)  # whose sum is infinite
    assert is_finite(weight)
    weight[1, 5] = value
    assert not is_finite(weight)
    assert is_finite(torch.empty(0, dtype=dtype))
    with pytest.raises(NonFiniteWeightsError, match=r"some/file holds NaN or infinity in 1 weights: b\. "):
        raise_for_nonfinite("some/file", [("a", torch.ones(2)), ("b", weight), ("c", torch.ones(2, dtype=torch.long))])


def spoil_file(file: Path) -> None:
    """Put a NaN into the first weight of a file, of CLIP the first of its image encoder."""
    is_bin = file.suffix == ".bin"
    weights = torch.load(file, weights_only=True) if is_bin else load_file(file)
    names = sorted(weights, key=lambda name: "vision_model.embeddings.patch" not in name)
    weights[names[0]].view(-1)[0] = math.nan
    torch.save(weights, file) if is_bin else save_file(weights, file, {"format": "pt"})


@pytest.mark.parametrize("kind", ["projector", "lora", "full"])
def test_a_checkpoint_with_nan_is_not_gone_on_from(kind: str, world: TinyWorld, tmp_path: Path) -> None:
    settings = {**KINDS[kind], "data_path": world.captions, "save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    train(parse_args(world.flags(tmp_path, **settings)))
    checkpoint = tmp_path / "checkpoint-1"
    names = {"projector": "mm_projector.bin", "lora": "adapter_model.safetensors", "full": "model.safetensors"}
    spoil_file(checkpoint / names[kind])
    with pytest.raises(NonFiniteWeightsError, match=r"checkpoint-1(/\S+)? holds NaN or infinity in 1 weights: "):
        train(parse_args(world.flags(tmp_path, **{**settings, "max_steps": 2})))


@pytest.mark.parametrize("part", ["llm", "clip"])
def test_a_base_with_nan_is_not_trained(part: str, world: TinyWorld, tmp_path: Path) -> None:
    copied = shutil.copytree(getattr(world, part), tmp_path / part)
    spoil_file(copied / "model.safetensors")
    flag = {"llm": "model_name_or_path", "clip": "vision_tower"}[part]
    with pytest.raises(NonFiniteWeightsError, match=f"{copied} holds NaN or infinity in 1 weights"):
        train(parse_args(flags(world, tmp_path / "run", **{flag: copied})))


def test_a_pretrained_projector_with_nan_is_not_trained(world: TinyWorld, tmp_path: Path) -> None:
    train(parse_args(flags(world, tmp_path / "first", max_steps=1)))
    file = tmp_path / "first" / "mm_projector.bin"
    spoil_file(file)
    with pytest.raises(ValueError, match=f"{file} holds NaN or infinity in 1 weights"):
        train(parse_args(flags(world, tmp_path / "second", pretrain_mm_mlp_adapter=file)))
