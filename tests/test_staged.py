"""Dropping image tokens inside the language model: ranking, stages, caches, training."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig

from llava.constants import IGNORE_INDEX
from llava.model.language_model.drop_plan import keep_best, pack_columns, plan_pools
from llava.model.language_model.packed import PACKED_SDPA
from llava.model.language_model.staged import StagedCache, StagedPass
from llava.reduction import available, build
from llava.reduction.base import DecoderReducer, Drop, EnteringTokens, LayerInput, MergedTokens
from llava.reduction.decoder.ranking import attention_from_queries, pool_columns
from tests.methods_table import runs
from tests.test_model import FIRST, ROWS, SIZES, alone, pictures
from tests.tiny_models import SIDE, pad, prompt, tiny_model

CLOSE = {"atol": 1e-4, "rtol": 0}
LAYERS = 6
PYRAMID = {"name": "pyramiddrop", "layers": [2, 3, 5], "ratios": [0.6, 0.4, 0.2]}
METHODS = (
    PYRAMID,
    {**PYRAMID, "pool": "sample"},
    {"name": "pyramiddrop", "lambda": 0.7, "stages": 3},
    {"name": "fastv", "layer": 2, "ratio": 0.6},
    {"encoder": {"name": "prumerge", "ratio": 0.5}, "decoder": PYRAMID},
    {"encoder": {"name": "vscan", "tokens": 10}, "decoder": {"name": "vscan_drop", "layers": [2, 4], "keep": [6, 3]}},
    *(method for name in available()["decoder"] if name not in ("pyramiddrop", "fastv") for method in runs(name)),
)
SPARSE = [method for method in METHODS if method.get("name") == "sparsevlm"]
BACKBONES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "mistral-window": {"sliding_window": 9},
    "qwen2": {},
    "qwen2-window": {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2},
    "qwen3": {},
}
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}


def staged_model(backbone: str = "llama", reduction: Any = None, **settings: Any) -> Any:
    settings = {"num_hidden_layers": LAYERS, **BACKBONES[backbone], **settings}
    model = tiny_model(backbone.partition("-")[0], **settings)
    model.set_reduction(PYRAMID if reduction is None else reduction)
    return model


def padded(side: str, anyres: bool = False) -> dict[str, Any]:
    """All rows as a batch."""
    ids, mask = pad(ROWS, side)
    return {"input_ids": ids, "attention_mask": mask, "images": pictures(anyres), "image_sizes": SIZES}


# Ranking


def reference_scores(given: LayerInput) -> Tensor:
    """`attention_from_queries` by loops, in float64 after the projections."""
    attention: Any = given.layer.self_attn
    normed = given.layer.input_layernorm(given.hidden)
    b, length = normed.shape[:2]
    d = attention.head_dim
    cos, sin = (t.expand(b, -1, -1).double() for t in given.position_embeddings)

    def head_of(kind: str, row: int, token: int, head: int) -> Tensor:
        vector = getattr(attention, f"{kind}_proj")(normed[row, token])[head * d : (head + 1) * d]
        norm = getattr(attention, f"{kind}_norm", None)
        vector = (vector if norm is None else norm(vector)).double()
        turned = torch.cat([-vector[d // 2 :], vector[: d // 2]])
        return vector * cos[row, token] + turned * sin[row, token]

    scores = torch.zeros(b, length, dtype=torch.float64)
    for row in range(b):
        queries = given.queries[row][given.query_mask[row]].tolist()
        for query in queries:
            for head in range(attention.config.num_attention_heads):
                q = head_of("q", row, query, head)
                seen = [t for t in range(query + 1) if given.mask[row, t]]
                logits = [
                    float(q @ head_of("k", row, t, head // attention.num_key_value_groups)) / math.sqrt(d) for t in seen
                ]
                weights = torch.tensor(logits, dtype=torch.float64).softmax(0)
                for t, weight in zip(seen, weights, strict=True):
                    scores[row, t] += weight / attention.config.num_attention_heads / len(queries)
    return scores


@pytest.mark.parametrize("backbone", ["llama", "mistral", "qwen2", "qwen3"])
@torch.no_grad()
def test_ranking_agrees_with_loops(backbone: str) -> None:
    model = staged_model(backbone).get_model()
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 7, 48, generator=generator)
    positions = torch.stack([torch.arange(7), torch.arange(7) * 2, torch.tensor([0, 0, 0, 1, 2, 3, 4])])
    mask = torch.tensor([[1] * 7, [1] * 5 + [0] * 2, [0] * 2 + [1] * 5], dtype=torch.bool)
    given = LayerInput(
        layer=model.layers[2],
        hidden=hidden,
        position_embeddings=model.rotary_emb(hidden, position_ids=positions),
        mask=mask,
        queries=torch.tensor([[6, 0], [2, 4], [5, 6]]),
        query_mask=torch.tensor([[True, False], [True, True], [True, True]]),
    )
    torch.testing.assert_close(attention_from_queries(given).double(), reference_scores(given), atol=1e-6, rtol=0)


def test_rows_without_a_query_score_zero() -> None:
    model = staged_model().get_model()
    hidden = torch.randn(1, 4, 48)
    embeddings = model.rotary_emb(hidden, position_ids=torch.arange(4).unsqueeze(0))
    mask = torch.ones(1, 4, dtype=torch.bool)
    no_query = torch.zeros(1, 1, dtype=torch.bool)
    given = LayerInput(model.layers[0], hidden, embeddings, mask, torch.zeros(1, 1, dtype=torch.int64), no_query)
    assert attention_from_queries(given).count_nonzero() == 0


@pytest.mark.parametrize("seed", range(20))
def test_keeping_the_best_of_each_pool_agrees_with_loops(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    pools = 4
    pool = torch.randint(-1, pools, (3, 11), generator=generator)
    scores = torch.randint(0, 5, (3, 11), generator=generator).float()  # with ties
    sizes = torch.bincount(pool[pool >= 0], minlength=pools)
    counts = (sizes * torch.rand(pools, generator=generator)).long()
    keep = keep_best(scores, pool, counts, sizes)
    for p in range(pools):
        members = [(-float(scores[b, t]), b, t) for b in range(3) for t in range(11) if pool[b, t] == p]
        best = {(b, t) for _, b, t in sorted(members)[: int(counts[p])]}
        assert {(b, t) for _, b, t in members if keep[b, t]} == best
    assert keep[pool < 0].all()


@pytest.mark.parametrize("left", [True, False])
def test_packing_closes_the_gaps(left: bool) -> None:
    keep = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]], dtype=torch.bool)
    columns, mask = pack_columns(keep, [3, 1, 0], left)
    assert [row[real].tolist() for row, real in zip(columns, mask, strict=True)] == [[0, 2, 3], [4], []]
    expected = [[1, 1, 1], [0, 0, 1], [0, 0, 0]] if left else [[1, 1, 1], [1, 0, 0], [0, 0, 0]]
    assert mask.long().tolist() == expected


def test_pools_of_images_and_of_samples() -> None:
    image_index = torch.tensor([[-1, 4, 4, 5, -1, 6], [-1, -1, -1, 4, 4, -1]])
    mask = torch.ones_like(image_index, dtype=torch.bool)
    images = plan_pools(image_index, mask, None, "image")
    assert images.pool.tolist() == [[-1, 0, 0, 1, -1, 2], [-1, -1, -1, 3, 3, -1]]
    assert (images.sizes.tolist(), images.row.tolist()) == ([2, 1, 1, 2], [0, 0, 0, 1])
    assert images.least.tolist() == [0, 0, 1, 0]  # the last token ranks, and stays
    kept, merged = images.counts(build("pyramiddrop"), Drop(1, 0.5, 1), images.sizes)
    assert images.row_lengths(kept) == [2 + 1 + 0 + 1, 4 + 1]
    assert merged.tolist() == [0, 0, 0, 0]
    samples = plan_pools(image_index, mask, None, "sample")
    assert samples.pool.tolist() == [[-1, 0, 0, 0, -1, 0], [-1, -1, -1, 1, 1, -1]]
    assert (samples.sizes.tolist(), samples.row.tolist()) == ([4, 2], [0, 1])


def test_queries_are_the_tokens_before_answers() -> None:
    labels = torch.tensor([[-100, -100, 5, 5, -100, 5], [-100] * 6, [7, 7, -100, -100, 8, -100]])
    mask = torch.ones_like(labels, dtype=torch.bool)
    image_index = torch.full_like(labels, -1)
    image_index[:, 1] = torch.arange(3)
    pools = plan_pools(image_index, mask, labels, "image")
    assert [row.nonzero().flatten().tolist() for row in pools.is_query] == [[1, 4], [], [3]]
    assert pools.queries == 2
    # The first row's image is a query itself; the second row has no answer, and is not dropped.
    assert pools.counts(build("pyramiddrop"), Drop(1, 0.0, 1), pools.sizes)[0].tolist() == [1, 1, 0]
    pools.ask(torch.tensor([[True] * 6, [False] * 5 + [True], [True, False] * 3]))
    assert [row.nonzero().flatten().tolist() for row in pools.is_query] == [[0, 2, 3, 4, 5], [5], [0, 2, 4]]
    assert (pools.queries, pools.least.tolist()) == (5, [0, 0, 0])


# Stages


@pytest.mark.parametrize("reduction", METHODS, ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("anyres", [False, True], ids=["flat", "anyres"])
def test_a_sample_does_not_depend_on_its_batch(anyres: bool, side: str, reduction: Any) -> None:
    settings = {"mm_patch_merge_type": "spatial_unpad", "image_aspect_ratio": "anyres"} if anyres else {}
    model = staged_model("llama", reduction, anyres=anyres, **settings)
    check_batch(model, side, anyres)


class Blend(DecoderReducer):
    """Keep a third, ranked by the loudest text tokens, and blend the others into two: the even and the odd ones."""

    def drops(self, num_layers: int) -> list[Drop]:
        return [Drop(2, 0.4, 1), Drop(4, 3, 3)]

    def merged(self, drop: Drop, dropped: Tensor) -> Tensor:
        return dropped.clamp(max=2)

    def queries(self, given: EnteringTokens) -> Tensor:
        loud = given.hidden.norm(dim=2)
        return (given.pool < 0) & given.mask & (loud > 0.65)

    def score(self, given: LayerInput) -> Tensor:
        return attention_from_queries(given)

    def merge(self, given: LayerInput, scores: Tensor, keep: Tensor) -> MergedTokens:
        row, column, is_real = pool_columns(given)
        dropped = is_real & ~keep[row.unsqueeze(1), column]
        order = (dropped.cumsum(1) - 1).masked_fill(~dropped, -1)
        member = torch.stack([dropped & (order % 2 == part) for part in range(2)], dim=1).to(given.output.dtype)
        tokens = given.output[row.unsqueeze(1), column]
        features = member @ tokens / member.sum(dim=2, keepdim=True).clamp(min=1)
        return MergedTokens(features, column.gather(1, member.argmax(dim=2)))


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_method_that_merges_does_not_depend_on_its_batch(side: str) -> None:
    model = staged_model(reduction="none")
    model.model.decoder_reducer = Blend()
    check_batch(model, side, anyres=False)


@torch.no_grad()
def test_merged_tokens_come_after_the_kept_ones_of_their_image() -> None:
    model = staged_model(reduction="none")
    model.model.decoder_reducer = Blend()
    ids = prompt(3, "image", 4, "image", 5).unsqueeze(0)
    spliced = model.splice_images(ids, images=pictures(False)[:2])
    staged = StagedPass(spliced.image_index, reducer=model.model.decoder_reducer)
    hidden = model.model(inputs_embeds=spliced.inputs_embeds, staged=staged, use_cache=True)
    assert [layer.get_seq_length() for layer in hidden.past_key_values.layers] == [45, 45, 29, 29, 23, 23]
    kept = staged.kept[0].tolist()
    images = [[column for column in kept if first <= column < first + 16] for first in (4, 24)]
    for columns in images:
        assert columns[:3] == sorted(columns[:3])
        assert len(columns) == 5
    texts = [column for column in kept if column not in images[0] + images[1]]
    assert kept == [*texts[:4], *images[0], *texts[4:8], *images[1], *texts[8:]]


@torch.no_grad()
def test_a_method_that_merges_packed() -> None:
    model = staged_model(reduction="none")
    model.set_attn_implementation(PACKED_SDPA)
    model.model.decoder_reducer = Blend()
    batch = padded("right")
    labels = batch["input_ids"].masked_fill(batch["input_ids"] < 0, IGNORE_INDEX)
    losses = [model(**batch, labels=labels, packed=packed).loss for packed in (False, True)]
    torch.testing.assert_close(*losses, atol=1e-5, rtol=0)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_backbones(backbone: str, attention: str) -> None:
    model = staged_model(backbone)
    model.set_attn_implementation(attention)
    check_batch(model, "right", anyres=False)


@torch.no_grad()
def check_batch(model: Any, side: str, anyres: bool) -> None:
    images = pictures(anyres)
    batch = padded(side, anyres)
    logits = model(**batch).logits
    tokens = model.generate(batch.pop("input_ids"), **batch, **GREEDY)
    for i in range(len(ROWS)):
        single = alone(images, i)
        expected = model(**single).logits[0]
        row = logits[i, -len(expected) :] if side == "left" else logits[i, : len(expected)]
        torch.testing.assert_close(row, expected, **CLOSE)
        assert tokens[i].tolist() == model.generate(**single, **GREEDY)[0].tolist()


@torch.no_grad()
def test_rows_of_one_length_may_lose_different_numbers() -> None:
    """Dropping makes a batch ragged that had no padding, and the next token is still read at its end."""
    model = staged_model()
    images = pictures(False)[:3]
    rows = [prompt(3, "image", 20, seed=1), prompt(2, "image", 1, "image", 4, seed=2)]
    ids, mask = pad(rows, "right")
    assert model.splice_images(ids, mask, images=images).attention_mask.all()
    tokens = model.generate(ids, attention_mask=mask, images=images, **GREEDY)
    for row, own, answer in zip(rows, (images[:1], images[1:]), tokens, strict=True):
        assert model.generate(row.unsqueeze(0), images=own, **GREEDY)[0].tolist() == answer.tolist()


@pytest.mark.parametrize(
    "reduction", [{**PYRAMID, "ratios": [1.0, 1.0, 1.0]}, {"name": "fastv", "ratio": 0.0}], ids=str
)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@torch.no_grad()
def test_keeping_everything_is_the_baseline(reduction: Any, training: bool) -> None:
    model = staged_model(reduction="none").train(training)
    batch = padded("right")
    labels = batch["input_ids"].masked_fill(batch["input_ids"] < 0, IGNORE_INDEX) if training else None
    expected = model(**batch, labels=labels)
    model.set_reduction(reduction)
    got = model(**batch, labels=labels)
    real = model.splice_images(**batch).attention_mask.bool()
    assert torch.equal(got.logits[real], expected.logits[real])
    if training:
        assert torch.equal(got.loss, expected.loss)


def test_stages_have_the_lengths_and_the_memory_that_the_ratios_say() -> None:
    model = staged_model()
    ids = prompt(3, "image", 4).unsqueeze(0)  # 8 text tokens, 16 of the image
    with torch.no_grad():
        output = model(input_ids=ids, images=pictures(False)[:1], use_cache=True)
    cache = output.past_key_values
    lengths = [8 + int(16 * keep) for keep in (1, 1, 0.6, 0.4, 0.4, 0.2)]
    assert [layer.get_seq_length() for layer in cache.layers] == lengths
    assert [len(stage.layers) for stage in cache.stages] == [2, 1, 2, 1]
    assert output.logits.shape[1] == lengths[-1]
    heads, width = model.config.num_key_value_heads, model.config.head_dim
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == sum(lengths) * 2 * heads * width * 4


@torch.no_grad()
def test_other_outputs_of_transformers() -> None:
    model = staged_model()
    inputs = {"input_ids": prompt(3, "image", 4).unsqueeze(0), "images": pictures(False)[:1]}
    output = model(**inputs, output_hidden_states=True)
    assert [state.shape[1] for state in output.hidden_states] == [24, 24, 24, 17, 14, 14, 11]
    as_tuple = model(**inputs, return_dict=False)
    assert torch.equal(as_tuple[0], output.logits)


@torch.no_grad()
def test_a_token_that_ranks_is_never_dropped() -> None:
    """A prompt that ends in its image: what its last token predicts is read from that token."""
    model = staged_model(reduction={"name": "pyramiddrop", "layers": [2, 4], "ratios": [0.2, 0.0]})
    for seed in range(5):
        inputs = {"input_ids": prompt(4, "image", seed=seed).unsqueeze(0), "images": torch.randn(1, 3, SIDE, SIDE)}
        spliced = model.splice_images(**inputs)
        staged = StagedPass(spliced.image_index, reducer=model.model.decoder_reducer)
        model.get_model()(inputs_embeds=spliced.inputs_embeds, staged=staged)
        assert staged.kept is not None
        assert staged.kept.tolist() == [[0, 1, 2, 3, 4, spliced.image_index.shape[1] - 1]]


# Decoding


@pytest.mark.parametrize("reduction", METHODS, ids=str)
@pytest.mark.parametrize("backbone", BACKBONES)
@torch.no_grad()
def test_cached_decoding_equals_decoding_without_cache(backbone: str, reduction: Any) -> None:
    """Without cache the answer follows the prompt in one pass; its labels make the prompt's last token rank."""
    model = staged_model(backbone, reduction)
    batch = padded("left")
    prompt_ids = batch.pop("input_ids")
    output = model.generate(prompt_ids, **batch, **GREEDY, return_dict_in_generate=True, output_logits=True)
    tokens = output.sequences
    whole = torch.cat([prompt_ids, tokens], dim=1)
    labels = torch.cat([torch.full_like(prompt_ids, IGNORE_INDEX), tokens], dim=1)
    batch["attention_mask"] = torch.cat([batch["attention_mask"], torch.ones_like(tokens)], dim=1)
    logits = model(input_ids=whole, **batch, labels=labels).logits
    torch.testing.assert_close(logits[:, -len(tokens[0]) - 1 : -1], torch.stack(output.logits, dim=1), **CLOSE)


