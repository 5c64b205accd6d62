"""What a method after the tower needs of it, and methods inside it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from llava.model.image_layout import padded_patches
from llava.reduction import ReductionConfig, build
from llava.reduction.base import EncoderReducer, Needs, TowerReducer, VisionFeatures, VisualTokens
from llava.reduction.stand_in import StandIn, TowerShape
from llava.reduction.tower.tokens import BlockTokens, Regrouping, TowerTokens, add_up
from tests.pretend_device import PretendDevice, put
from tests.tiny_models import SIDE, prompt, tiny_model

CLOSE = {"atol": 1e-5, "rtol": 0}
PATCHES = 16


def pixels(count: int = 2) -> Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


# Needs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("place", "block"), [("early", 0), ("selected", 2), ("last", 3), (0, 0), (-2, 2)])
@pytest.mark.parametrize("kind", ["clip", "siglip"])
@torch.no_grad()
def test_attention_of_a_block(kind: str, place: Any, block: int) -> None:
    """That of CLS, its own column left out; of all patches, the mean, where there is no CLS."""
    model = tiny_model(tower=kind)
    model.set_attn_implementation("eager")
    tower = model.get_vision_tower()
    expected = tower.vision_tower(pixels(), output_attentions=True).attentions[block]
    expected = expected[:, :, 0, 1:] if kind == "clip" else expected.mean(dim=2)
    needs = Needs(attention=(place,), keys=place, cls=True)
    vision = tower(pixels(), needs)
    torch.testing.assert_close(vision.attention[place], expected, **CLOSE)
    hidden = tower.vision_tower(pixels(), output_hidden_states=True).hidden_states
    layer = tower.vision_tower.encoder.layers[block]
    torch.testing.assert_close(vision.keys, layer.self_attn.k_proj(layer.layer_norm1(hidden[block])), **CLOSE)
    if kind == "clip":
        torch.testing.assert_close(vision.cls, hidden[3][:, 0], **CLOSE)
    else:
        assert vision.cls is None


@torch.no_grad()
def test_two_blocks_at_once() -> None:
    tower = tiny_model().get_vision_tower()
    vision = tower(pixels(), Needs(attention=(0, "selected")))
    for place in (0, "selected"):
        alone = tower(pixels(), Needs(attention=(place,)))
        torch.testing.assert_close(vision.attention[place], alone.attention[place], **CLOSE)


@torch.no_grad()
def test_hidden_states_of_blocks() -> None:
    tower = tiny_model().get_vision_tower()
    vision = tower(pixels(), Needs(hidden=(4, 0)))
    expected = tower.vision_tower(pixels(), output_hidden_states=True).hidden_states
    for block in (4, 0):
        torch.testing.assert_close(vision.hidden_states[block], expected[block][:, 1:], **CLOSE)
    torch.testing.assert_close(vision.features, expected[3][:, 1:], **CLOSE)
    with pytest.raises(ValueError, match=r"hidden states after \[5\] blocks .* which has 4"):
        tower(pixels(), Needs(hidden=(5,)))


@torch.no_grad()
def test_nothing_is_computed_that_is_not_declared() -> None:
    tower, ran = tiny_model().get_vision_tower(), []
    for number, layer in enumerate(tower.vision_tower.encoder.layers):
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
        layer.self_attn.k_proj.register_forward_hook(lambda *_, number=number: ran.append(f"keys {number}"))
    vision = tower(pixels())
    assert ran == ["keys 0", 0, "keys 1", 1, "keys 2", 2]
    assert (vision.keys, vision.queries, vision.cls, dict(vision.attention)) == (None, None, None, {})
    ran.clear()
    tower(pixels(), Needs(attention=("last",)))
    assert ran == ["keys 0", 0, "keys 1", 1, "keys 2", 2, "keys 3"]
    ran.clear()
    tower(pixels(), Needs(keys=1))
    assert ran == ["keys 0", 0, "keys 1", 1, "keys 2", 2, "keys 1"]


@pytest.mark.parametrize("place", [4, -5])
def test_a_block_that_the_tower_lacks(place: int) -> None:
    with pytest.raises(ValueError, match=f"reads block {place} of the vision tower .* has the blocks 0 to 3"):
        tiny_model().get_vision_tower()(pixels(), Needs(keys=place))


def test_projected_tokens_are_not_projected_again() -> None:
    model = tiny_model(mm_projector_type="linear", reduction={"name": "divprune", "tokens": 5})
    inner = model.get_model()
    tokens, counts = inner.encode_images(pixels())
    every, _ = inner.encode_images(pixels(), reduction="none")
    assert counts.tolist() == [5, 5]
    expected = every.view(2, PATCHES, -1)
    for i, own in enumerate(tokens.view(2, 5, -1)):
        assert all((expected[i] - token).abs().sum(dim=1).min() < 1e-4 for token in own)
    tokens.sum().backward()
    assert inner.mm_projector.weight.grad.abs().sum() > 0


class ReadsText(EncoderReducer):
    """Keeps all patches, and what it was given."""

    kind: str | None = "segments"

    @property
    def needs(self) -> Needs:
        return Needs(text=self.kind, padding=True)

    def phrases(self, question: str) -> list[str]:
        return question.removesuffix(" please").split()

    def forward(self, vision: VisionFeatures) -> VisualTokens:
        self.seen = vision
        return VisualTokens(vision.features)


def test_words_are_embedded_without_context() -> None:
    class Tokenizer:
        bos_token_id = 1

        def __call__(self, word: str, add_special_tokens: bool) -> Any:
            assert not add_special_tokens
            return type("Encoding", (), {"input_ids": [10 + len(word)] * len(word)})

    model = tiny_model()
    reducer = model.model.encoder_reducer = ReadsText(kind="words")
    model.tokenizer = Tokenizer()
    ids = torch.stack([prompt(2, "image", 3), prompt(3, "image", 2)])
    model(input_ids=ids, images=pixels(), texts=["a bb please", "please"])
    embed = model.get_input_embeddings()
    assert reducer.seen.text_mask.tolist() == [[True] * 3 + [False] * 3, [True] * 6]
    assert torch.equal(reducer.seen.text[0, :3], embed(torch.tensor([11, 12, 12])))
    assert torch.equal(reducer.seen.text[1], embed(torch.tensor([16] * 6)))


def test_patches_that_only_pad_are_told() -> None:
    model = tiny_model()
    reducer = model.model.encoder_reducer = ReadsText(kind=None)
    sizes = [(100, 50), (10, 10)]
    model(input_ids=torch.stack([prompt(2, "image")] * 2), images=pixels(), image_sizes=sizes)
    assert reducer.seen.padding.view(2, 4, 4).any(dim=2).tolist() == [[True, False, False, True], [False] * 4]
    assert padded_patches((640, 360), 336, (24, 24)).sum() == 240  # of a released case
    assert padded_patches((300, 600), 336, (24, 24)).sum() == 288


def test_padding_after_a_method_in_the_tower() -> None:
    """Of the patches that stayed, or of the smaller picture."""
    rows = torch.tensor([True, False, False, True])
    model = inside(Halve())
    reducer = model.model.encoder_reducer = ReadsText(kind=None)
    batch = {"input_ids": prompt(2, "image").unsqueeze(0), "images": pixels(1), "image_sizes": [(100, 50)]}
    model(**batch)
    assert reducer.seen.padding.tolist() == rows.repeat_interleave(4)[reducer.seen.source].tolist()
    model.model.tower_reducer = Smaller()
    model(**{**batch, "image_sizes": [(100, 20)]})
    assert reducer.seen.padding.tolist() == [[False] * 4]


def test_cls_among_the_patches_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'visionzip'.*cls_patch keeps CLS among the patches"):
        tiny_model(mm_vision_select_feature="cls_patch", reduction="visionzip")


# Inside the tower -------------------------------------------------------------------------------------------------


class Halve(TowerReducer):
    """Keep the patches with the largest values in block 1, and in `ragged` images different numbers."""

    ragged: bool = False
    fuse: bool = False

    def blocks(self, depth: int, selected: int) -> list[int]:
        return [1]

    def regroup(self, given: BlockTokens) -> Regrouping:
        tokens, first = given.tokens.features, given.tokens.first
        n, t, _ = tokens.shape
        score = tokens[:, first:].mean(dim=2)
        patches = t - first
        order = first + score.argsort(dim=1, descending=True)
        counts = torch.full((n,), patches // 2)
        if self.ragged:
            counts = 2 + torch.round(tokens[:, first].abs().sum(dim=1)).long() % 5
        cls = torch.zeros(n, first, dtype=torch.int64)
        kept = torch.cat([cls, order[:, : int(counts.max())]], dim=1)
        mask = torch.arange(kept.shape[1]) < first + counts.unsqueeze(1)
        if not self.fuse:
            return Regrouping(kept, mask=mask if self.ragged else None)
        into = torch.full((n, t), kept.shape[1]).scatter(1, kept, torch.arange(kept.shape[1]).expand(n, -1))
        return Regrouping(torch.cat([kept, torch.full((n, 1), -1)], dim=1), into)


def inside(method: TowerReducer, **settings: Any) -> Any:
    model = tiny_model(**settings)
    model.model.tower_reducer = method
    return model


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["clip", "siglip"])
@torch.no_grad()
def test_a_picture_does_not_depend_on_its_batch(kind: str, attention: str) -> None:
    model = inside(Halve(ragged=True), tower=kind)
    model.set_attn_implementation(attention)
    inner = model.get_model()
    tokens = inner.read_tiles(pixels(4), None, inner.reducers())
    assert len(set(tokens.counts.tolist())) > 1
    for i in range(4):
        alone = inner.read_tiles(pixels(4)[i : i + 1], None, inner.reducers())
        count = int(tokens.counts[i])
        assert int(alone.counts) == count
        torch.testing.assert_close(tokens.features[i, :count], alone.features[0, :count], **CLOSE)
        assert tokens.features[i, count:].abs().sum() == 0
        assert tokens.source[i, :count].tolist() == alone.source[0, :count].tolist()
        own = [tokens.assignment[i].tolist().index(place) for place in range(count)]
        assert own == tokens.source[i, :count].tolist()


@torch.no_grad()
def test_the_runner_is_the_block_where_nothing_happens() -> None:
    """Also with the sizes of merged tokens, all of them one."""
    inner = tiny_model().get_model()
    expected = inner.read_tiles(pixels(), None, inner.reducers()).features
    inner.tower_reducer = build("tome", per_block=0)
    got = inner.read_tiles(pixels(), None, inner.reducers())
    torch.testing.assert_close(got.features, expected, **CLOSE)
    assert got.source.tolist() == got.assignment.tolist() == [list(range(PATCHES))] * 2


@pytest.mark.parametrize("fuse", [False, True])
@torch.no_grad()
def test_what_becomes_of_tokens_by_a_plain_loop(fuse: bool) -> None:
    """Two steps one after another: sizes, sources and where patches went."""
    generator = torch.Generator().manual_seed(0)
    tokens, members = TowerTokens.of(torch.randn(1, 9, 4, generator=generator), first=1), [[i] for i in range(9)]
    features = [tokens.features[0, i] for i in range(9)]
    for _ in range(2):
        given = BlockTokens(tokens, *[torch.empty(0)] * 3, None, 1.0, 0, 1)
        how = Halve(fuse=fuse).regroup(given)
        tokens = tokens.regrouped(how)
        if how.into is None:
            groups = [[old] for old in how.kept[0].tolist()]
        else:
            groups = [
                [old for old, new in enumerate(how.into[0].tolist()) if new == m] for m in range(how.kept.shape[1])
            ]
        sizes = [len(part) for part in members]
        features = [
            sum(features[old] * sizes[old] for old in group) / sum(sizes[old] for old in group) for group in groups
        ]
        sources = [-1 if old < 0 else min(members[old]) for old in how.kept[0].tolist()]
        members = [[patch for old in group for patch in members[old]] for group in groups]
    torch.testing.assert_close(tokens.features[0], torch.stack(features), **CLOSE)
    assert tokens.sizes[0].tolist() == [len(part) for part in members]
    went = {patch: place for place, part in enumerate(members) for patch in part}
    assert tokens.assignment[0].tolist() == [went.get(patch, -1) for patch in range(1, 9)]
    if not fuse:
        assert tokens.source[0].tolist() == [source - 1 for source in sources]


def test_with_anyres_kept_patches_are_in_raster_order() -> None:
    settings = {"mm_patch_merge_type": "spatial_unpad", "image_aspect_ratio": "anyres"}
    model = inside(Halve(), anyres=True, **settings)
    picture = torch.randn(5, 3, SIDE, SIDE)
    (count,) = model.count_visual_tokens([picture], image_sizes=[(112, 112)])
    assert count[1] < count[0]
    ids = prompt(2, "image", 3).unsqueeze(0)
    logits = model(input_ids=ids, images=[picture], image_sizes=[(112, 112)]).logits
    assert logits.shape[1] == ids.shape[1] - 1 + count[1]


def test_a_method_after_the_tower_follows_or_is_refused() -> None:
    model = inside(Halve())
    model.model.encoder_reducer = build("prumerge", ratio=0.5)
    inner = model.get_model()
    tokens = inner.read_tiles(pixels(), None, inner.reducers())
    assert tokens.counts.tolist() == [5, 5]
    assert (tokens.source < PATCHES).all()
    inner.tower_reducer = Halve(ragged=True)
    with pytest.raises(ValueError, match="leaves a different number of tokens of each picture"):
        inner.read_tiles(pixels(4), None, inner.reducers())
    with pytest.raises(ValueError, match=r"'visionzip'.* reads block 2 .* 'tome' still takes tokens away"):
        model.set_reduction({"tower": {"name": "tome", "per_block": 2}, "encoder": "visionzip"})
    with pytest.raises(ValueError, match=r"tower's method 'tome' keeps patches here and there, .* on the whole grid"):
        ReductionConfig.parse({"tower": {"name": "tome", "per_block": 2}, "projector": "avgpool"})


class Smaller(TowerReducer):
    """Run the tower on 2 x 2 patches."""

    keeps_grid = True

    def input_grid(self, grid: tuple[int, int]) -> tuple[int, int]:
        return 2, 2


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@torch.no_grad()
def test_a_smaller_picture(kind: str) -> None:
    """What follows sees a smaller grid: a projector that fuses neighbours, and the layout of tiles."""
    model = inside(Smaller(), tower=kind)
    inner, encoder = model.get_model(), model.get_vision_tower().vision_tower
    tokens = inner.read_tiles(pixels(), None, inner.reducers())
    small = torch.nn.functional.interpolate(pixels(), (28, 28), mode="bicubic", antialias=True)
    hidden = encoder(small, interpolate_pos_encoding=True, output_hidden_states=True).hidden_states[3]
    torch.testing.assert_close(tokens.features, hidden[:, -4:], **CLOSE)
    assert tokens.grid == (2, 2)
    inner.projector_reducer = build("avgpool", kernel=2)
    assert inner.encode_images(pixels())[1].tolist() == [1, 1]
    model = inside(Smaller(), tower=kind, anyres=True)
    picture = [torch.randn(5, 3, SIDE, SIDE)]
    assert model.count_visual_tokens(picture, image_sizes=[(112, 112)]) == [(16 + 64 + 8, 4 + 16 + 4)]


def test_a_model_keeps_its_method_in_the_tower() -> None:
    model = tiny_model()
    model.set_reduction({"name": "tome", "tokens": 6})
    assert model.config.reduction == {"tower": {"name": "tome", "tokens": 6}}
    again = type(model)(model.config)
    assert again.get_model().tower_reducer.tokens == 6
    assert model.count_visual_tokens(pixels()) == [(16, 6), (16, 6)]


@pytest.mark.parametrize(
    ("options", "pairs"),
    [
        ({"per_block": 2}, [2, 2, 2]),
        ({"per_block": [4, -3]}, [4, 1, 0]),
        ({"per_block": [1, 2, 0, 9]}, [1, 2, 0]),
        ({"per_block": [3, 0, 0]}, [3, 0, 0]),
        ({"tokens": 12}, [2, 1, 1]),
        ({"tokens": 99}, [0, 0, 0]),
        ({"tokens": 3}, [5, 5, 3]),  # evenly, the last block would have 6 tokens, of which 4 can't go
        ({"tokens": 1}, [8, 4, 2]),  # more than halves can do
    ],
)
def test_tome_schedules(options: dict[str, Any], pairs: list[int]) -> None:
    assert build("tome", **options).schedule(PATCHES, 3) == pairs


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", [{"name": "tome", "per_block": 2}, {"name": "ats"}, {"name": "evit"}], ids=str)
def test_blocks_with_a_method_are_checkpointed(method: dict[str, Any], reentrant: bool) -> None:
    """Their gradients are the same, and each of the selected blocks runs again in the backward pass."""
    model = tiny_model().train()
    model.set_reduction(method)
    inner, tower = model.get_model(), model.get_vision_tower()
    tower.vision_tower.requires_grad_(True)
    blocks, ran = tower.vision_tower.encoder.layers, []
    for block in blocks:
        block.self_attn.k_proj.register_forward_hook(lambda *_: ran.append(1))

    def gradients() -> list[Tensor]:
        ran.clear()
        model.zero_grad()
        inner.encode_images(pixels())[0].square().sum().backward()
        return [parameter.grad for parameter in blocks[:3].parameters()]

    expected = gradients()
    assert len(ran) == 3
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for own, plain in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(own, plain, atol=1e-4, rtol=1e-4)
    assert len(ran) == 6


@pytest.mark.parametrize("method", [{"name": "tome", "per_block": 90}, {"name": "evit"}, {"name": "ats"}], ids=str)
def test_the_choice_in_half_precision_is_that_of_float32(method: dict[str, Any]) -> None:
    """Of values that 16 bits hold."""
    reducer = build(**method)
    for dtype in (torch.bfloat16, torch.float16):
        given = block_tokens(1, patches=300)
        names = ("queries", "keys", "values")
        half = replace(given, **{name: getattr(given, name).to(dtype) for name in names})
        whole = replace(half, **{name: getattr(half, name).float() for name in names})
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = reducer.regroup(half)
        expected = reducer.regroup(whole)
        assert found.kept.equal(expected.kept)
        assert found.into is None or found.into.equal(expected.into)


def test_sums_on_a_gpu_are_the_same_in_an_order_of_their_own() -> None:
    """scatter_add adds in any order there, and a token would differ from run to run."""
    values, slot = torch.randn(3, 40, 5), torch.randint(7, (3, 40))
    expected = add_up(values, slot, 7)
    with PretendDevice(), mock.patch.object(torch.Tensor, "scatter_add", side_effect=AssertionError):
        found = add_up(put(values.clone()), put(slot.clone()), 7)
    torch.testing.assert_close(found, expected)


# EViT, ATS, resize ------------------------------------------------------------------------------------------------


def block_tokens(first: int, count: int = 3, patches: int = 20) -> BlockTokens:
    """Random tokens of a block, with attention that differs much from one to another."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    tokens = TowerTokens.of(draw(count, first + patches, 8), first)
    heads = (count, 2, first + patches, 4)
    return BlockTokens(tokens, 2 * draw(*heads), 2 * draw(*heads), draw(*heads), None, 0.5, 1, 3)


