"""What answering a question costs: vision tower, reducer, projector, prefill and decoding, with methods or without.

Shapes: T tiles of a sample, n tokens that a layer sees.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llava.cost.devices import Precision, find_device, find_precision
from llava.cost.formulas import (
    OPERATIONS,
    Linear,
    Widths,
    Work,
    block,
    cache_bytes,
    flops,
    linear,
    live_bytes,
    ranking,
    repeat,
    seconds,
)
from llava.cost.sizes import Sizes, linears_of, open_model
from llava.cost.tokens import (
    image_lengths,
    layer_lengths,
    patches_read,
    projector_passes,
    reduced_tokens,
    reducer_macs,
    tile_count,
    tower_lengths,
    with_budget,
)
from llava.model.multimodal_encoder.clip_text import ClipText, resolve_text_config
from llava.model.multimodal_projector.builder import build_projector_modules
from llava.reduction.base import DecoderReducer, Reducers
from llava.reduction.budget import ModelShape
from llava.reduction.config import ReductionConfig
from llava.reduction.stand_in import TowerShape

PARTS = ("vision", "reducer", "projector", "prefill", "decoding")


@dataclass(frozen=True)
class Scenario:
    """What is asked, and where it runs.

    Attributes:
        batch: rows answered together, all alike.
        images: of a row; the frames of a clip each are one.
        tiles: of an image, whose tokens all enter; None: as the model's settings cut and lay out an image.
        image_size: (width, height) in pixels, for anyres; None: a square of twice the tower's side.
        text_tokens: of the prompt beside the images.
        new_tokens: of the answer; the first comes from the prefill.
        device: a name of `llava.cost.devices.DEVICES`.
        dtype: a name of `llava.cost.devices.PRECISIONS`.
        fused: attention whose scores never reach memory (sdpa, flash attention); otherwise eager.
        image_tokens: visual tokens of a row that enter the language model, in place of what the method's budget says.
    """

    batch: int = 1
    images: int = 1
    tiles: int | None = None
    image_size: tuple[int, int] | None = None
    text_tokens: int = 60
    new_tokens: int = 20
    device: str = "A100"
    dtype: str = "fp16"
    fused: bool = True
    image_tokens: float | None = None

    def __post_init__(self) -> None:
        least = {"batch": 1, "images": 0, "tiles": 1, "text_tokens": 0, "new_tokens": 1}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise ValueError(f"{name}={value}: expected {bound} or more")
        find_precision(self.dtype, find_device(self.device))


@dataclass(frozen=True)
class QuestionCost:
    """What a scenario costs.

    Attributes:
        works: steps of each of `PARTS`, for the whole batch.
        image_tokens: visual tokens of a row that enter the language model.
        lengths: tokens of a row that each layer sees in the prefill.
        weights: bytes.
        cache: bytes of keys and values at the end.
        activations: bytes that the prefill holds at once beside them.
        note: what stands for an adaptive method.
        scenario: what it is the cost of.
    """

    works: dict[str, list[Work]]
    image_tokens: float
    lengths: list[int]
    weights: float
    cache: float
    activations: float
    scenario: Scenario
    note: str = ""

    def flops(self, operations: int = OPERATIONS) -> dict[str, float]:
        """Operations of each part; a multiply-add is `operations` of them."""
        return {name: flops(works, operations) for name, works in self.works.items()}

    def seconds(self) -> dict[str, float]:
        """The least time of each part on the scenario's device (roofline)."""
        device = find_device(self.scenario.device)
        precision = find_precision(self.scenario.dtype, device)
        return {name: seconds(works, device, precision) for name, works in self.works.items()}


