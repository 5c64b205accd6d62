"""What is trained, in what order, at what rate, and what is written: on tiny models, in this process."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from llava.files import atomic_folder
from llava.model.builder import load_pretrained_model
from llava.train import modeling
from llava.train.checkpoints.folders import last_complete_checkpoint
from llava.train.checkpoints.saving import (
    RunKind,
    gather,
    load_run,
    part_of,
    save_run,
)
from llava.train.modeling import (
    linear_layer_names,
    load_model,
    load_tokenizer,
    read_config,
    run_kind,
)
from llava.train.sampler import EpochSampler, ModalityLengthSampler
from llava.train.settings.parsing import Arguments, parse_args
from llava.train.train import checkpoint_to_resume, train
from llava.train.trainer import LLaVATrainer, parameter_group_names
from tests.tiny_world import SIDE, TinyWorld, make_tiny_world

LORA = {"lora_enable": True, "lora_r": 4, "lora_alpha": 8}
PROJECTOR = {"tune_mm_mlp_adapter": True, "version": "plain"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return make_tiny_world(tmp_path_factory.mktemp("world"))


def run(world: TinyWorld, folder: Path, **settings: Any) -> LLaVATrainer:
    if settings.get("version") == "plain":
        settings.setdefault("data_path", world.captions)
    return train(parse_args(world.flags(folder, **settings)))


def build(world: TinyWorld, folder: Path, **settings: Any) -> tuple[Any, Arguments]:
    arguments = parse_args(world.flags(folder, **settings))
    config = read_config(arguments)
    return load_model(arguments, config, load_tokenizer(arguments)), arguments


def logits(folder: Path, base: Path | None = None, **settings: Any) -> Tensor:
    """Last logits of a checkpoint for a fixed prompt with an image."""
    base_path = None if base is None else str(base)
    _, model, _, _ = load_pretrained_model(str(folder), base_path, device="cpu", dtype=torch.float32, **settings)
    pixels = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids=torch.tensor([[1, 50, -200, 60, 61]]), images=pixels).logits[0, -1]


def trained_names(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# What is trained -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        (PROJECTOR, {"projector"}),
        ({}, {"projector", "language_model"}),
        ({"freeze_mm_mlp_adapter": True}, {"language_model"}),
        ({"freeze_backbone": True}, {"projector"}),
        (LORA, {"projector", "language_model"}),
        ({**LORA, "freeze_mm_mlp_adapter": True}, {"language_model"}),
        ({**LORA, "unfreeze_mm_vision_tower": True}, {"projector", "language_model", "vision_tower"}),
        ({"unfreeze_mm_vision_tower": True}, {"projector", "language_model", "vision_tower"}),
    ],
)
def test_what_is_trained(settings: dict[str, Any], parts: set[str], world: TinyWorld, tmp_path: Path) -> None:
    model, _ = build(world, tmp_path, **settings)
    names = trained_names(model)
    assert {part_of(name) for name in names} == parts
    if settings.get("lora_enable"):
        llm = {name for name in names if part_of(name) == "language_model"}
        assert all("lora_" in name and name.startswith("base_model.model.model.layers.") for name in llm)


def test_lora_adapts_every_linear_layer_of_the_blocks_and_no_other(world: TinyWorld, tmp_path: Path) -> None:
    model, _ = build(world, tmp_path, **LORA)
    wanted = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    bare, _ = build(world, tmp_path)
    assert linear_layer_names(bare) == wanted
    adapted = {name.split(".lora_A")[0] for name in trained_names(model) if ".lora_A" in name}
    layers = model.config.num_hidden_layers
    assert len(adapted) == layers * len(wanted)
    assert not any("vision_tower" in name or "mm_projector" in name or "lm_head" in name for name in adapted)


def test_nothing_to_train_is_an_error(world: TinyWorld, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing is trained"):
        run(world, tmp_path, freeze_backbone=True, freeze_mm_mlp_adapter=True)


def test_config_keeps_what_llava_keeps(world: TinyWorld, tmp_path: Path) -> None:
    settings = {"mm_projector_lr": 1e-5, "image_aspect_ratio": "anyres", "image_grid_pinpoints": "[(32, 64)]"}
    model, _ = build(world, tmp_path, mm_patch_merge_type="spatial_unpad", reduction="prumerge", **settings, **LORA)
    config = model.config.to_dict()
    expected = {
        "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": [[32, 64]],
        "tokenizer_padding_side": "right",
        "tokenizer_model_max_length": 512,
        "tune_mm_mlp_adapter": False,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "mm_projector_lr": 1e-5,
        "mm_projector_type": "mlp2x_gelu",
        "mm_patch_merge_type": "spatial_unpad",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": str(world.clip),
        "mm_hidden_size": 24,
        "reduction": {"encoder": {"name": "prumerge"}},
    }
    assert {key: config.get(key) for key in expected} == expected
    assert any("image_newline" in name for name in trained_names(model))


def test_a_language_model_needs_a_tower(world: TinyWorld, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name one with --vision_tower"):
        run(world, tmp_path, vision_tower=None)


def test_types_of_a_quantized_model(world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """QLoRA's way without bitsandbytes: the layers that it would quantize are plain."""
    monkeypatch.setattr(modeling, "quantization", lambda training: {})
    arguments = parse_args(world.flags(tmp_path, **LORA, bf16=True, max_steps=1))
    arguments.training.bits = 4
    trainer = train(arguments)
    assert trainer is not None
    dtypes: dict[str, set[torch.dtype]] = {}
    for name, parameter in trainer.model.named_parameters():
        part = "norm" if part_of(name) == "language_model" and "norm" in name else part_of(name)
        dtypes.setdefault("trained" if parameter.requires_grad else part, set()).add(parameter.dtype)
    bf16, float32 = {torch.bfloat16}, {torch.float32}
    assert dtypes == {"trained": float32, "norm": float32, "language_model": bf16, "vision_tower": bf16}
    assert math.isfinite(trainer.state.log_history[0]["loss"])


