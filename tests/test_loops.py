"""Methods against plain loops written from their papers: what the released code's cases do not show."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from llava.model.multimodal_encoder.regrouping import run_block
from llava.reduction import VisionFeatures, build
from llava.reduction.base import LayerInput
from llava.reduction.tower.tokens import TowerTokens
from tests.methods_table import NAMES
from tests.test_golden_more import ROWS
from tests.tiny_models import tiny_model

CLOSE = {"atol": 1e-5, "rtol": 0}
GOLDEN = {"prumerge", "prumerge_plus", "trim", "stf", "pyramiddrop"}  # of the first set, in tests/test_golden.py
LOOPS = {
    "sequential": "test_reduction.test_samplers_keep_what_their_names_say",
    "spatial": "test_reduction.test_samplers_keep_what_their_names_say",
    "random": "test_reduction.test_samplers_keep_what_their_names_say",
    "avgpool": "test_projector.test_agrees_with_a_plain_loop",
    "token_concat": "test_projector.test_agrees_with_a_plain_loop",
    "resize": "test_tower.test_resize_is_transformers_encoder_on_a_smaller_picture",
}
"""Methods that no released code has cases of, and the test that compares each with a loop."""


def test_every_method_is_compared() -> None:
    """With the released code's cases, or with a loop."""
    golden = GOLDEN | {row.method for row in ROWS.values()} | {"vscan_drop"}  # which is in the cases of vscan
    assert set(NAMES) <= golden | set(LOOPS), "a new method needs golden cases, or a loop that LOOPS names"
    for place in LOOPS.values():
        file, _, test = place.partition(".")
        assert callable(getattr(importlib.import_module(f"tests.{file}"), test))


# VisionZip


def slow_visionzip(vision: VisionFeatures, image: int, dominant: int, contextual: int, variant: str) -> list[Tensor]:
    """The tokens of one image, one by one."""
    features, attention = vision.features[image], vision.attention["selected"][image]
    p = len(features)
    keys = vision.keys[image, -p:].unflatten(1, (vision.num_heads, -1)).mean(1)  # type: ignore[index]
    tokens = [] if vision.cls is None else [vision.cls[image]]
    ranked = sorted(range(p), key=lambda i: -float(attention[:, i].sum()))
    kept = sorted(ranked[: dominant - len(tokens)])
    tokens += [features[i] for i in kept]
    others = [i for i in range(p) if i not in kept]
    step = max(1, len(others) // contextual)
    targets = [others[step * place] for place in range(contextual)]
    members: dict[int, list[int]] = {target: [] for target in targets}
    for other in others:
        if other not in targets:
            near = max(targets, key=lambda target: float(cosine_similarity(keys[other], keys[target], dim=0)))
            members[near].append(other)
    for target, own in members.items():
        joined = [features[i] for i in own]
        if variant == "paper":
            tokens.append(torch.stack([features[target], *joined]).mean(0))
        else:
            tokens.append(features[target] + (torch.stack(joined).mean(0) if joined else 0))
    return tokens


@pytest.mark.parametrize("variant", ["paper", "release"])
@pytest.mark.parametrize(("dominant", "contextual"), [(6, 3), (2, 1), (9, 7)])
@pytest.mark.parametrize("has_cls", [True, False])
def test_visionzip(has_cls: bool, dominant: int, contextual: int, variant: str) -> None:
    generator = torch.Generator().manual_seed(dominant)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    cls = random(2, 8) if has_cls else None
    attention = {"selected": random(2, 2, 24).softmax(-1)}
    keys = random(2, 24 + has_cls, 8)
    vision = VisionFeatures(random(2, 24, 8), (4, 6), keys=keys, num_heads=2, attention=attention, cls=cls)
    tokens = build("visionzip", dominant=dominant, contextual=contextual, variant=variant)(vision)
    for i in range(2):
        expected = slow_visionzip(vision, i, dominant, contextual, variant)
        torch.testing.assert_close(tokens.features[i], torch.stack(expected), **CLOSE)


# ToMe


def slow_tome(block: Any, tokens: list[Tensor], sizes: list[int], pairs: int) -> tuple[list[Tensor], list[int]]:
    """One block: attention that counts a token as often as its size, the merge, the MLP. CLS is the first token."""
    attention = block.self_attn
    normed = [block.layer_norm1(token) for token in tokens]
    q, k, v = (
        [getattr(attention, f"{name}_proj")(token).unflatten(0, (-1, attention.head_dim)) for token in normed]
        for name in "qkv"
    )
    after = []
    for i, token in enumerate(tokens):
        heads = []
        for head in range(len(q[0])):
            logits = [float(q[i][head] @ k[j][head]) / math.sqrt(attention.head_dim) for j in range(len(tokens))]
            weights = [size * math.exp(logit) for size, logit in zip(sizes, logits, strict=True)]
            heads.append(sum(w * v[j][head] for j, w in enumerate(weights)) / sum(weights))
        after.append(token + attention.out_proj(torch.cat(heads)))
    metric = [key.mean(0) for key in k]
    even, odd = range(0, len(tokens), 2), range(1, len(tokens), 2)
    best = {}
    for a in even:
        if a:
            near = max(odd, key=lambda b: float(cosine_similarity(metric[a], metric[b], dim=0)))
            best[a] = (float(cosine_similarity(metric[a], metric[near], dim=0)), near)
    merged = sorted(best, key=lambda a: -best[a][0])[:pairs]
    groups = [[a] for a in even if a not in merged]
    groups += [[b, *(a for a in merged if best[a][1] == b)] for b in odd]
    grown = [sum(sizes[i] for i in group) for group in groups]
    mixed = [sum(sizes[i] * after[i] for i in group) / size for group, size in zip(groups, grown, strict=True)]
    return [token + block.mlp(block.layer_norm2(token)) for token in mixed], grown


@torch.no_grad()
def test_tome_over_three_blocks() -> None:
    """Sizes are carried from block to block and weigh attention."""
    blocks = list(tiny_model().get_vision_tower().modules())
    blocks = [module for module in blocks if hasattr(module, "layer_norm1") and hasattr(module, "mlp")][:3]
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 17, 32, generator=generator)
    method = build("tome", per_block=[4, 3, 1])
    tokens = TowerTokens.of(features, first=1)
    expected = [(list(image), [1] * 17) for image in features]
    for number, block in enumerate(blocks):
        tokens = run_block(block, tokens, method, number, len(blocks))
        expected = [slow_tome(block, *state, pairs=(4, 3, 1)[number]) for state in expected]
    for i, (own, sizes) in enumerate(expected):
        torch.testing.assert_close(tokens.features[i], torch.stack(own), atol=1e-4, rtol=0)
        assert tokens.sizes[i].tolist() == sizes
    assert max(sizes) > 2


