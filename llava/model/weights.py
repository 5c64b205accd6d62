"""Reading weight files safely, and putting weights into a model so that nothing is missing, left over or misshapen."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

# Buffers that old releases of transformers saved and present ones compute.
_OBSOLETE = re.compile(r"(rotary_emb\.inv_freq|embeddings\.position_ids)$")
# Where a checkpoint's weights may be; the first that is there is read.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
VISION_TOWER_PREFIX = "model.vision_tower."
_DTYPES = {"auto": None, "float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def parse_dtype(name: str) -> torch.dtype | None:
    """The dtype of this name; None for "auto".

    Raises:
        ValueError: no such dtype.
    """
    if name not in _DTYPES:
        raise ValueError(f"dtype {name!r}: choose one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a .safetensors file, or a .bin file without running any code that it may hold.

    Raises:
        ValueError: no such file, or not a file of tensors.
    """
    path = Path(path)
    with _readable(path):
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)


def read_shapes(path: str | Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights in a file, as `read_weights` reads it, without reading the weights.

    Raises:
        ValueError: no such file, or not a file of tensors.
    """
    path = Path(path)
    with _readable(path):
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        weights = torch.load(path, map_location="meta", weights_only=True)
        return {name: tuple(weight.shape) for name, weight in weights.items()}


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a checkpoint's weights, one or its shards.

    Raises:
        ValueError: there is none.
    """
    found = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if found is None:
        raise ValueError(f"{folder} holds no weights: expected one of {', '.join(WEIGHT_FILES)}")
    if found.suffix != ".json":
        return [found]
    return [folder / name for name in sorted(set(read_json(found)["weight_map"].values()))]


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file of a checkpoint.

    Raises:
        ValueError: it is missing or no JSON; the place is named.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing; the checkpoint is incomplete")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}, column {error.colno}: not valid JSON ({error.msg})") from error


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn what goes wrong in reading a file of weights into a ValueError that names it."""
    if not path.is_file():
        raise ValueError(f"no weights at {path}: the file does not exist")
    try:
        yield
    except Exception as error:  # each format raises its own types for a torn or foreign file
        raise ValueError(f"{path} can't be read as a file of weights ({error}); copy or download it again") from error


@contextmanager
def without_load_report() -> Iterator[None]:
    """Keep transformers from listing missing and unexpected keys where the caller judges them itself."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def weights_mark(weights: Mapping[str, Tensor]) -> str:
    """A short text that tells sets of weights apart, by their names and every bit."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def strip_prefixes(weights: Mapping[str, Tensor], prefixes: Iterable[str]) -> dict[str, Tensor]:
    """Take each of `prefixes`, in this order, off the keys that begin with it."""
    stripped = dict(weights)
    for prefix in prefixes:
        stripped = {key.removeprefix(prefix): value for key, value in stripped.items()}
    return stripped


def load_into(module: nn.Module, weights: Mapping[str, Tensor], origin: object, prefix: str = "") -> set[str]:
    """Copy weights into the parameters of the same name; works on parameters that ZeRO-3 has partitioned.

    Args:
        module: where the parameters are.
        weights: by name.
        origin: file or folder that the weights come from, for messages.
        prefix: taken off the names first.

    Returns:
        Names of the parameters that were filled.

    Raises:
        ValueError: a name that the module does not have, another shape, NaN or infinity; all such keys are listed.
    """
    named = strip_prefixes(weights, [prefix])
    parameters = dict(module.named_parameters())
    unknown = sorted(set(named) - set(parameters))
    shapes = [
        f"{k} {tuple(v.shape)}, the model has {true_shape(parameters[k])}"
        for k, v in named.items()
        if k in parameters and tuple(v.shape) != true_shape(parameters[k])
    ]
    raise_for_keys(origin, unexpected=unknown, misshapen=shapes)
    raise_for_nonfinite(origin, named.items())
    for key, value in named.items():
        _copy(parameters[key], value)
    return set(named)


def true_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The parameter's shape, also where ZeRO-3 has partitioned it and left an empty tensor."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _copy(parameter: nn.Parameter, value: Tensor) -> None:
    if not hasattr(parameter, "ds_shape"):
        parameter.data.copy_(value)
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        parameter.data.copy_(value)


def check_loaded(info: Mapping[str, Any], origin: object, filled: Iterable[str] = ()) -> set[str]:
    """Judge what transformers reports about a load.

    Args:
        info: its loading info (missing_keys, unexpected_keys, mismatched_keys).
        origin: folder of the checkpoint, for messages.
        filled: missing keys that were filled from elsewhere.

    Returns:
        The missing keys of the vision tower, if all else is well.

    Raises:
        ValueError: a missing, unexpected or misshapen weight; all are listed.
    """
    missing = set(info["missing_keys"]) - set(filled)
    tower = {key for key in missing if key.startswith(VISION_TOWER_PREFIX)}
    raise_for_keys(
        origin,
        missing=sorted(missing - tower),
        unexpected=sorted(key for key in info["unexpected_keys"] if not _OBSOLETE.search(key)),
        misshapen=sorted(
            f"{key} {tuple(given)}, the model has {tuple(own)}"
            for key, given, own in info["mismatched_keys"]
            if key not in set(filled)
        ),
    )
    return tower


def raise_for_keys(
    origin: object,
    missing: list[str] | None = None,
    unexpected: list[str] | None = None,
    misshapen: list[str] | None = None,
) -> None:
    """Raise a ValueError that lists the keys, if there are any."""
    found = {"missing": missing, "unexpected": unexpected, "wrong shape": misshapen}
    parts = [f"{kind} ({len(keys)}): {shorten(keys)}" for kind, keys in found.items() if keys]
    if parts:
        raise ValueError(
            f"the weights of {origin} do not fit the model that its config describes; " + "; ".join(parts) + ". Check "
            "that weights and config belong together: mm_projector_type, reduction, vision tower and language model "
            "must be those they were trained with"
        )


class NonFiniteWeightsError(ValueError):
    """Weights hold NaN or infinity; the message lists them."""


def raise_for_nonfinite(origin: object, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse weights that a diverged run has written, or a damaged file.

    Args:
        origin: file or folder that the weights come from.
        weights: names and weights; where ZeRO-3 has partitioned one, this process's slice is looked at.

    Raises:
        NonFiniteWeightsError: some hold NaN or infinity.
    """
    bad = [name for name, weight in weights if not is_finite(getattr(weight, "ds_tensor", weight))]
    if bad:
        raise NonFiniteWeightsError(
            f"{origin} holds NaN or infinity in {len(bad)} weights: {shorten(bad)}. The run that wrote it diverged, "
            "or a file is damaged: take an earlier checkpoint, or copy it again"
        )


def is_finite(weight: Tensor) -> bool:
    """False where a weight of a usual floating-point type holds NaN or infinity; it takes no memory."""
    if weight.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return True
    if weight.is_meta or weight.numel() == 0:
        return True
    least, most = torch.aminmax(weight.detach())  # NaN is both
    return bool(least.isfinite() & most.isfinite())


def shorten(keys: list[str], most: int = 12) -> str:
    """Keys as a message lists them."""
    return ", ".join(keys[:most]) + (f", and {len(keys) - most} more" if len(keys) > most else "")