def test_one_process_trains_on_one_gpu(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where it sees four, transformers would take nn.DataParallel, which cuts lists of pictures anywhere."""
    whole = transformers.TrainingArguments.__post_init__

    def with_four_gpus(self: Any) -> None:
        whole(self)
        assert self.n_gpu == 0
        self._n_gpu = 4

    monkeypatch.setattr(transformers.TrainingArguments, "__post_init__", with_four_gpus)
    monkeypatch.setattr(nn.DataParallel, "__init__", lambda *_: pytest.fail("nn.DataParallel"))
    trainer = run(world, tmp_path, **PROJECTOR, max_steps=1)
    assert trainer.args.n_gpu == 1
    assert trainer.args.train_batch_size == 2
    assert "1 of 4 GPUs trains (cpu), since one process was started" in caplog.text
    assert "num_gpus=4" in caplog.text


# Optimizer groups ------------------------------------------------------------------------------------------------


def test_parameter_groups_by_name(world: TinyWorld, tmp_path: Path) -> None:
    model, _ = build(world, tmp_path, unfreeze_mm_vision_tower=True)
    decayed = {name for name in trained_names(model) if "norm" not in name and not name.endswith("bias")}
    groups = parameter_group_names(model, decayed, {"projector", "vision_tower"})
    assert list(groups) == [
        ("base", True),
        ("base", False),
        ("projector", True),
        ("projector", False),
        ("vision_tower", True),
        ("vision_tower", False),
    ]
    assert groups["projector", True] == ["model.mm_projector.0.weight", "model.mm_projector.2.weight"]
    assert groups["projector", False] == ["model.mm_projector.0.bias", "model.mm_projector.2.bias"]
    assert "model.layers.0.self_attn.q_proj.weight" in groups["base", True]
    assert "lm_head.weight" in groups["base", True]
    assert "model.layers.0.input_layernorm.weight" in groups["base", False]
    assert all(".vision_tower." in name for name in groups["vision_tower", True])
    assert sorted(itertools.chain(*groups.values())) == sorted(trained_names(model))


def test_rates_of_projector_and_tower(world: TinyWorld, tmp_path: Path) -> None:
    settings = {"mm_projector_lr": 3e-4, "mm_vision_tower_lr": 2e-6, "unfreeze_mm_vision_tower": True}
    trainer = run(world, tmp_path, weight_decay=0.1, max_steps=1, lr_scheduler_type="constant", **settings)
    groups = [(g["lr"], g["weight_decay"]) for g in trainer.optimizer.param_groups]
    assert groups == [(1e-2, 0.1), (1e-2, 0.0), (3e-4, 0.1), (3e-4, 0.0), (2e-6, 0.1), (2e-6, 0.0)]
    assert trainer._get_learning_rate() == 1e-2


# Order of samples ------------------------------------------------------------------------------------------------


def modality_lengths(count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 500, (count,), generator=generator)
    signs = torch.where(torch.rand(count, generator=generator) < 0.7, 1, -1)
    return (lengths * signs).tolist()


@pytest.mark.parametrize(("count", "batch", "per_step"), [(1, 1, 1), (7, 4, 2), (64, 4, 4), (1003, 8, 3), (90, 16, 8)])
def test_modality_sampler_is_a_permutation_of_uniform_steps(count: int, batch: int, per_step: int) -> None:
    lengths = modality_lengths(count)
    order = list(ModalityLengthSampler(lengths, batch, per_step, seed=1))
    assert sorted(order) == list(range(count))
    step = batch * per_step
    images = sum(length > 0 for length in lengths)
    whole = (images // step + (count - images) // step) * step
    for start in range(0, whole, step):
        signs = {lengths[i] > 0 for i in order[start : start + step]}
        assert len(signs) == 1


def test_modality_sampler_gives_every_device_the_same_work() -> None:
    lengths = modality_lengths(4096)
    batch, devices = 16, 8
    order = list(ModalityLengthSampler(lengths, batch, devices, seed=0))
    costs = torch.tensor([abs(lengths[i]) for i in order[: len(order) // 128 * 128 - 256]]).view(-1, devices, batch)
    sums = costs.sum(dim=2).float()
    assert ((sums.amax(1) - sums.amin(1)) / sums.mean(1)).mean() < 0.05


def test_samplers_depend_on_seed_and_epoch_only() -> None:
    lengths = modality_lengths(100)
    for make in (lambda seed: EpochSampler(100, seed), lambda seed: ModalityLengthSampler(lengths, 4, 2, seed)):
        first, again, other = make(0), make(0), make(1)
        torch.manual_seed(5)
        order = list(first)
        torch.manual_seed(6)
        assert list(again) == order
        assert list(other) != order
        first.set_epoch(1)
        assert list(first) != order
        first.set_epoch(0)
        assert list(first) == order


def test_modality_sampler_with_one_modality() -> None:
    assert sorted(ModalityLengthSampler([3, 1, 2, 5, 4], 2, 1, seed=0)) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="sample 1 has length 0"):
        ModalityLengthSampler([3, 0], 1, 1, seed=0)


# Training and what it writes -------------------------------------------------------------------------------------


def test_pretraining_writes_the_projector(world: TinyWorld, tmp_path: Path) -> None:
    trainer = run(world, tmp_path, **PROJECTOR, save_strategy="steps", save_steps=1)
    for folder in (tmp_path, tmp_path / "checkpoint-1"):
        weights = torch.load(folder / "mm_projector.bin", weights_only=True)
        layers = [f"model.mm_projector.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")]
        assert sorted(weights) == sorted(layers)
        assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlavaLlamaForCausalLM"]
        assert not list(folder.glob("*.safetensors"))
    before = logits(tmp_path / "checkpoint-1", world.llm)
    after = logits(tmp_path, world.llm)
    assert not torch.allclose(before, after, atol=1e-3)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2


def test_lora_writes_adapter_and_projector(world: TinyWorld, tmp_path: Path) -> None:
    run(world, tmp_path, **LORA, reduction="prumerge", save_strategy="steps", save_steps=1)
    for folder in (tmp_path, tmp_path / "checkpoint-1"):
        adapter = load_file(folder / "adapter_model.safetensors")
        assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in adapter
        others = torch.load(folder / "non_lora_trainables.bin", weights_only=True)
        assert all(name.startswith("base_model.model.model.mm_projector.") for name in others)
        assert len(others) == 4
        config = json.loads((folder / "config.json").read_text())
        assert config["reduction"] == {"encoder": {"name": "prumerge"}}
        assert config["use_cache"]
        assert (folder / "tokenizer_config.json").is_file()
    changed = logits(tmp_path, world.llm)
    assert not torch.allclose(logits(tmp_path / "checkpoint-1"), changed, atol=1e-3)
    assert not torch.allclose(logits(tmp_path, reduction="none"), changed, atol=1e-3)


def test_full_finetuning_writes_the_model(world: TinyWorld, tmp_path: Path) -> None:
    adapter = tmp_path / "pretrained"
    run(world, adapter, **PROJECTOR)
    trainer = run(world, tmp_path / "full", pretrain_mm_mlp_adapter=adapter / "mm_projector.bin")
    weights = load_file(tmp_path / "full" / "model.safetensors")
    assert "model.mm_projector.0.weight" in weights
    assert any(name.startswith("model.vision_tower.vision_tower.vision_model.") for name in weights)
    assert (tmp_path / "full" / "tokenizer_config.json").is_file()
    assert not torch.allclose(logits(tmp_path / "full"), logits(adapter, world.llm), atol=1e-3)
    own = trainer.model.state_dict()["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(weights["model.layers.0.mlp.up_proj.weight"], own)


def test_finetuning_goes_on_from_a_llava_checkpoint(world: TinyWorld, tmp_path: Path) -> None:
    """Settings that are not given come from its config; its projector stays."""
    run(world, tmp_path / "a", reduction="prumerge")
    given = {"mm_projector_type": None, "mm_vision_select_layer": None, "image_aspect_ratio": None}
    given |= {"vision_tower": None, "mm_use_im_patch_token": None, "mm_use_im_start_end": None}
    given["model_name_or_path"] = tmp_path / "a"
    model, arguments = build(world, tmp_path / "b", **given)
    assert arguments.data.image_aspect_ratio == "pad"
    assert arguments.model.mm_projector_type == "mlp2x_gelu"
    assert model.config.reduction == {"encoder": {"name": "prumerge"}}
    weights = load_file(tmp_path / "a" / "model.safetensors")
    assert torch.equal(model.get_parameter("model.mm_projector.0.weight"), weights["model.mm_projector.0.weight"])
    run(world, tmp_path / "b", **given, **LORA)
    assert not torch.allclose(logits(tmp_path / "b"), logits(tmp_path / "a"), atol=1e-3)


def test_marker_tokens_are_learned_and_kept(world: TinyWorld, tmp_path: Path) -> None:
    run(world, tmp_path / "p", **PROJECTOR, mm_use_im_start_end=True)
    weights = torch.load(tmp_path / "p" / "mm_projector.bin", weights_only=True)
    assert weights["model.embed_tokens.weight"].shape[0] == 259 + 2
    adapter = tmp_path / "p" / "mm_projector.bin"
    run(world, tmp_path / "l", **LORA, mm_use_im_start_end=True, pretrain_mm_mlp_adapter=adapter)
    others = torch.load(tmp_path / "l" / "non_lora_trainables.bin", weights_only=True)
    assert others["base_model.model.model.embed_tokens.weight"].shape[0] == 259 + 2
    assert logits(tmp_path / "l", world.llm).shape == (259 + 2,)


def test_biases_are_kept_beside_the_adapters(world: TinyWorld, tmp_path: Path) -> None:
    shutil.copytree(world.llm, tmp_path / "qwen")
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=259, num_key_value_heads=2, tie_word_embeddings=True, **shape)
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "qwen")
    settings = {**LORA, "lora_bias": "all", "model_name_or_path": tmp_path / "qwen"}
    trainer = run(world, tmp_path / "lora", **settings, save_strategy="steps", save_steps=1)
    name = "model.layers.0.self_attn.q_proj"
    others = torch.load(tmp_path / "lora" / "non_lora_trainables.bin", weights_only=True)
    bias = others[f"base_model.model.{name}.bias"]
    assert bias.any()
    _, model, _, _ = load_pretrained_model(str(tmp_path / "lora"), device="cpu", dtype=torch.float32, merge_lora=True)
    assert torch.equal(model.get_parameter(f"{name}.bias"), bias)
    load_run(trainer.model, RunKind.LORA, tmp_path / "lora" / "checkpoint-1")
    assert not torch.equal(trainer.model.get_parameter(f"base_model.model.{name}.base_layer.bias"), bias)


def test_tied_embeddings_are_written_once(world: TinyWorld, tmp_path: Path) -> None:
    shutil.copytree(world.llm, tmp_path / "qwen")
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = Qwen2Config(vocab_size=259, num_key_value_heads=2, tie_word_embeddings=True, **shape)
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "qwen")
    trainer = run(world, tmp_path / "run", model_name_or_path=tmp_path / "qwen")
    weights = load_file(tmp_path / "run" / "model.safetensors")
    assert "lm_head.weight" not in weights
    assert torch.equal(weights["model.embed_tokens.weight"], trainer.model.lm_head.weight)
    load_run(trainer.model, RunKind.FULL, tmp_path / "run")


def test_a_trained_tower_is_kept(world: TinyWorld, tmp_path: Path) -> None:
    settings = {"unfreeze_mm_vision_tower": True, "mm_vision_tower_lr": 1e-2, "max_steps": 1}
    trainer = run(world, tmp_path / "lora", **LORA, **settings)
    others = torch.load(tmp_path / "lora" / "non_lora_trainables.bin", weights_only=True)
    assert any("vision_tower" in name for name in others)
    _, model, _, _ = load_pretrained_model(str(tmp_path / "lora"), device="cpu", dtype=torch.float32)
    name = "model.vision_tower.vision_tower.encoder.layers.0.mlp.fc1.weight"
    assert torch.equal(model.get_parameter(name), trainer.model.base_model.model.get_parameter(name))


@pytest.mark.parametrize("settings", [PROJECTOR, LORA, {}], ids=["projector", "lora", "full"])
def test_an_interrupted_run_ends_like_an_uninterrupted_one(
    settings: dict[str, Any], world: TinyWorld, tmp_path: Path
) -> None:
    """Stopped in its second epoch; with dropout, so that the random state must be right too."""
    settings = {
        **settings,
        "save_strategy": "steps",
        "save_steps": 7,
        "max_steps": 9,
        "lora_dropout": 0.1,
        "logging_steps": 2,
    }
    settings |= {"group_by_modality_length": "version" not in settings}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole_trainer = run(world, whole, **settings)
    shutil.copytree(whole / "checkpoint-7", parts / "checkpoint-7")
    assert checkpoint_to_resume(parse_args(world.flags(parts, **settings)).training) == str(parts / "checkpoint-7")
    trainer = run(world, parts, **settings)
    logged = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    expected = {entry["step"]: entry["loss"] for entry in whole_trainer.state.log_history if "loss" in entry}
    assert logged == pytest.approx(expected, rel=1e-5)
    assert list(logged) == [2, 4, 6, 8]  # the line of step 8 is the mean of a step before and one after the stop
    base = world.llm if settings.get("version") or settings.get("lora_enable") else None
    assert torch.allclose(logits(parts, base), logits(whole, base), atol=1e-5)


def test_a_checkpoint_that_was_not_finished_is_not_resumed(world: TinyWorld, tmp_path: Path) -> None:
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").touch()
    (tmp_path / "checkpoint-11").mkdir()
    (tmp_path / "checkpoint-latest").mkdir()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert last_complete_checkpoint(tmp_path / "nowhere") is None


def test_old_checkpoints_are_removed(world: TinyWorld, tmp_path: Path) -> None:
    run(world, tmp_path, **PROJECTOR, save_strategy="steps", save_steps=2, max_steps=7, save_total_limit=2)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["checkpoint-4", "checkpoint-6"]


def test_accumulating_gradients_equals_a_larger_batch(world: TinyWorld, tmp_path: Path) -> None:
    settings = {**PROJECTOR, "max_steps": 2, "optim": "sgd"}
    run(world, tmp_path / "a", **settings, per_device_train_batch_size=4)
    run(world, tmp_path / "b", **settings, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    a, b = (torch.load(tmp_path / n / "mm_projector.bin", weights_only=True) for n in "ab")
    for name, weight in a.items():
        torch.testing.assert_close(weight, b[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("precision", [{}, {"bf16": True}, {"bf16": True, "gradient_checkpointing": True}])
@pytest.mark.parametrize("kind", [PROJECTOR, LORA, {}], ids=["projector", "lora", "full"])
def test_the_loss_falls_in_every_precision(
    kind: dict[str, Any], precision: dict[str, Any], world: TinyWorld, tmp_path: Path
) -> None:
    trainer = run(world, tmp_path, **kind, **precision, max_steps=12, learning_rate=2e-2)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-3:]) < sum(losses[:3]) - 0.5
    types = {p.dtype for p in trainer.model.parameters() if p.requires_grad}
    assert types == {torch.float32}  # without DeepSpeed's copies small updates would be lost in bfloat16


def test_gradient_checkpointing_changes_no_gradient(world: TinyWorld, tmp_path: Path) -> None:
    settings = {**LORA, "lora_dropout": 0.0, "max_steps": 2}
    run(world, tmp_path / "a", **settings)
    run(world, tmp_path / "b", **settings, gradient_checkpointing=True)
    torch.testing.assert_close(logits(tmp_path / "a"), logits(tmp_path / "b"), atol=1e-5, rtol=1e-4)


def test_lora_goes_on_from_an_adapter(world: TinyWorld, tmp_path: Path) -> None:
    run(world, tmp_path / "a", **LORA)
    model, _ = build(world, tmp_path / "b", **LORA, lora_weight_path=tmp_path / "a")
    adapter = load_file(tmp_path / "a" / "adapter_model.safetensors")
    own = dict(model.named_parameters())
    for name, weight in adapter.items():
        assert torch.equal(own[name.replace(".weight", ".default.weight")], weight)
    projector = torch.load(tmp_path / "a" / "non_lora_trainables.bin", weights_only=True)
    assert all(torch.equal(own[name], weight) for name, weight in projector.items())
    torch.save(adapter, tmp_path / "a" / "adapter_model.bin")  # as PEFT wrote it for LLaVA
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="wrong shape"):
        build(world, tmp_path / "c", **{**LORA, "lora_r": 2}, lora_weight_path=tmp_path / "a")


# Files -----------------------------------------------------------------------------------------------------------


def test_an_empty_weight_is_never_written() -> None:
    with pytest.raises(ValueError, match=r"mm_projector\.weight has shape \(0,\): ZeRO-3"):
        gather([("mm_projector.weight", nn.Parameter(torch.empty(0)))], keep=True)
    assert gather([("a", nn.Parameter(torch.empty(0)))], keep=False) == {}


def test_files_appear_only_when_they_are_complete(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("old")
    with pytest.raises(RuntimeError), atomic_folder(tmp_path) as folder:
        (folder / "config.json").write_text("half")
        raise RuntimeError
    assert (tmp_path / "config.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    with atomic_folder(tmp_path) as folder:
        (folder / "config.json").write_text("new")
    assert (tmp_path / "config.json").read_text() == "new"
    assert len(list(tmp_path.iterdir())) == 1


def test_shards_of_an_earlier_run_are_removed(world: TinyWorld, tmp_path: Path) -> None:
    model, arguments = build(world, tmp_path)
    stale = ["model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    for name in stale:
        (tmp_path / name).touch()
    save_run(model, run_kind(arguments), tmp_path, writer=True)
    assert (tmp_path / "model.safetensors").is_file()
    assert not any((tmp_path / name).exists() for name in stale)


def test_reading_back_is_strict(world: TinyWorld, tmp_path: Path) -> None:
    model, _ = build(world, tmp_path, **PROJECTOR)
    save_run(model, RunKind.PROJECTOR, tmp_path, writer=True)
    weights = torch.load(tmp_path / "mm_projector.bin", weights_only=True)
    del weights["model.mm_projector.0.bias"]
    torch.save(weights, tmp_path / "mm_projector.bin")
    with pytest.raises(ValueError, match=r"missing .*model\.mm_projector\.0\.bias"):
        load_run(model, RunKind.PROJECTOR, tmp_path)


def test_sampling_settings_of_vicuna_do_not_stop_the_writing(world: TinyWorld, tmp_path: Path) -> None:
    """Its generation_config has a temperature without do_sample, which transformers refuses to write."""
    model, _ = build(world, tmp_path)
    model.generation_config.temperature = 0.9
    save_run(model, RunKind.FULL, tmp_path, writer=True)
    assert json.loads((tmp_path / "generation_config.json").read_text())["temperature"] == 0.9


@pytest.mark.parametrize("kind", ["projector", "lora"])
def test_a_result_opens_from_any_folder(
    kind: str, world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base and the tower were named as seen from where the run was started."""
    monkeypatch.chdir(world.root)
    settings = {"tune_mm_mlp_adapter": True} if kind == "projector" else {"lora_enable": True, "lora_r": 2}
    names = {"model_name_or_path": "llm", "vision_tower": "clip"}
    train(parse_args(world.flags(tmp_path / "out", **names, **settings, max_steps=1)))
    monkeypatch.chdir(tmp_path)
    base = world.llm if kind == "projector" else None  # adapters name theirs
    _, model, _, _ = load_pretrained_model("out", base, device="cpu")
    assert model.config.mm_vision_tower == str(world.clip)