def question_cost(model: Any, reduction: Any = None, scenario: Scenario | None = None) -> QuestionCost:
    """What a scenario costs with a method.

    Args:
        model: from `open_model`, or a LLaVA model on any device.
        reduction: what `ReductionConfig.parse` reads; None: no method.
        scenario: see there.

    Raises:
        ValueError: a method that does not suit the model, or is adaptive without a typical count.
    """
    scenario = scenario or Scenario()
    sizes = Sizes.of(model)
    tiles, share = tiles_of(model, scenario)
    reducers, note = methods(reduction, share, model)
    precision = find_precision(scenario.dtype, find_device(scenario.device))
    images = entering_tokens(model, reducers, scenario)
    lengths = layer_lengths(reducers.decoder, len(sizes.layers), images, scenario.text_tokens)
    reduced, passes = reducing(model, sizes, reducers, tiles, scenario)
    return QuestionCost(
        works={
            "vision": vision_works(sizes, tower_lengths(model, reducers), tiles, scenario.fused),
            "reducer": [*reduced, *ranking_works(sizes, reducers.decoder, lengths, scenario.batch)],
            "projector": [linear(layer, rows) for layer, rows in passes],
            "prefill": prefill_works(sizes, lengths, scenario),
            "decoding": decoding_works(sizes, lengths, scenario),
        },
        image_tokens=sum(images),
        lengths=lengths,
        weights=weight_bytes(weights_with(model, sizes, reducers), precision),
        cache=cache_bytes(
            sizes.widths, [n + scenario.new_tokens - 1 for n in lengths], precision.value, scenario.batch
        ),
        activations=_live(sizes, tiles, lengths[0], precision, scenario),
        scenario=scenario,
        note=note,
    )


def methods(reduction: Any, share: float | None = None, model: Any = None) -> tuple[Reducers, str]:
    """New reducers of a reduction, an adaptive one with a budget, and a note.

    Args:
        reduction: what `ReductionConfig.parse` reads.
        share: as for `with_budget`.
        model: in which a method meets the `budget` that it is told.
    """
    shape = None
    if model is not None:
        shape = ModelShape(TowerShape.of(model.get_model().get_vision_tower()), model.config.num_hidden_layers)
    reducers = ReductionConfig.parse(reduction).build_all(shape)
    return with_budget(reducers, share, TowerShape() if shape is None else shape.tower)


def tiles_of(model: Any, scenario: Any) -> tuple[int, float | None]:
    """Tiles of all rows, and the fraction of their patches that enters the language model, where it is given."""
    each = scenario.images * (scenario.tiles or tile_count(model, scenario.image_size))
    if not scenario.image_tokens or not each:
        return scenario.batch * each, None
    return scenario.batch * each, scenario.image_tokens / (each * patches_read(model.get_model().get_vision_tower()))


def entering_tokens(model: Any, reducers: Reducers, scenario: Any) -> list[int]:
    """Visual tokens of each image of a row, by the methods' budget or as the scenario says."""
    if scenario.image_tokens is not None:
        each, rest = divmod(round(scenario.image_tokens), max(scenario.images, 1))
        return [each + (i < rest) for i in range(scenario.images)]
    return image_lengths(model, reducers, scenario.images, scenario.tiles, scenario.image_size)


# Parts -----------------------------------------------------------------------------------------------------------


def reducing(
    model: Any, sizes: Sizes, reducers: Reducers, tiles: int, scenario: Any
) -> tuple[list[Work], list[tuple[Linear, float]]]:
    """The encoder method's own work on so many tiles, and the projector's linear layers with the rows of each."""
    if not tiles:
        return [], []
    reduced, kept = _reducer_works(model, sizes, reducers, tiles, scenario)
    entered, passes = projector_passes(model, reducers)
    # It sees what the methods before it kept, unless they read what it makes of all.
    rows = tiles if kept is None or reducers.needs.projected else tiles * kept / entered
    if reducers.needs.projected:
        return reduced, [(layer, rows * seen) for layer, seen in passes]
    if scenario.image_tokens is not None and reducers.projector is None:
        rows = scenario.batch * scenario.image_tokens / entered
    return reduced, [(layer, rows * seen) for layer, seen in passes]