@pytest.mark.parametrize("reduction", [PYRAMID, METHODS[3], *SPARSE], ids=str)
@torch.no_grad()
def test_beams_and_sampling(reduction: Any) -> None:
    model = staged_model(reduction=reduction)
    batch = padded("right")
    ids = batch.pop("input_ids")
    settings = {"num_beams": 3, "max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    beams = model.generate(ids, **batch, **settings)
    for i in range(len(ROWS)):
        assert beams[i].tolist() == model.generate(**alone(pictures(False), i), **settings)[0].tolist()
    torch.manual_seed(0)
    sampled = model.generate(ids, **batch, do_sample=True, num_return_sequences=2, max_new_tokens=3)
    assert sampled.shape[0] == 2 * len(ROWS)
    greedy = model.generate(**alone(pictures(False), 0), **GREEDY)
    looked_up = model.generate(**alone(pictures(False), 0), **GREEDY, prompt_lookup_num_tokens=2)
    assert looked_up.tolist() == greedy.tolist()


@torch.no_grad()
def test_interleaved_generations_do_not_disturb_each_other() -> None:
    model = staged_model()
    expected = [model.generate(**alone(pictures(False), i), **GREEDY)[0].tolist() for i in (0, 3)]
    runs = [SimpleNamespace(cache=StagedCache(config=model.config), inputs=alone(pictures(False), i)) for i in (0, 3)]
    tokens: list[list[int]] = [[], []]
    for _ in range(GREEDY["max_new_tokens"]):
        for run, got in zip(runs, tokens, strict=True):
            logits = model(**run.inputs, past_key_values=run.cache, use_cache=True).logits
            got.append(int(logits[0, -1].argmax()))
            run.inputs = {"input_ids": torch.tensor([[got[-1]]])}
    assert tokens == expected


@torch.no_grad()
def test_a_cache_follows_its_rows() -> None:
    model = staged_model()
    batch = padded("left")
    cache = model(**batch, use_cache=True).past_key_values
    rows = torch.tensor([3, 1])
    step = {"input_ids": torch.tensor([[5]] * len(ROWS)), "position_ids": batch["attention_mask"].sum(1, keepdim=True)}
    image_tokens = torch.tensor([2, 1, 0, 1, 1]).unsqueeze(1) * 15
    step["position_ids"] = step["position_ids"] + image_tokens
    expected = model(**step, past_key_values=cache).logits[rows]
    cache.crop(-1)
    cache.batch_select_indices(rows)
    chosen = {key: value[rows] for key, value in step.items()}
    torch.testing.assert_close(model(**chosen, past_key_values=cache).logits, expected, **CLOSE)
    cache.crop(-1)
    cache.reorder_cache(torch.tensor([1, 0]))
    swapped = {key: value.flip(0) for key, value in chosen.items()}
    torch.testing.assert_close(model(**swapped, past_key_values=cache).logits.flip(0), expected, **CLOSE)
    cache.crop(-1)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(2)
    twice = {key: value[rows].repeat_interleave(2, 0) for key, value in step.items()}
    torch.testing.assert_close(model(**twice, past_key_values=cache).logits[::2], expected, **CLOSE)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert not cache.stages


def test_another_cache_is_refused() -> None:
    model = staged_model()
    inputs = {"input_ids": prompt(3, "image", 4).unsqueeze(0), "images": pictures(False)[:1]}
    with pytest.raises(ValueError, match="a DynamicCache can't hold the stages"):
        model(**inputs, past_key_values=DynamicCache(config=model.config), use_cache=True)
    with pytest.raises(ValueError, match="cache_implementation='static' can't hold the stages"):
        model.generate(**inputs, cache_implementation="static", max_new_tokens=2)
    settings = GenerationConfig(cache_implementation="dynamic", **GREEDY)
    with torch.no_grad():
        tokens = model.generate(**inputs, generation_config=settings)
        assert tokens.tolist() == model.generate(**inputs, **GREEDY).tolist()
    assert settings.cache_implementation == "dynamic"


@torch.no_grad()
def test_embeddings_come_with_their_image_index() -> None:
    model = staged_model()
    inputs = {"input_ids": prompt(3, "image", 4).unsqueeze(0), "images": pictures(False)[:1]}
    spliced = model.splice_images(**inputs)
    embeds = {"inputs_embeds": spliced.inputs_embeds, "image_index": spliced.image_index}
    assert torch.equal(model(**embeds).logits, model(**inputs).logits)
    assert model.generate(**embeds, **GREEDY).tolist() == model.generate(**inputs, **GREEDY).tolist()
    with pytest.raises(ValueError, match="pass image_index"):
        model(inputs_embeds=spliced.inputs_embeds)


@torch.no_grad()
def test_going_on_from_a_cache_is_checked() -> None:
    model = staged_model()
    inputs = {"input_ids": prompt(3, "image", 4).unsqueeze(0), "images": pictures(False)[:1]}
    cache = model(**inputs, use_cache=True).past_key_values
    one = torch.tensor([[5]])
    with pytest.raises(ValueError, match="covers 1 tokens, but the cache holds 24 and 1 are new"):
        model(input_ids=one, attention_mask=torch.ones_like(one), past_key_values=cache)
    with pytest.raises(ValueError, match="images enter with the prompt"):
        model(**inputs, past_key_values=cache)
    with pytest.raises(ValueError, match="can't remove 1 tokens from a cache with 24, of which 24 are the prompt"):
        cache.crop(-1)


@torch.no_grad()
def test_an_empty_row_changes_nothing() -> None:
    model = staged_model()
    batch = padded("left")
    ids, mask = batch.pop("input_ids"), batch.pop("attention_mask")
    expected = model.generate(ids, attention_mask=mask, **batch, **GREEDY)
    more = torch.cat([ids, torch.zeros_like(ids[:1])]), torch.cat([mask, torch.zeros_like(mask[:1])])
    assert model.generate(more[0], attention_mask=more[1], **batch, **GREEDY)[:-1].tolist() == expected.tolist()


@torch.no_grad()
def test_rows_stay_padded_on_their_side() -> None:
    """Two rows as long as each other of which one loses more: on the right, as they came."""
    model = staged_model()
    images = pictures(False)[:3]
    rows = [prompt(3, "image", 20, seed=1), prompt(2, "image", 1, "image", 4, seed=2)]
    ids, mask = pad(rows, "right")
    logits = model(input_ids=ids, attention_mask=mask, images=images).logits
    for row, own, got in zip(rows, (images[:1], images[1:]), logits, strict=True):
        expected = model(input_ids=row.unsqueeze(0), images=own).logits[0]
        torch.testing.assert_close(got[: len(expected)], expected, **CLOSE)


# Training


def training_batch() -> dict[str, Any]:
    """Two turns, one turn, text only, an image without an answer, an answer right after the image."""
    batch = padded("right")
    labels = torch.full_like(batch["input_ids"], IGNORE_INDEX)
    ids = batch["input_ids"]
    for row, spans in enumerate([[(7, 9), (12, 15)], [(5, 10)], [(3, 7)], [], [(8, 9)]]):
        for start, stop in spans:
            labels[row, start:stop] = ids[row, start:stop]
    assert (labels >= IGNORE_INDEX).all()
    return {**batch, "labels": labels.masked_fill(ids < 0, IGNORE_INDEX)}


def gradients(model: Any, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reduction", METHODS, ids=str)
def test_gradient_checkpointing_changes_nothing(reduction: Any) -> None:
    model = staged_model(reduction=reduction).train()
    batch = training_batch()
    loss, plain = gradients(model, batch)
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
        other_loss, checkpointed = gradients(model, batch)
        assert torch.equal(loss, other_loss)
        assert plain.keys() == checkpointed.keys()
        for name, gradient in plain.items():
            torch.testing.assert_close(checkpointed[name], gradient, atol=1e-7, rtol=1e-5)


def test_the_loss_of_a_batch_is_that_of_its_samples() -> None:
    model = staged_model().train()
    batch = training_batch()
    total, count = 0.0, 0
    images, sizes = batch["images"], batch["image_sizes"]
    for i, row in enumerate(ROWS):
        labels = batch["labels"][i : i + 1, : len(row)]
        learnt = int((labels != IGNORE_INDEX).sum())
        if learnt:
            chosen = slice(FIRST[i], FIRST[i] + int((row < 0).sum()))
            single = {"input_ids": row.unsqueeze(0), "images": images[chosen], "image_sizes": sizes[chosen]}
            total += float(model(**single, labels=labels).loss) * learnt
            count += learnt
    assert float(model(**batch).loss) == pytest.approx(total / count, abs=1e-5)


def test_a_sample_without_answer_passes_undropped() -> None:
    model = staged_model().train()
    batch = padded("right")
    spliced = model.splice_images(**batch, labels=training_batch()["labels"])
    staged = StagedPass(spliced.image_index, spliced.labels, reducer=model.model.decoder_reducer)
    model.get_model()(
        inputs_embeds=spliced.inputs_embeds,
        attention_mask=spliced.attention_mask,
        position_ids=spliced.position_ids,
        staged=staged,
    )
    assert staged.kept is not None
    images = [
        [int((spliced.image_index[i, row[row >= 0]] == n).sum()) for n in range(5)] for i, row in enumerate(staged.kept)
    ]
    assert images == [[3, 3, 0, 0, 0], [0, 0, 3, 0, 0], [0] * 5, [0, 0, 0, 16, 0], [0, 0, 0, 0, 3]]
    # What is learnt is all still there, and follows its token.
    assert (staged.kept_labels() != IGNORE_INDEX).sum() == (spliced.labels != IGNORE_INDEX).sum()
    for row in staged.kept:
        real = row[row >= 0]
        assert (real.diff() > 0).all()


def test_no_gradient_through_the_ranking() -> None:
    model = staged_model().get_model()
    hidden = torch.randn(1, 5, 48, requires_grad=True)
    embeddings = model.rotary_emb(hidden, position_ids=torch.arange(5).unsqueeze(0))
    ones = torch.ones(1, 5, dtype=torch.bool)
    given = LayerInput(model.layers[1], hidden, embeddings, ones, torch.tensor([[4]]), torch.ones(1, 1).bool())
    assert not attention_from_queries(given).requires_grad


@torch.no_grad()
def test_adapted_weights_rank() -> None:
    """With LoRA the layer's adapted projections rank: unmerged and merged adapters drop the same tokens."""
    from peft import LoraConfig, get_peft_model

    model = staged_model()
    batch = padded("left")
    plain = kept_columns(model, batch)
    config = LoraConfig(r=4, target_modules=["q_proj", "k_proj"], exclude_modules=r"(?!model\.layers\.).*")
    adapted = get_peft_model(model, config)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.normal_(generator=torch.Generator().manual_seed(0))
    unmerged = kept_columns(adapted.get_base_model(), batch)
    merged = kept_columns(adapted.merge_and_unload(), batch)
    assert unmerged == merged
    assert unmerged != plain


def kept_columns(model: Any, batch: dict[str, Any]) -> list[list[int]]:
    """Columns of the spliced batch that reach the last layer."""
    spliced = model.splice_images(**batch)
    staged = StagedPass(spliced.image_index, reducer=model.model.decoder_reducer)
    model.get_model()(
        inputs_embeds=spliced.inputs_embeds, attention_mask=spliced.attention_mask, staged=staged, use_cache=False
    )
    assert staged.kept is not None
    return staged.kept.tolist()


def test_half_precision() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        model = staged_model().to(dtype).train()
        batch = training_batch()
        batch["images"] = [image.to(dtype) for image in batch["images"]]
        loss, grads = gradients(model, batch)
        assert torch.isfinite(loss)
        assert all(torch.isfinite(gradient).all() for gradient in grads.values())


# Options


def test_default_stages_follow_the_depth() -> None:
    drops = build("pyramiddrop").drops(32)
    assert [(d.after, d.keep, d.ranked_by) for d in drops] == [(8, 0.5, 8), (16, 0.25, 16), (24, 0.125, 24)]
    assert build("pyramiddrop", **{"lambda": 0.4, "stages": 2}).drops(8)[0].keep == 0.4
    assert [(d.after, d.keep, d.ranked_by) for d in build("fastv", layer=3, ratio=0.9).drops(32)] == [(3, 0.1, 2)]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("pyramiddrop", {"layers": [8]}, "layers and ratios go together"),
        ("pyramiddrop", {"layers": [8], "ratios": [0.5], "stages": 2}, "not both"),
        ("pyramiddrop", {"layers": [8, 16], "ratios": [0.5]}, "lists of one length"),
        ("pyramiddrop", {"layers": [16, 8], "ratios": [0.5, 0.2]}, "must rise"),
        ("pyramiddrop", {"layers": [0], "ratios": [0.5]}, "layers=.* each item a whole number, 1 or more"),
        ("pyramiddrop", {"layers": [8, 16], "ratios": [0.2, 0.5]}, "must fall"),
        ("pyramiddrop", {"layers": [8], "ratios": [1.5]}, "ratios=.* each item a number from 0 to 1"),
        ("pyramiddrop", {"layers": "8", "ratios": [1.5]}, "layers='8' must be a list"),
        ("pyramiddrop", {"lambda": 0}, "lambda=0"),
        ("pyramiddrop", {"stages": 0}, "stages=0"),
        ("pyramiddrop", {"pool": "batch"}, "pool='batch'"),
        ("pyramiddrop", {"layer": 3}, "no option 'layer'"),
        ("fastv", {"layer": 0}, "layer=0"),
        ("fastv", {"ratio": 1.5}, "ratio=1.5"),
        ("sparsevlm", {"version": 2.0}, 'version=2.0 is a number: put it in quotes, "2.0"'),
        ("sparsevlm", {"version": "1.0"}, "version='1.0' is not known; choose one of: 1.5, 2.0"),
        ("sparsevlm", {"layers": [1, 3]}, "must be lists of one length, a number for each drop; without one"),
        ("sparsevlm", {"layers": [3, 1], "keep": [4, 2]}, r"layers=\[3, 1\] must rise"),
        ("sparsevlm", {"keep": [9, 0, 1]}, "keep=.* each item a whole number, 1 or more"),
        ("sparsevlm", {"keep": [9, 4, 1], "tokens": 64}, "keep and tokens both say"),
        ("sparsevlm", {"heads": 2}, "heads are of version 2.0"),
    ],
)
def test_bad_options(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, **options)


