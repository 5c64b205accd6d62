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
from llava.reduction.encoder.prumerge import received_attention
from llava.reduction.registry import register
from tests.methods_table import runs
from tests.tiny_models import tiny_model


def test_available_lists_methods_by_site() -> None:
    methods = available()
    assert list(methods) == ["tower", "encoder", "projector", "decoder"]
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
        ("prunemerge", "unknown reduction method 'prunemerge'; known methods are: tower: .*encoder: .*prumerge"),
        ({"name": "PruMerge"}, "unknown reduction method 'PruMerge'"),
        (
            {"encoder": {"name": "prumerge", "rato": 0.5}},
            "has no option 'rato'; it has: frames, ratio, tokens, variant, neighbours, attention",
        ),
        ({"encoder": {"name": "prumerge", "ratio": 1.5}}, r"ratio=1.5 must be a number above 0"),
        ({"encoder": {"name": "prumerge", "ratio": "half"}}, r"ratio='half' must be a number"),
        ({"encoder": {"name": "prumerge", "variant": "fast"}}, "variant='fast' is not known; choose one of: .*release"),
        ({"encoder": {"name": "prumerge", "tokens": 0}}, "tokens=0 must be a whole number, 1 or more"),
        ({"encoder": {"name": "prumerge", "tokens": 9, "ratio": 0.5}}, "ratio and tokens both say how many"),
        ({"encoder": {"name": "prumerge", "neighbours": -1}}, "neighbours=-1 must be a whole number"),
        ({"encoder": {"ratio": 0.5}}, "expected a method's name or a mapping with the key 'name'"),
        ({"llm": {"name": "prumerge"}}, "unknown site llm; the sites are: tower, encoder, projector, decoder"),
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
    assert again.get_model().encoder_reducer.ratio == 0.5
    model.set_reduction("none")
    assert model.config.reduction == {}
    assert model.get_model().encoder_reducer is None


def slow_attention(keys: torch.Tensor, queries: torch.Tensor, heads: int) -> torch.Tensor:
    """Attention of CLS to the patches, head by head, [P] float32 like the method's, so that ties are the same."""
    width = keys.shape[1] // heads
    parts = [slice(h * width, (h + 1) * width) for h in range(heads)]
    rows = [torch.softmax(queries[0, c] @ keys[:, c].T / math.sqrt(width), 0, dtype=torch.float32) for c in parts]
    return torch.stack(rows).mean(dim=0)[1:]


def slow_received(keys: torch.Tensor, queries: torch.Tensor, heads: int) -> torch.Tensor:
    """Mean attention that each row of keys receives, query by query and head by head."""
    width = keys.shape[1] // heads
    parts = [slice(h * width, (h + 1) * width) for h in range(heads)]
    return torch.stack(
        [torch.softmax(q[c] @ keys[:, c].T / math.sqrt(width), 0, dtype=torch.float32) for q in queries for c in parts]
    ).mean(dim=0)


