"""The sizes that the formulas need, read off a model without weights or off one that is trained.

Shapes: P patches of a tile, C vision width, D language-model width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from llava.cost.formulas import Linear, Widths
from llava.cost.presets import ALIASES, MODELS, TOWERS
from llava.model.builder import read_llava_config
from llava.model.llava_hf.opening import from_hf_config, read_hf_config
from llava.model.weights import read_json
from llava.reduction.config import ReductionConfig
from llava.reduction.released import without_methods

Layers = tuple[tuple[Linear, ...], ...]


@dataclass(frozen=True)
class Sizes:
    """Of a LLaVA model.

    Attributes:
        widths: of a layer of the language model.
        layers: linear layers of each layer of the language model.
        head: from the last layer to the vocabulary.
        tower_widths: of a block of the vision tower.
        blocks: linear layers of each block of the tower.
        patch_embedding: from the pixels of a patch to C.
        patches: P.
        tower_tokens: tokens of a tile within the tower, P and CLS.
        weights: elements by part: layers, head, embeddings (with newline and last norm), tower, projector.
    """

    widths: Widths
    layers: Layers
    head: Linear
    tower_widths: Widths
    blocks: Layers
    patch_embedding: Linear
    patches: int
    tower_tokens: int
    weights: Mapping[str, int]

    @classmethod
    def of(cls, model: Any) -> Sizes:
        """Those of a model with its head, on any device; not of PEFT's wrapper."""
        inner, tower = model.get_model(), model.get_model().get_vision_tower()
        encoder, config = tower.vision_tower, tower.config
        head = linears_of(model.lm_head)
        return cls(
            widths=Widths.of(model.config),
            layers=tuple(linears_of(layer) for layer in inner.layers),
            head=replace(head[0], trained=any(layer.trained for layer in head)),
            tower_widths=Widths.of(config, gated=False),
            blocks=tuple(linears_of(block) for block in encoder.encoder.layers),
            patch_embedding=Linear(math.prod((3, config.patch_size, config.patch_size)), tower.hidden_size),
            patches=tower.num_patches,
            tower_tokens=tower.num_patches + int(tower.has_cls),
            weights=_weights(model),
        )

    def with_training(self, trains: str, rank: int, tower: bool) -> Sizes:
        """What learns in a run, in place of what the model says: see `TrainingRun`."""
        return replace(
            self,
            layers=tuple(_trained(layer, trains, rank) for layer in self.layers),
            head=replace(self.head, trained=trains == "all"),
            blocks=tuple(tuple(replace(part, trained=tower) for part in block) for block in self.blocks),
        )


def linears_of(module: nn.Module) -> tuple[Linear, ...]:
    """All linear layers inside; by features, because ZeRO-3 and quantization change the weights' shapes."""
    return tuple(
        Linear(layer.in_features, layer.out_features, layer.weight.requires_grad)
        for layer in module.modules()
        if isinstance(layer, nn.Linear)
    )


def _trained(layer: tuple[Linear, ...], trains: str, rank: int) -> tuple[Linear, ...]:
    if trains != "lora":
        return tuple(replace(part, trained=trains == "all") for part in layer)
    frozen = [replace(part, trained=False) for part in layer]
    adapters = [(Linear(part.inputs, rank, True), Linear(rank, part.outputs, True)) for part in layer]
    return (*frozen, *(half for pair in adapters for half in pair))


def _weights(model: Any) -> dict[str, int]:
    """Elements of all parameters by the part that they belong to."""
    inner = model.get_model()
    parts: dict[str, Any] = {
        "layers": inner.layers,
        "head": model.lm_head,
        "embeddings": inner.embed_tokens,
        "tower": nn.ModuleList(filter(None, (inner.vision_tower, inner.video_tower))),
        "projector": nn.ModuleDict(inner.projector_modules()),
    }
    weights = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    if model.lm_head.weight is inner.embed_tokens.weight:
        weights["head"] = 0
    newline = getattr(inner, "image_newline", None)
    weights["embeddings"] += sum(p.numel() for p in inner.norm.parameters())
    weights["embeddings"] += 0 if newline is None else newline.numel()
    return weights


def open_model(model: Any = "llava-1.5-7b", vision_tower: str | None = None) -> Any:
    """A model without weights, on the meta device and without methods.

    Args:
        model: a name of `llava.cost.presets`, a checkpoint's folder, a config.json, the content of one, or a
            configuration.
        vision_tower: folder of the tower, in place of the one that the config names.

    Raises:
        ValueError: none of these, or a configuration without a vision tower or that LLaVA has no class for.
    """
    raw, origin = _read(model)
    raw = without_methods(raw)
    if vision_tower is not None:
        raw.update(mm_vision_tower=vision_tower, mm_vision_config=None, mm_text_config=None)
    if not raw.get("mm_vision_tower"):
        raise ValueError(f"{origin} has no mm_vision_tower: it is a bare language model. Name a LLaVA checkpoint")
    for key, known in TOWERS.get(raw["mm_vision_tower"], {}).items():
        raw[key] = raw.get(key) or known
    return _build(_Content(raw, origin))


def reduction_of(model: Any) -> dict[str, Any]:
    """The methods that a checkpoint's config.json asks for; `model` as for `open_model`."""
    raw, _ = _read(model)
    return ReductionConfig.of_model(SimpleNamespace(**raw)).to_dict()


@dataclass(frozen=True)
class _Content:
    raw: dict[str, Any]
    origin: str

    def __hash__(self) -> int:
        return hash(str(self.raw))


@lru_cache(maxsize=8)
def _build(content: _Content) -> Any:
    cls, config = read_llava_config(content.raw, content.origin)
    with torch.device("meta"):
        return cls(config).eval()


def _read(model: Any) -> tuple[dict[str, Any], str]:
    """The content of a config.json, and where it comes from."""
    if isinstance(model, Mapping):
        return dict(model), "the configuration"
    if hasattr(model, "to_dict"):
        return model.to_dict(), "the configuration"
    name = ALIASES.get(str(model).lower(), str(model).lower())
    if name in MODELS:
        return dict(MODELS[name]), name
    path = Path(model)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(
            f"{str(model)!r} is neither a checkpoint's folder with a config.json nor a model known by name: "
            f"{', '.join([*ALIASES, *MODELS])}"
        )
    raw = read_json(file)
    if "text_config" in raw and "vision_config" in raw:
        raw = from_hf_config(read_hf_config(file.parent), file.parent).to_dict()
    return raw, str(file)
