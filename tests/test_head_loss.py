"""The loss from the rows that are learnt, in chunks: the same losses and gradients as from the logits of all tokens."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.loss.loss_utils import ForCausalLMLoss

from llava.constants import IGNORE_INDEX
from llava.model import llava_arch
from llava.model.language_model.head_loss import CHUNK_LOGITS, CHUNKS, chunk_count, head_loss, is_sharded
from llava.model.language_model.packed import PACKED_SDPA
from llava.train.settings.parsing import parse_args
from llava.train.train import train
from tests.ranks import train_in_ranks
from tests.test_model import ROWS
from tests.test_staged import BACKBONES, GREEDY, PYRAMID, gradients, padded, staged_model, training_batch
from tests.tiny_models import VOCAB
from tests.tiny_world import ROOT, make_tiny_world

WAYS: dict[str, dict[str, Any]] = {
    "plain": {"reduction": "none"},
    "encoder": {"reduction": "prumerge"},
    "staged": {"reduction": PYRAMID},
    "packed": {"reduction": "none", "packed": True},
    "packed-staged": {"reduction": PYRAMID, "packed": True},
}


@pytest.fixture(autouse=True)
def sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small batches in as many chunks as large ones, as where the head is sharded."""
    monkeypatch.setattr("llava.model.language_model.head_loss.is_sharded", lambda head: True)


def head_model(backbone: str = "llama", way: str = "plain", **settings: Any) -> Any:
    model = staged_model(backbone, WAYS[way]["reduction"], **settings)
    if "packed" in WAYS[way]:
        model.set_attn_implementation(PACKED_SDPA)
    return model.train()


def batch_of(way: str = "plain", side: str = "right") -> dict[str, Any]:
    """Rows of several turns, one without an answer, and answers at the first token of a row."""
    batch = training_batch()
    if side == "left":
        batch = {**padded("left"), "labels": batch["labels"]}
        for i, row in enumerate(ROWS):
            batch["labels"][i] = batch["labels"][i].roll(batch["labels"].shape[1] - len(row))
    starts = batch["attention_mask"].argmax(dim=1)
    for row in (0, 2):
        batch["labels"][row, starts[row]] = batch["input_ids"][row, starts[row]]
    return {**batch, **({"packed": True} if "packed" in WAYS[way] else {})}


