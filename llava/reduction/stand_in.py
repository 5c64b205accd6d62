"""Features that mean nothing, on which the methods' own code says how many tokens it keeps and what it costs.

Shapes: N tiles, P patches, T tokens of a tile within the tower, C vision width, D language-model width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from llava.reduction.base import EncoderReducer, Needs, Reducers, TowerReducer, VisionFeatures, VisualTokens
from llava.reduction.frames import reduce_jointly
from llava.reduction.tower.tokens import BlockTokens, TowerTokens


@dataclass(frozen=True)
class TowerShape:
    """A vision tower as the methods see it.

    Attributes:
        grid: (h, w), rows and columns of patches.
        has_cls: whether a class token comes before the patches.
        keeps_cls: whether it is handed on among them (`mm_vision_select_feature: cls_patch`).
        depth: number of blocks.
        selected: how many of them lead to what is read.
    """

    grid: tuple[int, int] = (24, 24)
    has_cls: bool = True
    keeps_cls: bool = False
    depth: int = 24
    selected: int = 23

    @classmethod
    def of(cls, tower: Any, selected: int | None = None) -> TowerShape:
        """That of a `VisionTower`; `selected` blocks where not its own choice is read."""
        keeps = tower.has_cls and tower.select_feature == "cls_patch"
        return cls(tower.grid, tower.has_cls, keeps, tower.depth, tower.num_blocks if selected is None else selected)


@dataclass(frozen=True)
class StandIn:
    """Random features on the CPU, the same each time.

    Attributes:
        shape: of the tower.
        tiles: N.
        width: C, of features, keys and queries.
        heads: into which keys and queries are divided.
        embeds: width of the space that CLIP shares between images and texts.
        projected: D.
    """

    shape: TowerShape
    tiles: int = 1
    width: int = 4
    heads: int = 1
    embeds: int = 2
    projected: int = 4

    def tokens_in_tower(self, reducer: TowerReducer | None) -> tuple[list[int], TowerTokens]:
        """Tokens of a tile, CLS among them, that enter each block's MLP up to the selected one; and those at the end.

        The first number is of what enters the first block.
        """
        draw, shape = _Draw(), self.shape
        first = int(shape.has_cls)
        grid = shape.grid if reducer is None else reducer.input_grid(shape.grid)
        tokens = TowerTokens.of(draw(self.tiles, first + grid[0] * grid[1], self.width), first)
        lengths = [tokens.features.shape[1]]
        acts = () if reducer is None else reducer.blocks(shape.depth, shape.selected)
        for block in range(shape.selected):
            if reducer is not None and block in acts:
                heads = (self.tiles, self.heads, tokens.features.shape[1], self.width // self.heads)
                queries, keys, values = draw(*heads), draw(*heads), draw(*heads)
                given = BlockTokens(tokens, queries, keys, values, None, 1.0, block, shape.selected)
                how = reducer.regroup(given)
                tokens = tokens if how is None else tokens.regrouped(how)
                if not reducer.tracks_sizes:
                    tokens = replace(tokens, sizes=torch.ones_like(tokens.sizes))
            lengths.append(tokens.features.shape[1])
        return lengths, tokens

    def features(self, needs: Needs, reducer: TowerReducer | None = None) -> VisionFeatures:
        """What the tower hands to a method after it."""
        draw, first = _Draw(), int(self.shape.has_cls)
        _, tokens = self.tokens_in_tower(reducer)
        count = tokens.features.shape[1] - first
        handed = count + int(self.shape.keeps_cls)
        grid = self.shape.grid if reducer is None else reducer.input_grid(self.shape.grid)
        lies_on_grid = reducer is None or reducer.keeps_grid
        vision = VisionFeatures(
            draw(self.tiles, handed, self.width),
            grid=grid if lies_on_grid else None,
            keys=draw(self.tiles, count + first, self.width),
            queries=draw(self.tiles, count + first, self.width),
            num_heads=self.heads,
            attention={place: draw(self.tiles, self.heads, handed).softmax(dim=2) for place in needs.attention},
            cls=draw(self.tiles, self.width) if first else None,
            hidden_states={block: draw(self.tiles, handed, self.width) for block in needs.hidden},
            patch_embeds=draw(self.tiles, handed, self.embeds),
            projected=draw(self.tiles, handed, self.projected) if needs.projected else None,
            text=self._text(needs, draw),
        )
        if not lies_on_grid:
            vision.mask = None if tokens.mask is None else tokens.mask[:, first:]
            vision.source = tokens.source[:, first:]
            vision.assignment = (tokens.assignment - first).clamp(min=-1)
        return vision

    def _text(self, needs: Needs, draw: _Draw) -> Tensor:
        if needs.text == "words":
            return draw(self.tiles, 4, self.projected)
        return draw(self.tiles, 1, self.embeds) if needs.text == "segments" else draw(self.tiles, self.embeds)

    def reduced(self, reducers: Reducers) -> VisualTokens:
        """What the methods in and after the tower leave of the tiles."""
        vision = self.features(reducers.needs, reducers.tower)
        return reduce_features(vision, reducers)


class _Draw:
    """Random numbers, the same each time."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator)


def reduce_features(vision: VisionFeatures, reducers: Reducers) -> VisualTokens:
    """The tokens that the methods in and after the tower leave, with the patches that they come from.

    Args:
        vision: what the tower hands on, with all that the method after it needs.
        reducers: of whose sites `tower` has acted already.

    Returns:
        A row for each picture; for each clip, where its frames are ranked together (`VisualTokens.frames`).

    Raises:
        ValueError: the method after the tower can't work on what the one inside left.
    """
    inside, after = reducers.tower, reducers.encoder
    if after is None:
        return VisualTokens(vision.features) if inside is None else inside(vision)
    if vision.mask is not None:
        assert inside is not None
        raise after.mistake(
            f"'{inside.method}' leaves a different number of tokens of each picture, which a method after the tower "
            "does not take; leave one of them out"
        )
    is_joint = after.frames == "joint" and max(vision.frames or (0,)) > 1
    tokens = reduce_jointly(after, vision, _after) if is_joint else _after(after, vision)
    if tokens.grid is None and inside is not None:
        tokens.grid = vision.grid
    return tokens


def _after(method: EncoderReducer, vision: VisionFeatures) -> VisualTokens:
    """What a method after the tower leaves, with the patches that its tokens come from, whatever acted inside."""
    tokens: VisualTokens = method(vision)
    if vision.source is not None:
        place = None if tokens.source is None else tokens.source.to(vision.source.device)
        own = vision.source if place is None else vision.source.gather(1, place.clamp(min=0))
        tokens.source = own if place is None else own.masked_fill(place < 0, -1)
        tokens.assignment = None
    return tokens
