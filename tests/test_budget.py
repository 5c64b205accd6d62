"""One budget for all methods: what a layer of the language model really processes."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from llava.cost.tokens import layer_lengths
from llava.reduction import ReductionConfig, available
from llava.reduction.budget import TOLERANCE, ModelShape
from llava.reduction.registry import method_class
from tests.methods_table import NAMES, beside_a_budget
from tests.tiny_models import SIDE, prompt, tiny_model

LAYERS = 6
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT |= {"projection_dim": 24, "vocab_size": 99}


@pytest.fixture(scope="module")
def model() -> Any:
    settings = {
        "num_hidden_layers": LAYERS,
        "mm_vision_config": tiny_model().config.mm_vision_config | {"image_size": 112},
    }
    return tiny_model(**settings, mm_text_config=TEXT, reduction="trim")


@pytest.mark.parametrize("budget", [5, 16, 33.5, 64])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_layer_processes_the_budget(model: Any, name: str, budget: float) -> None:
    """By the lengths of the cache after a prefill, or the method says that it can't."""
    model.set_reduction("none")
    try:
        method = {"name": name, "budget": budget, **beside_a_budget(name)}
        model.set_reduction(method)
    except ValueError as error:
        assert "can't be met; the nearest is" in str(error) or "can't be told" in str(error)
        return
    inner, ids = model.get_model(), prompt(3, "image", 6).unsqueeze(0)
    shapes = {"pooled": (24,), "segments": (1, 24), "words": (4, model.config.hidden_size)}
    inner._embed_texts = lambda phrases, kind: (torch.randn(len(phrases), *shapes[kind]), None)
    pixels = torch.randn(1, 3, 2 * SIDE, 2 * SIDE)
    cache = model(input_ids=ids, images=pixels, texts=["red"], use_cache=True).past_key_values
    del inner._embed_texts
    seen = [layer.get_seq_length() - (ids.shape[1] - 1) for layer in cache.layers]
    assert sum(seen) / LAYERS == pytest.approx(budget, rel=TOLERANCE)
    assert [*model.config.reduction.values()] == [method]


def test_every_method_says_what_it_chooses_from() -> None:
    """The fewest tokens first, so that the nearest is found."""
    for name in NAMES:
        choices, shape = method_class(name).budget_choices(576), ModelShape()
        site = next(site for site, names in available().items() if name in names)
        some = [choices[i * (len(choices) - 1) // 7] for i in range(8)] if choices else []
        means = [
            shape.mean_tokens(ReductionConfig.parse({site: {"name": name, **choice}}).build_all(shape))
            for choice in some
        ]
        assert means == sorted(means), name


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ({"name": "sparsevlm", "tokens": 192}, 206.5),
        ({"name": "sparsevlm", "tokens": 128}, 145.4),
        ({"name": "sparsevlm", "tokens": 96}, 114.1),
        ({"name": "sparsevlm", "tokens": 64}, 82.3),
        ({"name": "sparsevlm", "version": "2.0", "tokens": 192}, 206.8),
        ({"name": "sparsevlm", "version": "2.0", "tokens": 128}, 144.1),
        ({"name": "sparsevlm", "version": "2.0", "tokens": 96}, 113.9),
        ({"name": "sparsevlm", "version": "2.0", "tokens": 64}, 81.8),
        ({"name": "dart", "tokens": 192}, 219.8),
        ({"name": "dart", "tokens": 128}, 159.8),
        ({"name": "dart", "tokens": 64}, 99.8),
        ({"name": "fastv", "ratio": 0.5}, 306),
        ({"name": "fastv", "ratio": 0.778}, 156),
    ],
    ids=str,
)
def test_what_a_label_costs(method: dict[str, Any], expected: float) -> None:
    """The mean over 32 layers, tokens that others were merged into included; `llava flops` counts the same."""
    shape, reducers = ModelShape(), ReductionConfig.parse(method).build_all()
    mean = shape.mean_tokens(reducers)
    assert mean == pytest.approx(expected, abs=0.051)
    assert sum(layer_lengths(reducers.decoder, 32, [576, 576], 60)) / 32 == 60 + 2 * mean


def test_sites_together(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    both = {"encoder": {"name": "visionzip", "tokens": 96}, "decoder": {"name": "fastv", "budget": 64}}
    reducers = ReductionConfig.parse(both).build_all(ModelShape())
    assert reducers.decoder.tokens == 62  # (2 * 96 + 30 * 62) / 32
    assert "budget=64: fastv with tokens=62, 64.12 visual tokens a layer" in caplog.text


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"name": "visionzip", "budget": 64, "tokens": 9}, "budget and tokens both say"),
        ({"name": "visionzip", "budget": 64, "dominant": 9}, "budget and dominant both say"),
        ({"name": "fastv", "budget": 64, "ratio": 0.5}, "budget and ratio both say"),
        ({"name": "prumerge", "budget": "many"}, "budget='many' must be a number above 0"),
        ({"name": "prumerge", "budget": 0}, "budget=0 must be a number above 0"),
    ],
)
def test_what_a_budget_excludes(method: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReductionConfig.parse(method)


def test_a_budget_that_cannot_be_met() -> None:
    with pytest.raises(ValueError, match=r"budget=128 .* can't be met; the nearest is 144, with kernel=2"):
        ReductionConfig.parse({"name": "avgpool", "budget": 128}).build_all(ModelShape())
    with pytest.raises(ValueError, match="no model with a vision tower here"):
        ReductionConfig.parse({"name": "prumerge", "budget": 128}).build_all()