def assert_equal_gradients(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    """Equal as one vector; those of a single weight may be sums that nearly cancel."""
    assert got.keys() == expected.keys()
    norms = {name: float(gradient.norm()) for name, gradient in expected.items()}
    off = {name: float((got[name] - gradient).norm()) for name, gradient in expected.items()}
    assert math.hypot(*off.values()) <= tolerance * math.hypot(*norms.values())
    assert [name for name in off if off[name] > 10 * tolerance * norms[name]] == []


def check(model: Any, batch: dict[str, Any], tolerance: float = 1e-6) -> None:
    """Loss and gradients are those of the path that makes all logits."""
    assert model(**batch).logits is None
    loss, expected = gradients(model, {**batch, "skip_logits": False})
    short, got = gradients(model, batch)
    assert float(short) == pytest.approx(float(loss), rel=tolerance)
    assert_equal_gradients(got, expected, tolerance)


# Equal to the logits of all tokens


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_losses_and_gradients(backbone: str, way: str) -> None:
    model = head_model(backbone, way)
    check(model, batch_of(way))
    check(model, {**batch_of(way), "num_items_in_batch": torch.tensor(37)})


@pytest.mark.parametrize("way", ["plain", "staged"])
def test_left_padding(way: str) -> None:
    check(head_model(way=way), batch_of(way, side="left"))


def test_all_tokens_are_learnt() -> None:
    batch = batch_of()
    batch["labels"] = batch["input_ids"].clamp(min=0).masked_fill(batch["attention_mask"] == 0, IGNORE_INDEX)
    check(head_model(), {**batch, "num_items_in_batch": 50})


@pytest.mark.parametrize("way", ["plain", "packed-staged"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool, way: str) -> None:
    model = head_model(way=way)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    check(model, batch_of(way))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    """Of the head's weights the gradient is a sum of the chunks' rounded ones; all else is as exact as it was."""
    model, batch = head_model(), batch_of()
    with torch.autocast("cpu", dtype=dtype):
        check(model, batch, tolerance=1e-2)
    model.to(dtype)
    batch["images"] = [image.to(dtype) for image in batch["images"]]
    loss, _ = gradients(model, {**batch, "skip_logits": False})
    assert float(gradients(model, batch)[0]) == pytest.approx(float(loss), rel=1e-5)  # the sum is in float32


# Heads


class QuantizedHead(nn.Module):
    """Whole numbers and a scale, as a frozen weight of 8 bits."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.scale = float(weight.abs().max() / 127)
        self.register_buffer("codes", (weight / self.scale).round().to(torch.int8))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden @ (self.codes.to(hidden.dtype) * self.scale).t()


@pytest.mark.parametrize("way", ["plain", "packed-staged"])
@pytest.mark.parametrize("kind", ["lora", "saved", "frozen", "tied", "quantized", "resized"])
def test_heads(kind: str, way: str) -> None:
    model = head_model(way=way, tie_word_embeddings=kind == "tied")
    if kind == "resized":  # for marker tokens
        model.resize_token_embeddings(VOCAB + 3)
    elif kind == "frozen":
        model.lm_head.requires_grad_(False)
    elif kind == "quantized":
        model.set_output_embeddings(QuantizedHead(model.lm_head.weight.detach()))
    adapters = {"lora": {"target_modules": ["lm_head", "q_proj"]}, "saved": {"modules_to_save": ["lm_head"]}}
    if kind in adapters:
        chosen = {"target_modules": ["q_proj"], "exclude_modules": r".*vision_tower.*", **adapters[kind]}
        adapted = get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM", **chosen))
        assert any("lm_head" in name and weight.requires_grad for name, weight in adapted.named_parameters())
        model = adapted.train()
    check(model, batch_of(way))


def test_dropout_is_the_same_when_logits_are_made_anew() -> None:
    """The gradient is that of the loss that was drawn: a small step changes it as much as the gradient says."""
    model, batch = head_model(), batch_of()
    config = LoraConfig(r=4, init_lora_weights=False, lora_dropout=0.5, target_modules=["lm_head"])
    weight = get_peft_model(model, config).get_parameter("base_model.model.lm_head.lora_B.default.weight")

    def loss() -> Tensor:
        torch.manual_seed(0)
        return model(**batch).loss

    before = loss()
    before.backward()
    assert weight.grad is not None
    with torch.no_grad():
        weight -= 1e-3 * weight.grad
    assert float((before - loss()).detach()) == pytest.approx(1e-3 * float(weight.grad.square().sum()), rel=0.01)


# What is computed


class Largest(TorchDispatchMode):
    """Notes the most rows of a matrix over the vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            is_matrix = isinstance(tensor, Tensor) and tensor.ndim > 1 and tensor.shape[-1] == VOCAB
            if is_matrix and tensor.shape != (48, VOCAB):  # that are the head's weights, transposed
                self.rows = max(self.rows, tensor.numel() // VOCAB)
        return result


@pytest.mark.parametrize("way", WAYS)
def test_no_matrix_of_tokens_and_words(way: str) -> None:
    model, batch = head_model(way=way), batch_of(way)
    batch["labels"] = batch["input_ids"].clamp(min=0).masked_fill(batch["attention_mask"] == 0, IGNORE_INDEX)
    rows = {}
    for skip in (False, True):
        with Largest() as largest:
            model(**batch, skip_logits=skip).loss.backward()
        rows[skip] = largest.rows
    learnt = int((batch["labels"] != IGNORE_INDEX).sum())
    assert rows[True] <= -(-learnt // CHUNKS) < learnt < rows[False]


class Calls:
    """Rows of each call of the head."""

    def __init__(self, model: Any) -> None:
        self.rows: list[int] = []
        model.get_output_embeddings().register_forward_hook(self._note)

    def _note(self, module: Any, inputs: Any, output: Tensor) -> None:
        self.rows.append(output.numel() // output.shape[-1])


@pytest.mark.parametrize("way", WAYS)
def test_every_batch_calls_the_head_equally_often(way: str) -> None:
    """Otherwise ranks whose batches differ would wait for each other for ever where the head is sharded."""
    model, batch = head_model(way=way), batch_of(way)
    calls, labels = Calls(model), batch["labels"]
    one = torch.full_like(labels, IGNORE_INDEX)
    one[2, 4] = 5
    for chosen in (labels, one, torch.full_like(labels, IGNORE_INDEX)):
        calls.rows.clear()
        loss = model(**{**batch, "labels": chosen}).loss
        assert len(calls.rows) == CHUNKS
        loss.backward()
        assert len(calls.rows) == 2 * CHUNKS - 1


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("count", [None, 1])
def test_a_batch_without_labels(count: int | None, way: str) -> None:
    """Its loss is 0 of so many answers, or the mean of nothing; all weights have a gradient, of zero."""
    model, batch = head_model(way=way), batch_of(way)
    _, expected = gradients(model, batch)
    batch["labels"] = torch.full_like(batch["labels"], IGNORE_INDEX)
    loss, got = gradients(model, {**batch, "num_items_in_batch": count})
    assert loss.isnan() if count is None else loss == 0
    assert got.keys() == expected.keys()
    assert not any(gradient.count_nonzero() for gradient in got.values())


@pytest.mark.parametrize("most", [None, 4, 5, 40])
def test_more_places_than_answers(most: int | None) -> None:
    head, hidden = nn.Linear(4, 7, bias=False), torch.randn(2, 5, 4)
    labels = torch.tensor([[1, 2, -100, 3, 4], [-100, -100, -100, 0, -100]])
    expected = ForCausalLMLoss(head(hidden), labels, 7)
    torch.testing.assert_close(head_loss(head, hidden, labels, ForCausalLMLoss, most=most), expected)


@pytest.mark.parametrize("way", ["staged", "packed", "packed-staged"])
def test_the_plan_of_the_batch_says_how_many_answers_there_are(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the host does not wait for the device to count them."""
    given = []

    def spy(*args: Any) -> Tensor:
        given.append(args[-1])
        return head_loss(*args)

    monkeypatch.setattr(llava_arch, "head_loss", spy)
    batch = batch_of(way)
    head_model(way=way)(**batch)
    assert given == [int((batch["labels"] != IGNORE_INDEX).sum())]


@pytest.mark.parametrize("way", ["plain", "encoder", "staged"])
@torch.no_grad()
def test_generation_makes_the_logits_that_it_reads(way: str) -> None:
    model, batch = head_model(way=way).eval(), padded("right")
    calls = Calls(model)
    model.generate(batch.pop("input_ids"), **batch, **GREEDY)
    assert calls.rows == [len(ROWS)] * GREEDY["max_new_tokens"]


# Who gets logits


def test_logits_are_there_unless_it_trains() -> None:
    model, batch = head_model(), batch_of()
    assert model(**batch).logits is None
    assert model(**batch).counts is not None
    assert model(**batch, skip_logits=False).logits is not None
    labels = batch.pop("labels")
    assert model(**batch).logits is not None
    assert model(**batch, skip_logits=True).logits is not None  # there is nothing else to return
    with torch.no_grad():
        whole = model(**batch, labels=labels)
    assert whole.logits is not None
    model.eval()
    assert model(**batch, labels=labels).logits is not None
    with torch.no_grad():
        short = model(**batch, labels=labels, skip_logits=True)
    assert short.logits is None
    torch.testing.assert_close(short.loss, whole.loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize("way", WAYS)
def test_a_tuple_begins_with_loss_and_logits(way: str) -> None:
    loss, logits, *_ = head_model(way=way)(**batch_of(way), return_dict=False)
    assert loss.ndim == 0
    assert logits.shape[-1] == VOCAB


def test_hidden_states_are_returned_as_before() -> None:
    model, batch = head_model(), batch_of()
    whole = model(**batch, output_hidden_states=True, skip_logits=False)
    short = model(**batch, output_hidden_states=True)
    for got, expected in zip(short.hidden_states, whole.hidden_states, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("way", ["plain", "staged"])
def test_another_loss_gets_all_logits(way: str) -> None:
    model, batch = head_model(way=way), batch_of(way)

    def loss(logits: Tensor, labels: Tensor, **kwargs: Any) -> Tensor:
        return logits.sum()

    model.loss_function = loss
    output = model(**batch)
    assert output.loss == output.logits.sum()


def test_a_head_that_does_more_gets_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = head_model()
    monkeypatch.setattr(type(model), "has_plain_head", False)
    assert model(**batch_of()).logits is not None


# Processes


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_ddp_sees_each_weight_once() -> None:
    model, batch = head_model(), batch_of()
    model.get_vision_tower().requires_grad_(False)
    _, expected = gradients(model, {**batch, "skip_logits": False})
    wrapped = DistributedDataParallel(model)
    for _ in range(2):  # the second pass fails where a weight of the first was not ready
        _, got = gradients(wrapped, batch)
    assert_equal_gradients({name.removeprefix("module."): gradient for name, gradient in got.items()}, expected)


@pytest.mark.slow
def test_a_sharded_head(tmp_path: Path) -> None:
    """Under ZeRO-3 two ranks whose batches hold few answers, many and none learn what one process learns."""
    pytest.importorskip("deepspeed")
    world = make_tiny_world(tmp_path / "world")
    texts = [
        ("Hi", "red"),
        ("Hi", "a longer answer, " * 4),
        ("Hi", "b"),
        ("a question that hides its answer " * 9, "c"),
    ]
    data = tmp_path / "data.json"
    data.write_text(
        json.dumps(
            [
                {"id": str(i), "conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]}
                for i, (asked, answer) in enumerate(texts * 2)
            ]
        )
    )
    common = {"data_path": data, "train_sampling_strategy": "sequential", "max_steps": 3, "learning_rate": 1e-3}
    common |= {"model_max_length": 256}
    runs = {
        "sharded": {"per_device_train_batch_size": 1, "deepspeed": ROOT / "scripts/zero3.json"},
        "alone": {"per_device_train_batch_size": 2},
    }
    train_in_ranks(world.flags(tmp_path / "sharded", **common, **runs["sharded"]), 2, tmp_path / "log")
    train(parse_args(world.flags(tmp_path / "alone", **common, **runs["alone"])))
    losses = [
        [entry["loss"] for entry in json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"][:3]]
        for name in runs
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_small_batch_takes_fewer_chunks() -> None:
    """Never one alone, so that no matrix of all answers and words is there."""
    words = 32000
    assert [chunk_count(rows, words) for rows in (0, 100, 2000, 10**6)] == [2, 2, -(-2000 * words // CHUNK_LOGITS), 8]
    head = torch.nn.Linear(4, 8)
    assert not is_sharded(head)
    head.weight.ds_id = 0  # type: ignore[assignment]
    assert is_sharded(head)


@pytest.mark.parametrize("way", WAYS)
def test_loss_and_gradients_do_not_depend_on_the_chunks(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for is_small in (False, True):
        monkeypatch.setattr("llava.model.language_model.head_loss.is_sharded", lambda head, s=is_small: not s)
        model, batch = head_model(way=way), batch_of(way)
        calls = Calls(model)
        loss = model(**batch).loss
        assert len(calls.rows) == (2 if is_small else CHUNKS)
        loss.backward()
        found.append((loss, model.get_output_embeddings().weight.grad))
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=1e-5)
