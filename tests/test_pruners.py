"""FasterVLM, VisPruner, CDPruner and HoloV against plain loops, and what they have in common."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cosine_similarity

from llava.constants import SHORT_ANSWER
from llava.reduction import VisionFeatures, build
from llava.reduction.base import Needs
from llava.reduction.encoder.cdpruner import likeliest_set, relevance_of
from llava.reduction.encoder.holov import quotas
from llava.reduction.encoder.vispruner import DROPPED
from tests.test_tower import Halve, inside
from tests.tiny_models import SIDE, tiny_model, vision_config

METHODS: list[dict[str, Any]] = [
    {"name": "fastervlm"},
    {"name": "vispruner"},
    {"name": "vispruner", "important_ratio": 0.0},
    {"name": "cdpruner"},
    {"name": "holov"},
    {"name": "holov", "variant": "paper"},
    {"name": "divprune"},
]


def some(n: int = 3, p: int = 60, seed: int = 0) -> VisionFeatures:
    """Everything that one of the methods reads, in float64: without near ties a plain loop finds the same."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return VisionFeatures(
        normal(n, p, 12),
        attention={"selected": (2 * normal(n, 2, p)).softmax(dim=2)},
        projected=normal(n, p, 16),
        patch_embeds=normal(n, p, 8),
        text=normal(n, 2, 8),
    )


def row(vision: VisionFeatures, i: int) -> VisionFeatures:
    """One of the images."""
    names = ("features", "projected", "patch_embeds", "text", "text_mask")
    own = {name: None if (value := getattr(vision, name)) is None else value[i : i + 1] for name in names}
    return replace(vision, attention={"selected": vision.attention["selected"][i : i + 1]}, **own)


# Plain loops ------------------------------------------------------------------------------------------------------


def slow_vispruner(features: Tensor, attention: Tensor, tokens: int, ratio: float) -> list[int]:
    """Kept patches of one image, patch by patch."""
    order = sorted(range(len(attention)), key=lambda i: -attention[i])
    tokens = min(tokens, len(order))
    kept, rest = order[: int(tokens * ratio)], order[int(tokens * ratio) :]
    wanted = tokens - len(kept)
    while len(rest) > wanted:
        first, second = rest[::2], rest[1::2]
        if not second:
            rest = []
            break
        best = {a: max(float(cosine_similarity(features[a], features[b], dim=0)) for b in second) for a in first}
        falling = sorted(first, key=lambda a: -best[a])
        rest = falling[min(DROPPED, len(rest) - wanted, len(first)) :] + second
    return sorted(kept + rest)


@settings(max_examples=15, deadline=None)
@given(
    p=st.integers(1, 41),
    tokens=st.integers(1, 45),
    ratio=st.sampled_from([0.0, 0.3, 0.5, 0.75, 1.0]),
    seed=st.integers(0, 99),
)
def test_vispruner_equals_the_loop(p: int, tokens: int, ratio: float, seed: int) -> None:
    """Odd numbers too, at which the release crashes."""
    vision = some(2, p, seed)
    kept = build("vispruner", tokens=tokens, important_ratio=ratio)(vision).source
    for i in range(2):
        attention = vision.attention["selected"][i].mean(dim=0)
        assert kept[i].tolist() == slow_vispruner(vision.features[i], attention, tokens, ratio)


def test_vispruner_of_important_ones_alone_is_fastervlm() -> None:
    vision = some()
    expected = build("fastervlm", tokens=20)(vision)
    tokens = build("vispruner", tokens=20, important_ratio=1.0)(vision)
    assert torch.equal(tokens.source, expected.source)
    for i in range(3):
        attention = vision.attention["selected"][i].mean(dim=0)
        assert expected.source[i].tolist() == sorted(attention.topk(20).indices.tolist())
        assert torch.equal(expected.features[i], vision.features[i, expected.source[i]])


def slow_relevance(patches: Tensor, text: Tensor) -> Tensor:
    cosines = [[cosine_similarity(patch, part, dim=0) for part in text] for patch in patches]
    values = -torch.tensor(cosines, dtype=text.dtype).mean(dim=1)
    return (values - values.min() + 1e-6) / (values.max() - values.min())


