"""SparseVLM: who rates, gravity of positions and clusters of recycled tokens against plain loops; its tables."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from llava.constants import IGNORE_INDEX
from llava.model.language_model.packed import PACKED_SDPA
from llava.reduction import build
from llava.reduction.base import EnteringTokens, LayerInput
from llava.reduction.decoder.density_peaks import density_peaks, merge_by_density
from llava.reduction.decoder.ranking import attention_of_heads, attention_rows
from llava.reduction.decoder.sparsevlm import gravity
from tests.test_staged import SPARSE, gradients, padded, staged_model, training_batch

Group = tuple[int, list[int]]


def groups_by_loops(tokens: list[list[float]], count: int) -> list[Group]:
    """Centre and members of each group, from the paper's words."""
    n, width = len(tokens), len(tokens[0])
    far = [[math.dist(a, b) / math.sqrt(width) for b in tokens] for a in tokens]
    density = [math.exp(-sum(d * d for d in sorted(row)[:count]) / count) for row in far]
    greatest = max(map(max, far))
    peaks = []
    for i in range(n):
        denser = [far[i][j] for j in range(n) if density[j] > density[i]]
        peaks.append(density[i] * min([*denser, greatest]))
    centres = sorted(range(n), key=lambda i: -peaks[i])[:count]
    members: list[list[int]] = [[] for _ in centres]
    for i in range(n):
        members[centres.index(i) if i in centres else min(range(count), key=lambda g: far[i][centres[g]])].append(i)
    return list(zip(centres, members, strict=True))


@pytest.mark.parametrize("seed", range(10))
def test_density_peaks_agree_with_loops(seed: int) -> None:
    """Sets of different lengths in one batch; the order of a tie, which two groups begin with, is left open."""
    generator = torch.Generator().manual_seed(seed)
    lengths, counts = torch.tensor([23, 31, 9, 12, 0]), torch.tensor([3, 4, 1, 2, 0])
    tokens = torch.randn(5, 31, 6, generator=generator, dtype=torch.float64)
    centres, group = density_peaks(tokens, lengths, counts)
    again, merged = merge_by_density(tokens, lengths, counts)
    assert torch.equal(centres, again)
    for row, (length, count) in enumerate(zip(lengths.tolist(), counts.tolist(), strict=True)):
        assert (group[row] >= 0).tolist() == [i < length for i in range(31)]
        expected = groups_by_loops(tokens[row, :length].tolist(), count) if count else []
        got: list[Group] = [(int(centres[row, g]), (group[row] == g).nonzero()[:, 0].tolist()) for g in range(count)]
        tied = count < 3  # one group: all densities are 1; two: the nearest pair
        if count > 1:
            assert (sorted(got) if tied else got) == (sorted(expected) if tied else expected)
        for g, (_, members) in enumerate(got):
            mean = tokens[row, members].sum(dim=0) / (len(members) + 1e-6)
            torch.testing.assert_close(merged[row, g], mean, atol=1e-12, rtol=0)
        if count == 1:
            assert got[0][1] == list(range(length))


def test_clusters_of_tokens_that_are_far_and_equal() -> None:
    """Densities that would be 0 in float32 still rank, and of equal tokens each centre has itself."""
    tokens = torch.zeros(1, 12, 4)
    tokens[0, :6] = torch.arange(6.0).unsqueeze(1) * 100
    centres, group = density_peaks(tokens, torch.tensor([12]), torch.tensor([3]))
    assert group[0, centres[0]].tolist() == [0, 1, 2]
    spread = tokens.clone()
    spread[0] = (torch.arange(12.0) ** 2 * 100).unsqueeze(1)
    centres, _ = density_peaks(spread, torch.tensor([12]), torch.tensor([3]))
    assert centres[0, 0] in (0, 1)  # where the others lie densest


