"""Writing and reading what a run trains, in LLaVA's file formats.

- projector: `mm_projector.bin` (of MQT `query_abstractor.bin`) and config.json
- lora: PEFT's adapter, `non_lora_trainables.bin`, config.json and the tokenizer
- full: the whole model in safetensors, config.json and the tokenizer

Under ZeRO-3 a rank holds a slice of each weight and the weight itself is empty; it is gathered here, so every
rank must call the functions that write. Files appear under their names only when they are complete.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import re
from collections.abc import Callable, Iterable
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llava.files import (
    ADAPTER_CONFIG,
    NON_LORA_FILE,
    adapter_file,
    check_writable,
    checkpoint_folder,
    projector_file,
    projector_file_of,
)
from llava.model.generation_config import writable_generation_config
from llava.model.tokenizer import save_tokenizer
from llava.model.weights import (
    NonFiniteWeightsError,
    is_finite,
    load_into,
    raise_for_keys,
    read_json,
    read_weights,
    shorten,
    weight_files,
)
from llava.reduction.base import PROJECTOR_MODULES

logger = logging.getLogger(__name__)

# What PEFT 0.4 to 0.10, with which LLaVA's own code opens an adapter, know of adapter_config.json.
PEFT_0_4_KEYS = {
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "modules_to_save",
    "peft_type",
    "r",
    "revision",
    "target_modules",
    "task_type",
}


class RunKind(Enum):
    """What a run trains, and so what it writes."""

    PROJECTOR = "projector"
    LORA = "lora"
    FULL = "full"


def part_of(name: str) -> str:
    """The part of the model that a parameter of this name belongs to.

    Returns:
        "vision_tower", "projector" (with the newline token: all that connects tower and language model),
        "reducer" or "language_model".
    """
    parts = name.split(".")
    if "vision_tower" in parts or "video_tower" in parts:
        return "vision_tower"
    if any(p in PROJECTOR_MODULES or p in ("image_newline", "vision_resampler") for p in parts):
        return "projector"
    return "reducer" if any(p.endswith("_reducer") for p in parts) else "language_model"


def gather(parameters: Iterable[tuple[str, Tensor]], keep: bool) -> dict[str, Tensor]:
    """Copies of weights on the CPU, whole also under ZeRO-3. Every rank must call it with the same names.

    Args:
        parameters: names and weights.
        keep: False on ranks that only take part in the gathering; they get an empty dict.

    Raises:
        ValueError: a weight has no elements: it is a slice that could not be gathered.
        NonFiniteWeightsError: weights hold NaN or infinity, and must not take the place of good ones.
    """
    bad: list[str] = []
    weights: dict[str, Tensor] = {}
    copies: dict[int, Tensor] = {}  # tied weights stay one tensor under two names, and are written once
    for name, parameter in parameters:
        with _whole(parameter):
            if not keep:
                continue
            if parameter.numel() == 0:
                raise ValueError(
                    f"{name} has shape {tuple(parameter.shape)}: ZeRO-3 keeps it in slices, and they could not "
                    "be gathered; it is not written, because it would load as an empty weight"
                )
            if id(parameter) not in copies:
                bad += [] if is_finite(parameter) else [name]
                copies[id(parameter)] = parameter.detach().to("cpu", copy=True).contiguous()
            weights[name] = copies[id(parameter)]
    if bad:
        raise NonFiniteWeightsError(f"{len(bad)} weights hold NaN or infinity, so none is written: {shorten(bad)}")
    return weights


def _whole(parameter: Tensor) -> contextlib.AbstractContextManager:
    if not hasattr(parameter, "ds_id"):
        return contextlib.nullcontext()
    from deepspeed import zero

    return zero.GatheredParameters([parameter])


def save_run(model: nn.Module, kind: RunKind, folder: str | Path, *, writer: bool, tokenizer: Any = None) -> None:
    """Write what a run of this kind trains. Every rank must call it.

    Args:
        model: the model, or PEFT's wrapper of it for `RunKind.LORA`.
        folder: where the files go; made if missing. What is left there of an earlier result is removed.
        writer: True on the one rank that writes.
        tokenizer: written too, where the kind has one.
    """
    collect, write = {
        RunKind.PROJECTOR: (_projector_weights, _write_projector),
        RunKind.LORA: (_lora_weights, _write_lora),
        RunKind.FULL: (_all_weights, _write_full),
    }[kind]
    weights = gather(collect(model), keep=writer)
    if not writer:
        return
    with checkpoint_folder(Path(folder)) as staging:
        write(model, weights, staging)
        if tokenizer is not None and kind is not RunKind.PROJECTOR:
            save_tokenizer(tokenizer, staging)


def _projector_weights(model: nn.Module) -> list[tuple[str, Tensor]]:
    # Besides the projector, marker tokens have trained embeddings where mm_use_im_start_end added some.
    return [(n, p) for n, p in model.named_parameters() if part_of(n) == "projector" or p.requires_grad]


def _write_projector(model: nn.Module, weights: dict[str, Tensor], folder: Path) -> None:
    torch.save(weights, folder / projector_file_of(weights))
    _write_config(model, folder)


def _is_adapter(name: str) -> bool:
    return "lora_" in name


def _whole_part(name: str) -> str | None:
    """The part that a weight belongs to, where it is kept whole as soon as some of it is trained."""
    if ".vision_tower.vision_tower." in name or ".video_tower.vision_tower." in name:
        return "vision_tower"
    return "projector" if part_of(name) == "projector" else None


def _base_name(name: str) -> str:
    """Name of a weight without the layer that PEFT puts around it, as it is in the base model."""
    return name.replace(".base_layer.", ".")


def _lora_weights(model: nn.Module) -> list[tuple[str, Tensor]]:
    kept = {name for name, p in model.named_parameters() if _is_adapter(name) or p.requires_grad}
    # A tower that is trained is kept whole, its frozen last blocks too, and so is a projector: readers take them from
    # one place.
    whole = {_whole_part(name) for name in kept} - {None}
    return [(name, p) for name, p in model.named_parameters() if name in kept or _whole_part(name) in whole]


def _write_lora(model: Any, weights: dict[str, Tensor], folder: Path) -> None:
    adapters = {name: weight for name, weight in weights.items() if _is_adapter(name)}
    # Left to itself, PEFT looks up the base model on the hub to see whether its vocabulary has changed.
    model.save_pretrained(folder, state_dict=adapters, save_embedding_layers=False)
    _leave_out_newer_defaults(folder / ADAPTER_CONFIG)
    # PEFT's model card: a form to be filled in, which would replace the README of a repository.
    (folder / "README.md").unlink(missing_ok=True)
    others = {_base_name(name): weight for name, weight in weights.items() if not _is_adapter(name)}
    torch.save(others, folder / NON_LORA_FILE)
    _write_config(model, folder)


def _leave_out_newer_defaults(path: Path) -> None:
    """Drop settings from adapter_config.json that hold a default, and that older releases of PEFT refuse."""
    from peft import LoraConfig

    defaults = LoraConfig().to_dict()
    settings = {k: v for k, v in read_json(path).items() if k in PEFT_0_4_KEYS or v != defaults.get(k)}
    settings.pop("peft_version", None)
    path.write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")


def _all_weights(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    return model.state_dict(keep_vars=True).items()


def _write_full(model: Any, weights: dict[str, Tensor], folder: Path) -> None:
    if getattr(model, "generation_config", None) is not None:
        model.generation_config = writable_generation_config(model, model.generation_config.pad_token_id)
    use_cache, model.config.use_cache = model.config.use_cache, True
    model.save_pretrained(folder, state_dict=weights)
    model.config.use_cache = use_cache


def _write_config(model: Any, folder: Path) -> None:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = copy.deepcopy(base.config)
    config.architectures = [type(base).__name__]
    config.dtype = str(base.dtype).removeprefix("torch.")
    config.use_cache = True  # off during training only
    config.save_pretrained(folder)


def extract_projector(folder: Path, output: Path) -> None:
    """Write the projector of a full checkpoint as a file like `mm_projector.bin`.

    Args:
        folder: the checkpoint.
        output: the file.

    Raises:
        ValueError: no weights there, or none of a projector; or the output exists or can't be written.
    """
    check_writable(output.parent, f"the folder of output {output}:")
    if output.exists():
        raise ValueError(f"output {output} exists; choose another name, or remove it first")
    weights: dict[str, Tensor] = {}
    for file in weight_files(folder):
        weights |= {name: weight for name, weight in read_weights(file).items() if part_of(name) == "projector"}
    if not weights:
        raise ValueError(f"{folder} has no weights of a projector: name a full LLaVA checkpoint")
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = output.with_name(f".{output.name}")
    torch.save(weights, staging)
    staging.replace(output)


def load_run(model: Any, kind: RunKind, folder: str | Path) -> None:
    """Read back what `save_run` wrote, into a model that was built as for that run.

    Raises:
        ValueError: a trained weight is missing, unknown or of another shape; the names are listed.
    """
    folder = Path(folder)
    if kind is RunKind.FULL:
        # Names in the files may differ from names in the model; from_pretrained knows both, and is strict.
        model.load_state_dict(type(model).from_pretrained(str(folder), dtype=model.dtype).state_dict())
        return
    weights = read_weights(projector_file(folder)) if kind is RunKind.PROJECTOR else _read_lora(folder)
    _fill(model, weights, folder)


def load_adapter(model: nn.Module, folder: str | Path) -> None:
    """Read a LoRA folder, with or without `non_lora_trainables.bin`, into a model that PEFT has wrapped.

    Raises:
        ValueError: an adapter's weight is missing, unknown or of another shape; the names are listed.
    """
    _fill(model, _read_lora(Path(folder)), folder, required=_is_adapter)


def _fill(
    model: nn.Module,
    weights: dict[str, Tensor],
    origin: object,
    required: Callable[[str], bool] = lambda name: True,
) -> None:
    own = {_base_name(name): name for name, _ in model.named_parameters()}
    weights = {own.get(name, name): weight for name, weight in weights.items()}
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    raise_for_keys(origin, missing=[name for name in trained if required(name) and name not in weights])
    load_into(model, weights, origin)


def _read_lora(folder: Path) -> dict[str, Tensor]:
    adapter = read_weights(adapter_file(folder))
    # PEFT leaves the adapter's name out of the file.
    named = {re.sub(r"(lora_\w+)\.", r"\1.default.", name, count=1): w for name, w in adapter.items()}
    others = folder / NON_LORA_FILE
    return {**named, **(read_weights(others) if others.is_file() else {})}