def test_layers_that_the_model_does_not_have() -> None:
    message = r"after layers \[16, 24\], but this language model has 16 layers: choose from 1 to 15"
    reduction = {"name": "pyramiddrop", "layers": [8, 16, 24], "ratios": [0.5, 0.25, 0.125]}
    with pytest.raises(ValueError, match=message):
        staged_model(num_hidden_layers=16, reduction=reduction)
    with pytest.raises(ValueError, match=message):  # and where the config says so
        tiny_model(num_hidden_layers=16, reduction={"decoder": reduction})


def test_the_method_is_kept_in_the_config(tmp_path: Any) -> None:
    model = staged_model()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.config.reduction == {"decoder": PYRAMID}
    inputs = {"input_ids": prompt(3, "image", 4).unsqueeze(0), "images": torch.randn(1, 3, SIDE, SIDE)}
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(**inputs).logits, model(**inputs).logits, **CLOSE)


def test_autocast_does_not_round_the_ranking() -> None:
    generator = torch.Generator().manual_seed(0)
    b, length, width = 2, 40, 16
    identity = torch.nn.Identity()  # autocast leaves it alone, so that only the ranking itself can round
    attention = SimpleNamespace(q_proj=identity, k_proj=identity, head_dim=8, scaling=8**-0.5)
    angles = torch.rand(1, length, 8, generator=generator)
    given = LayerInput(
        layer=SimpleNamespace(input_layernorm=identity, self_attn=attention),  # type: ignore[arg-type]
        hidden=torch.randn(b, length, width, generator=generator),
        position_embeddings=(angles.cos(), angles.sin()),
        mask=torch.ones(b, length, dtype=torch.bool),
        queries=torch.full((b, 1), length - 1),
        query_mask=torch.ones(b, 1, dtype=torch.bool),
    )
    expected = attention_from_queries(given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attention_from_queries(given), expected)
