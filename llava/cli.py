"""The `llava` command."""

from __future__ import annotations

import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from llava.messages import set_up_messages

OVERWRITE = "Replace what this program wrote there; other files are never replaced."

app = typer.Typer(
    help="Train LLaVA-style models with fewer visual tokens.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"llava {version('llava')}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show all that libraries say, and the traceback of an error.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    del version
    if debug:
        os.environ["LLAVA_DEBUG"] = "1"
    set_up_messages()


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML file; its keys are the flags of train_mem.py.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, e.g. learning_rate=2e-5 reduction=prumerge num_gpus=2")
    ] = None,
) -> None:
    """Train, as a YAML file says: `llava train configs/prumerge/finetune_lora.yaml output_dir=out num_gpus=8`.

    Besides the flags, the keys num_gpus, hostfile and master_port say how to launch. With `deepspeed` set,
    DeepSpeed's launcher starts one process for each GPU, as the shell scripts do; otherwise torchrun does where
    num_gpus is above 1. In a process that a launcher has started (RANK is set), the training runs right there.
    """
    from llava.train.launching.launch import train_from_config
    from llava.train.launching.process import leave

    leave(train_from_config(str(config), overrides or []))


@app.command("cache-features")
def cache_features(
    config: Annotated[Path, typer.Argument(help="YAML file, as for `llava train`.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, as for `llava train`; feature_cache=FOLDER says where to.")
    ] = None,
) -> None:
    """Run the frozen vision tower once over all images of a run, which then reads its features in place of them.

    What is there already is kept, so a command that was killed goes on. `llava train` with the same settings reads
    the folder; docs/training.md says when that is right, and what it saves.
    """
    from llava.train.launching.launch import cache_from_config
    from llava.train.launching.process import leave

    leave(cache_from_config(str(config), overrides or []))


@app.command()
def doctor(
    config: Annotated[Path, typer.Argument(help="YAML file, as for `llava train`.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, as for `llava train`.")] = None,
    device_memory: Annotated[
        float | None, typer.Option(help="GiB of a GPU to compare with, where the run goes to another machine.")
    ] = None,
) -> None:
    """Check a run without training: settings, every sample and image, lengths, checkpoints, memory and disk.

    Prints a line for each finding, and ends with exit code 1 where something must be mended.
    """
    from llava.train.preflight.doctor import examine, summary

    report = examine(config, overrides or [], device_memory)
    for finding in report.ordered():
        typer.echo(finding.line())
    typer.echo(summary(report))
    raise typer.Exit(1 if report.errors else 0)


@app.command()
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


@app.command()
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


