"""Every method and every pair of methods: alone and in a batch, trained and asked, in two types.

The registry drives it: a method without a row in `tests/methods_table.py` fails here.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from llava.reduction import available, build
from llava.reduction.stand_in import StandIn, TowerShape
from tests.methods_table import METHODS, NAMES, Method, composes, model_that_suits, pairwise, runs, together
from tests.tiny_models import pad, prompt
from tests.tiny_world import SIDE


def label(method: Method) -> str:
    return "-".join(str(value) for value in method.values()).replace(" ", "")


ALONE = [pytest.param(method, id=label(method)) for name in NAMES for method in runs(name)]
TOGETHER = [pytest.param(together(*names), id="+".join(names)) for names in pairwise()]
ENCODER_CASES = [case for case in ALONE if case.values[0]["name"] in available()["encoder"]]
# Batches of three, whose rows are batches of one as well: alike, and with two images, none and one.
ALIKE = [prompt(3, "image", 4, seed=i) for i in range(3)]
RAGGED = [prompt("image", 3, "image", 2), prompt(4), prompt(1, "image", 6)]
LANGUAGE_MODEL = ("model.layers", "model.embed_tokens", "model.norm", "lm_head")
TEXTS = ["a red bus", "no image here", "something quite different"]
ASK: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return model_that_suits(tmp_path_factory.mktemp("world"))


def inputs_of(rows: list[torch.Tensor], dtype: torch.dtype) -> list[dict[str, Any]]:
    """Keyword arguments of each row by itself."""
    generator = torch.Generator().manual_seed(1)
    single = []
    for row, text in zip(rows, TEXTS, strict=False):
        images = torch.randn(int((row < 0).sum()), 3, SIDE, SIDE, generator=generator).to(dtype)
        single.append({"input_ids": row.unsqueeze(0), "images": list(images), "texts": [text]})
    return single


def use(model: Any, reduction: dict[str, Any]) -> None:
    """Give the model this method alone: otherwise a projector's method would stay when another site's is named."""
    model.set_reduction("none")
    model.set_reduction(reduction)


def batch_of(single: list[dict[str, Any]], side: str = "right") -> dict[str, Any]:
    ids, mask = pad([one["input_ids"][0] for one in single], side)
    images = [image for one in single for image in one["images"]]
    return {"input_ids": ids, "attention_mask": mask, "images": images, "texts": [one["texts"][0] for one in single]}


@torch.no_grad()
def check_logits(model: Any, rows: list[torch.Tensor], side: str = "right") -> None:
    """Logits of each row are the same alone and in the batch."""
    single = inputs_of(rows, torch.float32)
    logits = model(**batch_of(single, side)).logits
    for i, one in enumerate(single):
        alone = model(**one).logits[0]
        row = logits[i, -len(alone) :] if side == "left" else logits[i, : len(alone)]
        torch.testing.assert_close(row, alone, atol=1e-4, rtol=0)


@torch.no_grad()
def check_answers(model: Any, rows: list[torch.Tensor], side: str = "right") -> None:
    """The answer to each row is the same alone and in the batch."""
    single = inputs_of(rows, torch.float32)
    batch = batch_of(single, side)
    tokens = model.generate(batch.pop("input_ids"), **batch, **ASK)
    for i, one in enumerate(single):
        assert tokens[i].tolist() == model.generate(one.pop("input_ids"), **one, **ASK)[0].tolist()


def with_labels(inputs: dict[str, Any]) -> dict[str, Any]:
    """The last tokens of each row are learnt: two, and in every other row three."""
    ids, real = inputs["input_ids"], inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    from_the_end = real.flip(1).cumsum(1).flip(1) * real
    return {**inputs, "labels": ids.masked_fill((from_the_end == 0) | (from_the_end > 2), -100)}


def loss_of(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    torch.manual_seed(0)  # a method may draw its count anew in each step
    return model(**with_labels(inputs)).loss


def check_training(model: Any, dtype: torch.dtype) -> torch.Tensor:
    """A finite loss, which is returned, whose gradients reach the projector and the language model."""
    model.zero_grad()
    loss = loss_of(model, batch_of(inputs_of(RAGGED, dtype)))
    loss.backward()
    assert loss.isfinite()
    learns = {"projector": 0.0, "language model": 0.0}
    for name, parameter in model.named_parameters():
        assert "vision_tower" not in name or not parameter.requires_grad, name
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            learns["language model" if name.startswith(LANGUAGE_MODEL) else "projector"] += float(parameter.grad.norm())
        assert parameter.requires_grad or not name.startswith(LANGUAGE_MODEL), name
    assert all(learns.values())
    return loss.detach()


def check_neighbours(model: Any, loss: torch.Tensor) -> None:
    """The loss of a batch is the mean over that of its rows, which learn two tokens each."""
    losses = [loss_of(model, one).detach() for one in inputs_of(RAGGED, torch.float32)]
    torch.testing.assert_close(loss, sum(losses) / len(losses), atol=1e-5, rtol=0)


def test_every_method_has_its_row() -> None:
    assert set(NAMES) <= set(METHODS), "give a new method its row in tests/methods_table.py"


def test_every_pair_is_run_or_refused(model: Any) -> None:
    """Two methods that can't work together are refused before a picture is read, and the reason is given."""
    covered = {pair for names in pairwise() for pair in itertools.combinations(sorted(names), 2)}
    for pair in itertools.combinations(sorted(NAMES), 2):
        assert (pair in covered) == composes(*pair), pair
        if len(sites := together(*pair)) == 2 and not composes(*pair):
            with pytest.raises(
                ValueError, match=r"whole grid; leave one out|still takes tokens away|a different number of tokens"
            ):
                use(model, sites)