@pytest.fixture
def given() -> LayerInput:
    """Two rows of a layer, the second padded on the left, with positions that have gaps."""
    model = staged_model(reduction="none", num_key_value_heads=2).get_model()
    hidden = torch.randn(2, 11, 48, generator=torch.Generator().manual_seed(0))
    positions = torch.stack([torch.arange(11) * 7, torch.tensor([0, 0, 0, 1, 5, 6, 90, 91, 92, 200, 201])])
    return LayerInput(
        layer=model.layers[1],
        hidden=hidden,
        position_embeddings=model.rotary_emb(hidden, position_ids=positions),
        mask=torch.tensor([[1] * 11, [0, 0] + [1] * 9]).bool(),
        queries=torch.tensor([[9, 10, 0], [7, 9, 10]]),
        query_mask=torch.tensor([[True, True, False], [True, True, True]]),
        rotary=model.rotary_emb,
        positions=positions,
        pool=torch.tensor([[-1, 0, 0, 0, 0, 0, -1, -1, -1, -1, -1], [-1, -1, -1, 1, 1, -1, 2, 2, 2, -1, -1]]),
        present=torch.tensor([5, 2, 3]),
    )


def cosines_of_distances(given: LayerInput) -> Tensor:
    """Gravity by its definition, in loops."""
    frequencies = [float(f) for f in given.rotary.inv_freq]  # type: ignore[union-attr]
    result = torch.zeros(*given.queries.shape, given.mask.shape[1], dtype=torch.float64)
    for row, queries in enumerate(given.queries.tolist()):
        for q, query in enumerate(queries):
            for column in range(given.mask.shape[1]):
                distance = int(given.positions[row, query]) - int(given.positions[row, column])
                total = sum(math.cos(distance * f) for f in frequencies)
                result[row, q, column] = 2 / math.sqrt(2 * len(frequencies)) * total
    return result


@torch.no_grad()
def test_gravity_agrees_with_loops(given: LayerInput) -> None:
    torch.testing.assert_close(gravity(given).double(), cosines_of_distances(given), atol=1e-4, rtol=0)
    half = LayerInput(**{**vars(given), "position_embeddings": tuple(t.bfloat16() for t in given.position_embeddings)})
    assert torch.equal(gravity(half), gravity(given))  # not from the model's rounded tables


@pytest.mark.parametrize("heads", [1, 2, None])
@torch.no_grad()
def test_scores_of_the_strongest_heads_agree_with_loops(given: LayerInput, heads: int | None) -> None:
    attention, pull = attention_rows(given).double(), cosines_of_distances(given)
    got = build("sparsevlm", version="2.0", heads=heads).score(given)
    for pool, row in enumerate([0, 1, 1]):
        columns = (given.pool[row] == pool).nonzero()[:, 0].tolist()
        asked = given.query_mask[row].nonzero()[:, 0].tolist()
        divided = [
            [sum(float(attention[row, h, q, c] / pull[row, q, c]) for q in asked) / len(asked) for c in columns]
            for h in range(4)
        ]
        best = sorted(divided, key=sum, reverse=True)[: heads or 4]
        for i, column in enumerate(columns):
            assert float(got[row, column]) == pytest.approx(sum(head[i] for head in best) / len(best), rel=1e-3)
    assert got[given.pool < 0].count_nonzero() == 0


@torch.no_grad()
def test_attention_of_heads_is_the_mean_of_the_rows(given: LayerInput) -> None:
    rows = attention_rows(given) * given.query_mask[:, None, :, None]
    mean = rows.sum(dim=2) / given.query_mask.sum(dim=1)[:, None, None]
    torch.testing.assert_close(attention_of_heads(given), mean, atol=1e-6, rtol=0)


def raters_by_loops(given: EnteringTokens, row: int) -> list[int]:
    columns = range(given.mask.shape[1])
    images = [c for c in columns if given.pool[row, c] >= 0]
    text = [c for c in columns if images and c > images[-1] and given.mask[row, c]]
    text = [c for c in text if given.answer is None or not given.answer[row, c]]
    if not text:
        return []
    rates = torch.zeros(len(text), dtype=torch.float64)
    for image in images:
        logits = [float(given.hidden[row, image].double() @ given.hidden[row, c].double()) for c in text]
        rates += torch.tensor(logits, dtype=torch.float64).softmax(0) / len(images)
    return [c for c, rate in zip(text, rates, strict=True) if rate > rates.mean()] or text