# DART


def slow_dart(
    given: LayerInput, pool: int, image_pivots: int, text_pivots: int, each: int, variant: str
) -> tuple[set[int], set[int]]:
    """Columns of an image's tokens that stay: its pivots, and what all pivots take."""
    ((row,),) = {tuple(rows) for rows in (given.pool == pool).any(1).nonzero().T.tolist()}
    image = (given.pool[row] == pool).nonzero().flatten().tolist()
    answer = set() if given.answer is None else set(given.answer[row].nonzero().flatten().tolist())
    text = [
        column
        for column in range(image[-1] + 1, given.pool.shape[1])
        if given.mask[row, column] and given.pool[row, column] < 0 and column not in answer
    ]
    attention: Any = given.layer.self_attn

    def strength(column: int) -> float:
        key = attention.k_proj(given.layer.input_layernorm(given.hidden[row, column]))
        total = 0.0
        for head in key.split(attention.head_dim):
            cos, sin = (table[row, column] for table in given.position_embeddings)
            half = attention.head_dim // 2
            total += float((head * cos + torch.cat([-head[half:], head[:half]]) * sin).abs().sum())
        return total

    own = sorted(image, key=lambda column: -strength(column))[:image_pivots]
    pivots = own + sorted(text, key=lambda column: -strength(column))[:text_pivots]
    if variant == "release":
        place = {column: int(given.mask[row, :column].sum()) for column in pivots}  # in the sequence without padding
        pivots = [column for position in set(place.values()) for column in pivots if place[column] == position]
    vectors = [given.norm(given.output[row, column]) for column in range(given.pool.shape[1])]
    left, taken = [column for column in image if column not in own], set()
    for pivot in pivots:
        least = sorted(left, key=lambda column: float(cosine_similarity(vectors[pivot], vectors[column], dim=0)))
        taken |= set(least[:each])
        left = [column for column in left if column not in taken]
    return set(own), taken


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("variant", ["paper", "release"])
@torch.no_grad()
def test_dart(variant: str, training: bool) -> None:
    """Two images in a row and one in a shorter, left-padded row."""
    model = tiny_model("llama").get_model()
    pool = torch.tensor([[-1, *[0] * 14, -1, *[1] * 12, *[-1] * 7], [*[-1] * 9, *[2] * 16, *[-1] * 10]])
    mask = torch.ones_like(pool, dtype=torch.bool)
    mask[1, :7] = False
    answer = torch.zeros_like(mask)
    answer[0, -3:] = answer[1, -4:-2] = True
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        hidden, output = (torch.randn(*pool.shape, 48, generator=generator) for _ in range(2))
        entered = torch.tensor([14, 12, 16])
        given = LayerInput(
            layer=model.layers[1],
            hidden=hidden,
            position_embeddings=model.rotary_emb(hidden, position_ids=(mask.cumsum(1) - 1).clamp(min=0)),
            mask=mask,
            queries=torch.zeros(2, 1, dtype=torch.int64),
            query_mask=torch.ones(2, 1, dtype=torch.bool),
            output=output,
            norm=model.norm,
            pool=pool,
            answer=answer if training else None,
            entered=entered,
            present=entered,
        )
        options = {"layer": 2, "tokens": 9, "image_pivots": 2, "text_pivots": 2}
        reducer = build("dart", **options, variant=variant)
        counts = reducer.kept(reducer.drops(3)[0], entered, entered).tolist()
        scores = reducer.score(given)
        for i, count in enumerate(counts):
            pivots, taken = slow_dart(given, i, 2, 2, each=9 // 4, variant=variant)
            row = int((pool == i).any(1).nonzero())
            columns = (pool[row] == i).nonzero().flatten()
            best = columns[scores[row, columns].argsort(descending=True, stable=True)[:count]]
            assert len(pivots) + len(taken) == count
            assert set(best.tolist()) == pivots | taken
