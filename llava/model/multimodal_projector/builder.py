"""Build the projector: what maps vision features to the language model's width."""

from __future__ import annotations

import re
from typing import Any

from torch import nn


def build_vision_projector(config: Any) -> nn.Module:
    """The projector of `config.mm_projector_type`: linear, mlpNx_gelu or identity.

    Args:
        config: `mm_projector_type` (default linear), `mm_hidden_size` C, `hidden_size` D.

    Returns:
        A module from [..., C] to [..., D] whose weights have LLaVA's names.

    Raises:
        ValueError: an unknown type, or identity where C differs from D.
    """
    kind = getattr(config, "mm_projector_type", None) or "linear"
    if kind == "linear":
        return nn.Linear(config.mm_hidden_size, config.hidden_size)
    if kind == "identity":
        if config.mm_hidden_size != config.hidden_size:
            raise ValueError(
                f"mm_projector_type=identity needs equal widths, but the tower has {config.mm_hidden_size} and the "
                f"language model {config.hidden_size}; use linear or mlp2x_gelu"
            )
        return nn.Identity()
    mlp = re.fullmatch(r"mlp([1-9]\d*)x_gelu", kind)
    if mlp is None:
        raise ValueError(f"unknown mm_projector_type {kind!r}; known: linear, mlpNx_gelu (N = 1, 2, ...), identity")
    layers: list[nn.Module] = [nn.Linear(config.mm_hidden_size, config.hidden_size)]
    for _ in range(int(mlp.group(1)) - 1):
        layers += [nn.GELU(), nn.Linear(config.hidden_size, config.hidden_size)]
    return nn.Sequential(*layers)
