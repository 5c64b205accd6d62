"""Run the layers of a language model in stages, each with fewer image tokens: one runner for all decoder reducers.

It serves every backbone of transformers that has `layers`, `norm` and `rotary_emb`; the layers are transformers' own.
A batch is planned on the host, from one copy of its image indices; after that lengths are known and nothing waits for
the device. What decoding needs of the prefill (which tokens each stage has, and how far its positions are shifted)
lies in the cache.

Shapes: B rows, L tokens a row, P pools of image tokens that compete for places, Q query tokens a row, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.masking_utils import LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from llava.constants import IGNORE_INDEX
from llava.reduction.base import DecoderReducer, LayerInput


@dataclass
class StagedPass:
    """What the runner must know of a batch besides its embeddings, and what it reports.

    Attributes:
        image_index: [B, L] int64, number of the image that a token belongs to; -1 for text and padding.
        labels: [B, L] int64 or None. With labels the tokens before the answers rank, without them the last one does.
        kept: set by the runner: [B, L'] int64, the columns that reach the end; -1 at padding.
    """

    image_index: Tensor
    labels: Tensor | None = None
    kept: Tensor | None = None

    def kept_labels(self) -> Tensor:
        """The labels of the tokens that reach the end, [B, L']."""
        assert self.labels is not None and self.kept is not None
        return self.labels.gather(1, self.kept.clamp(min=0)).masked_fill(self.kept < 0, IGNORE_INDEX)


@dataclass
class CachedStage:
    """What decoding needs of one stage: its layers, the [B, L] mask of its prompt, and [B, 1] to add to positions."""

    layers: range
    mask: Tensor
    shift: Tensor


class StagedCache(DynamicCache):
    """Keys and values of a prompt whose length differs from stage to stage."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stages: list[CachedStage] = []

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt in the first stage, padding included."""
        return self.stages[0].mask.shape[1]

    def _select(self, rows: Tensor) -> None:
        for stage in self.stages:
            stage.mask, stage.shift = (t.index_select(0, rows.to(t.device)) for t in (stage.mask, stage.shift))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        for stage in self.stages:
            stage.mask, stage.shift = (t.repeat_interleave(repeats, dim=0) for t in (stage.mask, stage.shift))

    def reset(self) -> None:
        super().reset()
        self.stages = []


@dataclass
class Rows:
    """The tokens of a batch that are still there.

    Attributes:
        columns: [B, L'] int64, their columns in the batch that entered; anything at padding.
        mask: [B, L'] bool, real tokens.
        position_ids: [B, L'] int64.
        is_padded: whether there is any padding, known on the host.
    """

    columns: Tensor
    mask: Tensor
    position_ids: Tensor
    is_padded: bool

    def of(self, values: Tensor, fill: int = 0) -> Tensor:
        """[B, L] values of the batch that entered, for these tokens; `fill` at padding."""
        return values.gather(1, self.columns).masked_fill(~self.mask, fill)


@dataclass
class Pools:
    """Which image tokens compete, and how many there are; on the host but for the tensors of shape [B, L].

    Attributes:
        pool: [B, L] int64, the pool of a token, -1 for what is never dropped.
        is_query: [B, L] bool, tokens whose attention ranks; they are never dropped themselves.
        sizes: [P] int64, tokens of each pool that entered the language model.
        row: [P] int64, the row that a pool lies in.
        least: [P] int64, tokens that a pool keeps in any case: its queries; all, in a row without a query.
        others: [B] int64, real tokens of a row outside all pools.
        queries: Q, the most queries of a row, at least 1.
        left: whether rows are padded on the left.
    """

    pool: Tensor
    is_query: Tensor
    sizes: Tensor
    row: Tensor
    least: Tensor
    others: Tensor
    queries: int
    left: bool

    def counts(self, keep: float) -> Tensor:
        """[P] tokens that each pool has where the fraction `keep` of what entered is to stay."""
        return torch.maximum((self.sizes.double() * keep).long(), self.least)

    def row_lengths(self, counts: Tensor) -> list[int]:
        """Real tokens of each row where the pools have `counts` tokens."""
        return self.others.index_add(0, self.row, counts).tolist()


def plan_pools(image_index: Tensor, mask: Tensor, labels: Tensor | None, pool_of: str) -> Pools:
    """Find the pools and the queries of a batch. This is the one copy to the host.

    Args:
        image_index: [B, L] int64, -1 for text and padding.
        mask: [B, L] bool, real tokens.
        labels: [B, L] int64 or None; see `StagedPass`.
        pool_of: "image" or "sample".
    """
    device = image_index.device
    image, real = image_index.cpu(), mask.cpu()
    b = len(image)
    is_image = (image >= 0) & real
    if pool_of == "image":
        before = torch.cat([image.new_full((b, 1), -1), image[:, :-1]], dim=1)
        starts = is_image & (image != before)
        pool = starts.flatten().cumsum(0).view_as(image) - 1
        row = starts.nonzero()[:, 0]
    else:
        has_image = is_image.any(dim=1)
        pool = (has_image.cumsum(0) - 1).unsqueeze(1).expand_as(image)
        row = has_image.nonzero()[:, 0]
    pool = pool.masked_fill(~is_image, -1)
    is_query = _queries(real, None if labels is None else labels.cpu())
    sizes = torch.bincount(pool[is_image], minlength=len(row))
    protected = torch.bincount(pool[is_image & is_query], minlength=len(row))
    return Pools(
        pool=pool.to(device),
        is_query=is_query.to(device),
        sizes=sizes,
        row=row,
        least=torch.where(is_query.any(dim=1)[row], protected, sizes),
        others=(real & ~is_image).sum(dim=1),
        queries=max(1, int(is_query.sum(dim=1).max())),
        # Unless the batch is padded on the right, rows stay aligned at their end, where the next token is read.
        left=bool(real[:, -1].all()),
    )


def _queries(real: Tensor, labels: Tensor | None) -> Tensor:
    """[B, L] bool: the token before each answer; without labels the last token."""
    after = torch.cat([real[:, 1:], torch.zeros_like(real[:, :1])], dim=1)
    if labels is None:
        return real & (after.flip(1).cumsum(1).flip(1) == 0)
    learnt = (labels != IGNORE_INDEX) & real
    learnt_after = torch.cat([learnt[:, 1:], torch.zeros_like(learnt[:, :1])], dim=1)
    return real & ~learnt & learnt_after


def keep_best(scores: Tensor, pool: Tensor, counts: Tensor, sizes: Tensor) -> Tensor:
    """Keep the best tokens of each pool; of equal ones, the earlier.

    Args:
        scores: [B, L] float32.
        pool: [B, L] int64, -1 for what is kept in any case.
        counts: [P] int64 on the host, how many to keep of each pool.
        sizes: [P] int64 on the host, how many of `pool` are of each.

    Returns:
        [B, L] bool.
    """
    flat, device = pool.flatten(), pool.device
    order = scores.flatten().argsort(descending=True, stable=True)
    order = order[flat[order].argsort(stable=True)]  # pool by pool (-1 first), the best first
    starts = (flat.numel() - int(sizes.sum()) + sizes.cumsum(0) - sizes).to(device)
    place = torch.empty_like(order).index_put_((order,), torch.arange(len(order), device=device))
    rank = place - torch.cat([starts, starts.new_zeros(1)])[flat]  # pool -1 reads the zero at the end
    limit = torch.cat([counts.to(device), counts.new_full((1,), flat.numel()).to(device)])
    return (rank < limit[flat]).view_as(pool)


def pack_columns(keep: Tensor, lengths: list[int], left: bool) -> tuple[Tensor, Tensor]:
    """Close the gaps that dropped tokens leave.

    Args:
        keep: [B, L] bool.
        lengths: tokens kept in each row.
        left: pad on the left.

    Returns:
        Columns [B, L'] of the kept tokens in their order, 0 at padding; and [B, L'] bool, what is no padding.
    """
    b, old = keep.shape
    length = max(lengths)
    count = torch.tensor(lengths, device=keep.device).unsqueeze(1)
    shift = length - count if left else torch.zeros_like(count)
    target = torch.where(keep, keep.cumsum(1) - 1 + shift, length)
    columns = torch.zeros(b, length + 1, dtype=torch.int64, device=keep.device)
    columns.scatter_(1, target, torch.arange(old, device=keep.device).expand(b, -1))
    new = torch.arange(length, device=keep.device).expand(b, -1)
    return columns[:, :length], (new >= shift) & (new < shift + count)


@merge_with_config_defaults
@capture_outputs
def forward_in_stages(
    model: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    inputs_embeds: Tensor | None = None,
    use_cache: bool | None = None,
    staged: StagedPass | None = None,
    **kwargs: Any,
) -> BaseModelOutputWithPast:
    """In place of the forward of a transformer's inner model whose `decoder_reducer` drops image tokens.

    Args:
        model: with `layers`, `norm`, `rotary_emb`, `embed_tokens` and `decoder_reducer`.
        staged: for training and prefill; None to go on from a `StagedCache`.
        Others as for transformers' models.

    Raises:
        ValueError: the mask is not [B, L], or the cache can't hold stages.
    """
    hidden = model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
    if attention_mask is not None and attention_mask.ndim != 2:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}: with a decoder reduction it must be [batch, "
            "tokens], for each stage makes its own causal mask of it"
        )
    cache = open_cache(model, past_key_values) if use_cache else None
    kwargs["use_cache"] = use_cache
    if staged is None:
        hidden = _decode(model, hidden, attention_mask, position_ids, past_key_values, kwargs)
    else:
        hidden = _prefill(model, hidden, attention_mask, position_ids, cache, staged, kwargs)
    return BaseModelOutputWithPast(last_hidden_state=model.norm(hidden), past_key_values=cache)


def open_cache(model: Any, cache: Any) -> StagedCache:
    """The given cache, or a new one.

    Raises:
        ValueError: a cache of another kind, which has one length for all layers.
    """
    if cache is None:
        return StagedCache(config=model.config)
    if not isinstance(cache, StagedCache):
        raise ValueError(
            f"a {type(cache).__name__} can't hold the stages of a decoder reduction: leave out past_key_values and "
            "cache_implementation, or pass llava.model.language_model.staged.StagedCache(config=model.config)"
        )
    return cache


def _prefill(
    model: Any,
    hidden: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: StagedCache | None,
    staged: StagedPass,
    kwargs: dict[str, Any],
) -> Tensor:
    reducer: DecoderReducer = model.decoder_reducer
    rows = _entering_rows(hidden, attention_mask, position_ids)
    pools = plan_pools(staged.image_index, rows.mask, staged.labels, reducer.pool)
    counts, first_rows, start = pools.sizes, rows, 0
    rows.is_padded = any(n < hidden.shape[1] for n in pools.row_lengths(counts))
    stage = _Stage(model, hidden, rows, start, cache, kwargs)
    for drop in reducer.drops(len(model.layers)):
        judged = stage.run(hidden, drop.ranked_by)
        hidden = stage.run(judged, drop.after)
        left = pools.counts(drop.keep)
        # In training all ranks must run the same modules in the same order, or ZeRO-3 waits for ever: a batch that
        # drops nothing goes the same way.
        if not model.training and torch.equal(left, counts):
            continue
        scores = reducer.score(_layer_input(model.layers[drop.ranked_by], judged, stage, pools))
        _remember(cache, range(start, drop.after), rows, first_rows)
        pool, is_query = rows.of(pools.pool, -1), rows.of(pools.is_query)
        keep = rows.mask & keep_best(scores.masked_fill(is_query, torch.inf), pool, left, counts)
        columns, mask = pack_columns(keep, pools.row_lengths(left), pools.left)
        hidden = _take_rows(hidden, columns)
        rows = _drop_rows(rows, columns, mask, pools.row_lengths(left), reducer.renumbers)
        counts, start = left, drop.after
        stage = _Stage(model, hidden, rows, start, cache, kwargs)
    hidden = stage.run(hidden, len(model.layers))
    _remember(cache, range(start, len(model.layers)), rows, first_rows)
    staged.kept = rows.columns.masked_fill(~rows.mask, -1)
    return hidden


def _entering_rows(hidden: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> Rows:
    b, length = hidden.shape[:2]
    columns = torch.arange(length, device=hidden.device).expand(b, -1)
    mask = torch.ones_like(columns, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    positions = _positions(mask) if position_ids is None else position_ids.expand(b, -1)
    return Rows(columns, mask, positions, is_padded=True)


def _positions(mask: Tensor) -> Tensor:
    """0, 1, 2, ... over the real tokens of each row; 0 before them."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def _drop_rows(rows: Rows, columns: Tensor, mask: Tensor, lengths: list[int], renumbers: bool) -> Rows:
    return Rows(
        columns=rows.columns.gather(1, columns),
        mask=mask,
        position_ids=_positions(mask) if renumbers else rows.position_ids.gather(1, columns),
        is_padded=min(lengths) < columns.shape[1],
    )


def _take_rows(hidden: Tensor, columns: Tensor) -> Tensor:
    """hidden[b, columns[b]]: [B, L, D] and [B, L'] give [B, L', D]."""
    b, length, d = hidden.shape
    flat = (columns + length * torch.arange(b, device=columns.device).unsqueeze(1)).flatten()
    return hidden.reshape(-1, d).index_select(0, flat).view(b, -1, d)


def _layer_input(layer: Any, hidden: Tensor, stage: _Stage, pools: Pools) -> LayerInput:
    rows = stage.rows
    is_query = rows.of(pools.is_query)
    queries = is_query.long().argsort(dim=1, descending=True, stable=True)[:, : pools.queries]
    return LayerInput(layer, hidden, stage.position_embeddings, rows.mask, queries, is_query.gather(1, queries))


def _remember(cache: StagedCache | None, layers: range, rows: Rows, first: Rows) -> None:
    if cache is None:
        return
    last, first_last = (r.position_ids.masked_fill(~r.mask, 0).amax(dim=1, keepdim=True) for r in (rows, first))
    cache.stages.append(CachedStage(layers, rows.mask, last - first_last))


def _decode(
    model: Any,
    hidden: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: StagedCache,
    kwargs: dict[str, Any],
) -> Tensor:
    b, new = hidden.shape[:2]
    seen = cache.get_seq_length()
    if attention_mask is None:
        prompt = cache.stages[0].mask
        attention_mask = torch.cat([prompt, prompt.new_ones(b, seen + new - cache.prompt_length)], dim=1)
    if position_ids is None:
        position_ids = _positions(attention_mask.bool())[:, -new:]
    answer = attention_mask[:, cache.prompt_length :].bool()
    for stage in cache.stages:
        mask = torch.cat([stage.mask, answer], dim=1)
        rows = Rows(mask, mask, position_ids + stage.shift, is_padded=True)
        hidden = _Stage(model, hidden, rows, stage.layers.start, cache, kwargs).run(hidden, stage.layers.stop)
    return hidden


def _layer_types(config: Any) -> list[str]:
    """Kind of attention of each layer, as transformers' models read it off their config."""
    same = "full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"
    return getattr(config, "layer_types", None) or [same] * config.num_hidden_layers


class _Stage:
    """Layers that see the same tokens: they share masks and rotary embeddings."""

    def __init__(
        self, model: Any, hidden: Tensor, rows: Rows, start: int, cache: StagedCache | None, kwargs: dict[str, Any]
    ) -> None:
        self.model, self.rows, self.cache, self.kwargs = model, rows, cache, kwargs
        self.next = start
        self.layer_types = _layer_types(model.config)
        self.masks = dict(self._masks(hidden))
        self.position_embeddings = model.rotary_emb(hidden, position_ids=rows.position_ids)

    def _masks(self, hidden: Tensor) -> Iterator[tuple[str, Tensor | None]]:
        """For each kind of layer the mask that transformers makes for it."""
        following = self.layer_types[self.next :]
        for kind in dict.fromkeys(following):
            yield (
                kind,
                LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING[kind](
                    config=self.model.config,
                    inputs_embeds=hidden,
                    attention_mask=self.rows.mask if self.rows.is_padded else None,
                    past_key_values=self.cache,
                    layer_idx=self.next + following.index(kind),  # whose cache has this stage's length
                ),
            )

    def run(self, hidden: Tensor, stop: int) -> Tensor:
        """Run the layers up to number `stop`, not included."""
        for i in range(self.next, stop):
            hidden = self.model.layers[i](
                hidden,
                attention_mask=self.masks[self.layer_types[i]],
                position_embeddings=self.position_embeddings,
                position_ids=self.rows.position_ids,
                past_key_values=self.cache,
                **self.kwargs,
            )
        self.next = max(self.next, stop)
        return hidden
