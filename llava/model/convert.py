"""Rewrite checkpoints: ours as llava-hf, so that transformers, vLLM and SGLang can serve it, and back."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch

from llava.files import check_apart, new_folder, places_read
from llava.model.builder import lasting_name, load_pretrained_model, local_folder
from llava.model.llava_hf.export import write_hf
from llava.model.llava_hf.opening import KEPT
from llava.model.llava_hf.restore import inferred_settings, write_llava
from llava.model.weights import read_json

logger = logging.getLogger(__name__)


def convert(
    source: str | os.PathLike,
    target: str | os.PathLike,
    to: str = "hf",
    *,
    model_base: str | os.PathLike | None = None,
    vision_tower: str | os.PathLike | None = None,
    template: str | None = None,
    dtype: torch.dtype | None = None,
    drop_reduction: bool = False,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint in another layout. The target appears under its name only when it is complete.

    Args:
        source: folder or hub name, of any layout that `load_pretrained_model` opens; LoRA weights are merged.
        target: folder to write.
        to: "hf" for LlavaForConditionalGeneration, or LlavaNextForConditionalGeneration where images are tiled;
            "llava" for a full checkpoint in LLaVA's layout, with the vision tower's weights in it.
        model_base: as for `load_pretrained_model`.
        vision_tower: as for `load_pretrained_model`; to "llava" from hf, the name to write as mm_vision_tower.
        template: to hf, name of the prompt template to write as chat template; default: the one that LLaVA trains
            the kind of language model with.
        dtype: of the written weights; default: the checkpoint's.
        drop_reduction: to hf, leave out the reduction of visual tokens, which that layout can't express: the model
            then gets all tokens, unlike in its training.
        max_shard_size: largest size of one weight file.
        overwrite: replace a target that this program wrote; what someone else put there stays.

    Returns:
        The target.

    Raises:
        ValueError: the target exists, may not be replaced, or holds what is read; or the checkpoint can't be opened or
            expressed in that layout.
    """
    if to not in ("hf", "llava"):
        raise ValueError(f"to={to!r}: choose hf or llava")
    folder, origin = Path(target), local_folder(source)
    check_apart(folder, "target", places_read(origin, model_base, vision_tower))
    raw = _config_json(origin)
    hf = raw if "text_config" in raw else None
    if to == "hf" and hf is not None:
        raise ValueError(f"{os.fspath(source)} has the llava-hf layout already")
    with new_folder(folder, overwrite=overwrite) as staging:
        tokenizer, model, processor, _ = load_pretrained_model(
            origin, model_base, device="cpu", dtype=dtype, vision_tower=None if hf else vision_tower, merge_lora=True
        )
        model.config.mm_vision_tower = _tower_name(raw, vision_tower if hf else None, model.config.mm_vision_tower)
        if to == "hf":
            write_hf(staging, model, tokenizer, processor, template, drop_reduction, max_shard_size)
        else:
            kept = None if hf is None else hf.get(KEPT) or inferred_settings(hf, tokenizer)
            write_llava(staging, model, tokenizer, processor, kept, max_shard_size)
    logger.info("%s: written in the layout %s", folder, to)
    return folder


def _config_json(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    return read_json(path) if path.is_file() else {}


def _tower_name(raw: dict[str, Any], wanted: str | os.PathLike | None, opened: str) -> str:
    """The tower's name to write: the one asked for or the source's own, rather than where its weights were read."""
    kept = raw.get(KEPT, {}).get("config", raw)
    return lasting_name(wanted or kept.get("mm_vision_tower") or opened)
