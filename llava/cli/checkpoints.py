"""Commands that rewrite checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

OVERWRITE = "Replace what this program wrote there; other files are never replaced."


def merge(
    model_path: Annotated[str, typer.Argument(help="LoRA or projector-only folder.")],
    output: Annotated[Path, typer.Argument(help="Folder for the full checkpoint.")],
    model_base: Annotated[str | None, typer.Option(help="Its base; default: the one that the folder names.")] = None,
    vision_tower: Annotated[str | None, typer.Option(help="In place of the config's mm_vision_tower.")] = None,
    dtype: Annotated[str, typer.Option(help="float16, bfloat16 or float32; default: the checkpoint's.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help=OVERWRITE)] = False,
) -> None:
    """Write a LoRA or projector-only folder and its base as one full checkpoint."""
    from llava.train.merge import merge_checkpoint

    merge_checkpoint(
        model_path, output, model_base=model_base, vision_tower=vision_tower, dtype=dtype, overwrite=overwrite
    )


def convert(
    source: Annotated[str, typer.Argument(help="Checkpoint of any layout: a folder or hub name.")],
    target: Annotated[Path, typer.Argument(help="Folder to write.")],
    to: Annotated[str, typer.Option(help="hf (for transformers, vLLM, SGLang) or llava.")] = "hf",
    model_base: Annotated[str | None, typer.Option(help="Base of a LoRA or projector-only folder.")] = None,
    vision_tower: Annotated[
        str | None, typer.Option(help="In place of the config's mm_vision_tower; from hf, the name to write as it.")
    ] = None,
    template: Annotated[str | None, typer.Option(help="Prompt template to write as chat template, e.g. v1.")] = None,
    dtype: Annotated[str, typer.Option(help="float16, bfloat16 or float32; default: the checkpoint's.")] = "auto",
    drop_reduction: Annotated[
        bool, typer.Option("--drop-reduction", help="Write a model with reduced visual tokens as one that gets all.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help=OVERWRITE)] = False,
) -> None:
    """Write a checkpoint in llava-hf's layout, or a llava-hf one in LLaVA's."""
    from llava.model import convert as conversion
    from llava.model.weights import parse_dtype

    conversion.convert(
        source,
        target,
        to,
        model_base=model_base,
        vision_tower=vision_tower,
        template=template,
        dtype=parse_dtype(dtype),
        drop_reduction=drop_reduction,
        overwrite=overwrite,
    )