def attention_received(given: BlockTokens, i: int) -> Tensor:
    """[H, T] of one image, by definition."""
    weights = (given.queries[i] @ given.keys[i].transpose(1, 2) * given.scale).softmax(dim=2)
    return weights[:, 0] if given.tokens.first else weights.mean(dim=1)


@pytest.mark.parametrize("first", [1, 0])
@pytest.mark.parametrize("variant", ["release", "paper"])
def test_evit_by_a_plain_loop(variant: str, first: int) -> None:
    given = block_tokens(first)
    left = given.tokens.regrouped(build("evit", keep=0.33, variant=variant).regroup(given))
    for i, own in enumerate(left.features):
        x, score = given.tokens.features[i], attention_received(given, i).mean(dim=0)
        order = sorted(range(first, first + 20), key=lambda j: -float(score[j]))
        kept, rest = order[:7], order[7:]  # ceil(0.33 * 20)
        kept = sorted(kept) if variant == "paper" else kept
        expected = [*x[:first], *(x[j] for j in kept), sum(score[j] * x[j] for j in rest)]
        torch.testing.assert_close(own, torch.stack(expected), **CLOSE)
        assert left.source[i, first:].tolist() == [*(j - first for j in kept), -1]
        fused = [first + kept.index(first + j) if first + j in kept else first + 7 for j in range(20)]
        assert left.assignment[i].tolist() == fused


