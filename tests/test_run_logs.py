"""What a run writes down: lines of log, metrics.jsonl, run_info.json, trackers, the progress bar."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import math
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import convert_to_fp32
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.integrations import integration_utils
from transformers.modeling_outputs import CausalLMOutputWithPast

from llava.constants import IGNORE_INDEX
from llava.model.language_model import head_loss
from llava.model.language_model.batch_counts import LlavaOutput, Totals, count_batch
from llava.model.language_model.staged import StagedPass
from llava.model.splice import Spliced
from llava.provenance import git_state
from llava.train.logs import batch_meter
from llava.train.logs.batch_meter import BatchMeter, Stopwatch, describe
from llava.train.logs.flops import FlopsModel, peak_flops, utilization
from llava.train.logs.metrics_file import drop_later_lines
from llava.train.logs.progress import TrainingBar
from llava.train.settings import parsing
from llava.train.settings.parsing import parse_args
from llava.train.train import train
from llava.train.trainer import LLaVATrainer
from tests.tiny_models import prompt, tiny_model
from tests.tiny_world import PATCH, SIDE, TinyWorld, make_tiny_world

PATCHES = (SIDE // PATCH) ** 2
LORA = {"lora_enable": True, "lora_r": 4, "lora_alpha": 8}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return make_tiny_world(tmp_path_factory.mktemp("world"))


def run(world: TinyWorld, folder: Path, **settings: Any) -> LLaVATrainer:
    return train(parse_args(world.flags(folder, **settings)))


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# Counts ----------------------------------------------------------------------------------------------------------


def test_a_line_of_log(world: TinyWorld, tmp_path: Path) -> None:
    """Three samples of known lengths, one without an image, against counts by hand."""
    samples = json.loads(world.data.read_text())[:3]
    data = tmp_path / "data.json"
    data.write_text(json.dumps(samples))
    settings = {"data_path": data, "per_device_train_batch_size": 3, "max_steps": 1, "packing": False}
    trainer = run(world, tmp_path / "run", **settings)
    items = [trainer.train_dataset[i] for i in range(3)]
    lengths = [len(item["input_ids"]) + (PATCHES - 1) * len(item["images"]) for item in items]
    line = lines(tmp_path / "run")[0]
    assert line["padding"] == pytest.approx(1 - sum(lengths) / (3 * max(lengths)), abs=1e-4)
    assert line["padding"] > 0
    assert line["image_tokens"] == PATCHES
    assert "image_tokens_last" not in line
    assert line["tokens_per_second"] / line["samples_per_second"] == pytest.approx(sum(lengths) / 3, rel=1e-2)
    assert {"loss", "grad_norm", "learning_rate", "epoch", "step", "time", "peak_memory_gb"} <= line.keys()
    assert 0.05 < line["peak_memory_gb"] < 50
    assert "mfu" not in line  # a CPU's peak is not known


@pytest.mark.parametrize(
    ("reduction", "entering", "leaving"),
    [
        ("{name: spatial, rows: 2, columns: 2}", 4, None),
        ("{name: pyramiddrop, layers: [1], ratios: [0.25]}", PATCHES, PATCHES / 4),
        ("{encoder: {name: spatial, rows: 2, columns: 4}, decoder: {name: fastv, layer: 1, ratio: 0.5}}", 8, 4),
    ],
)
@pytest.mark.parametrize("packing", [False, True])
def test_image_tokens(
    reduction: str, entering: int, leaving: float | None, packing: bool, world: TinyWorld, tmp_path: Path
) -> None:
    run(world, tmp_path, **LORA, reduction=reduction, packing=packing, gradient_accumulation_steps=2, max_steps=2)
    for line in lines(tmp_path)[:2]:
        assert line["image_tokens"] == entering
        assert line.get("image_tokens_last") == leaving
        assert (line["padding"] == 0) == packing


def test_counting_does_not_wait_for_the_device() -> None:
    """Tensors of the meta device have no values: whoever wants one on the host gets an error."""
    places = torch.zeros(2, 9, dtype=torch.long, device="meta")
    spliced = Spliced(places, places, places, places, places, places, left=False, images=2, tiles=2)
    meter = BatchMeter()
    for staged in (None, StagedPass(places, packed=True, kept=places[:, :4])):
        counts = count_batch(spliced, staged)
        assert counts.device.type == "meta"
        meter.note(counts)
    with pytest.raises((RuntimeError, NotImplementedError)):
        meter.read(torch.device("meta")).tolist()


def batch(tiles: int = 1) -> dict[str, Any]:
    """Two rows, of 8 tokens and an image and of 6 tokens, with 6 and 4 tokens to learn."""
    ids = torch.nn.utils.rnn.pad_sequence([prompt(3, "image", 4), prompt(5)], batch_first=True)
    mask = torch.tensor([[1] * 9, [1] * 6 + [0] * 3]).bool()
    labels = torch.where(mask & (ids >= 0), ids, IGNORE_INDEX)
    labels[:, :2] = IGNORE_INDEX
    images = torch.randn(1, 3, 56, 56) if tiles == 1 else torch.randn(1, tiles, 3, 56, 56)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "images": images}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("reduction", "last"), [("none", 16), ("{name: fastv, layer: 1, ratio: 0.75}", 4)])
def test_counts_of_a_batch(reduction: str, last: int, packed: bool) -> None:
    model = tiny_model(attn_implementation="packed_sdpa").train()
    model.set_reduction(reduction)
    counts = model(**batch(), packed=packed).counts
    places = 24 + 6 if packed else 2 * 24
    assert counts.dtype == torch.int64
    assert Totals(*counts.tolist()) == Totals(30, 24**2 + 6**2, 16, last, 1, 2, places, 1, 6 + 4)


def test_counts_of_a_batch_of_text() -> None:
    """The blank picture that it encodes is no useful work."""
    ids = prompt(6).unsqueeze(0)
    counts = tiny_model().train()(input_ids=ids, labels=ids).counts
    assert Totals(*counts.tolist()) == Totals(7, 49, 0, 0, 0, 1, 7, 0, 6)


def test_tiles_are_counted() -> None:
    counts = Totals(*tiny_model().train()(**batch(tiles=3)).counts.tolist())
    assert (counts.images, counts.tiles, counts.image_tokens) == (1, 3, 48)


@pytest.mark.parametrize("reduction", ["none", "{name: fastv, layer: 1, ratio: 0.5}"])
def test_what_has_no_counts(reduction: str) -> None:
    """Evaluation, inference, and tuples, which stay as transformers has them."""
    model = tiny_model().train()
    model.set_reduction(reduction)
    inputs = batch()
    assert len(model(**inputs, return_dict=False, use_cache=False)) == 2
    with torch.no_grad():
        assert type(model(**inputs)) is CausalLMOutputWithPast
    assert type(model.eval()(**inputs)) is CausalLMOutputWithPast
    assert type(model(**{**inputs, "labels": None})) is CausalLMOutputWithPast


def test_counts_pass_mixed_precision() -> None:
    """accelerate makes the output anew, from its fields."""
    output = tiny_model().train()(**batch())
    converted = convert_to_fp32(output)
    assert type(converted) is LlavaOutput
    assert torch.equal(converted.counts, output.counts)


def test_nothing_of_a_pass_stays_on_the_model(world: TinyWorld, tmp_path: Path) -> None:
    """The model that trained has the methods and attributes of one that did not."""
    trainer = run(world, tmp_path, max_steps=1)
    fresh = type(trainer.model)(trainer.model.config)
    assert "splice_images" not in vars(trainer.model)
    ours = [(trainer.model, fresh), (trainer.model.get_model(), fresh.get_model())]
    for trained, new in ours:
        assert not trained._forward_hooks
        assert {name for name in vars(trained).keys() - vars(new).keys() if not name.startswith("_")} == set()


def test_sums_of_batches() -> None:
    meter, device = BatchMeter(), torch.device("cpu")
    assert meter.read(device).tolist() == [0] * 9
    for _ in range(2):
        meter.note(torch.arange(9))
    assert meter.read(device).tolist() == [2 * i for i in range(9)]
    assert meter.read(device).sum() == 0


def test_throughput_of_totals() -> None:
    totals = Totals(tokens=300, image_tokens=100, image_tokens_last=25, images=5, samples=6, places=400)
    expected = {"tokens_per_second": 150.0, "samples_per_second": 3.0, "padding": 0.25, "image_tokens": 20.0}
    assert describe(totals, 2.0, has_decoder_reducer=False) == expected
    assert describe(totals, 2.0, has_decoder_reducer=True) == {**expected, "image_tokens_last": 5.0}
    assert "image_tokens" not in describe(Totals(tokens=3, places=3, samples=1), 1.0, has_decoder_reducer=False)


def test_the_watch_leaves_out_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(batch_meter.time, "perf_counter", lambda: now)
    watch = Stopwatch()
    now = 3.0
    watch.pause()
    now = 10.0
    watch.go_on()
    now = 12.0
    assert watch.lap() == 5.0
    now = 13.0
    assert watch.lap() == 1.0


# Arithmetic ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trains", "reduction"),
    [
        ("all", "none"),
        ("projector", "none"),
        ("all and tower", "none"),
        ("all", "{name: pyramiddrop, layers: [1], ratios: [0.5]}"),
        ("projector", "{name: stf, mbtf: 2}"),
    ],
)
def test_flops_by_formula_are_those_that_torch_counts(
    trains: str, reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_loss, "CHUNKS", 1)  # so that no logits are made twice
    model = tiny_model(num_hidden_layers=4, attn_implementation="eager")
    model.set_reduction(reduction)
    model.set_attn_implementation("eager")
    for name, parameter in model.named_parameters():
        tower = "vision_tower" in name and "layers.3" not in name and "post_layernorm" not in name
        parameter.requires_grad_(
            "mm_projector" in name
            or (trains != "projector" and "tower" not in name)
            or (trains[-5:] == "tower" and tower)
        )
    model.train()
    ids = torch.stack([prompt(30, "image", 40, seed=i) for i in range(2)])
    with FlopCounterMode(display=False) as counter:
        labels = ids.clamp(min=0).masked_fill(torch.arange(ids.shape[1]) < 40, IGNORE_INDEX)
        output = model(input_ids=ids, labels=labels, images=torch.randn(2, 3, 56, 56))
        output.loss.backward()
    formula = FlopsModel(model).of(Totals(*output.counts.tolist()))
    # Not in the formula: ranking, and that pixels have no gradient.
    assert formula == pytest.approx(counter.get_total_flops(), rel=0.03)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA A10G", 70e12),
        ("Tesla V100-SXM2-32GB", 125e12),
        ("Tesla T4", 65e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA A1000", None),
        ("some other device", None),
    ],
)
def test_peaks_by_name(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak


def test_utilization_of_a_known_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert utilization(1e12, 1.0, 1, True) is None or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100-SXM4-80GB")
    assert utilization(312e12, seconds=2.0, processes=4, computes_16_bit=True) == 0.125
    assert utilization(312e12, seconds=2.0, processes=4, computes_16_bit=False) is None


# Files -----------------------------------------------------------------------------------------------------------


def test_metrics_of_a_run_that_goes_on(world: TinyWorld, tmp_path: Path) -> None:
    """Lines after the checkpoint, a half line and the old summary go; each step stands there once."""
    settings = {"tune_mm_mlp_adapter": True, "save_strategy": "steps", "save_steps": 2, "max_steps": 3}
    run(world, tmp_path, **settings)
    first = lines(tmp_path)
    assert [line["step"] for line in first] == [1, 2, 3, 3]
    assert "train_runtime" in first[-1]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "lo')
    run(world, tmp_path, **{**settings, "max_steps": 4})
    second = lines(tmp_path)
    assert [line["step"] for line in second if "loss" in line] == [1, 2, 3, 4]
    assert second[:2] == first[:2]
    assert second[2] != first[2]  # its time


def test_lines_that_are_dropped(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    kept = '{"step": 1, "loss": 2}\n{"step": 2, "eval_loss": 2}\n'
    dropped = (
        '{"step": 2, "train_runtime": 3}\nnonsense\n5\n{"loss": 1}\n{"step": 3, "loss": 1}\n{"step": 2, "loss": 1}'
    )
    file.write_text(kept + dropped)
    drop_later_lines(file, 2)
    assert file.read_text() == kept
    before = file.stat().st_ino
    drop_later_lines(file, 2)
    assert file.stat().st_ino == before
    drop_later_lines(file, 0)
    assert file.read_text() == ""


def test_numbers_that_json_does_not_have(world: TinyWorld, tmp_path: Path) -> None:
    trainer = run(world, tmp_path, tune_mm_mlp_adapter=True, max_steps=1)
    trainer.log({"eval_loss": math.nan, "eval_other": 1.0})
    last = (tmp_path / "metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(last, parse_constant=pytest.fail)["eval_loss"] is None


def test_run_info(world: TinyWorld, tmp_path: Path) -> None:
    settings = {"tune_mm_mlp_adapter": True, "max_steps": 1, "hub_token": "secret", "save_strategy": "steps"}
    run(world, tmp_path, **settings, save_steps=1)
    text = (tmp_path / "run_info.json").read_text()
    info = json.loads(text)
    assert "secret" not in text
    assert info["config"]["learning_rate"] == 1e-2
    assert info["config"]["lora_r"] == 64  # a default
    assert info["config"]["model_name_or_path"] == str(world.llm)
    assert info["versions"]["torch"] == torch.__version__
    assert info["versions"]["transformers"] == importlib.metadata.version("transformers")
    assert info["processes"] == 1
    assert info["resumed_from"] is None
    run(world, tmp_path, **{**settings, "max_steps": 2}, save_steps=1)
    assert json.loads((tmp_path / "run_info.json").read_text())["resumed_from"] == str(tmp_path / "checkpoint-1")


def test_commit_of_a_repository(tmp_path: Path) -> None:
    assert git_state(tmp_path) is None
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "file").write_text("1")
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "one"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    state = git_state(tmp_path)
    assert state is not None
    assert len(state["commit"]) == 40
    assert not state["changed"]
    (tmp_path / "file").write_text("2")
    assert git_state(tmp_path) == {**state, "changed": True}


@pytest.mark.slow
def test_trackers_offline(world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer = run(world, tmp_path / "run", tune_mm_mlp_adapter=True, report_to="wandb,tensorboard")
    import wandb

    summary = dict(wandb.run.summary)
    wandb.finish()
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert summary["train/image_tokens"] == PATCHES
    board = event_accumulator.EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    assert {"train/loss", "train/tokens_per_second", "train/padding"} <= set(board.Tags()["scalars"])
    assert trainer.state.global_step == 2


def test_a_run_that_goes_on_keeps_its_wandb_run(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []

    class Tracker(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            opened.append((os.environ["WANDB_RUN_ID"], os.environ["WANDB_RESUME"]))

    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    monkeypatch.delenv("WANDB_RESUME", raising=False)
    monkeypatch.setattr(parsing, "require_package", lambda name, flag: None)
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "wandb", Tracker)
    settings = {"tune_mm_mlp_adapter": True, "report_to": "wandb", "save_strategy": "steps", "save_steps": 1}
    for steps in (1, 2):
        run(world, tmp_path / "first", **settings, max_steps=steps)
    run(world, tmp_path / "second", **settings, max_steps=1)
    (first, resume), again, (second, _) = opened
    assert (first, resume) == again
    assert resume == "allow"
    assert second != first
    assert "WANDB_RUN_ID" not in os.environ
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    monkeypatch.setenv("WANDB_RESUME", "must")
    run(world, tmp_path / "third", **settings, max_steps=1)
    assert opened[3] == ("mine", "must")


def test_time_left_of_a_run_that_goes_on() -> None:
    """The bar begins where the run stands, so that steps of the earlier start do not count as done in no time."""
    bar = TrainingBar()
    state = TrainerState(global_step=40, max_steps=100)
    bar.on_train_begin(None, state, TrainerControl())
    assert bar.training_bar is not None
    assert (bar.training_bar.n, bar.training_bar.initial, bar.training_bar.total) == (40, 40, 100)
    state.global_step = 41
    bar.on_step_end(None, state, TrainerControl())
    assert bar.training_bar.n == 41
    bar.training_bar.close()


def test_lines_in_place_of_the_bar(caplog: pytest.LogCaptureFixture) -> None:
    """Where there is no terminal: one every few per cent, with the last loss, and the last step."""
    caplog.set_level(logging.INFO, logger="llava")
    bar, state = TrainingBar(bar=False), TrainerState(global_step=10, max_steps=210)
    bar.on_train_begin(None, state, TrainerControl())
    for step in range(11, 211):
        bar.on_step_begin(None, state, TrainerControl())
        state.global_step = step
        bar.on_step_end(None, state, TrainerControl())
        bar.on_log(None, state, TrainerControl(), logs={"loss": step / 100, "grad_norm": 1.0})
    bar.on_log(None, state, TrainerControl(), logs={"eval_loss": 0.5})
    bar.on_log(None, state, TrainerControl(), logs={"train_runtime": 7.2, "train_loss": 1.0})
    bar.on_train_end(None, state, TrainerControl())
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 20 + 2
    assert said[0].startswith("step 11/210 (5 %), loss 0.110, ")
    assert said[-3] == "step 210: eval_loss 0.5"
    assert said[-2].startswith("step 210/210 (100 %), loss 2.100, ")
    assert said[-1] == "200 steps in 7 s"


def test_the_bar_is_used(world: TinyWorld, tmp_path: Path) -> None:
    trainer = run(world, tmp_path, tune_mm_mlp_adapter=True, max_steps=1, disable_tqdm=False)
    kinds = [type(callback).__name__ for callback in trainer.callback_handler.callbacks]
    assert "TrainingBar" in kinds
    assert "ProgressCallback" not in kinds
