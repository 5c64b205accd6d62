"""Batches run as one row without padding: the same losses, gradients and logits, and samples that stay apart."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llava.model.language_model import staged
from llava.model.language_model.packed import (
    PACKED_SDPA,
    PACKED_VARLEN,
    best_packed_attention,
    boundaries,
    packed_sdpa,
    packed_varlen,
    rows_for_sdpa,
    window_mask,
)
from llava.model.language_model.staged import StagedPass
from llava.train.modeling import read_config
from llava.train.settings.parsing import parse_args
from llava.train.train import choose_packing, train
from tests.test_model import FIRST, ROWS, pictures
from tests.test_staged import BACKBONES, GREEDY, METHODS, gradients, padded, staged_model, training_batch
from tests.tiny_world import make_tiny_world
from tests.varlen_kernels import kernels, set_attention

__all__ = ["kernels"]  # a fixture


def packing_model(backbone: str, reduction: Any, **settings: Any) -> Any:
    model = staged_model(backbone, reduction, **settings)
    model.set_attn_implementation(PACKED_SDPA)
    return model


@pytest.mark.parametrize("reduction", ["none", "prumerge", *METHODS], ids=str)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_losses_and_gradients_are_those_of_the_padded_batch(backbone: str, reduction: Any) -> None:
    model = packing_model(backbone, reduction).train()
    batch = training_batch()
    loss, expected = gradients(model, batch)
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        packed_loss, got = gradients(model, {**batch, "packed": True})
        torch.testing.assert_close(packed_loss, loss, atol=1e-5, rtol=0)
        assert got.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(got[name], gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("anyres", [False, True], ids=["flat", "anyres"])
@pytest.mark.parametrize("reduction", ["none", METHODS[0], METHODS[3]], ids=str)
@torch.no_grad()
def test_a_packed_row_is_its_samples_one_behind_the_other(reduction: Any, anyres: bool) -> None:
    settings = {"mm_patch_merge_type": "spatial_unpad", "image_aspect_ratio": "anyres"} if anyres else {}
    model = packing_model("llama", reduction, anyres=anyres, **settings)
    batch = {**training_batch(), "images": pictures(anyres)}
    alone = []
    for i, row in enumerate(ROWS):
        chosen = slice(FIRST[i], FIRST[i] + int((row < 0).sum()))
        labels = batch["labels"][i : i + 1, : len(row)]
        inputs = {"images": batch["images"][chosen], "image_sizes": batch["image_sizes"][chosen]}
        alone.append(model(input_ids=row.unsqueeze(0), labels=labels, **inputs).logits[0])
    torch.testing.assert_close(model(**batch, packed=True).logits[0], torch.cat(alone), atol=1e-4, rtol=0)


def test_nothing_predicts_the_first_token_of_a_sample() -> None:
    labels = torch.tensor([[5, 6, 7], [8, 9, -100]])
    kept = torch.tensor([[0, 1, 2], [0, 1, -1]])
    passed = StagedPass(
        torch.full_like(labels, -1), labels, packed=True, kept=kept, place=torch.tensor([0, 1, 2, 3, 4])
    )
    assert passed.kept_labels().tolist() == [[-100, 6, 7, -100, 9]]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_that_cannot_keep_samples_apart_is_refused(attention: str) -> None:
    model = staged_model()
    model.set_attn_implementation(attention)
    with pytest.raises(ValueError, match="packed batches need attn_implementation packed_sdpa or flash_attention_2"):
        model(**training_batch(), packed=True)


@torch.no_grad()
def test_without_packing_it_is_sdpa() -> None:
    model = staged_model()
    expected = model(**padded("right")).logits
    model.set_attn_implementation(PACKED_SDPA)
    assert torch.equal(model(**padded("right")).logits, expected)


# Kernels that go by the samples' boundaries


@pytest.mark.parametrize("attention", [PACKED_VARLEN, "flash_attention_2"])
@pytest.mark.parametrize("reduction", ["none", METHODS[0], METHODS[3]], ids=str)
@pytest.mark.parametrize("backbone", ["llama", "mistral-window", "qwen2-window"])
def test_boundaries_do_what_masks_do(backbone: str, reduction: Any, attention: str, kernels: None) -> None:
    """Padded on either side, and packed."""
    model = staged_model(backbone, reduction).train()
    for side in ("right", "left"):
        model.config.tokenizer_padding_side = side
        set_attention(model, "sdpa")
        loss, expected = gradients(model, {**training_batch(), "use_cache": False})
        set_attention(model, attention)
        for packed in (False, True):
            packed_loss, got = gradients(model, {**training_batch(), "use_cache": False, "packed": packed})
            torch.testing.assert_close(packed_loss, loss, atol=1e-5, rtol=0)
            for name, gradient in expected.items():
                torch.testing.assert_close(got[name], gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("reduction", ["none", METHODS[0]], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_prefill_by_boundaries_and_tokens_after_it(side: str, reduction: Any, kernels: None) -> None:
    model = staged_model(reduction=reduction)
    expected = model.generate(**padded(side), **GREEDY)
    for attention in (PACKED_VARLEN, "flash_attention_2"):
        set_attention(model, attention)
        assert torch.equal(model.generate(**padded(side), **GREEDY), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("kv_heads", [6, 2], ids=["all heads", "grouped"])
def test_varlen_is_packed_sdpa(dtype: torch.dtype, window: int | None, kv_heads: int, kernels: None) -> None:
    lengths, device = [5, 1, 0, 9], torch.device("cpu")
    generator = torch.Generator().manual_seed(0)
    module = torch.nn.Linear(1, 1)
    module.num_key_value_groups, module.config = 6 // kv_heads, SimpleNamespace()
    kinds = [torch.randn(1, heads, 15, 8, generator=generator).to(dtype) for heads in (6, kv_heads, kv_heads)]
    given = {"scaling": 0.3, "sliding_window": window, **boundaries(lengths, device)}
    weights = torch.randn(1, 15, 6, 8, generator=generator)
    results = []
    for attend, mask, rows in (
        (packed_sdpa, window_mask(9, window, device), rows_for_sdpa(lengths, device)),
        (packed_varlen, None, {}),
    ):
        leaves = [kind.clone().requires_grad_() for kind in kinds]
        output, _ = attend(module, *leaves, mask, **given, **rows)
        (output.float() * weights).sum().backward()
        results.append([output, *(leaf.grad for leaf in leaves)])
    close = {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.02, "rtol": 0.02}
    for by_rows, by_kernel in zip(*results, strict=True):
        assert by_kernel.dtype == dtype
        torch.testing.assert_close(by_kernel, by_rows, **close)


def test_the_kernel_gets_16_bit_types_under_autocast(kernels: None) -> None:
    model = staged_model().train()
    set_attention(model, PACKED_VARLEN)
    seen = set()
    hook = model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda _, args: seen.add(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(**training_batch(), packed=True).loss.backward()
    hook.remove()
    assert seen == {torch.bfloat16}


def test_the_kernel_has_no_dropout(kernels: None) -> None:
    model = staged_model(attention_dropout=0.1).train()
    set_attention(model, PACKED_VARLEN)
    with pytest.raises(ValueError, match="packed_varlen has no dropout: set attention_dropout to 0"):
        model(**training_batch(), packed=True)


@pytest.mark.parametrize(
    ("gpu", "is_16_bit", "changes", "expected"),
    [
        ((9, 0), True, {}, PACKED_VARLEN),
        ((8, 0), True, {"head_dim": 128}, PACKED_VARLEN),
        ((7, 0), True, {}, PACKED_SDPA),  # a V100
        (None, True, {}, PACKED_SDPA),
        ((9, 0), False, {}, PACKED_SDPA),
        ((9, 0), True, {"head_dim": 12}, PACKED_SDPA),
        ((9, 0), True, {"head_dim": 512}, PACKED_SDPA),
        ((9, 0), True, {"attention_dropout": 0.1}, PACKED_SDPA),
    ],
)
def test_the_kernel_is_taken_where_it_can_run(
    gpu: tuple[int, int] | None,
    is_16_bit: bool,
    changes: dict[str, Any],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: gpu)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    config = SimpleNamespace(**{"hidden_size": 4096, "num_attention_heads": 32, **changes})
    assert best_packed_attention(config, is_16_bit=is_16_bit) == expected


def test_indices_of_packed_rows_are_made_once_a_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    made = staged.rows_for_sdpa
    monkeypatch.setattr(staged, "rows_for_sdpa", lambda *args: calls.append(args[0]) or made(*args))
    model = packing_model("llama", METHODS[0]).train()
    model(**training_batch(), packed=True).loss.backward()
    assert len(calls) == 4  # of six layers


@pytest.mark.parametrize("settings", [{"lora_enable": True, "lora_dropout": 0.0}, {}], ids=["lora", "full"])
def test_a_packed_run_has_the_losses_of_the_padded_one(settings: dict[str, Any], tmp_path: Path) -> None:
    world = make_tiny_world(tmp_path / "world")
    losses = []
    for packing in (False, True):
        flags = world.flags(tmp_path / str(packing), max_steps=3, learning_rate=1e-3, packing=packing, **settings)
        history = train(parse_args(flags)).state.log_history
        losses.append([entry["loss"] for entry in history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_packing_with_eager_attention_is_refused_before_the_run(tmp_path: Path) -> None:
    world = make_tiny_world(tmp_path / "world")
    with pytest.raises(ValueError, match="--packing needs flash_attention_2 or sdpa"):
        parse_args(world.flags(tmp_path, packing=True, attn_implementation="eager"))


@pytest.mark.parametrize(
    ("settings", "attention", "on_gpu", "expected"),
    [
        ({}, "sdpa", False, (True, PACKED_SDPA)),
        ({"packing": "auto"}, "sdpa", False, (True, PACKED_SDPA)),
        ({"packing": False}, "sdpa", False, (False, "sdpa")),
        ({"per_device_train_batch_size": 1}, "sdpa", False, (False, "sdpa")),
        ({"per_device_train_batch_size": 1, "tokens_per_batch": 512}, "sdpa", False, (True, PACKED_SDPA)),
        ({}, "eager", False, (False, "eager")),
        ({}, "sdpa", True, (False, "sdpa")),
        ({"packing": True}, "sdpa", True, (True, PACKED_SDPA)),
        ({}, "flash_attention_2", True, (True, "flash_attention_2")),
    ],
    ids=str,
)
def test_packing_is_on_where_it_is_faster(
    settings: dict[str, Any],
    attention: str,
    on_gpu: bool,
    expected: tuple[bool, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = make_tiny_world(tmp_path / "world")
    arguments = parse_args(world.flags(tmp_path / "run", **settings))
    training = arguments.training
    training.attn_implementation = attention
    monkeypatch.setattr("llava.train.train.runs_on_cpu", lambda training: not on_gpu)
    choose_packing(training, read_config(arguments))
    assert (training.packing, training.attn_implementation) == expected


def test_the_choice_is_kept_with_the_run_and_may_change(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    world = make_tiny_world(tmp_path / "world")
    saves = {"save_strategy": "steps", "save_steps": 1}
    train(parse_args(world.flags(tmp_path / "run", **saves, max_steps=1, packing=False)))
    train(parse_args(world.flags(tmp_path / "run", **saves, max_steps=2)))
    kept = json.loads((tmp_path / "run/checkpoint-2/run_settings.json").read_text())
    assert kept["packing"] is True
    assert "packing changed since" in caplog.text