@app.command("eval")
def evaluate(
    model_path: Annotated[str, typer.Argument(help="Checkpoint of any layout: a folder or hub name.")],
    task: Annotated[
        str | None, typer.Option(help="Benchmarks, as pope,gqa: answered and scored. Their files: docs/evaluation.md.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for the results of tasks; default: outputs/eval/CHECKPOINT[-METHOD].")
    ] = None,
    data: Annotated[Path, typer.Option(help="Folder of the tasks' files.")] = Path("playground/data/eval"),
    limit: Annotated[int | None, typer.Option(help="So many questions of each task, for a trial.")] = None,
    num_gpus: Annotated[int | None, typer.Option(help="Processes for tasks, a GPU each; default: all GPUs.")] = None,
    judge_model: Annotated[str | None, typer.Option(help="Model that grades answers, where a task wants one.")] = None,
    judge_url: Annotated[
        str, typer.Option(help="Its endpoint, with OpenAI's interface; the key is OPENAI_API_KEY.")
    ] = "https://api.openai.com/v1",
    question_file: Annotated[
        Path | None, typer.Option(help="In place of tasks: LLaVA's JSON lines: question_id, image, text.")
    ] = None,
    answers_file: Annotated[Path | None, typer.Option(help="Where their answers go, as JSON lines.")] = None,
    image_folder: Annotated[str, typer.Option(help="Folder that their image names start from.")] = "",
    image_access: Annotated[
        str, typer.Option("--image-access", "--image_access", help="folder, disk (any file) or remote (URLs too).")
    ] = "folder",
    model_base: Annotated[str | None, typer.Option(help="Base of a LoRA or projector-only folder.")] = None,
    vision_tower: Annotated[str | None, typer.Option(help="In place of the config's mm_vision_tower.")] = None,
    reduction: Annotated[
        str | None, typer.Option(help="A method's name, JSON or none; default: the checkpoint's own.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float16, bfloat16 or float32; default: the checkpoint's.")] = "auto",
    conv_mode: Annotated[
        str | None, typer.Option(help="Prompt template; default: vicuna_v1, for tasks by the language model.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token each time.")] = 0.0,
    num_beams: Annotated[int, typer.Option(help="Width of the beam search.")] = 1,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Longest answer in tokens; default: 128, or the task's own.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Questions that are answered at once.")] = 8,
    num_workers: Annotated[int | None, typer.Option(help="Processes that read images ahead.")] = None,
    no_images: Annotated[bool, typer.Option("--no-images", help="Leave the images out.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace answers or results that exist.")] = False,
) -> None:
    """Score a checkpoint on benchmarks (--task), or answer a file of questions (--question-file, --answers-file)."""
    from llava.eval import model_vqa, running
    from llava.eval.answering import VqaOptions
    from llava.eval.judge import Judge
    from llava.eval.sharding import Source
    from llava.model.weights import parse_dtype

    if (task is None) == (question_file is None) or (question_file is None) != (answers_file is None):
        raise ValueError("pass either --task, or --question-file and --answers-file")
    options = VqaOptions(
        image_folder=image_folder,
        image_access=image_access,
        conv_mode=conv_mode or "vicuna_v1",
        temperature=temperature,
        num_beams=num_beams,
        max_new_tokens=128 if max_new_tokens is None else max_new_tokens,
        batch_size=batch_size,
        num_workers=num_workers,
        no_images=no_images,
        count_visual_tokens=task is not None,
    )
    opening: dict[str, Any] = {
        "model_base": model_base,
        "vision_tower": vision_tower,
        "reduction": reduction,
        "dtype": parse_dtype(dtype),
    }
    if question_file is not None and answers_file is not None:
        model_vqa.evaluate(model_path, question_file, answers_file, options=options, overwrite=overwrite, **opening)
        return
    output = output or running.default_output(model_path, reduction)
    evaluation = running.Evaluation(
        source=Source(model_path=model_path, **opening),
        tasks=[name.strip() for name in (task or "").split(",") if name.strip()],
        output=output,
        data=data,
        options=options,
        conv_mode=conv_mode,
        max_new_tokens=max_new_tokens,
        limit=limit,
        devices=running.default_devices(num_gpus),
        judge=None if judge_model is None else Judge(model=judge_model, url=judge_url, cache=output / ".verdicts"),
        overwrite=overwrite,
    )
    Console().print(running.results_table(running.run_tasks(evaluation)))


@app.command()
def report(
    runs: Annotated[list[Path] | None, typer.Argument(help="Folders that `llava eval --task` wrote.")] = None,
    paper: Annotated[
        str | None, typer.Option(help="prumerge, prumerge_v1, trim, stf or pyramiddrop: its tables; runs beside them.")
    ] = None,
    table: Annotated[str | None, typer.Option(help="One of the paper's tables, by number.")] = None,
    form: Annotated[str | None, typer.Option("--format", help="table, csv or markdown.")] = None,
    findings: Annotated[bool, typer.Option("--findings", help="Tokens, relative performance, means, cost.")] = False,
    baseline: Annotated[str | None, typer.Option(help="Run that relative performance refers to.")] = None,
    model: Annotated[str | None, typer.Option(help="The paper's name of the runs' model.")] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="The paper's name of the runs' method, or RUN=NAME for one of them.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="File for the report; .csv and .md say the format.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Picture: score against visual tokens and FLOPs.")] = None,
) -> None:
    """Show the papers' tables, and results of `llava eval` beside them or among themselves."""
    from llava.eval.reports.report import ReportOptions
    from llava.eval.reports.report import report as write_report

    options = ReportOptions(
        paper=paper,
        table=table,
        form=form,
        findings=findings,
        baseline=baseline,
        model=model,
        method=method or (),
        output=output,
        plot=plot,
    )
    write_report(runs or [], options)


@app.command()
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


@app.command()
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


def main() -> None:
    """Entry point: what a user can mend is shown as one line, and the exit code is 2; 74 where the system refused."""
    try:
        app()
    except (ValueError, OSError) as error:
        if os.environ.get("LLAVA_DEBUG"):
            raise
        Console(stderr=True, soft_wrap=True).print("[bold red]error:[/] ", end="")
        Console(stderr=True, soft_wrap=True).print(str(error), style="red", markup=False, highlight=False)
        sys.exit(2 if isinstance(error, ValueError) else os.EX_IOERR)