def test_cdpruner_takes_what_adds_most_to_the_determinant() -> None:
    vision = some()
    kept = build("cdpruner", tokens=9)(vision).source
    for i in range(3):
        relevance = slow_relevance(vision.patch_embeds[i], vision.text[i])
        unit = vision.projected[i] / vision.projected[i].norm(dim=1, keepdim=True)
        kernel = relevance.unsqueeze(1) * (unit @ unit.T) * relevance
        chosen: list[int] = []
        while len(chosen) < 9:
            left = [j for j in range(60) if j not in chosen]
            chosen.append(max(left, key=lambda j: kernel[[*chosen, j]][:, [*chosen, j]].det()))
        assert kept[i].tolist() == sorted(chosen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cdpruner_above_the_rank_keeps_distinct_patches(dtype: torch.dtype) -> None:
    """Where the release has NaN and keeps patches twice: the most relevant ones follow."""
    directions = torch.eye(4, dtype=dtype)[torch.arange(40) % 4]
    relevance = torch.linspace(1, 0.1, 40, dtype=dtype)
    kernel = relevance.unsqueeze(1) * (directions @ directions.T) * relevance
    chosen = likeliest_set(kernel.expand(2, -1, -1), 40)
    assert chosen.tolist() == [list(range(40))] * 2
    assert likeliest_set(torch.zeros(1, 5, 5, dtype=dtype), 5).sort().values.tolist() == [[0, 1, 2, 3, 4]]


def test_relevance_of_a_text_without_some_segments() -> None:
    vision = some()
    text = torch.cat([vision.text, torch.full_like(vision.text, 7)], dim=1)
    mask = torch.tensor([[True, True, False, False]] * 3)
    expected = relevance_of(vision.patch_embeds, vision.text)
    torch.testing.assert_close(relevance_of(vision.patch_embeds, text, mask), expected)
    torch.testing.assert_close(expected[1], slow_relevance(vision.patch_embeds[1], vision.text[1]))
    same = relevance_of(torch.ones(1, 4, 8), torch.ones(1, 1, 8))
    assert same.isfinite().all()


def test_cdpruner_leaves_out_the_line_that_asks_for_a_short_answer() -> None:
    assert build("cdpruner").phrases(f"What is it?\n{SHORT_ANSWER}") == ["What is it?"]
    assert build("cdpruner").phrases("What is it?") == ["What is it?"]


def slow_holov(features: Tensor, attention: Tensor, tokens: int) -> list[int]:
    """The release's choice for one image, region by region; -1 for a zero token."""
    regions = [part.tolist() for part in torch.arange(len(features)).tensor_split(min(16, len(features)))]
    weights = []
    for region in regions:
        n, unit = len(region), features[region] / (features[region].norm(dim=1, keepdim=True) + 1e-6)
        cosine = unit @ unit.T
        cosine.fill_diagonal_(0)
        mean = cosine.sum(dim=1, keepdim=True) / max(n - 1, 1)
        variance = (cosine - mean).square().sum(dim=1) / max(n - 1, 1)
        looked_at = 1000 * attention[region]
        score = looked_at + 0.09 * variance * looked_at.abs().mean() / (variance.abs().mean() + 1e-6)
        weights.append(float(score.mean()))
    share = [int(tokens * weight / (sum(weights) + 1e-6)) for weight in weights]
    for region in sorted(range(len(regions)), key=lambda g: -weights[g])[: tokens - sum(share)]:
        share[region] += 1
    kept: list[int] = []
    for region, count in zip(regions, share, strict=True):
        whole = count >= len(region)
        kept += region if whole else sorted(region, key=lambda j: -attention[j])[:count]
    return kept + [-1] * (tokens - len(kept))


@pytest.mark.parametrize("p", [7, 16, 60, 83])
@pytest.mark.parametrize("part", [0.2, 0.6, 1])
def test_holov_equals_the_loop(p: int, part: float) -> None:
    vision, tokens = some(3, p), max(1, int(part * p))
    result = build("holov", tokens=tokens)(vision)
    for i in range(3):
        attention = vision.attention["selected"][i].mean(dim=0)
        assert result.source[i].tolist() == slow_holov(vision.projected[i], attention, tokens)
    assert (result.features[result.source < 0] == 0).all()
    torch.testing.assert_close(result.features[0, 0], vision.projected[0, result.source[0, 0]])


def test_holov_of_the_paper_hands_on_what_is_too_much_for_a_region() -> None:
    weights = torch.tensor([[0.1, 0.7, 0.2], [0.0, 0.0, 1.0]])
    sizes = torch.tensor([4, 4, 3])
    assert quotas(weights, sizes, 8, hands_on=False).tolist() == [[0, 4, 2], [0, 0, 3]]
    assert quotas(weights, sizes, 8, hands_on=True).tolist() == [[1, 4, 3], [4, 1, 3]]
    vision = some(3, 60)
    for tokens in (30, 60):
        kept = build("holov", tokens=tokens, variant="paper")(vision).source
        assert [len(set(row)) for row in kept.tolist()] == [tokens] * 3
        assert (kept >= 0).all()
    assert (build("holov", tokens=60)(vision).source < 0).any()


# What they have in common -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_an_image_does_not_depend_on_its_neighbours(method: dict[str, Any]) -> None:
    vision, reducer = some(4, 50), build(**method, tokens=13)
    together = reducer(vision)
    for i in range(4):
        alone = reducer(row(vision, i))
        assert torch.equal(together.source[i], alone.source[0])
        torch.testing.assert_close(together.features[i], alone.features[0])


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_the_choice_in_half_precision_is_that_of_float32(method: dict[str, Any]) -> None:
    """Of values that 16 bits hold; also under autocast."""
    vision, reducer = some(2, 50), build(**method, tokens=13)
    names = ("features", "projected", "patch_embeds", "text")
    for dtype in (torch.bfloat16, torch.float16):
        half = replace(
            vision,
            attention={"selected": vision.attention["selected"].float()},
            **{name: getattr(vision, name).to(dtype) for name in names},
        )
        tokens = reducer(half)
        whole = replace(half, **{name: getattr(half, name).float() for name in names})
        expected = reducer(whole)
        assert torch.equal(tokens.source, expected.source)
        assert tokens.features.dtype == dtype
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(reducer(whole).source, expected.source)


@pytest.mark.parametrize("name", ["fastervlm", "vispruner", "holov"])
@torch.no_grad()
def test_without_cls_attention_is_what_patches_receive(name: str) -> None:
    model = tiny_model(tower="siglip", reduction={"name": name, "tokens": 5})
    inner, pixels = model.get_model(), torch.randn(2, 3, SIDE, SIDE)
    tokens = inner.read_tiles(pixels, None, inner.reducers())
    vision = model.get_vision_tower()(pixels, Needs(attention=("selected",), keys="selected"))
    vision.projected = inner.mm_projector(vision.features)
    assert tokens.source.tolist() == build(name, tokens=5)(vision).source.tolist()
    assert tokens.features.shape[1] == 5


def test_cdpruner_needs_a_tower_with_clips_text(tmp_path: Path) -> None:
    vision_config("siglip").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a reduction that reads the text needs a whole CLIP, with its text tower"):
        tiny_model(tower="siglip", mm_vision_tower=str(tmp_path), reduction="cdpruner")


@pytest.mark.parametrize("name", ["cdpruner", "holov"])
def test_what_is_lacking_is_said(name: str) -> None:
    with pytest.raises(ValueError, match="pass projected="):
        build(name)(VisionFeatures(torch.randn(1, 9, 4), attention={"selected": torch.rand(1, 2, 9)}))


@pytest.mark.parametrize("name", ["fastervlm", "vispruner", "holov"])
def test_after_a_method_in_the_tower(name: str) -> None:
    """It follows one that ends before the block that is read; another is refused, and one that leaves rows ragged."""
    model = inside(Halve())
    model.model.encoder_reducer = build(name, tokens=4)
    inner, pixels = model.get_model(), torch.randn(4, 3, SIDE, SIDE)
    assert inner.read_tiles(pixels, None, inner.reducers()).features.shape[:2] == (4, 4)
    inner.tower_reducer = Halve(ragged=True)
    with pytest.raises(ValueError, match=f"'{name}'.* leaves a different number of tokens of each picture"):
        inner.read_tiles(pixels, None, inner.reducers())
    with pytest.raises(ValueError, match=f"'{name}'.* reads block 2 .* 'tome' still takes tokens away"):
        model.set_reduction({"tower": {"name": "tome", "per_block": 2}, "encoder": name})
