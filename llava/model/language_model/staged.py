"""Run the layers of a language model in stages, each with fewer image tokens: one runner for all decoder reducers.

It also runs batches packed, with or without a reducer: hidden states then lie in one row without padding, and only
attention and ranking see the samples apart.

It serves every backbone of transformers that has `layers`, `norm` and `rotary_emb`; the layers are transformers' own.
A batch is planned on the host, which knows it from the splice or copies it once; after that all lengths are known, and
nothing here waits for the device. What decoding needs of the prefill (which tokens each stage has, and how far its
positions are shifted) lies in the cache.

Shapes: B rows, L tokens a row, P pools of image tokens that compete for places, Q query tokens a row, D width,
T tokens of all rows, padding left out.
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
from llava.model.language_model.drop_plan import Pools, keep_best, pack_columns, plan_pools
from llava.model.language_model.merged_rows import plan_merged
from llava.model.language_model.packed import (
    BY_BOUNDARIES,
    CAN_PACK,
    PACKED_SDPA,
    boundaries,
    rows_for_sdpa,
    window_mask,
)
from llava.model.splice import SplicePlan
from llava.reduction.base import DecoderReducer, EnteringTokens, LayerInput


@dataclass
class StagedPass:
    """What the runner must know of a batch besides its embeddings, and what it reports.

    Attributes:
        image_index: [B, L] int64, number of the image that a token belongs to; -1 for text and padding.
        labels: [B, L] int64 or None. With labels the tokens before the answers rank, without them the last one does.
        packed: whether to run the batch as one row without padding; the output then is one row too.
        left: whether rows are padded on the left; None: as the mask shows.
        reducer: what drops image tokens; None drops none.
        plan: the batch on the host, where a splice made it; without one it is copied there.
        kept: set by the runner: [B, L'] int64, the columns that reach the end; -1 at padding.
        place: set by the runner where the batch is packed: [T], index of each token of the row into [B, L'].
        answers: set by the runner: tokens with a label, known on the host.
    """

    image_index: Tensor
    labels: Tensor | None = None
    packed: bool = False
    left: bool | None = None
    reducer: DecoderReducer | None = None
    plan: SplicePlan | None = None
    kept: Tensor | None = None
    place: Tensor | None = None
    answers: int | None = None

    def on_host(self, mask: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """`image_index`, the [B, L] bool mask of real tokens, and `labels`, on the host."""
        if self.plan is not None:
            return self.plan.pool_index, self.plan.attention_mask, self.plan.labels
        given = [self.image_index, mask.long()] + ([] if self.labels is None else [self.labels])
        image_index, real, *labels = torch.stack(given).cpu()
        return image_index, real.bool(), labels[0] if labels else None

    def kept_labels(self) -> Tensor:
        """The labels of the tokens that reach the end, [B, L'], or [1, T] where packed."""
        assert self.labels is not None and self.kept is not None
        kept = self.kept.to(self.labels.device)  # the last layer may be on another device
        labels = self.labels.gather(1, kept.clamp(min=0)).masked_fill(kept < 0, IGNORE_INDEX)
        if self.place is None:
            return labels
        # In a packed row the token before a sample is another sample's: nothing predicts the first one.
        first = torch.nn.functional.pad(labels[:, 1:], (1, 0), value=IGNORE_INDEX)
        return first.flatten()[self.place.to(first.device)].unsqueeze(0)


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

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens, of the answer only.

        Raises:
            ValueError: the prompt would be cut, whose stages have different lengths.
        """
        if self.stages and abs(tokens_to_remove) > self.get_seq_length() - self.prompt_length:
            raise ValueError(
                f"can't remove {abs(tokens_to_remove)} tokens from a cache with {self.get_seq_length()}, of which "
                f"{self.prompt_length} are the prompt: its image tokens are dropped already; run the prompt anew"
            )
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        super().reset()
        self.stages = []


@dataclass
class Rows:
    """The tokens of a batch that are still there, and where they are stored.

    Attributes:
        columns: [B, L'] int64, their columns in the batch that entered; anything at padding.
        mask: [B, L'] bool, real tokens.
        position_ids: [B, L'] int64.
        lengths: real tokens of each row, known on the host; None in decoding.
        left: whether padding stands on the left, and nowhere else; None: that is not known.
        real: [T] int64 where the batch is packed, index of the real tokens into [B, L'].
    """

    columns: Tensor
    mask: Tensor
    position_ids: Tensor
    lengths: list[int] | None = None
    left: bool | None = None
    real: Tensor | None = None

    @property
    def is_padded(self) -> bool:
        return self.lengths is None or min(self.lengths) < self.mask.shape[1]

    def of(self, values: Tensor, fill: int = 0) -> Tensor:
        """[B, L] values of the batch that entered, for these tokens; `fill` at padding."""
        return values.gather(1, self.columns).masked_fill(~self.mask, fill)

    def to(self, device: torch.device) -> None:
        """Follow the hidden states to another device, where the model is spread over several."""
        self.columns, self.mask, self.position_ids = (
            t.to(device) for t in (self.columns, self.mask, self.position_ids)
        )
        self.real = None if self.real is None else self.real.to(device)

    def pack(self) -> None:
        """Store the tokens as one row, without padding."""
        assert self.lengths is not None
        self.real = torch.nonzero_static(self.mask.flatten(), size=sum(self.lengths))[:, 0]

    def store(self, values: Tensor) -> Tensor:
        """[B, L', ...] as it is stored: [1, T, ...] where packed."""
        return values if self.real is None else values.flatten(0, 1).index_select(0, self.real).unsqueeze(0)

    def index(self) -> Tensor:
        """[B, L'], where each token is stored."""
        if self.real is None:
            return torch.arange(self.mask.numel(), device=self.mask.device).view(self.mask.shape)
        return (self.mask.flatten().cumsum(0) - 1).clamp(min=0).view(self.mask.shape)

    def unpack(self, stored: Tensor) -> Tensor:
        """What `store` gave, as [B, L', ...] again; anything at padding."""
        return stored if self.real is None else stored[0][self.index()]

    def take(self, stored: Tensor, columns: Tensor, new: Rows) -> Tensor:
        """Of what is stored here, the `columns` [B, L''] of each row, as `new` stores them."""
        wanted = new.store(self.index().gather(1, columns))
        return stored.flatten(0, 1).index_select(0, wanted.flatten()).unflatten(0, wanted.shape)

    def boundaries(self, attention: str) -> dict[str, Any]:
        """What attention is told in place of a mask: where samples begin and end. Empty where it needs the mask.

        For kernels that go by boundaries, the padding of a row is a sample of its own.
        """
        if self.lengths is None:
            return {}
        device, lengths = self.mask.device, self.lengths
        if self.real is not None:
            rows = rows_for_sdpa(lengths, device) if attention == PACKED_SDPA else {}
            return {**boundaries(lengths, device), **rows}
        if self.left is None or attention not in BY_BOUNDARIES:
            return {}
        width = self.mask.shape[1]
        pairs = [(width - n, n) if self.left else (n, width - n) for n in lengths]
        return boundaries([n for pair in pairs for n in pair], device)


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
    """In place of the forward of a transformer's inner model, where a decoder reducer drops image tokens.

    Args:
        model: with `layers`, `norm`, `rotary_emb` and `embed_tokens`.
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
    use_cache = bool(use_cache) and not (staged is not None and staged.packed)
    drops = staged is None or staged.reducer is not None
    cache = open_cache(model, past_key_values, drops) if use_cache else None
    kwargs["use_cache"] = use_cache
    if staged is None:
        hidden = _decode(model, hidden, attention_mask, position_ids, past_key_values, kwargs)
    else:
        hidden = _prefill(model, hidden, attention_mask, position_ids, cache, staged, kwargs)
    return BaseModelOutputWithPast(last_hidden_state=model.norm(hidden), past_key_values=cache)


def open_cache(model: Any, cache: Any, drops: bool) -> DynamicCache:
    """The given cache, or a new one.

    Args:
        model: whose config says how long its layers' windows are.
        cache: that is given, or None.
        drops: whether its layers will have different lengths.

    Raises:
        ValueError: a cache of another kind, which has one length for all layers.
    """
    if cache is None:
        return StagedCache(config=model.config) if drops else DynamicCache(config=model.config)
    if not drops:
        return cache
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
    cache: DynamicCache | None,
    staged: StagedPass,
    kwargs: dict[str, Any],
) -> Tensor:
    reducer = staged.reducer
    rows = _entering_rows(hidden, attention_mask, position_ids)
    image_index, real, labels = staged.on_host(rows.mask)
    staged.answers = None if labels is None else int((labels != IGNORE_INDEX).sum())
    rows.lengths = real.sum(dim=1).tolist()
    rows.left = None if staged.plan is None else staged.plan.left
    if staged.packed:
        check_packing(model.config)
        rows.pack()
    hidden = rows.store(hidden)
    first_rows, start = rows, 0
    stage = _Stage(model, hidden, rows, start, cache, kwargs)
    if reducer is not None:
        pools = plan_pools(image_index, real, labels, reducer.pool, staged.left, hidden.device)
        counts = pools.sizes
        _choose_queries(reducer, hidden, rows, pools)
    for drop in [] if reducer is None else reducer.drops(len(model.layers)):
        assert reducer is not None
        judged = stage.run(hidden, drop.ranked_by)
        hidden = stage.run(judged, drop.after)
        kept, merged = pools.counts(reducer, drop, counts)
        # In training all ranks must run the same modules in the same order, or ZeRO-3 waits for ever: a batch that
        # drops nothing goes the same way.
        if not model.training and torch.equal(kept, counts):
            continue
        rows.to(hidden.device)
        pools.to(hidden.device)
        given = _layer_input(model, model.layers[drop.ranked_by], judged, hidden, stage, pools)
        given.drop, given.entered, given.present, given.kept, given.merged = drop, pools.sizes, counts, kept, merged
        scores = reducer.score(given)
        _remember(cache, range(start, drop.after), rows, first_rows)
        pool, is_query = rows.of(pools.pool, -1), rows.of(pools.is_query)
        keep = rows.mask & keep_best(scores.to(pool.device).masked_fill(is_query, torch.inf), pool, kept, counts)
        if int(merged.sum()):
            new, hidden = _merge_rows(reducer, given, scores, keep, rows, pools, hidden)
        else:
            lengths = pools.row_lengths(kept)
            columns, mask = pack_columns(keep, lengths, pools.left)
            new = _drop_rows(rows, columns, mask, lengths, reducer.renumbers)
            hidden = rows.take(hidden, columns, new)
        new.left = pools.left
        rows, counts, start = new, kept + merged, drop.after
        stage = _Stage(model, hidden, rows, start, cache, kwargs)
    hidden = stage.run(hidden, len(model.layers))
    _remember(cache, range(start, len(model.layers)), rows, first_rows)
    staged.kept, staged.place = rows.columns.masked_fill(~rows.mask, -1), rows.real
    return hidden


def check_packing(config: Any) -> None:
    """Raise ValueError where the config's attention would let the samples of a packed row see each other."""
    if config._attn_implementation not in CAN_PACK:
        raise ValueError(
            f"packed batches need attn_implementation {' or '.join(CAN_PACK)}, not {config._attn_implementation}, "
            "which lets samples see each other"
        )


def _entering_rows(hidden: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> Rows:
    b, length = hidden.shape[:2]
    columns = torch.arange(length, device=hidden.device).expand(b, -1)
    mask = torch.ones_like(columns, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    return Rows(columns, mask, _positions(mask) if position_ids is None else position_ids.expand(b, -1))


def _positions(mask: Tensor) -> Tensor:
    """0, 1, 2, ... over the real tokens of each row; 0 before them."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def _drop_rows(rows: Rows, columns: Tensor, mask: Tensor, lengths: list[int], renumbers: bool) -> Rows:
    new = Rows(
        columns=rows.columns.gather(1, columns),
        mask=mask,
        position_ids=_positions(mask) if renumbers else rows.position_ids.gather(1, columns),
        lengths=lengths,
    )
    if rows.real is not None:
        new.pack()
    return new


def _choose_queries(reducer: DecoderReducer | None, hidden: Tensor, rows: Rows, pools: Pools) -> None:
    if reducer is None or not len(pools.sizes):
        return
    chosen = reducer.queries(EnteringTokens(rows.unpack(hidden), rows.mask, pools.pool, pools.is_answer))
    if chosen is not None:
        pools.ask(chosen & rows.mask)


def _layer_input(model: Any, layer: Any, judged: Tensor, hidden: Tensor, stage: _Stage, pools: Pools) -> LayerInput:
    """What a method ranks by; the fields that say how many stay are the caller's to fill in.

    Args:
        model: with `norm` and `rotary_emb`.
        layer: that ranks.
        judged: the input of the layer that ranks, as it is stored.
        hidden: the input of the layer that comes next.
        stage: in which both are.
        pools: of the batch.
    """
    rows = stage.rows
    is_query = rows.of(pools.is_query)
    queries = is_query.long().argsort(dim=1, descending=True, stable=True)[:, : pools.queries]
    unpacked = [rows.unpack(values.to(rows.mask.device)) for values in (judged, *stage.position_embeddings)]
    output = unpacked[0] if hidden is judged else rows.unpack(hidden)
    answer = None if pools.is_answer is None else rows.of(pools.is_answer)
    # Where the model is spread over devices, the layer that ranks may be on another one.
    device = layer.input_layernorm.weight.device
    parts = (*unpacked, rows.mask, queries, is_query.gather(1, queries), output, rows.of(pools.pool, -1))
    states, cos, sin, mask, queries, query_mask, output, pool = (values.to(device) for values in parts)
    return LayerInput(
        layer,
        states,
        (cos, sin),
        mask,
        queries,
        query_mask,
        output=output,
        norm=model.norm,
        rotary=model.rotary_emb,
        positions=rows.position_ids.to(device),
        pool=pool,
        answer=None if answer is None else answer.to(device),
    )


def _merge_rows(
    reducer: DecoderReducer, given: LayerInput, scores: Tensor, keep: Tensor, rows: Rows, pools: Pools, hidden: Tensor
) -> tuple[Rows, Tensor]:
    """The rows after a drop that merges, and their hidden states as they are stored."""
    merged = reducer.merge(given, scores, keep.to(given.mask.device))
    plan = plan_merged(merged, given.merged, keep, rows.of(pools.pool, -1), pools)
    lengths = pools.row_lengths(given.kept + given.merged)
    columns, mask = pack_columns(plan.stays, lengths, pools.left)
    columns = plan.order.gather(1, columns)
    new = _drop_rows(rows, plan.stands_in.gather(1, columns), mask, lengths, reducer.renumbers)
    full = plan.extend(rows.unpack(hidden), merged.features.to(hidden.device))
    return new, new.store(full.gather(1, columns.unsqueeze(-1).expand(-1, -1, full.shape[-1])))


def _remember(cache: DynamicCache | None, layers: range, rows: Rows, first: Rows) -> None:
    if not isinstance(cache, StagedCache):
        return
    last, first_last = (r.position_ids.masked_fill(~r.mask, 0).amax(dim=1, keepdim=True) for r in (rows, first))
    cache.stages.append(CachedStage(layers, rows.mask, last - first_last.to(last.device)))


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
    if attention_mask is not None and attention_mask.shape[1] != seen + new:
        raise ValueError(
            f"attention_mask covers {attention_mask.shape[1]} tokens, but the cache holds {seen} and {new} are new: it "
            "must cover both, the prompt with its image tokens included"
        )
    if attention_mask is None:
        prompt = cache.stages[0].mask
        attention_mask = torch.cat([prompt, prompt.new_ones(b, seen + new - cache.prompt_length)], dim=1)
    if position_ids is None:
        position_ids = _positions(attention_mask.bool())[:, -new:]
    answer = attention_mask[:, cache.prompt_length :].bool()
    for stage in cache.stages:
        mask, shift = stage.mask.to(hidden.device), stage.shift.to(hidden.device)
        mask = torch.cat([mask, answer.to(hidden.device)], dim=1)
        rows = Rows(mask, mask, position_ids.to(hidden.device) + shift)
        hidden = _Stage(model, hidden, rows, stage.layers.start, cache, kwargs).run(hidden, stage.layers.stop)
    return hidden


def _layer_types(config: Any) -> list[str]:
    """Kind of attention of each layer, as transformers' models read it off their config."""
    same = "full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"
    return getattr(config, "layer_types", None) or [same] * config.num_hidden_layers


class _Stage:
    """Layers that see the same tokens: they share masks and rotary embeddings."""

    def __init__(
        self, model: Any, hidden: Tensor, rows: Rows, start: int, cache: DynamicCache | None, kwargs: dict[str, Any]
    ) -> None:
        self.model, self.rows, self.cache = model, rows, cache
        self.attention = model.config._attn_implementation
        self.boundaries = rows.boundaries(self.attention)
        self.kwargs = {**kwargs, **self.boundaries}
        self.next = start
        self.layer_types = _layer_types(model.config)
        self.masks = dict(self._masks(hidden))
        self.position_ids = rows.store(rows.position_ids)
        self.position_embeddings = model.rotary_emb(hidden, position_ids=self.position_ids)

    def _masks(self, hidden: Tensor) -> Iterator[tuple[str, Tensor | None]]:
        """For each kind of layer the mask that transformers makes for it, unless attention goes by boundaries."""
        following = self.layer_types[self.next :]
        for kind in dict.fromkeys(following):
            mask = None
            if self.boundaries:
                if self.attention == PACKED_SDPA and kind == "sliding_attention":
                    mask = window_mask(self.boundaries["max_length_q"], self.model.config.sliding_window, hidden.device)
            else:
                is_padded = self.rows.is_padded
                mask = LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING[kind](
                    config=self.model.config,
                    inputs_embeds=hidden,
                    attention_mask=self.rows.mask if is_padded else None,
                    past_key_values=self.cache,
                    layer_idx=self.next + following.index(kind),  # whose cache has this stage's length
                    allow_is_causal_skip=not is_padded,  # it would wait to see whether there is padding
                )
            yield kind, mask

    def run(self, hidden: Tensor, stop: int) -> Tensor:
        """Run the layers up to number `stop`, not included."""
        for i in range(self.next, stop):
            hidden = self.model.layers[i](
                hidden,
                attention_mask=self.masks[self.layer_types[i]],
                position_embeddings=self.position_embeddings,
                position_ids=self.position_ids,
                past_key_values=self.cache,
                **self.kwargs,
            )
        self.next = max(self.next, stop)
        return hidden
