"""Reducers: names and options, and PruMerge against a plain loop."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.reduction import ReductionConfig, VisionFeatures, available, build
from llava.reduction.base import EncoderReducer
from llava.reduction.registry import register
from tests.tiny_models import tiny_model


def test_available_lists_methods_by_site() -> None:
    methods = available()
    assert list(methods) == ["encoder", "projector", "decoder"]
    assert "prumerge" in methods["encoder"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, {}),
        ("none", {}),
        ("", {}),
        ({}, {}),
        ("prumerge", {"encoder": {"name": "prumerge"}}),
        ({"encoder": "prumerge"}, {"encoder": {"name": "prumerge"}}),
        ({"name": "prumerge", "ratio": 0.5}, {"encoder": {"name": "prumerge", "ratio": 0.5}}),
        ('{"encoder": {"name": "prumerge", "ratio": 0.5}}', {"encoder": {"name": "prumerge", "ratio": 0.5}}),
        ("encoder: {name: prumerge, ratio: 0.5}", {"encoder": {"name": "prumerge", "ratio": 0.5}}),
        ("{name: prumerge, neighbours: 8}", {"encoder": {"name": "prumerge", "neighbours": 8}}),
        ({"encoder": {"name": "prumerge"}, "decoder": None}, {"encoder": {"name": "prumerge"}}),
    ],
)
def test_parse(value: Any, expected: dict[str, Any]) -> None:
    config = ReductionConfig.parse(value)
    assert config.to_dict() == expected
    assert ReductionConfig.parse(json.loads(json.dumps(config.to_dict()))) == config
    assert bool(config) == bool(expected)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("prunemerge", "unknown reduction method 'prunemerge'; known methods are: encoder: .*prumerge"),
        ({"name": "PruMerge"}, "unknown reduction method 'PruMerge'"),
        ({"encoder": {"name": "prumerge", "rato": 0.5}}, "has no option 'rato'; it has: variant, ratio, neighbours"),
        ({"encoder": {"name": "prumerge", "ratio": 1.5}}, r"ratio=1.5 must be a number above 0"),
        ({"encoder": {"name": "prumerge", "ratio": "half"}}, r"ratio='half' must be a number"),
        ({"encoder": {"name": "prumerge", "variant": "fast"}}, "variant='fast' is not known; choose one of: .*release"),
        ({"encoder": {"name": "prumerge", "neighbours": -1}}, "neighbours=-1 must be a whole number"),
        ({"encoder": {"ratio": 0.5}}, "expected a method's name or a mapping with the key 'name'"),
        ({"tower": {"name": "prumerge"}}, "unknown site tower; the sites are: encoder, projector, decoder"),
        ({"decoder": {"name": "prumerge"}}, "method 'prumerge' works at the site 'encoder', not 'decoder'"),
        ("{name: [", "neither a method's name nor valid JSON or YAML"),
        (3, "expected a method's name or a mapping"),
    ],
)
def test_parse_names_what_is_wrong(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReductionConfig.parse(value)


def test_build_names_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="unknown reduction method 'nothing'"):
        build("nothing")
    with pytest.raises(ValueError, match="has no option 'budget'"):
        build("prumerge", budget=3)


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match="'prumerge' is taken by PruMerge"):
        register("prumerge")(EncoderReducer)


def test_set_reduction_is_kept_in_the_config() -> None:
    model = tiny_model()
    model.set_reduction({"name": "prumerge", "ratio": 0.5})
    assert model.config.reduction == {"encoder": {"name": "prumerge", "ratio": 0.5}}
    again = type(model)(model.config)
    assert again.get_model().encoder_reducer.options.ratio == 0.5
    model.set_reduction("none")
    assert model.config.reduction == {}
    assert model.get_model().encoder_reducer is None


def slow_prumerge(vision: VisionFeatures, ratio: float | None, neighbours: int) -> list[torch.Tensor]:
    """PruMerge's release, image by image and patch by patch."""
    images = []
    for y, keys, queries in zip(vision.features, vision.keys, vision.queries, strict=True):
        p, c = y.shape
        # In float32 like the method, so that scores which tie there tie here.
        attention = torch.softmax(queries[0] @ keys.T / math.sqrt(c), dim=0, dtype=torch.float32)[1:]
        if ratio is None:
            q1, q3 = np.percentile(attention.numpy(), [25, 75])
            count = max(1, int((attention > q3 + 1.5 * (q3 - q1)).sum()))
        else:
            count = max(1, int(p * ratio))
        kept = sorted(range(p), key=lambda i: (-attention[i].item(), i))[:count]
        tokens = []
        for i in kept:
            cosine = torch.nn.functional.cosine_similarity(keys[1 + i], keys[1:], dim=1, eps=1e-12)
            others = sorted((j for j in range(p) if j != i), key=lambda j: -cosine[j].item())[:neighbours]
            tokens.append(y[i] + sum((attention[j] * y[j] for j in others), torch.zeros(c, dtype=y.dtype)))
        rest = [attention[j] * y[j] for j in range(p) if j not in kept]
        tokens.append(sum(rest, torch.zeros(c, dtype=y.dtype)))
        images.append(torch.stack(tokens))
    return images