@pytest.mark.parametrize("has_cls", [True, False])
@pytest.mark.parametrize("heads", [1, 3])
def test_attention_received(has_cls: bool, heads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    y, keys, queries = (torch.randn(2, 10 + n, 6, generator=generator) for n in (0, has_cls, has_cls))
    vision = VisionFeatures(y, keys=keys, queries=queries, num_heads=heads)
    attention, patch_keys = received_attention(vision, heads)
    for i in range(2):
        expected = slow_received(keys[i], queries[i], heads)[int(has_cls) :]
        torch.testing.assert_close(attention[i], expected, atol=1e-5, rtol=0)
    assert torch.equal(patch_keys, keys[:, int(has_cls) :])
    with pytest.raises(ValueError, match=r"attention=received needs all queries: \(2, 1, 6\)"):
        received_attention(VisionFeatures(y, keys=keys, queries=queries[:, :1]), heads)


def slow_selection(method: str, variant: str, attention: torch.Tensor, options: dict[str, Any]) -> list[int]:
    """Patches to keep, by the rules of the method, one after the other."""
    p = len(attention)
    ratio, tokens = options.get("ratio"), options.get("tokens")
    ranked = sorted(range(p), key=lambda i: (-attention[i].item(), i))
    if ratio is None and tokens is None:
        q1, q3 = np.percentile(attention.numpy(), [25, 75])
        count = max(1, int((attention > q3 + 1.5 * (q3 - q1)).sum()))
    else:
        count = max(1, int(p * ratio)) if tokens is None else min(tokens, p)
    kept = ranked[:count]
    if method == "prumerge":
        return kept
    rest = [i for i in range(p) if i not in kept]
    if variant == "paper":
        wanted = min(count, len(rest))
        return kept + [rest[(2 * i + 1) * len(rest) // (2 * wanted)] for i in range(wanted)]
    if ratio is None and tokens is None:
        step = max(1, p // count // 3)
        return kept + [i for i in range(0, p - 1, step) if i not in kept]
    step = int(1 / ratio) if tokens is None else max(1, p // tokens)
    return kept + list(range(step // 2, p - 1, step))


def slow_merge(
    variant: str, y: torch.Tensor, attention: torch.Tensor, keys: torch.Tensor, kept: list[int], neighbours: int
) -> torch.Tensor:
    """Merge patch by patch."""
    p, c = y.shape
    # As the release takes the complement: kept ones become 0, sort, drop as many as were kept.
    pruned = sorted(0 if i in kept else i for i in range(p))[len(kept) :]

    def weighted(patches: list[int]) -> torch.Tensor:
        return sum((attention[j] * y[j] for j in patches), torch.zeros(c, dtype=y.dtype))

    tokens = []
    for slot, i in enumerate(kept):
        cosine = torch.nn.functional.cosine_similarity(keys[i], keys, dim=1, eps=1e-12)
        others = kept[:slot] + kept[slot + 1 :] + pruned if variant == "release" else pruned
        nearest = sorted(others, key=lambda j: -cosine[j].item())[: min(neighbours, p - 1)]
        own = y[i] if variant == "release" or not nearest else 0 * y[i]
        tokens.append(own + weighted(nearest))
    return torch.stack([*tokens, weighted(pruned)] if variant == "release" else tokens)


BUDGETS = st.one_of(
    st.just({}),
    st.builds(lambda r: {"ratio": r}, st.floats(0.01, 1.0)),
    st.builds(lambda t: {"tokens": t}, st.integers(1, 50)),
)


@settings(max_examples=150, deadline=None)
@given(
    method=st.sampled_from(["prumerge", "prumerge_plus"]),
    variant=st.sampled_from(["release", "paper"]),
    images=st.integers(1, 4),
    patches=st.integers(2, 40),
    heads=st.integers(1, 3),
    budget=BUDGETS,
    neighbours=st.integers(1, 40),
    spread=st.sampled_from([0.0, 0.3, 3.0, 30.0]),  # 0: all attention equal; 30: one spike
    seed=st.integers(0, 10_000),
)
def test_prumerge_equals_the_loop(
    method: str,
    variant: str,
    images: int,
    patches: int,
    heads: int,
    budget: dict[str, Any],
    neighbours: int,
    spread: float,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(rows: int) -> torch.Tensor:
        return torch.randn(images, rows, 4 * heads, generator=generator, dtype=torch.float64)

    y, keys, queries = draw(patches), draw(1 + patches), spread * draw(1 + patches)
    reducer = build(method, variant=variant, neighbours=neighbours, **budget)
    tokens = reducer(VisionFeatures(y, keys=keys, queries=queries, num_heads=heads))
    assert tokens.mask is not None
    assert tokens.source is not None
    for i in range(images):
        attention = slow_attention(keys[i], queries[i], 1 if variant == "release" else heads)
        kept = slow_selection(method, variant, attention, budget)
        expected = slow_merge(variant, y[i], attention, keys[i, 1:], kept, neighbours)
        real = tokens.mask[i]
        assert real.tolist() == sorted(real.tolist(), reverse=True)  # real tokens come first
        torch.testing.assert_close(tokens.features[i][real], expected, atol=1e-5, rtol=0)
        assert not tokens.features[i][~real].any()
        assert tokens.source[i][real].tolist() == kept + [-1] * (variant == "release")
        assert (tokens.source[i][~real] == -1).all()


@pytest.mark.parametrize("variant", ["release", "paper"])
@pytest.mark.parametrize("method", ["prumerge", "prumerge_plus"])
@pytest.mark.parametrize("budget", [{}, {"ratio": 0.3}, {"tokens": 5}, {"ratio": 1.0}], ids=str)
def test_without_merging_patches_stay_as_they_are(method: str, variant: str, budget: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    y, keys, queries = (torch.randn(3, n, 8, generator=generator) for n in (20, 21, 21))
    tokens = build(method, variant=variant, neighbours=0, **budget)(VisionFeatures(y, keys=keys, queries=3 * queries))
    for i in range(3):
        attention = slow_attention(keys[i], 3 * queries[i], 1)
        kept = sorted(set(slow_selection(method, variant, attention, budget)))
        assert tokens.source[i][tokens.mask[i]].tolist() == kept
        assert torch.equal(tokens.features[i][tokens.mask[i]], y[i][kept])
        assert not tokens.features[i][~tokens.mask[i]].any()


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


GRIDS = st.tuples(st.integers(1, 9), st.integers(1, 9))


@settings(max_examples=80, deadline=None)
@given(grid=GRIDS, name=st.sampled_from(["sequential", "spatial", "random"]), data=st.data())
def test_samplers_keep_what_their_names_say(grid: tuple[int, int], name: str, data: st.DataObject) -> None:
    h, w = grid
    count = data.draw(st.integers(1, h * w))
    features = torch.arange(float(h * w)).view(1, -1, 1).expand(2, -1, 3)
    tokens = build(name, tokens=count)(VisionFeatures(features, grid=grid))
    assert tokens.source is not None
    kept = tokens.source[0].tolist()
    assert kept == sorted(set(kept))
    assert tokens.features[1, :, 0].tolist() == kept
    assert len(kept) <= count
    if name == "sequential":
        assert kept == list(range(count))
    if name == "random":
        assert len(kept) == count
    if name == "spatial":
        rows, columns = {i // w for i in kept}, {i % w for i in kept}
        assert kept == [y * w + x for y in sorted(rows) for x in sorted(columns)]


@pytest.mark.parametrize(("rows", "columns"), [(6, 6), (5, 8), (8, 5), (7, 5), (5, 7), (4, 4)])
def test_spatial_grids_of_the_papers_ablation(rows: int, columns: int) -> None:
    tokens = build("spatial", rows=rows, columns=columns)(VisionFeatures(torch.zeros(1, 24 * 24, 2), grid=(24, 24)))
    assert tokens.source is not None
    kept = tokens.source[0]
    for positions, count in ((kept // 24, rows), (kept % 24, columns)):
        places = positions.unique()
        assert len(places) == count
        gaps = places.diff()
        assert gaps.max() - gaps.min() <= 1
        assert abs(int(places[0]) - int(23 - places[-1])) <= 1  # as far from one border as from the other


def test_random_is_seeded() -> None:
    vision = VisionFeatures(torch.zeros(1, 100, 2), grid=(10, 10))
    first, again, other = (build("random", tokens=30, seed=seed)(vision).source for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_config_says_where_a_mistake_stands() -> None:
    with pytest.raises(ValueError, match=r"^reduction\.encoder: method 'prumerge' has no option 'ratoi'; it has"):
        ReductionConfig.parse({"name": "prumerge", "ratoi": 0.5})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sequential", {}, "'sequential': there is no adaptive count"),
        ("random", {}, "'random': there is no adaptive count"),
        ("spatial", {"rows": 3}, "rows and columns go together"),
        ("spatial", {"rows": 3, "columns": 0}, "columns=0 must be a whole number"),
        ("spatial", {"rows": 3, "columns": 3, "tokens": 9}, "leave out ratio and tokens"),
    ],
)
def test_samplers_say_what_is_wrong(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, **options)
    with pytest.raises(ValueError, match="do not fit the tower's grid of 2 x 2"):
        build("spatial", rows=3, columns=1)(VisionFeatures(torch.zeros(1, 4, 2), grid=(2, 2)))


@pytest.mark.parametrize(
    "method",
    [
        {"name": "prumerge", "ratio": 0.25, "neighbours": 3},
        {"name": "prumerge", "variant": "paper", "attention": "received", "ratio": 0.25},
        {"name": "prumerge_plus", "ratio": 0.25, "neighbours": 3},
        {"name": "trim", "ratio": 0.25},
        {"name": "trim", "variant": "paper", "ratio": 0.25},
        {"name": "divprune", "tokens": 60},
        {"name": "visionzip", "tokens": 60},
        {"name": "visionzip", "tokens": 60, "variant": "paper"},
        {"name": "vscan", "tokens": 64},
        {"name": "mmtok", "tokens": 60},
    ],
    ids=str,
)
def test_autocast_does_not_change_the_choice(method: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    n, p, c = 8, 256, 32

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    vision = VisionFeatures(
        normal(n, p, c),
        grid=(16, 16),
        keys=normal(n, 1 + p, c),
        queries=normal(n, 1 + p, c),
        num_heads=4,
        attention={place: normal(n, 4, p).softmax(dim=2) for place in ("early", "selected")},
        cls=normal(n, c),
        projected=normal(n, p, c),
        patch_embeds=normal(n, p, c),
        text=normal(n, 5, c) if method["name"] == "mmtok" else normal(n, c),
    )
    options = {key: value for key, value in method.items() if key != "name"}
    reducer = build(method["name"], **options)
    expected = reducer(vision)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokens = reducer(vision)
    assert torch.equal(tokens.source, expected.source)
    # The tokens themselves may be rounded to 16 bits; a neighbour more or less is more than that.
    torch.testing.assert_close(tokens.features.float(), expected.features, atol=0.05, rtol=0.02)


@pytest.mark.parametrize("name", [name for names in available().values() for name in names if name != "tome"])
def test_every_method_has_a_release(name: str) -> None:
    """`variant: release` is understood by all, also where there is nothing to choose; another one is refused.

    ToMe's licence forbids to look at its release.
    """
    options = runs(name)[0] | {"variant": "release"}
    assert build(**options).method == name
    with pytest.raises(ValueError, match="variant"):
        build(**options | {"variant": "draft"})
