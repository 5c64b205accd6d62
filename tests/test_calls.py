"""What one call may be given: a method of its own, and arguments that are refused with a reason."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch

from tests.test_model import ROWS, SIZES, pictures
from tests.tiny_models import pad, tiny_model

FASTV = {"name": "fastv", "layer": 1, "ratio": 0.6}
METHODS: tuple[Any, ...] = (
    "none",
    "prumerge",
    {"name": "prumerge_plus", "ratio": 0.25},
    FASTV,
    {"encoder": {"name": "spatial", "rows": 2, "columns": 3}, "decoder": {**FASTV, "layer": 2}},
)
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}


def batch(side: str = "left") -> dict[str, Any]:
    ids, mask = pad(ROWS, side)
    return {"input_ids": ids, "attention_mask": mask, "images": pictures(False), "image_sizes": SIZES}


@pytest.mark.parametrize("own", [None, FASTV, "prumerge"], ids=str)
@torch.no_grad()
def test_a_method_for_one_call(own: Any) -> None:
    model, other = tiny_model(), tiny_model()
    model.set_reduction(own)
    before = model(**batch()).logits
    for method in METHODS:
        other.set_reduction(method)
        torch.testing.assert_close(model(**batch(), reduction=method).logits, other(**batch()).logits)
        for beams in (1, 2):
            tokens = model.generate(**batch(), reduction=method, num_beams=beams, **GREEDY)
            assert tokens.tolist() == other.generate(**batch(), num_beams=beams, **GREEDY).tolist()
        counts = other.count_visual_tokens(pictures(False), SIZES)
        assert model.count_visual_tokens(pictures(False), SIZES, reduction=method) == counts
    assert torch.equal(model(**batch()).logits, before)


@torch.no_grad()
def test_threads_with_methods_of_their_own_do_not_meet() -> None:
    model = tiny_model(num_hidden_layers=4)

    def answers(method: Any, start: Barrier | None = None) -> list[list[int]]:
        with torch.no_grad():  # the mode is a thread's own
            if start is not None:
                start.wait()
            return [model.generate(**batch(), reduction=method, **GREEDY).tolist() for _ in range(3)]

    alone = [answers(method) for method in METHODS]
    start = Barrier(len(METHODS))
    with ThreadPoolExecutor(len(METHODS)) as pool:
        together = list(pool.map(lambda method: answers(method, start), METHODS))
    assert together == alone
    assert len({str(tokens) for tokens in alone}) > 2


def test_a_method_that_needs_other_weights_than_there_are() -> None:
    model = tiny_model()
    for method in ("token_concat", {"name": "stf", "mbtf": 2}):
        with pytest.raises(ValueError, match="needs another projector than this checkpoint has"):
            model.generate(**batch(), reduction=method)
    with pytest.raises(ValueError, match=r"without CLIP's text tower: open it with load_pretrained_model\(.*'trim'"):
        model(**batch(), reduction="trim")
    with pytest.raises(ValueError, match="unknown reduction method 'prune'"):
        model(**batch(), reduction="prune")
    with pytest.raises(ValueError, match="choose from 1 to 2"):
        model(**batch(), reduction={**FASTV, "layer": 7})
    model.set_reduction({"name": "stf", "mbtf": 2})
    with pytest.raises(ValueError, match=r"trained with reduction=\{'projector': \{'name': 'stf'"):
        model(**batch(), reduction="none")
    model(**batch(), reduction=FASTV)  # keeps the projector's method
    assert model.config.reduction == {"projector": {"name": "stf", "mbtf": 2}}
