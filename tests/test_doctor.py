"""`llava doctor` and the checks before a run: each defect has its line and an exit code, a sound run has none."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.autograd.graph import saved_tensors_hooks
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)
from typer.testing import CliRunner

from llava import cli
from llava.mm_utils import process_images
from llava.reduction.base import VisualTokens
from llava.train import train as train_module
from llava.train.modeling import load_model, load_tokenizer, read_config
from llava.train.preflight import memory
from llava.train.preflight.doctor import examine, preflight, processes_of
from llava.train.preflight.findings import Report
from llava.train.preflight.models import VisualCount, build_without_weights, without_meta
from llava.train.preflight.samples import check_images_exist, measure
from llava.train.settings.config import LaunchOptions
from llava.train.settings.parsing import Arguments, check_args, parse_args
from llava.train.train import train
from tests.test_dataset import turns
from tests.tiny_world import ROOT, SIDE, TinyWorld, make_tiny_world

LORA = {"lora_enable": True, "lora_r": 4}
PICTURE = turns("<image>\nWhat?", "red")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    world = make_tiny_world(tmp_path_factory.mktemp("world"))
    (world.images / "torn.png").write_bytes((world.images / "red.png").read_bytes()[:60])
    return world


def recipe(world: TinyWorld, folder: Path, **settings: Any) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(dict(flag[2:].split("=", 1) for flag in world.flags(folder / "out", **settings))))
    return file


def doctor(*words: object) -> tuple[int, list[str]]:
    """Exit code and findings of the command."""
    result = CliRunner().invoke(cli.app, ["doctor", *map(str, words)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, [line for line in result.stdout.splitlines() if line]


def with_samples(world: TinyWorld, folder: Path, *samples: dict[str, Any]) -> Path:
    path = folder / "data.json"
    path.write_text(json.dumps([*json.loads(world.data.read_text()), *samples]))
    return path


# Sound runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"tune_mm_mlp_adapter": True},
        {"reduction": "{encoder: {name: prumerge, ratio: 0.5}, decoder: {name: fastv, layer: 1, ratio: 0.5}}"},
        {**LORA, "bf16": True, "reduction": "prumerge", "deepspeed": str(ROOT / "scripts/zero3.json")},
        {"image_aspect_ratio": "anyres", "image_grid_pinpoints": "[(32, 64)]", "mm_patch_merge_type": "spatial_unpad"},
    ],
    ids=["projector", "full", "lora", "anyres"],
)
def test_a_sound_run(settings: dict[str, Any], world: TinyWorld, tmp_path: Path) -> None:
    code, lines = doctor(recipe(world, tmp_path, use_cpu=True, **settings))
    assert code == 0, lines
    assert not any(line.startswith("error") for line in lines)
    assert re.fullmatch(r"ready to train, [01] warning\(s\)", lines[-1])
    kinds = [line.split(": ")[1] for line in lines[:-1]]
    assert {"length", "memory", "disk"} <= set(kinds)
    assert len(lines) == len(set(lines))
    assert not (tmp_path / "out").exists()


def test_a_sound_run_from_a_llava_checkpoint(world: TinyWorld, tmp_path: Path) -> None:
    train(parse_args(world.flags(tmp_path / "llava", max_steps=1, reduction="prumerge")))
    unset = dict.fromkeys(["mm_projector_type", "mm_vision_select_layer", "image_aspect_ratio"])
    # The checkpoint holds the tower's weights, so a folder with its settings is enough.
    shutil.copytree(world.clip, tmp_path / "clip", ignore=shutil.ignore_patterns("*.safetensors"))
    unset |= {"model_name_or_path": tmp_path / "llava", "vision_tower": tmp_path / "clip"}
    code, lines = doctor(recipe(world, tmp_path, **unset))
    assert code == 0, lines
    assert any(line.startswith("ok: method: the reduction is adaptive") for line in lines)


def test_a_sound_run_with_tied_embeddings(world: TinyWorld, tmp_path: Path) -> None:
    shutil.copytree(world.llm, tmp_path / "qwen")
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Qwen2Config(vocab_size=259, num_key_value_heads=2, tie_word_embeddings=True, **shape)
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "qwen")
    code, lines = doctor(recipe(world, tmp_path, model_name_or_path=tmp_path / "qwen"))
    assert code == 0, lines


def test_images_inside_the_data_need_no_files(world: TinyWorld, tmp_path: Path) -> None:
    content = (world.images / "red.png").read_bytes()
    samples = [{"id": str(i), "image": {"bytes": content, "path": "a.png"}, "conversations": PICTURE} for i in range(4)]
    pq.write_table(pa.Table.from_pylist(samples), tmp_path / "data.parquet")
    settings = {"data_path": tmp_path / "data.parquet", "tune_mm_mlp_adapter": True}
    assert doctor(recipe(world, tmp_path, **settings))[0] == 0
    train(parse_args(world.flags(tmp_path / "out", **settings)))


# Defects of the data ---------------------------------------------------------------------------------------------

DATA_DEFECTS: dict[str, tuple[dict[str, Any], str]] = {
    "missing image": ({"image": "gone.png", "conversations": PICTURE}, r"error: image: 2 samples \('x1', 'x2'\).*gone"),
    "torn image": ({"image": "torn.png", "conversations": PICTURE}, r"error: image: 2 samples .*torn\.png.* truncated"),
    "tags": ({"image": "red.png", "conversations": turns("What?", "red")}, r"error: image tags: 2 samples .*have 0"),
    "no answer": ({"conversations": turns("What?")}, r"error: nothing to learn: 2 samples .*it has no answer"),
    "no conversation": ({}, r"error: format: 2 samples .*the key 'conversations' is missing"),
    "late answer": (
        {"conversations": turns("word " * 200, "red")},
        r"error: answers cut off: 2 samples \('x1', 'x2'\) without a token to learn among the first 512",
    ),
}


@pytest.mark.parametrize(("sample", "line"), DATA_DEFECTS.values(), ids=DATA_DEFECTS)
def test_defects_of_samples(sample: dict[str, Any], line: str, world: TinyWorld, tmp_path: Path) -> None:
    data = with_samples(world, tmp_path, {"id": "x1", **sample}, {"id": "x2", **sample})
    code, lines = doctor(recipe(world, tmp_path, data_path=data))
    assert code == 1
    assert [text for text in lines if re.match(line, text)], lines
    assert sum(text.startswith("error") for text in lines) == 1
    assert lines[-1].startswith("1 problem(s) to mend before training")


def test_bad_samples_that_are_skipped_are_warnings(world: TinyWorld, tmp_path: Path) -> None:
    data = with_samples(world, tmp_path, {"id": "x", "image": "gone.png", "conversations": PICTURE})
    code, lines = doctor(recipe(world, tmp_path, data_path=data), "on_bad_sample=skip")
    assert code == 0
    assert any(line.startswith("warning: image: 1 sample ('x')") for line in lines)


def test_many_samples_are_counted_and_few_are_named(world: TinyWorld, tmp_path: Path) -> None:
    bad = [{"id": i, "image": "gone.png", "conversations": PICTURE} for i in range(700)]
    code, lines = doctor(recipe(world, tmp_path, data_path=with_samples(world, tmp_path, *bad)))
    assert code == 1
    assert lines[0].startswith("error: image: 700 samples (0, 1, 2, 3, 4, ...); the first: sample 0 (index 12 of ")


def test_lengths_count_visual_tokens(world: TinyWorld, tmp_path: Path) -> None:
    """An image is 16 tokens; with half of them dropped, the longest sample is 8 shorter."""
    file = recipe(world, tmp_path)

    def longest(*overrides: str) -> int:
        line = next(text for text in doctor(file, *overrides)[1] if "longest" in text)
        return int(re.search(r"longest (\d+)", line).group(1))  # type: ignore[union-attr]

    whole = longest("reduction=none")
    assert longest("reduction={name: sequential, ratio: 0.5}") == whole - 8
    assert longest("reduction=prumerge") == whole  # adaptive: all of them, at most
    code, lines = doctor(file, f"model_max_length={whole - 1}")
    assert code == 0
    assert any(re.match(r"warning: length: \d samples? \(.*longer than model_max_length", line) for line in lines)


def test_measure() -> None:
    ids, labels = torch.tensor([1, -200, 5, 6]), torch.tensor([-100, -100, 5, 6])
    assert measure(ids, labels, [10], 100).total == 13
    assert [measure(ids, labels, [10], limit).learned for limit in (11, 12, 13)] == [0, 1, 2]


def test_a_data_file_that_cannot_be_read(world: TinyWorld, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"id": }\n')
    code, lines = doctor(recipe(world, tmp_path, data_path=tmp_path / "bad.jsonl"))
    assert code == 1
    found = r"error: format: 1 sample \(index 0 of .*\); the first: data file .*bad\.jsonl' is malformed JSON at line 1"
    assert re.match(found, lines[0])


def test_a_stream_of_which_not_even_the_beginning_can_be_read(world: TinyWorld, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_bytes(b"\xff" * 9)
    file = recipe(world, tmp_path, data_path=tmp_path / "bad.json", streaming=True, max_steps=2)
    code, lines = doctor(file)
    assert code == 1
    assert re.match(r"error: data: data file .*bad\.json' is not UTF-8", lines[0])


def test_a_global_batch_that_cannot_be(world: TinyWorld, tmp_path: Path) -> None:
    code, lines = doctor(recipe(world, tmp_path), "global_batch_size=7", "num_gpus=2")
    assert code == 1
    assert lines[0].startswith("error: settings: --global_batch_size 7 is no multiple of 2 devices")


def test_wrong_settings(world: TinyWorld, tmp_path: Path) -> None:
    code, lines = doctor(recipe(world, tmp_path), "lernin_rate=1")
    assert (code, len(lines)) == (1, 2)
    assert lines[0].startswith("error: settings: ")
    assert "did you mean learning_rate" in lines[0]


# Defects of models -----------------------------------------------------------------------------------------------


def wide_projector(world: TinyWorld, folder: Path) -> dict[str, Any]:
    weights = {f"model.mm_projector.{i}.{n}": torch.zeros(64, 64) for i in (0, 2) for n in ("weight", "bias")}
    torch.save(weights, folder / "mm_projector.bin")
    return {"pretrain_mm_mlp_adapter": folder / "mm_projector.bin"}


def other_rank(world: TinyWorld, folder: Path) -> dict[str, Any]:
    train(parse_args(world.flags(folder / "lora", **LORA, max_steps=1)))
    return {"lora_enable": True, "lora_r": 8, "lora_weight_path": folder / "lora"}


def torn_tower(world: TinyWorld, folder: Path) -> dict[str, Any]:
    shutil.copytree(world.clip, folder / "clip")
    weights = folder / "clip" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return {"vision_tower": folder / "clip"}


def missing_shard(world: TinyWorld, folder: Path) -> dict[str, Any]:
    shutil.copytree(world.llm, folder / "llm")
    names = load_file(folder / "llm" / "model.safetensors")
    (folder / "llm" / "model.safetensors").unlink()
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (folder / "llm" / "model.safetensors.index.json").write_text(json.dumps(index))
    return {"model_name_or_path": folder / "llm"}


def missing_weight(world: TinyWorld, folder: Path) -> dict[str, Any]:
    shutil.copytree(world.llm, folder / "llm")
    weights = load_file(folder / "llm" / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "llm" / "model.safetensors", metadata={"format": "pt"})
    return {"model_name_or_path": folder / "llm"}


def other_width(world: TinyWorld, folder: Path) -> dict[str, Any]:
    shutil.copytree(world.llm, folder / "llm")
    config = json.loads((folder / "llm" / "config.json").read_text())
    (folder / "llm" / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    return {"model_name_or_path": folder / "llm"}


def no_weights(world: TinyWorld, folder: Path) -> dict[str, Any]:
    shutil.copytree(world.llm, folder / "llm")
    (folder / "llm" / "model.safetensors").unlink()
    return {"model_name_or_path": folder / "llm"}


def no_class_token(world: TinyWorld, folder: Path) -> dict[str, Any]:
    width = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    vision = {**width, "image_size": SIDE, "patch_size": 8}
    SiglipModel(SiglipConfig(text_config={**width, "vocab_size": 64}, vision_config=vision)).save_pretrained(
        folder / "siglip"
    )
    SiglipImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(folder / "siglip")
    return {"vision_tower": folder / "siglip", "reduction": "prumerge"}


def torn_llava(world: TinyWorld, folder: Path) -> dict[str, Any]:
    train(parse_args(world.flags(folder / "llava", max_steps=1)))
    weights = load_file(folder / "llava" / "model.safetensors")
    del weights["model.mm_projector.2.bias"]
    save_file(weights, folder / "llava" / "model.safetensors", metadata={"format": "pt"})
    return {"model_name_or_path": folder / "llava"}


MODEL_DEFECTS: dict[str, tuple[Callable[[TinyWorld, Path], dict[str, Any]], str]] = {
    "projector": (wide_projector, r"error: model: .*mm_projector\.bin.*wrong shape.*mm_projector\.0\.weight"),
    "adapter": (other_rank, r"error: model: .*lora.*wrong shape"),
    "tower": (torn_tower, r"error: vision tower: .*model\.safetensors can't be read as a file of weights"),
    "shard": (missing_shard, r"error: checkpoint: no weights at .*model-00001-of-00001\.safetensors"),
    "weight": (missing_weight, r"error: checkpoint: .*missing \(1\): model\.layers\.1\.mlp\.up_proj\.weight"),
    "width": (other_width, r"error: checkpoint: .*wrong shape .*up_proj\.weight \(48, 32\), the model has \(64, 32\)"),
    "projector of a checkpoint": (torn_llava, r"error: checkpoint: .*missing \(1\): model\.mm_projector\.2\.bias"),
    "no weights": (no_weights, r"error: checkpoint: .* holds no weights: expected one of model\.safetensors"),
    "method and tower": (no_class_token, r"error: method: .*attention of CLS, and this vision tower has none"),
    "drop after the end": (
        lambda world, folder: {"reduction": "{name: pyramiddrop, layers: [8], ratios: [0.5]}"},
        r"error: model: .*pyramiddrop.*8",
    ),
    "nothing trained": (
        lambda world, folder: {"freeze_backbone": True, "freeze_mm_mlp_adapter": True},
        r"error: model: nothing is trained",
    ),
    "no tower": (lambda world, folder: {"vision_tower": None}, r"error: model: .*name one with --vision_tower"),
}


@pytest.mark.parametrize(("make", "line"), MODEL_DEFECTS.values(), ids=MODEL_DEFECTS)
def test_defects_of_models(
    make: Callable[[TinyWorld, Path], dict[str, Any]], line: str, world: TinyWorld, tmp_path: Path
) -> None:
    code, lines = doctor(recipe(world, tmp_path, **make(world, tmp_path)))
    assert code == 1
    assert [text for text in lines if re.match(line, text)], lines


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"reduction": "{name: prumerge, ratio: 0.5}"},
        {"reduction": "{name: prumerge_plus, tokens: 3}"},
        {"reduction": "{name: spatial, rows: 2, columns: 3}", "mm_patch_merge_type": "spatial"},
        {"mm_patch_merge_type": "spatial_unpad"},
        {"reduction": "{name: random, tokens: 5}", "mm_patch_merge_type": "flat"},
        {"reduction": "{name: avgpool, kernel: 2}"},
        {"reduction": "{name: stf, kernel: 2, mbtf: [1, 2], tokens_out: 2}", "mm_patch_merge_type": "spatial_unpad"},
    ],
)
@pytest.mark.parametrize("ratio", ["pad", "anyres"])
def test_visual_tokens_are_those_of_the_model(
    ratio: str, settings: dict[str, Any], world: TinyWorld, tmp_path: Path
) -> None:
    settings = {"image_aspect_ratio": ratio, "image_grid_pinpoints": "[(32, 64), (64, 64)]", **settings}
    arguments = parse_args(world.flags(tmp_path, **settings))
    config = read_config(arguments)
    count = VisualCount(build_without_weights(arguments, config), arguments).count
    model = load_model(arguments, config, load_tokenizer(arguments))
    processor = model.get_vision_tower().image_processor
    how = SimpleNamespace(image_aspect_ratio=ratio, image_grid_pinpoints="[(32, 64), (64, 64)]")
    for size in ((40, 30), (20, 90), (64, 64), (500, 20)):
        pixels = process_images([Image.effect_noise(size, 50).convert("RGB")], processor, how)
        [(_, expected)] = model.count_visual_tokens([pixels[0]], [size])
        assert count(size) == expected, size


def test_tokens_of_which_only_shapes_are_known() -> None:
    source = torch.empty(1, 12, dtype=torch.long, device="meta")
    tokens = without_meta(VisualTokens(torch.empty(1, 12, 4, device="meta"), source=source), (2, 3))
    assert tokens.source is not None
    assert tokens.source.tolist() == [[0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]]


# Memory and disk -------------------------------------------------------------------------------------------------


def parsed(world: TinyWorld, folder: Path, **settings: Any) -> tuple[Any, Arguments]:
    arguments = check_args(world.flags(folder, **settings))
    return build_without_weights(arguments, read_config(arguments)), arguments


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_memory_of_states(stage: int, world: TinyWorld, tmp_path: Path) -> None:
    """Adam in bfloat16: 2 + 2 + 12 bytes a weight, shared by stage; 4 + 2 (autocast) + 4 + 8 without DeepSpeed."""
    config = {2: "zero2", 3: "zero3"}.get(stage)
    zero = {"deepspeed": str(ROOT / f"scripts/{config}.json")} if config else {}
    model, arguments = parsed(world, tmp_path, bf16=True, unfreeze_mm_vision_tower=True, **zero)
    weights = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert 0.9 * weights < trained < weights  # all but what is never read of the tower
    need = memory.estimate_memory(model, arguments, world_size=4, length=100)
    if stage == 0:
        assert need.weights == 4 * weights + 2 * trained
        assert (need.gradients, need.optimizer) == (4 * trained, 8 * trained)
    else:
        share = 4 if stage == 3 else 1
        assert (need.weights, need.gradients) == (2 * weights / share, 2 * trained / 4)
        assert need.optimizer == 12 * trained / 4


def test_memory_of_lora_and_offloading(world: TinyWorld, tmp_path: Path) -> None:
    model, arguments = parsed(world, tmp_path, bf16=True, **LORA)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - trained
    need = memory.estimate_memory(model, arguments, world_size=1, length=100)
    assert (need.weights, need.optimizer) == (2 * frozen + 6 * trained, 8 * trained)
    offload = {"deepspeed": str(ROOT / "scripts/zero3_offload.json")}
    model, arguments = parsed(world, tmp_path, bf16=True, **LORA, **offload)
    need = memory.estimate_memory(model, arguments, world_size=1, length=100)
    assert need.weights == need.optimizer == 0


def kept_by_autograd(config: LlamaConfig, dtype: torch.dtype, checkpointing: bool) -> int:
    """Bytes that a forward pass of [2, 64] tokens leaves for the backward pass."""
    model = LlamaForCausalLM(config).to(dtype).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model.model(torch.zeros(2, 64, dtype=torch.long)).last_hidden_state
    assert hidden.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("checkpointing", "key_heads"), [(False, 8), (False, 2), (True, 8)])
def test_activations_are_those_that_autograd_keeps(checkpointing: bool, key_heads: int, dtype: torch.dtype) -> None:
    """What four layers more cost, counted by autograd's own hooks on LLaVA-1.5's proportions."""
    half = dtype == torch.bfloat16
    training = SimpleNamespace(
        per_device_train_batch_size=2, fp16=False, bf16=half, gradient_checkpointing=checkpointing
    )
    shape = {"vocab_size": 32, "hidden_size": 256, "intermediate_size": 688, "num_attention_heads": 8}
    measured, estimated = [], []
    for layers in (4, 8):
        config = LlamaConfig(**shape, num_hidden_layers=layers, num_key_value_heads=key_heads)
        measured.append(kept_by_autograd(config, dtype, checkpointing))
        estimated.append(memory.activation_bytes(SimpleNamespace(config=config), training, 64)[0])
    assert estimated[1] - estimated[0] == pytest.approx(measured[1] - measured[0], rel=0.02)


def test_memory_is_compared_with_the_device(world: TinyWorld, tmp_path: Path) -> None:
    file = recipe(world, tmp_path)
    code, lines = doctor(file, "--device-memory", "0.001")
    assert code == 1
    assert re.match(r"error: memory: about 0\.0\d GiB \(weights .*use a higher ZeRO stage", lines[0])
    assert doctor(file, "--device-memory", "80")[0] == 0


def test_processes(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("one slots=4\ntwo slots=8  # fast\n# three slots=8\n")
    assert processes_of(LaunchOptions(hostfile=str(tmp_path / "hosts"))) == 12
    assert processes_of(LaunchOptions(num_gpus=3)) == 3


def test_free_disk(world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three checkpoints lie there while the third of save_total_limit 2 is written, and the result at the end."""
    settings = {"save_strategy": "steps", "save_steps": 10, "max_steps": 100, "save_total_limit": 2}
    model, arguments = parsed(world, tmp_path, **settings)
    weights, state = memory.checkpoint_bytes(model, arguments)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (weights, state) == (4 * (frozen + trained), 8 * trained)
    need = weights + 3 * (weights + state)
    for free, problems in ((need - 1, 1), (need, 0)):
        report = Report()
        memory.check_disk(report, model, arguments, samples=12, world_size=1, free=int(free))
        assert len(report.errors) == problems
    monkeypatch.setattr(memory.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    code, lines = doctor(recipe(world, tmp_path, **settings))
    assert code == 1
    assert re.match(r"error: disk: .* for 3 checkpoints .*set a smaller --save_total_limit", lines[0])


def test_what_a_resumed_run_has_written_is_free_for_it(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, arguments = parsed(world, tmp_path)
    need = int(sum(memory.checkpoint_bytes(model, arguments)[:1]))
    monkeypatch.setattr(memory.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    for written, problems in ((need - 1001, 1), (need - 1000, 0)):
        (tmp_path / "model.safetensors").write_bytes(bytes(written))
        report = Report()
        memory.check_disk(report, model, arguments, samples=12, world_size=1)
        assert len(report.errors) == problems


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"save_strategy": "no"}, 0),
        ({"save_strategy": "steps", "save_steps": 3, "max_steps": 10}, 3),
        ({"save_strategy": "steps", "save_steps": 0.5, "max_steps": 10}, 2),
        ({"save_strategy": "epoch", "num_train_epochs": 4, "max_steps": None, "save_total_limit": 1}, 2),
        ({"save_strategy": "steps", "save_steps": 5, "max_steps": None, "num_train_epochs": 2}, 2),
    ],
)
def test_number_of_checkpoints(settings: dict[str, Any], kept: int, world: TinyWorld, tmp_path: Path) -> None:
    """60 samples, 2 a step on each of 2 processes, where no number of steps is given."""
    training = check_args(world.flags(tmp_path, **settings)).training
    samples = 20 if settings.get("save_steps") == 5 else 60
    assert memory.checkpoints_kept(training, samples, world_size=2) == kept


