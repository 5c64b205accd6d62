"""Which method a projector was trained with, where the config does not say: read off its weights' names and shapes."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from llava.model.weights import find_file, find_weights, read_heads, read_json
from llava.reduction.base import PROJECTOR_MODULES
from llava.reduction.config import ReductionConfig
from llava.reduction.projector.stf import options_of_weights

logger = logging.getLogger(__name__)

_SHOWN_BY = {"query_abstractor.query": "mqt", "mm_projector.q_proj_1.": "tokenpacker"}  # a weight's name, the method


def add_projector_method(
    config: Any, path: str, projector_weights: Mapping[str, Tensor] | None = None, cache_dir: str | None = None
) -> None:
    """Give a LLaVA config that names no reduction the method that its checkpoint's projector shows.

    Args:
        config: of the model; `reduction` is set where a method is found, so that it is written with the model.
        path: folder or hub name of the checkpoint.
        projector_weights: those that are read in place of the checkpoint's.
        cache_dir: where files from the hub are kept.

    Raises:
        ValueError: a projector that fuses hidden states in a way that no release does.
    """
    if getattr(config, "mm_vision_tower", None) is None or getattr(config, "reduction", None) is not None:
        return
    named = ReductionConfig.of_model(config)
    if named.projector:
        config.reduction = named.to_dict()
        return
    if any(_is_projectors(name) for name in projector_weights or {}):
        method = method_of_weights(projector_weights or {})
    else:
        method = method_of_shapes(_shapes_in_checkpoint(path, cache_dir))
    if method is not None:
        config.reduction = {**named.to_dict(), "projector": method}
        logger.info("the projector's weights are those of a release: reduction is %s", config.reduction)


def method_of_adapter(file: str | Path, weights: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """The method of a `mm_projector.bin`: what the config.json beside it says, otherwise what its weights show."""
    beside = Path(file).with_name("config.json")
    if beside.is_file():
        settings = SimpleNamespace(**read_json(beside))
        method = ReductionConfig.of_model(settings).projector
        if method or getattr(settings, "reduction", None) is not None:
            return dict(method) or None
    return method_of_weights(weights)


def method_of_weights(weights: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """The method that a projector's weights show; see `method_of_shapes`."""
    return method_of_shapes({name: tuple(weight.shape) for name, weight in weights.items()})


def method_of_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
    """The method that the names and shapes of a projector's weights show; None for a plain projector.

    Raises:
        ValueError: see `options_of_weights` of STF.
    """
    for part, name in _SHOWN_BY.items():
        if any(part in key for key in shapes):
            return {"name": name}
    return options_of_weights(shapes)


def _is_projectors(name: str) -> bool:
    return any(part in name for part in PROJECTOR_MODULES)


def _shapes_in_checkpoint(path: str, cache_dir: str | None) -> dict[str, tuple[int, ...]]:
    """Shapes of the projector's weights, from the heads of the files that hold them."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, keys in find_weights(path, cache_dir).items():
        file = find_file(path, name, cache_dir)
        if file is not None and (
            keys is None or any(_is_projectors(key) for key in keys)
        ):  # check_files reports missing ones
            shapes |= {key: head.shape for key, head in read_heads(file).items() if _is_projectors(key)}
    return shapes