@settings(max_examples=60, deadline=None)
@given(
    images=st.integers(1, 4),
    patches=st.integers(2, 40),
    width=st.integers(2, 12),
    ratio=st.one_of(st.none(), st.floats(0.01, 1.0)),
    neighbours=st.integers(0, 40),
    spread=st.sampled_from([0.0, 0.3, 3.0, 30.0]),  # 0: all attention equal; 30: one spike
    seed=st.integers(0, 10_000),
)
def test_prumerge_equals_the_loop(
    images: int, patches: int, width: int, ratio: float | None, neighbours: int, spread: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(rows: int) -> torch.Tensor:
        return torch.randn(images, rows, width, generator=generator, dtype=torch.float64)

    vision = VisionFeatures(draw(patches), keys=draw(1 + patches), queries=spread * draw(1 + patches))
    tokens = build("prumerge", ratio=ratio, neighbours=neighbours)(vision)
    assert tokens.mask is not None
    assert tokens.source is not None
    for i, expected in enumerate(slow_prumerge(vision, ratio, neighbours)):
        real = tokens.mask[i]
        assert real.tolist() == sorted(real.tolist(), reverse=True)  # real tokens come first
        torch.testing.assert_close(tokens.features[i][real], expected, atol=1e-5, rtol=0)
        assert not tokens.features[i][~real].any()
        source = tokens.source[i][real].tolist()
        assert source[-1] == -1
        assert len(set(source)) == len(source)
        assert (tokens.source[i][~real] == -1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_prumerge_of_an_image_is_the_same_in_any_batch(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    draw = [(torch.randn(3, n, 16, generator=generator) * s).to(dtype) for n, s in ((64, 1), (65, 1), (1, 3))]
    reducer = build("prumerge")
    batch = reducer(VisionFeatures(draw[0], keys=draw[1], queries=draw[2]))
    assert batch.features.dtype == dtype
    for i in range(3):
        one = reducer(VisionFeatures(draw[0][i : i + 1], keys=draw[1][i : i + 1], queries=draw[2][i : i + 1]))
        assert batch.counts[i] == one.counts[0]
        torch.testing.assert_close(batch.features[i][batch.mask[i]], one.features[0][one.mask[0]])


def test_prumerge_says_what_it_lacks() -> None:
    features = torch.zeros(1, 4, 8)
    with pytest.raises(ValueError, match="pass keys= and queries="):
        build("prumerge")(VisionFeatures(features))
    with pytest.raises(ValueError, match=r"has none: keys of shape \(1, 4, 8\) for 4 patches"):
        build("prumerge")(VisionFeatures(features, keys=features, queries=features))


def test_prumerge_passes_gradients_to_a_trained_tower() -> None:
    features = torch.randn(2, 30, 8, requires_grad=True)
    keys = torch.randn(2, 31, 8)
    build("prumerge")(VisionFeatures(features, keys=keys, queries=keys)).features.sum().backward()
    assert features.grad is not None
    assert features.grad.abs().sum() > 0