@pytest.mark.parametrize("training", [False, True])
def test_raters_agree_with_loops(training: bool) -> None:
    """Text after the last image; one word; text before it only; text alone; padding on the left."""
    pool = torch.full((5, 12), -1)
    pool[0, 1:4], pool[0, 5:7], pool[1, 4:11], pool[2, 8:12], pool[4, 6:9] = 0, 1, 2, 3, 4
    mask = torch.ones(5, 12).bool()
    mask[4, :5] = False
    answer = torch.zeros(5, 12).bool()
    answer[0, 9:11] = answer[4, 9:] = True
    hidden = torch.randn(5, 12, 8, generator=torch.Generator().manual_seed(1))
    given = EnteringTokens(hidden, mask, pool, answer if training else None)
    chosen = build("sparsevlm").queries(given)
    found = [row.nonzero()[:, 0].tolist() for row in chosen]
    assert found == [raters_by_loops(given, row) for row in range(5)]
    assert (found[1], found[2], found[3]) == ([11], [], [])
    assert bool(found[4]) != training


@torch.no_grad()
def test_a_row_without_raters_keeps_its_tokens() -> None:
    model = staged_model(reduction=SPARSE[0])
    ids = torch.tensor([[5, 6, 7, -200]])
    cache = model(input_ids=ids, images=torch.randn(1, 3, 56, 56), use_cache=True).past_key_values
    assert len({layer.get_seq_length() for layer in cache.layers}) == 1


@pytest.mark.parametrize("reduction", SPARSE, ids=str)
@torch.no_grad()
def test_packed_rows(reduction: Any) -> None:
    model = staged_model(reduction=reduction)
    model.set_attn_implementation(PACKED_SDPA)
    batch = padded("right")
    labels = batch["input_ids"].masked_fill(batch["input_ids"] < 0, IGNORE_INDEX)
    labels[:, 8:] = IGNORE_INDEX
    losses = [model(**batch, labels=labels, packed=packed).loss for packed in (False, True)]
    torch.testing.assert_close(*losses, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_learns(dtype: torch.dtype) -> None:
    """Gradients pass through recycled tokens, in half precision too."""
    for reduction in SPARSE:
        model = staged_model(reduction=reduction).to(dtype).train()
        batch = training_batch()
        batch["images"] = [image.to(dtype) for image in batch["images"]]
        loss, grads = gradients(model, batch)
        assert torch.isfinite(loss)
        assert all(torch.isfinite(gradient).all() for gradient in grads.values())
        assert any(gradient.abs().sum() > 0 for name, gradient in grads.items() if "mm_projector" in name)


def test_layers_and_tables() -> None:
    depths = {depth: [drop.ranked_by for drop in build("sparsevlm").drops(depth)] for depth in (4, 8, 28, 32, 40)}
    assert depths == {4: [0, 1, 2], 8: [0, 1, 3], 28: [2, 5, 13], 32: [2, 6, 15], 40: [3, 8, 19]}
    keep = {t: [drop.keep for drop in build("sparsevlm", tokens=t).drops(32)] for t in (1, 64, 80, 192, 384, 600)}
    assert keep[64] == [66, 30, 17]
    assert keep[80] == [152, 39, 22]  # halfway to 96: 238, 48, 26
    assert keep[192] == [drop.keep for drop in build("sparsevlm").drops(32)] == [300, 200, 110]
    assert keep[384] == [438, 388, 343]  # halfway to all
    assert (keep[1], keep[600]) == ([1, 1, 1], [600, 600, 600])
    with pytest.raises(ValueError, match=r"layers=\[31\]: this language model has 32 layers.* choose from 0 to 30"):
        build("sparsevlm", layers=[4, 31], keep=[9, 8]).drops(32)
    with pytest.raises(ValueError, match=r"layers=\[2\]: this language model has 3 layers"):
        build("sparsevlm").drops(3)


def test_a_drop_never_keeps_all() -> None:
    """One less than there are; of a single token, that."""
    for version, recycled in (("1.5", 1), ("2.0", 0)):
        method = build("sparsevlm", version=version, layers=[1], keep=[99])
        assert method.layer_counts(4, 16) == [16, 16, 15 + recycled, 15 + recycled]
        assert method.layer_counts(4, 1) == [1, 1, 1, 1]