@pytest.mark.parametrize(
    ("tokens", "counts"), [(9, [16, 13, 11, 9]), (1, [16, 6, 3, 1]), (16, [16] * 4), (99, [16] * 4)]
)
@pytest.mark.parametrize("fuse", [True, False])
def test_evit_goes_down_in_equal_steps(tokens: int, counts: list[int], fuse: bool) -> None:
    lengths, _ = StandIn(TowerShape((4, 4), depth=4, selected=3)).tokens_in_tower(
        build("evit", tokens=tokens, fuse=fuse)
    )
    assert [length - 1 for length in lengths] == counts
    assert build("evit").blocks(24, 23) == [5, 11, 17]
    assert build("evit").blocks(12, 12) == [3, 6, 9]


@pytest.mark.parametrize("first", [1, 0])
@pytest.mark.parametrize("at_most", [None, 5, 1])
@pytest.mark.parametrize("variant", ["release", "paper"])
def test_ats_by_a_plain_loop(variant: str, at_most: int | None, first: int) -> None:
    given, points = block_tokens(first), at_most or 20
    left = given.tokens.regrouped(build("ats", variant=variant, at_most=at_most).regroup(given))
    for i in range(3):
        attention = attention_received(given, i).sum(dim=0)
        score = [float(attention[j] * given.values[i, :, j].norm()) for j in range(first, first + 20)]
        order = sorted(range(20), key=lambda j: score[j]) if variant == "release" else list(range(20))
        sums = [sum(score[j] for j in order[: k + 1]) for k in range(20)]
        low = sums[0] if variant == "release" else 0.0
        cdf = [(value - low) / (sums[-1] - low) for value in sums]
        if variant == "paper":
            at = [(2 * k - 1) / (2 * points) for k in range(1, points + 1)]
        else:
            start = min(value for value in cdf if value > 0)
            at = [start + (1 - start) * k / (points - 1) for k in range(points)] if points > 1 else [1.0]
        sampled = sorted({min(range(20), key=lambda k: abs(cdf[k] - point)) for point in at})
        kept = [order[k] for k in sampled]
        count = first + len(kept)
        assert left.source[i, first:count].tolist() == kept
        assert left.mask is None or left.mask[i].sum() == count
        expected = given.tokens.features[i][[*range(first), *(first + j for j in kept)]]
        torch.testing.assert_close(left.features[i, :count], expected)
        assert len(kept) <= points


