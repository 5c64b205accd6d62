"""Reading weight files safely, and putting weights into a model so that nothing is missing, left over or misshapen."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.utils import cached_file
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
VIDEO_TOWER_PREFIX = "model.video_tower."
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
        ValueError: no such file, not a file of tensors, or one with NaN, infinity or whole numbers in it.
    """
    path = Path(path)
    with _readable(path):
        weights = load_file(path) if path.suffix == ".safetensors" else _load_tensors(path, "cpu")
    raise_for_keys(path, mistyped=[f"{k} {v.dtype}" for k, v in weights.items() if not v.is_floating_point()])
    raise_for_nonfinite(path, weights.items())
    return weights


@dataclass(frozen=True)
class Head:
    """What a file says of a weight before it is read: its shape, and the name of its type."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def is_float(self) -> bool:
        return self.dtype.lower().startswith(("f", "bf"))


def read_heads(path: str | Path) -> dict[str, Head]:
    """Names, shapes and types of the weights in a file, as `read_weights` reads it, without reading the weights.

    Raises:
        ValueError: no such file, or not a file of tensors.
    """
    path = Path(path)
    with _readable(path):
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                return {name: Head(tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
        weights = _load_tensors(path, "meta")
        return {name: Head(tuple(w.shape), str(w.dtype).removeprefix("torch.")) for name, w in weights.items()}


def _load_tensors(path: Path, device: str) -> dict[str, Tensor]:
    weights = torch.load(path, map_location=device, weights_only=True)
    if not isinstance(weights, dict) or not all(
        isinstance(name, str) and isinstance(weight, Tensor) for name, weight in weights.items()
    ):
        raise ValueError(f"it holds a {type(weights).__name__}, and not tensors by their names")
    return weights


def find_file(path: str | Path, name: str, cache_dir: str | None = None) -> Path | None:
    """Where a file of a checkpoint lies on this machine; None where the checkpoint has no such file.

    Args:
        path: folder or hub name of the checkpoint.
        name: of the file.
        cache_dir: where files from the hub are kept.
    """
    try:
        found = cached_file(
            str(path),
            name,
            cache_dir=cache_dir,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except OSError:  # neither a folder nor the name of a model
        return None
    return None if found is None else Path(found)


def find_weights(path: str | Path, cache_dir: str | None = None) -> dict[str, list[str] | None]:
    """The files of a checkpoint's weights, looked for in the order in which transformers reads them.

    Returns:
        For each file the names of its weights as the index has them; None where there is no index.

    Raises:
        ValueError: an index that names no files, or files elsewhere.
    """
    for name in WEIGHT_FILES:
        found = find_file(path, name, cache_dir)
        if found is not None and name.endswith(".index.json"):
            return _files_of_index(found)
        if found is not None:
            return {name: None}
    return {}


def _files_of_index(index: Path) -> dict[str, list[str] | None]:
    weight_map = read_json(index).get("weight_map")
    files: dict[str, list[str] | None] = {}
    for name, file in weight_map.items() if isinstance(weight_map, dict) else ():
        if not isinstance(file, str) or Path(file).name != file:
            raise ValueError(f"{index}: weight_map has {file!r} for {name}, expected the name of a file beside it")
        cast(list, files.setdefault(file, [])).append(name)
    if not files:
        raise ValueError(f"{index} has no weight_map that names the files of the weights; copy or download it again")
    return files


def checkpoint_heads(path: str | Path, cache_dir: str | None = None, *, quantized: bool = False) -> dict[str, Head]:
    """What the files of a checkpoint say of its weights, by name; nothing, where it has none.

    Args:
        path: folder or hub name.
        cache_dir: where files from the hub are kept.
        quantized: whether weights may be whole numbers.

    Raises:
        ValueError: a file is missing, torn or none of weights, or has weights of a type that no model is trained in.
    """
    heads: dict[str, Head] = {}
    for name in find_weights(path, cache_dir):
        file = find_file(path, name, cache_dir) or Path(path) / name
        found = read_heads(file)
        odd = [f"{key} {head.dtype}" for key, head in found.items() if not (head.is_float or _OBSOLETE.search(key))]
        raise_for_keys(file, mistyped=[] if quantized else odd)
        heads |= found
    return heads


def check_files(path: str | Path, cache_dir: str | None = None, *, quantized: bool = False) -> None:
    """Look at a checkpoint's files before transformers reads them, whose errors would not name the file.

    Args:
        path, cache_dir, quantized: as for `checkpoint_heads`.

    Raises:
        ValueError: see `checkpoint_heads`; there are no weights; or generation_config.json is no JSON object.
    """
    if not find_weights(path, cache_dir):
        raise ValueError(
            f"{path} holds no weights, or can't be reached: expected a folder, or a model of the hub, with one of "
            f"{', '.join(WEIGHT_FILES)}"
        )
    checkpoint_heads(path, cache_dir, quantized=quantized)
    check_json(path, "generation_config.json", cache_dir)


def check_json(path: str | Path, name: str, cache_dir: str | None = None) -> None:
    """Raise ValueError where a checkpoint has a file of this name that is no JSON object; see `read_json`."""
    file = find_file(path, name, cache_dir)
    if file is not None:
        read_json(file)


def tower_weights(
    checkpoint: str | Path, tower: str | Path, names: Collection[str], cache_dir: str | None = None
) -> dict[str, Tensor]:
    """The image encoder's weights that a model has: those in its checkpoint, otherwise those of the tower itself.

    Args:
        checkpoint: folder or hub name of the model.
        tower: folder or hub name of a CLIP or SigLIP model, or of its vision half.
        names: of the encoder's weights.
        cache_dir: where files from the hub are kept.

    Returns:
        Weights by those names, mapped into memory where the file allows it.

    Raises:
        ValueError: some are missing, or a file can't be read.
    """
    prefix = f"{VISION_TOWER_PREFIX}vision_tower."
    for place, start in ((checkpoint, prefix), (tower, "")):
        found: dict[str, Tensor] = {}
        for file_name, keys in find_weights(place, cache_dir).items():
            if keys is not None and not any(key.startswith(start) for key in keys):
                continue
            file = find_file(place, file_name, cache_dir) or Path(place) / file_name
            for key, read in _lazily(file).items():
                name = key.removeprefix(prefix).removeprefix("vision_model.")
                if key.startswith(start) and name in names:
                    found[name] = read()
        if found:
            raise_for_keys(place, missing=sorted(set(names) - set(found)))
            return found
    raise ValueError(f"neither {checkpoint} nor {tower} holds the weights of the vision tower")


def _lazily(path: Path) -> dict[str, Callable[[], Tensor]]:
    """For each weight of a file what reads it."""
    with _readable(path):
        if path.suffix == ".safetensors":
            file = safe_open(path, framework="pt")
            return {name: partial(file.get_tensor, name) for name in file.keys()}  # noqa: SIM118
        return {name: partial(_itself, weight) for name, weight in _load_tensors(path, "cpu").items()}


def _itself(weight: Tensor) -> Tensor:
    return weight


def sampled_mark(weights: Mapping[str, Tensor], each: int = 64) -> str:
    """A short text that tells sets of weights apart by `each` values of every one, as bfloat16 has them.

    So it is the same for weights that are kept as float32, and for those that these were rounded to.
    """
    digest = hashlib.sha256()
    for name in sorted(weights):
        flat = weights[name].detach().flatten()
        values = flat[:: max(1, flat.numel() // each)].to(torch.bfloat16).float()
        digest.update(f"{name} {tuple(weights[name].shape)}".encode() + values.numpy().tobytes())
    return digest.hexdigest()[:16]


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a checkpoint's weights, one or its shards.

    Raises:
        ValueError: there is none.
    """
    files = [folder / name for name in find_weights(folder)]
    if not files:
        raise ValueError(f"{folder} holds no weights: expected one of {', '.join(WEIGHT_FILES)}")
    return files


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file of a checkpoint.

    Raises:
        ValueError: it is missing, no JSON or no object; the place is named.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing; the checkpoint is incomplete")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}, column {error.colno}: not valid JSON ({error.msg})") from error
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} can't be read as JSON ({error}); copy or download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {shorten([json.dumps(content)[:40]])}, expected a JSON object {{...}}")
    return content


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn what goes wrong in reading a file of weights into a ValueError that names it."""
    if not path.is_file():
        raise ValueError(f"no weights at {path}: the file does not exist")
    try:
        yield
    except Exception as error:  # each format raises its own types for a torn or foreign file
        raise ValueError(f"{path} can't be read as a file of weights: {_reason(path, error)}") from error


def _reason(path: Path, error: Exception) -> str:
    """Why a file of weights can't be read, and what to do. torch's own advice, to read it unsafely, is left out."""
    if os.access(path, os.R_OK) and path.open("rb").read(20).startswith(b"version https://git"):
        return "it is a pointer of Git LFS; fetch the file itself with git lfs pull"
    if isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error):
        return (
            "it is torn, or holds something other than tensors, which is not read because it may run code; copy or "
            "download it again, or write it with safetensors"
        )
    detail = str(error).partition("\n")[0].partition(". ")[0]
    return f"it is torn, or of another kind ({detail or type(error).__name__}); copy or download it again"


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
    """Remove each of `prefixes`, in this order, from the keys that begin with it."""
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
        prefix: removed from the names first.

    Returns:
        Names of the parameters that were filled.

    Raises:
        ValueError: a name that the module does not have, or another shape; all such keys are listed.
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
        The missing keys of the towers, if all else is well.

    Raises:
        ValueError: a missing, unexpected or misshapen weight; all are listed.
    """
    missing = set(info["missing_keys"]) - set(filled)
    tower = {key for key in missing if key.startswith((VISION_TOWER_PREFIX, VIDEO_TOWER_PREFIX))}
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
    mistyped: list[str] | None = None,
) -> None:
    """Raise a ValueError that lists the keys, if there are any."""
    found = {
        "missing": missing,
        "unexpected": unexpected,
        "wrong shape": misshapen,
        "wrong type, not of floats": mistyped,
    }
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