@pytest.mark.parametrize("reduction", ALONE)
def test_a_sample_is_the_same_alone_and_in_a_batch(model: Any, reduction: Method) -> None:
    use(model.float().eval(), reduction)
    check_logits(model, ALIKE)
    check_logits(model, RAGGED)
    check_answers(model, RAGGED)


@pytest.mark.parametrize("reduction", ALONE)
def test_a_step_of_training(model: Any, reduction: Method) -> None:
    use(model.float().train(), reduction)
    check_neighbours(model, check_training(model, torch.float32))


@pytest.mark.parametrize("reduction", ALONE)
def test_bfloat16(model: Any, reduction: Method) -> None:
    use(model.to(torch.bfloat16).train(), reduction)
    check_training(model, torch.bfloat16)
    batch = batch_of(inputs_of(RAGGED, torch.bfloat16))
    with torch.no_grad():
        tokens = model.eval().generate(batch.pop("input_ids"), **batch, **ASK)
    assert tokens.shape == (3, 3)


@pytest.mark.parametrize("reduction", TOGETHER)
def test_together(model: Any, reduction: dict[str, Method]) -> None:
    use(model.float().eval(), reduction)
    check_logits(model, RAGGED, "left")
    check_answers(model, RAGGED, "left")
    model.train()
    check_neighbours(model, check_training(model, torch.float32))


@pytest.mark.parametrize("reduction", ENCODER_CASES)
@pytest.mark.parametrize("grid", [(16, 16), (12, 20), (1, 7)], ids=str)
def test_any_grid(grid: tuple[int, int], reduction: dict[str, Any]) -> None:
    p, reducer = grid[0] * grid[1], build(**reduction)
    vision = StandIn(TowerShape(grid), tiles=2, width=8, heads=2, embeds=8).features(reducer.needs)
    tokens = reducer(vision)
    assert (tokens.counts >= 1).all()
    assert (tokens.counts <= p + 1).all() or reduction["name"] == "prumerge_plus"
    assert tokens.source is not None
    assert tokens.source.max() < p
