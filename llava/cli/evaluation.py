"""Commands that measure what a checkpoint knows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console


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
        Path | None, typer.Option(help="In place of tasks: LLaVA's JSON lines: question_id, image or video, text.")
    ] = None,
    answers_file: Annotated[Path | None, typer.Option(help="Where their answers go, as JSON lines.")] = None,
    image_folder: Annotated[str, typer.Option(help="Folder that their image names start from.")] = "",
    image_access: Annotated[
        str, typer.Option("--image-access", "--image_access", help="folder, disk (any file) or remote (URLs too).")
    ] = "folder",
    video_folder: Annotated[str, typer.Option(help="That their names of clips start from; default: the images'.")] = "",
    num_frames: Annotated[
        int | None, typer.Option(help="Frames of a clip, evenly; default: as the checkpoint was trained.")
    ] = None,
    video_fps: Annotated[float | None, typer.Option(help="Frames a second of a clip, in place of so many.")] = None,
    max_frames: Annotated[int | None, typer.Option(help="Frames of a clip at most.")] = None,
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
    num_workers: Annotated[int | None, typer.Option(help="Processes that read images and clips ahead.")] = None,
    no_images: Annotated[bool, typer.Option("--no-images", help="Leave images and clips out.")] = False,
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
        video_folder=video_folder,
        num_frames=num_frames,
        video_fps=video_fps,
        max_frames=max_frames,
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
