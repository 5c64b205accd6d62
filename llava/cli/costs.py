"""Commands that say what methods cost: by formula and on the clock."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def flops(
    model: Annotated[
        str,
        typer.Option(help="7b, 13b, another known name, a checkpoint's folder or a config.json."),
    ] = "7b",
    method: Annotated[
        list[str] | None,
        typer.Option(help="A method's name, JSON or YAML; several may be given; all: every one."),
    ] = None,
    vision_tower: Annotated[str | None, typer.Option(help="In place of the config's mm_vision_tower.")] = None,
    device: Annotated[str, typer.Option(help="V100, A100, H100 or H200.")] = "A100",
    dtype: Annotated[str, typer.Option(help="fp16, bf16, int8, int4; w8a16 and w4a16: weights only.")] = "fp16",
    batch: Annotated[int, typer.Option(help="Rows at once.")] = 1,
    images: Annotated[int, typer.Option(help="Images of a row.")] = 1,
    frames: Annotated[int, typer.Option(help="Frames of each, where they are clips.")] = 1,
    tiles: Annotated[int | None, typer.Option(help="Tiles of an image; default: by --image-size.")] = None,
    image_size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels, for anyres.")] = None,
    text_tokens: Annotated[int | None, typer.Option(help="Beside the images; default: 60, in training 300.")] = None,
    new_tokens: Annotated[int, typer.Option(help="Of the answer.")] = 20,
    image_tokens: Annotated[
        float | None, typer.Option(help="Visual tokens of a row, in place of what each method's budget says.")
    ] = None,
    train: Annotated[bool, typer.Option("--train", help="A training step in place of an answer.")] = False,
    trains: Annotated[str, typer.Option(help="all, lora or projector.")] = "all",
    lora_rank: Annotated[int, typer.Option(help="Of the adapters.")] = 128,
    trains_tower: Annotated[bool, typer.Option("--trains-tower", help="The vision tower learns too.")] = False,
    head_rows: Annotated[int | None, typer.Option(help="Learnt tokens of a sample; default: all text.")] = None,
    checkpointing: Annotated[bool, typer.Option(help="Compute the layers again in the backward pass.")] = True,
    devices: Annotated[int, typer.Option(help="That share the states of training.")] = 8,
    zero_stage: Annotated[int, typer.Option(help="What they share.")] = 2,
    utilization: Annotated[float, typer.Option(help="Part of the peak that training reaches (MFU).")] = 0.3,
    operations: Annotated[int, typer.Option(help="Of a multiply-add: 1 or 2.")] = 2,
    papers: Annotated[bool, typer.Option("--papers", help="The papers' figures beside ours, alone.")] = False,
    form: Annotated[str, typer.Option("--format", help="markdown, csv or json.")] = "markdown",
) -> None:
    """What an answer or a training step costs: FLOPs, bytes and least times, with methods beside the baseline."""
    from llava.cost import Scenario, TrainingRun, command

    if papers:
        typer.echo(command.papers(form), nl=False)
        return
    shared: dict[str, Any] = {
        "batch": batch,
        "images": images * frames,
        "tiles": tiles,
        "image_size": command.parse_size(image_size),
        "device": device,
        "image_tokens": image_tokens,
        "text_tokens": text_tokens if text_tokens is not None else 300 if train else 60,
    }
    asked: Scenario | TrainingRun
    if train:
        asked = TrainingRun(
            **shared,
            trains=trains,
            lora_rank=lora_rank,
            trains_tower=trains_tower,
            head_rows=head_rows,
            checkpointing=checkpointing,
            devices=devices,
            zero_stage=zero_stage,
            utilization=utilization,
        )
    else:
        asked = Scenario(**shared, new_tokens=new_tokens, dtype=dtype)
    text = command.report(model, method or [], asked, vision_tower=vision_tower, operations=operations, form=form)
    typer.echo(text, nl=False)


def bench(
    model: Annotated[
        str, typer.Argument(help="A checkpoint; or 7b, 13b, another known name or a config.json, for random weights.")
    ] = "7b",
    method: Annotated[
        list[str] | None,
        typer.Option(help="A method's name, JSON or YAML; several may be given; all: every one. Default: all."),
    ] = None,
    batch: Annotated[str, typer.Option(help="Requests at once, such as 1,8,32.")] = "1,8,32",
    images: Annotated[int, typer.Option(help="Images of a request.")] = 1,
    tiles: Annotated[int, typer.Option(help="Tiles of an image, as anyres cuts them.")] = 1,
    text_tokens: Annotated[int, typer.Option(help="Beside the images.")] = 60,
    new_tokens: Annotated[int, typer.Option(help="Of the answer.")] = 16,
    rounds: Annotated[int, typer.Option(help="Turns that count, after one that warms up.")] = 5,
    train: Annotated[str | None, typer.Option(help="lora or all: time a training step in place of an answer.")] = None,
    device: Annotated[str | None, typer.Option(help="Such as cuda:0; default: the GPU where there is one.")] = None,
    dtype: Annotated[str, typer.Option(help="Default: bfloat16 on a GPU, float32 on the CPU.")] = "auto",
    attention: Annotated[str | None, typer.Option(help="eager, sdpa or flash_attention_2.")] = None,
    vision_tower: Annotated[str | None, typer.Option(help="In place of the config's mm_vision_tower.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Folder for timelines, which ui.perfetto.dev shows.")] = None,
    form: Annotated[str, typer.Option("--format", help="markdown or json.")] = "markdown",
    output: Annotated[Path | None, typer.Option(help="File in place of the terminal.")] = None,
) -> None:
    """Time methods beside the baseline, by turns in one run: what FLOPs promise, and what the clock says."""
    from llava.cost.bench import command

    text = command.bench(
        model,
        method or ["all"],
        batch=batch,
        shape={"images": images, "tiles": tiles, "text_tokens": text_tokens, "new_tokens": new_tokens},
        form=form,
        device=device,
        dtype=dtype,
        rounds=rounds,
        trains=train,
        attention=attention,
        vision_tower=vision_tower,
        trace=trace,
    )
    if output is None:
        typer.echo(text, nl=False)
    else:
        output.write_text(text, encoding="utf-8")


def methods(
    name: Annotated[str | None, typer.Argument(help="Of one method: what it does, and where releases differ.")] = None,
    model: Annotated[str, typer.Option(help="Whose costs are shown: 7b, 13b, another known name or a folder.")] = "7b",
) -> None:
    """List the methods of reduction with site, options and cost, or describe one."""
    from llava.cost.methods import describe, table

    typer.echo(table(model) if name is None else describe(name), nl=False)
