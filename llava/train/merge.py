"""Join what a run trained with its base into one checkpoint."""

from __future__ import annotations

from pathlib import Path

from llava.files import check_apart, new_folder, places_read
from llava.model.builder import load_pretrained_model
from llava.model.weights import parse_dtype
from llava.train.checkpoints.saving import RunKind, save_run


def merge_checkpoint(
    model_path: str,
    output: str | Path,
    *,
    model_base: str | None = None,
    vision_tower: str | None = None,
    dtype: str = "auto",
    overwrite: bool = False,
) -> None:
    """Write a LoRA or projector-only folder and its base as one full checkpoint with tokenizer.

    Args:
        model_path: the folder.
        output: the checkpoint's folder.
        model_base: the language model or LLaVA checkpoint it belongs to; default: the one that it names.
        vision_tower: in place of the config's `mm_vision_tower`.
        dtype: see `parse_dtype`; "auto" is the checkpoint's.
        overwrite: replace an output that this program wrote; what someone else put there stays.

    Raises:
        ValueError: an unknown dtype, a folder that does not open, or an output that exists, may not be replaced, or
            holds what is read.
    """
    kind = parse_dtype(dtype)
    check_apart(output, "target", places_read(model_path, model_base, vision_tower))
    with new_folder(output, overwrite=overwrite) as staging:
        tokenizer, model, image_processor, _ = load_pretrained_model(
            model_path, model_base, dtype=kind, device="cpu", vision_tower=vision_tower, merge_lora=True
        )
        save_run(model, RunKind.FULL, staging, writer=True, tokenizer=tokenizer)
        image_processor.save_pretrained(staging)