def vision_works(sizes: Sizes, lengths: Sequence[tuple[int, int]], tiles: float, fused: bool = True) -> list[Work]:
    """The blocks of the vision tower on so many tiles; `lengths` as `tower_lengths` gives them."""
    if not tiles:
        return []
    works = [linear(sizes.patch_embedding, tiles * sizes.patches)]
    for (entered, fed), count in Counter(lengths).items():
        one = block(sizes.tower_widths, sizes.blocks[0], entered, batch=tiles, fused=fused, fed=fed)
        works += repeat(one, count)
    return works


def _reducer_works(
    model: Any, sizes: Sizes, reducers: Reducers, tiles: int, scenario: Any
) -> tuple[list[Work], int | None]:
    """What a method after the tower costs besides the blocks that run, and the tokens of a tile that are kept."""
    if reducers.encoder is None:
        kept = None if reducers.tower is None or reducers.projector else int(reduced_tokens(model, reducers, 1).counts)
        return [], kept
    width, needs = sizes.tower_widths.width, reducers.needs
    lengths, square = tower_lengths(model, reducers), Linear(width, width)
    every = tiles * (lengths[-1][1] if lengths else sizes.tower_tokens)
    works, embeds = [], 1
    works += [linear(square, every) for _ in {needs.keys, *needs.attention} - {None}]
    if needs.queries is not None:
        works.append(linear(square, every))
    for _ in needs.attention or ([needs.cls_query] if needs.cls_query is not None else []):
        works.append(linear(square, tiles if sizes.tower_tokens > sizes.patches else every))
    scores = every * width  # a row of CLS, or all rows of a tower without it
    works += [Work(macs=scores * (1 if sizes.tower_tokens > sizes.patches else every / tiles)) for _ in needs.attention]
    if needs.clip_text:
        text = text_tower(model)
        embeds = text.config.projection_dim
        works += _text_works(text, scenario) if needs.text else []
    handed = tiles * patches_read(model.get_model().get_vision_tower())
    if needs.patch_embeds:
        works.append(linear(Linear(width, embeds), handed))
    macs, kept = reducer_macs(model, reducers, embeds)
    own = Work(macs=macs, read=handed / tiles * width, written=kept * width)
    return [*works, *repeat([own], tiles)], kept


def text_tower(model: Any) -> ClipText:
    """CLIP's text tower beside the model's image encoder, without weights.

    Raises:
        ValueError: the tower has none.
    """
    from transformers import CLIPTextConfig

    tower, known = model.get_model().get_vision_tower(), getattr(model.config, "mm_text_config", None)
    config = resolve_text_config(tower.name) if known is None else CLIPTextConfig.from_dict(dict(known))
    with torch.device("meta"):
        return ClipText(config, tower.hidden_size)


def _text_works(text: ClipText, scenario: Any) -> list[Work]:
    """CLIP's text tower on each row's question, which is cut at the tower's length."""
    layers = text.text_model.encoder.layers
    tokens = min(scenario.text_tokens, text.config.max_position_embeddings)
    one = block(Widths.of(text.config, gated=False), linears_of(layers[0]), tokens, batch=scenario.batch)
    last = Linear(text.text_projection.in_features, text.text_projection.out_features)
    return [*repeat(one, len(layers)), linear(last, scenario.batch)]


def prefill_works(sizes: Sizes, lengths: Sequence[int], scenario: Scenario) -> list[Work]:
    """Layers, and the head on the last token of each row."""
    works = layer_works(sizes, [(n, n) for n in lengths], scenario.batch, scenario.fused)
    return [*works, linear(sizes.head, scenario.batch)]


def decoding_works(sizes: Sizes, lengths: Sequence[int], scenario: Scenario) -> list[Work]:
    """All tokens of the answer but the first, at the mean length of the cache."""
    passes = scenario.new_tokens - 1
    if passes == 0:
        return []
    seen = [(1, n + scenario.new_tokens / 2) for n in lengths]
    one = [*layer_works(sizes, seen, scenario.batch, scenario.fused), linear(sizes.head, scenario.batch)]
    return repeat(one, passes)


