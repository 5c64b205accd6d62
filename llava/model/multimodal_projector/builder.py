"""Build the projector: what maps vision features to the language model's width."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

from torch import nn

from llava.model.multimodal_encoder.vision_tower import VisionTower
from llava.reduction.base import ProjectorReducer


def build_projector_modules(
    config: Any, tower: VisionTower, reducer: ProjectorReducer | None = None
) -> dict[str, nn.Module]:
    """All that lies between tower and language model, by name: `mm_projector`, and what `reducer` has before it.

    Args:
        config: as for `build_vision_projector`.
        tower: the vision tower, whose blocks and grid must suit the reducer.
        reducer: the method that works in the projector, if any.

    Raises:
        ValueError: tower, reducer and projector do not go together; the setting is named.
    """
    plain = partial(build_vision_projector, config)
    if reducer is None:
        return {"mm_projector": plain()}
    if tower.has_cls and tower.select_feature == "cls_patch":
        raise ValueError(
            "mm_vision_select_feature=cls_patch keeps CLS among the patches, which a projector that fuses neighbours "
            "has no place for; set it to patch"
        )
    reducer.token_count(tower.grid)
    tower.blocks_read(reducer)
    return reducer.build_modules(config.mm_hidden_size, config.hidden_size, plain)


def build_vision_projector(config: Any, vision_width: int | None = None) -> nn.Module:
    """The projector of `config.mm_projector_type`: linear, mlpNx_gelu or identity.

    Args:
        config: `mm_projector_type` (default linear), `mm_hidden_size` C, `hidden_size` D.
        vision_width: C, where not the tower's own width enters.

    Returns:
        A module from [..., C] to [..., D] whose weights have LLaVA's names.

    Raises:
        ValueError: an unknown type, or identity where C differs from D.
    """
    kind = getattr(config, "mm_projector_type", None) or "linear"
    width = vision_width or config.mm_hidden_size
    if kind == "linear":
        return nn.Linear(width, config.hidden_size)
    if kind == "identity":
        if width != config.hidden_size:
            raise ValueError(
                f"mm_projector_type=identity needs equal widths, but the vision features have {width} and "
                f"the language model {config.hidden_size}; use linear or mlp2x_gelu"
            )
        return nn.Identity()
    if kind == "tokenpacker":
        raise ValueError(
            "mm_projector_type=tokenpacker is the projector of the method of that name, and another method, or none, "
            "is asked for: leave it out, or name the method, reduction={'name': 'tokenpacker'}"
        )
    mlp = re.fullmatch(r"mlp([1-9]\d*)x_gelu", kind)
    if mlp is None:
        raise ValueError(f"unknown mm_projector_type {kind!r}; known: linear, mlpNx_gelu (N = 1, 2, ...), identity")
    layers: list[nn.Module] = [nn.Linear(width, config.hidden_size)]
    for _ in range(int(mlp.group(1)) - 1):
        layers += [nn.GELU(), nn.Linear(config.hidden_size, config.hidden_size)]
    return nn.Sequential(*layers)
