"""Which method a projector was trained with, where the config does not say: read off its weights' names and shapes."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.utils import cached_file

from llava.model.weights import WEIGHT_FILES, read_json, read_shapes
from llava.reduction.config import ReductionConfig
from llava.reduction.projector.stf import options_of_weights

logger = logging.getLogger(__name__)

_PART = "mm_projector"


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
    if any(_PART in name for name in projector_weights or {}):
        method = method_of_weights(projector_weights or {})
    else:
        method = options_of_weights(_shapes_in_checkpoint(path, cache_dir))
    if method is not None:
        config.reduction = {**ReductionConfig.of_model(config).to_dict(), "projector": method}
        logger.info("the projector's weights are those of the released STF: reduction is %s", config.reduction)


def method_of_adapter(file: str | Path, weights: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """The method of a `mm_projector.bin`: what the config.json beside it says, else what its weights show."""
    beside = Path(file).with_name("config.json")
    if beside.is_file():
        reduction = read_json(beside).get("reduction")
        if reduction is not None:
            return dict(ReductionConfig.parse(reduction).projector) or None
    return method_of_weights(weights)


def method_of_weights(weights: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """The method that a projector's weights show; see `options_of_weights`."""
    return options_of_weights({name: tuple(weight.shape) for name, weight in weights.items()})


def _shapes_in_checkpoint(path: str, cache_dir: str | None) -> dict[str, tuple[int, ...]]:
    """Shapes of the projector's weights, from the heads of the files that hold them."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name in _files_of_projector(path, cache_dir):
        file = _find(path, name, cache_dir)
        if file is not None:  # transformers reports shards that are missing
            shapes |= {k: v for k, v in read_shapes(file).items() if _PART in k}
    return shapes


def _files_of_projector(path: str, cache_dir: str | None) -> list[str]:
    """Names of the files that hold the projector, looked for in the order in which transformers reads them."""
    for name in WEIGHT_FILES:
        found = _find(path, name, cache_dir)
        if found is not None and name.endswith(".index.json"):
            return sorted({file for key, file in read_json(Path(found))["weight_map"].items() if _PART in key})
        if found is not None:
            return [name]
    return []


def _find(path: str, name: str, cache_dir: str | None) -> str | None:
    """The local path of a file of the checkpoint; None where it has no such file."""
    return cached_file(
        path,
        name,
        cache_dir=cache_dir,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
