"""How many tokens there are at each place, by the methods' own code on stand-in features.

Shapes: T tiles of all images of a sample, P patches, M kept tokens of a tile, C vision width, D language-model width.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from llava.cost.formulas import Linear
from llava.mm_utils import get_anyres_image_grid_shape
from llava.model.language_model.drop_plan import plan_pools
from llava.model.multimodal_projector.builder import build_projector_modules
from llava.reduction.base import DecoderReducer, Reducer, Reducers, VisionFeatures, VisualTokens
from llava.reduction.options import values_of
from llava.reduction.stand_in import StandIn, TowerShape, reduce_features
from llava.reduction.tower.evit import EViT

# What stands for a method whose images say themselves how many patches they keep: a share of them, and whence.
TYPICAL = {
    "prumerge": (0.055, "32 of 576 tokens on average over six tasks (arXiv 2403.15388, section 4.1)"),
    "prumerge_plus": (0.125, "a quarter of the tokens (arXiv 2403.15388, Table 7)"),
    "ats": (0.25, "a quarter of the tokens (arXiv 2403.15388, Table 7), in equal steps over its blocks"),
    "trim": (0.212, "123 of 576 tokens (arXiv 2409.10994, section 5.1)"),
}


def with_budget(reducers: Reducers, share: float | None, shape: TowerShape) -> tuple[Reducers, str]:
    """The methods, an adaptive one with a count in its place that is known; and a note that says so.

    An adaptive method inside the tower is counted as one that goes down to the count in equal steps in the same blocks.

    Args:
        reducers: of all sites.
        share: the fraction of the patches that the adaptive one was seen to keep; None: a typical one.
        shape: of the tower.

    Raises:
        ValueError: an adaptive method without a typical count.
    """
    encoder, tower = reducers.encoder, reducers.tower
    if encoder is not None and encoder.is_adaptive:
        ratio, note = _share_of(encoder, share)
        return replace(reducers, encoder=type(encoder)(**{**values_of(encoder), "ratio": ratio})), note
    if tower is not None and tower.is_adaptive:
        ratio, note = _share_of(tower, share)
        tokens = max(1, round(shape.grid[0] * shape.grid[1] * ratio))
        counted = EViT(blocks_=[*tower.blocks(shape.depth, shape.selected)], tokens=tokens, fuse=False)
        return replace(reducers, tower=counted), note
    return reducers, ""


def _share_of(reducer: Reducer, share: float | None) -> tuple[float, str]:
    """The fraction of the patches that an adaptive method is counted to keep, and whence."""
    if share is not None:
        return min(1.0, share), ""
    if reducer.method not in TYPICAL:
        raise reducer.mistake("each image says how many tokens it keeps; give a budget, tokens=64 say, to count with")
    ratio, source = TYPICAL[reducer.method]
    return ratio, f"adaptive; counted as {source}"


def tile_count(model: Any, image_size: tuple[int, int] | None) -> int:
    """Tiles of an image under the model's settings.

    Args:
        model: LLaVA's.
        image_size: (width, height) in pixels; None: a square of twice the tower's side.
    """
    config, side = model.config, model.get_model().get_vision_tower().image_size
    if getattr(config, "image_aspect_ratio", None) != "anyres":
        return 1
    columns, rows = get_anyres_image_grid_shape(image_size or (2 * side, 2 * side), config.image_grid_pinpoints, side)
    return 1 + columns * rows


def image_lengths(
    model: Any, reducers: Reducers, images: int, tiles: int | None, image_size: tuple[int, int] | None
) -> list[int]:
    """Visual tokens that each image has in the language model.

    Args:
        model: LLaVA's.
        reducers: without an adaptive one.
        images: of the sample, all alike.
        tiles: of an image, whose tokens all enter; None: as the model's settings lay out an image.
        image_size: (width, height) in pixels.
    """
    count = tile_count(model, image_size) if tiles is None else tiles
    tokens = reduced_tokens(model, reducers, count)
    if tiles is not None:
        return [int(tokens.counts.sum())] * images
    side = model.get_model().get_vision_tower().image_size
    sizes = [image_size or (2 * side, 2 * side)]
    return model.get_model().layout_lengths(tokens, [count], sizes) * images


def reduced_tokens(model: Any, reducers: Reducers, tiles: int) -> VisualTokens:
    """What the methods before the language model make of so many tiles; the features mean nothing."""
    tower = model.get_model().get_vision_tower()
    inside = StandIn(TowerShape.of(tower), tiles)
    if reducers.projector is not None:
        grid = reducers.input_grid(tower.grid)
        return reducers.projector.placed(torch.empty(tiles, reducers.projector.token_count(grid), 0), grid)
    return inside.reduced(reducers)


def patches_read(tower: Any) -> int:
    """Tokens of a tile that the tower hands on: P, and CLS where it is kept."""
    return tower.num_patches + int(tower.has_cls and tower.select_feature == "cls_patch")


def reducer_macs(model: Any, reducers: Reducers, embeds: int) -> tuple[float, int]:
    """Multiply-adds of a method after the tower on one tile, and M: torch counts them on the method itself."""
    tower, config = model.get_model().get_vision_tower(), model.config
    heads = tower.config.num_attention_heads
    inside = StandIn(TowerShape.of(tower), 1, tower.hidden_size, heads, embeds, config.hidden_size)
    vision = inside.features(reducers.needs, reducers.tower)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tokens = reduce_features(vision, reducers)
    return counter.get_total_flops() / 2, int(tokens.counts.sum())


def tower_lengths(model: Any, reducers: Reducers) -> list[tuple[int, int]]:
    """For each block of the vision tower that runs, the tokens of a tile at its attention and at its MLP."""
    tower = model.get_model().get_vision_tower()
    read = tower.blocks_read(reducers.projector)
    depth = tower.depth_run(reducers.needs, read)
    lengths, _ = StandIn(TowerShape.of(tower, read[0])).tokens_in_tower(reducers.tower)
    lengths = lengths[: depth + 1] + lengths[-1:] * (depth + 1 - len(lengths))
    return list(itertools.pairwise(lengths))


def projector_passes(model: Any, reducers: Reducers) -> tuple[int, list[tuple[Linear, int]]]:
    """How many tokens come out of the projector for a tile, and its linear layers with the rows that each one sees.

    A product of attention counts as a layer too, whose weights are the keys or values of one tile.

    Without a method in the projector, all patches of the tower enter.

    The modules are made without weights and run on the meta device, with a method in the projector or without.
    """
    tower, reducer = model.get_model().get_vision_tower(), reducers.projector
    with torch.device("meta"), torch.no_grad(), _Products() as products:  # meters count what has gradients
        modules = build_projector_modules(model.config, tower, reducer)
        if reducer is None:
            features = torch.empty(1, patches_read(tower), tower.hidden_size)
            return modules["mm_projector"](features).shape[1], products.seen
        grid = reducers.input_grid(tower.grid)
        features = torch.empty(1, grid[0] * grid[1], tower.hidden_size)
        states = dict.fromkeys(tower.blocks_read(reducer), features)
        vision = VisionFeatures(features, grid=grid, hidden_states=states)
        return reducer(vision, **modules).features.shape[1], products.seen


class _Products(TorchDispatchMode):
    """Notes the products of matrices that run inside: each as a linear layer, with the rows that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Linear, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        first = _FACTORS.get(func.overloadpacket)
        if first is not None:
            left, right = args[first : first + 2]
            self.seen.append((Linear(left.shape[-1], right.shape[-1]), left.shape[:-1].numel()))
        return func(*args, **(kwargs or {}))


# The place of the left factor among the arguments.
_FACTORS = {torch.ops.aten.mm: 0, torch.ops.aten.bmm: 0, torch.ops.aten.addmm: 1, torch.ops.aten.baddbmm: 1}


def layer_lengths(reducer: DecoderReducer | None, layers: int, images: Sequence[int], text: int) -> list[int]:
    """Tokens of a sample that each layer of the language model sees.

    Args:
        reducer: that drops some of them, if any.
        layers: of the language model.
        images: visual tokens of each image.
        text: tokens that are of no image.
    """
    total = sum(images) + text
    if reducer is None or not images:
        return [total] * layers
    index = torch.full((1, total), -1)
    index[0, : sum(images)] = torch.arange(len(images)).repeat_interleave(torch.tensor(images))
    pools = plan_pools(index, torch.ones_like(index, dtype=torch.bool), None, reducer.pool)
    lengths, present, drops = [total], pools.sizes, {drop.after: drop for drop in reducer.drops(layers)}
    for layer in range(1, layers):
        if layer in drops:
            kept, merged = pools.counts(reducer, drops[layer], present)
            present = kept + merged
        lengths.append(pools.row_lengths(present)[0])
    return lengths