# The start of a run ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [wide_projector, torn_tower, missing_shard, "image"])
def test_a_run_refuses_before_weights_are_read(
    make: Any, world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_module, "load_model", lambda *_: pytest.fail("read weights"))
    bad = with_samples(world, tmp_path, {"id": "x7", "image": "gone.png", "conversations": PICTURE})
    settings = {"data_path": bad} if make == "image" else make(world, tmp_path)
    message = r"image: 1 sample \('x7'\)" if make == "image" else "projector|tower|shard|no weights"
    with pytest.raises(ValueError, match=rf"the run would fail, so it is not started:\nerror: .*({message})"):
        train(parse_args(world.flags(tmp_path / "out", **settings)))


def test_a_run_without_its_checks(world: TinyWorld, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bad = with_samples(world, tmp_path, {"id": "x7", "image": "gone.png", "conversations": PICTURE})
    settings = {"data_path": bad, "train_sampling_strategy": "sequential", "tune_mm_mlp_adapter": True}
    train(parse_args(world.flags(tmp_path / "out", preflight_seconds=0, **settings)))
    train(parse_args(world.flags(tmp_path / "out", on_bad_sample="skip", **settings)))
    assert "image: 1 sample ('x7'); the first: image " in caplog.text


def test_the_search_for_images_has_a_limit(world: TinyWorld, tmp_path: Path) -> None:
    bad = [{"id": i, "image": "gone.png", "conversations": PICTURE} for i in range(2000)]
    report = examine(recipe(world, tmp_path, data_path=with_samples(world, tmp_path, *bad)), [])
    assert "2000 samples" in report.errors[0].message
    arguments = check_args(world.flags(tmp_path, data_path=tmp_path / "data.json"))
    from llava.train.data import load_dataset

    dataset: Any = load_dataset(arguments, read_config(arguments), load_tokenizer(arguments), judge=False)
    report = Report()
    check_images_exist(dataset, report, seconds=-1)
    assert not report.errors
    assert "enough to look for the images of 0 samples only" in report.findings[0].message
    with pytest.raises(ValueError, match="2000 samples"):
        preflight(parse_args(world.flags(tmp_path, data_path=tmp_path / "data.json")), read_config(arguments), dataset)