def layer_works(sizes: Sizes, seen: Sequence[tuple[float, float]], batch: float = 1, fused: bool = True) -> list[Work]:
    """The layers of the language model, for (new tokens, tokens that they see) of each."""
    works: list[Work] = []
    for (queries, keys), count in Counter(seen).items():
        works += repeat(block(sizes.widths, sizes.layers[0], queries, keys, batch, fused), count, in_layers=True)
    return works


def ranking_works(
    sizes: Sizes, reducer: DecoderReducer | None, lengths: Sequence[int], batch: float = 1, queries: int = 1
) -> list[Work]:
    """What a decoder method computes to rank, wherever it drops."""
    drops = [] if reducer is None else reducer.drops(len(sizes.layers))
    ranked = [lengths[drop.after - 1] for drop in drops if lengths[drop.after] < lengths[drop.after - 1]]
    return [work for n in ranked for work in repeat(ranking(sizes.widths, n, queries, batch), 1, in_layers=True)]


# Bytes -----------------------------------------------------------------------------------------------------------


def weights_with(model: Any, sizes: Sizes, reducers: Reducers) -> dict[str, int]:
    """Elements of all parameters by part, with the projector and the text tower that the methods need."""
    with torch.device("meta"):
        modules = build_projector_modules(model.config, model.get_model().get_vision_tower(), reducers.projector)
    projector = sum(p.numel() for module in modules.values() for p in module.parameters())
    text = sum(p.numel() for p in text_tower(model).parameters()) if reducers.needs.clip_text else 0
    return {**sizes.weights, "projector": projector, "text tower": text}


def weight_bytes(weights: Mapping[str, int], precision: Precision) -> float:
    """All weights: those of the language model's layers in their format, the others in 16 bits."""
    others = sum(count for part, count in weights.items() if part != "layers")
    return weights["layers"] * precision.weight + 2 * others


def _live(sizes: Sizes, tiles: int, length: int, precision: Precision, scenario: Scenario) -> float:
    """The most that tower or language model holds at once beside weights and cache."""
    b, tower = scenario.batch, sizes.tower_tokens
    tower_scores = 0 if scenario.fused else tiles * sizes.tower_widths.heads * tower**2
    scores = 0 if scenario.fused else b * sizes.widths.heads * length**2
    vision = live_bytes(sizes.tower_widths, tiles * tower, 2, tower_scores)
    return max(vision, live_bytes(sizes.widths, b * length, precision.value, scores))


def flops_per_question(
    config: Any,
    reduction: Any = None,
    *,
    image_tokens: float | None = None,
    text_tokens: int = 60,
    new_tokens: int = 20,
    images: int = 1,
    tiles: int | None = None,
    image_size: tuple[int, int] | None = None,
    operations: int = OPERATIONS,
) -> float:
    """FLOPs of answering one question, all parts together.

    Args:
        config: what `open_model` reads: a known name, a folder, a configuration or its content; or a LLaVA model.
        reduction: the method, in any form that `ReductionConfig.parse` reads; None: no method, whatever a checkpoint's
            own config says. A decoder method's budget says how many
            image tokens each layer sees.
        image_tokens: visual tokens of the question's images together that enter the language model, a mean over
            questions say, as counted. None: what the method's budget says, for an adaptive method a typical count. Over
            questions of different lengths, the mean's FLOPs are slightly below the mean of the FLOPs (attention).
        text_tokens: of the prompt beside the images.
        new_tokens: of the answer.
        images: of the question.
        tiles: of an image; None: as the model cuts an image of `image_size`.
        image_size: (width, height) in pixels, for anyres.
        operations: of a multiply-add, 2 or 1.

    Raises:
        ValueError: an unknown model or method, or an adaptive method without a typical count.
    """
    model = config if hasattr(config, "get_model") else open_model(config)
    scenario = Scenario(
        images=images,
        tiles=tiles,
        image_size=image_size,
        text_tokens=text_tokens,
        new_tokens=new_tokens,
        image_tokens=image_tokens,
    )
    return sum(question_cost(model, reduction, scenario).flops(operations).values())