def test_ats_of_scores_that_say_nothing() -> None:
    """All zero, or one patch alone: one token stays."""
    given = block_tokens(1)
    given.values.zero_()
    assert given.tokens.regrouped(build("ats").regroup(given)).features.shape[1] == 2
    given = block_tokens(1, patches=1)
    assert given.tokens.regrouped(build("ats").regroup(given)).source.tolist() == [[-1, 0]] * 3


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@torch.no_grad()
def test_resize_is_transformers_encoder_on_a_smaller_picture(kind: str) -> None:
    model = tiny_model(tower=kind)
    model.set_reduction({"name": "resize", "tokens": 9})
    inner = model.get_model()
    tokens = inner.read_tiles(pixels(), None, inner.reducers())
    small = torch.nn.functional.interpolate(pixels(), (42, 42), mode="bicubic", antialias=True)
    encoder = model.get_vision_tower().vision_tower
    out = encoder(small, interpolate_pos_encoding=True, output_hidden_states=True)
    torch.testing.assert_close(tokens.features, out.hidden_states[3][:, -9:], **CLOSE)
    assert tokens.grid == (3, 3)


@pytest.mark.parametrize(
    ("reduction", "message"),
    [
        ({"name": "resize", "tokens": 10}, "tokens=10: a picture of 4 x 4 patches .* nearest has 9, 3 x 3"),
        ({"name": "resize", "tokens": 144}, "tokens=144: .* nearest has 16, 4 x 4"),
        ({"name": "evit", "blocks": [1, 3]}, r"'evit': blocks=\[1, 3\]: expected rising numbers from 0 to 2"),
        ({"name": "ats", "blocks": [1, 0]}, r"'ats': blocks=\[1, 0\]: expected rising numbers"),
        ({"name": "evit", "keep": 0.5, "tokens": 4}, "'evit': keep and tokens both say"),
        ({"name": "ats", "budget": 9}, "'ats' can't be told a budget"),
        (
            {"tower": {"name": "ats"}, "encoder": {"name": "prumerge", "tokens": 2}},
            "'prumerge': 'ats' leaves a different",
        ),
        (
            {"tower": {"name": "evit", "blocks": [0]}, "encoder": {"name": "vscan", "local_block": 1}},
            "'vscan': it works on the grid of patches, of which 'evit' takes some away",
        ),
        ({"name": "resize", "budget": 12}, "budget=12 .* can't be met; the nearest is 9, with tokens=9"),
    ],
)
def test_what_the_tower_cannot_do_is_said_at_once(reduction: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_model().set_reduction(reduction)
