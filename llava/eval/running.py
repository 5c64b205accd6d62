"""`llava eval --task`: answer the questions of benchmarks with a checkpoint, grade them and write what came out.

OUTPUT/TASK gets answers.jsonl (LLaVA's rows), grades.jsonl, result.json and what a server wants to be sent. Until a
task is answered, its answers gather in a hidden folder beside it, where a later run with the same settings goes on.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from tqdm import tqdm

from llava.cost import open_model
from llava.eval.answering import Answer, VqaOptions, check_images
from llava.eval.judge import Judge
from llava.eval.model_vqa import answer_row
from llava.eval.questions import Question, read_jsonl
from llava.eval.results import (
    ANSWERS_FILE,
    GRADES_FILE,
    RESULT_FILE,
    answer_settings,
    mean_flops,
    questions_hash,
    read_result,
    speed,
    task_facts,
    visual_tokens,
    whole_prompt,
    write_grades,
)
from llava.eval.sharding import MODEL_FILE, Source, TaskRun, answer_all
from llava.eval.tasks import get_task
from llava.eval.tasks.base import Grade, Task
from llava.files import new_folder
from llava.lock import lock
from llava.mm_utils import get_model_name_from_path
from llava.model.builder import local_folder
from llava.model.weights import read_json
from llava.provenance import git_state, versions, weights_hash
from llava.reduction.config import ReductionConfig

logger = logging.getLogger(__name__)

DATA = Path("playground/data/eval")
# The template of a checkpoint by its language model, where none is named.
TEMPLATES = {"mistral": "mistral_instruct", "qwen": "qwen_1_5"}
DEFAULT_TEMPLATE = "vicuna_v1"
JUDGED_AT_ONCE = 8  # questions
SIZES = {(4096, 32): "7B", (5120, 40): "13B"}  # of Vicuna, by width and layers


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What to evaluate.

    Attributes:
        source: the checkpoint.
        tasks: names of tasks.
        output: folder for the results.
        data: folder of the tasks' files, in LLaVA's layout.
        options: how questions are put; its image folder, template and length are not read.
        conv_mode: name of the prompt template; None: by the checkpoint's language model and the task.
        max_new_tokens: longest answer; None: the tasks' own.
        limit: so many questions of each task; None: all.
        devices: such as "cuda:1"; a process each.
        judge: grades the answers of tasks that a model scores; None leaves them without a score.
        overwrite: replace results of other settings.
    """

    source: Source
    tasks: Sequence[str]
    output: Path
    data: Path = DATA
    options: VqaOptions = field(default_factory=lambda: VqaOptions(temperature=0.0, count_visual_tokens=True))
    conv_mode: str | None = None
    max_new_tokens: int | None = None
    limit: int | None = None
    devices: Sequence[str] = ("cpu",)
    judge: Judge | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit={self.limit}: must be at least 1")
        if not self.tasks:
            raise ValueError("no task to evaluate: name one at least")


@dataclass(frozen=True)
class _Prepared:
    """A task of an evaluation with its questions; `run.folder` is where answers gather, `target` where results go."""

    task: Task
    run: TaskRun
    questions: list[Question]
    settings: Mapping[str, Any]
    target: Path


def default_devices(number: int | None = None) -> list[str]:
    """The first `number` devices: of the GPUs where there are any, all by default; otherwise processes on the CPU.

    Raises:
        ValueError: there are not so many GPUs.
    """
    gpus = torch.cuda.device_count()
    if number is not None and number < 1:
        raise ValueError(f"num_gpus={number}: must be at least 1")
    if gpus and number is not None and number > gpus:
        raise ValueError(f"num_gpus={number}: this machine shows {gpus}; CUDA_VISIBLE_DEVICES says which")
    return [f"cuda:{index}" for index in range(number or gpus)] if gpus else ["cpu"] * (number or 1)


def default_template(config: Mapping[str, Any]) -> str:
    """The prompt template for a checkpoint, by the language model that its config.json names."""
    model_type = str(config.get("text_config", {}).get("model_type") or config.get("model_type", ""))
    return next((name for part, name in TEMPLATES.items() if part in model_type), DEFAULT_TEMPLATE)


def default_output(model_path: str, reduction: str | None = None) -> Path:
    """Where the results of a checkpoint go, and of a method in place of its own."""
    name = get_model_name_from_path(model_path)
    if reduction is not None:
        methods = ReductionConfig.parse(reduction).to_dict()
        own = json.dumps(methods, sort_keys=True)
        plain = all(method.keys() == {"name"} for method in methods.values())
        names = "-".join(method["name"] for method in methods.values()) or "none"
        name += f"-{names}" if plain else f"-{names}-{hashlib.sha256(own.encode()).hexdigest()[:6]}"
    return Path("outputs/eval") / name


def title_of_model(config: Mapping[str, Any]) -> str | None:
    """What the papers call a checkpoint with this config.json, such as LLaVA-1.5-7B; None for others."""
    inner = config.get("text_config", config)
    size = SIZES.get((inner.get("hidden_size", 4096), inner.get("num_hidden_layers", 32)))
    if size is None or "llama" not in str(inner.get("model_type", "llava_llama")):
        return None
    if config.get("mm_video_tower") or config.get("model_type") == "video_llava":
        return f"Video-LLaVA-{size}"
    tiled = config.get("image_aspect_ratio") == "anyres" or config.get("model_type") == "llava_next"
    return f"LLaVA-{'NeXT' if tiled else '1.5'}-{size}"


def run_tasks(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Answer and grade the questions of all tasks; what is there already is not done again.

    Returns:
        The results in the order of the tasks, as their files hold them.

    Raises:
        ValueError: a file, an image or the checkpoint can't be read, or a result of other settings lies in the way; it
            is named, before the model is opened.
    """
    checkpoint = _checkpoint(evaluation.source)
    with lock(evaluation.output / ".eval.lock", f"output {evaluation.output}"):
        tasks = [_prepare(evaluation, name, checkpoint) for name in dict.fromkeys(evaluation.tasks)]
        open_ones = [task for task in tasks if not _is_done(task, evaluation)]
        for task in open_ones:
            check_images(task.questions, task.run.options)
            task.run.folder.mkdir(parents=True, exist_ok=True)
        todo = [(task.run, _unanswered(task)) for task in open_ones]
        answer_all(evaluation.source, evaluation.devices, todo)
        for task in open_ones:
            _finish(task, evaluation, checkpoint)
        return [read_result(task.target) for task in tasks]


def _checkpoint(source: Source) -> dict[str, Any]:
    folder = local_folder(source.model_path)
    base = None if source.model_base is None else local_folder(source.model_base)
    config = read_json(folder / "config.json")
    return {
        "path": source.model_path,
        "name": get_model_name_from_path(source.model_path),
        "sha256": weights_hash(folder),
        "base": source.model_base,
        "base_sha256": None if base is None else weights_hash(base),
        "model": title_of_model(config),
        "template": default_template(config),
    }


def _prepare(evaluation: Evaluation, name: str, checkpoint: Mapping[str, Any]) -> _Prepared:
    task = get_task(name)
    options = replace(
        evaluation.options,
        image_folder=str(evaluation.data / task.folder / task.images),
        conv_mode=evaluation.conv_mode or task.templates.get(checkpoint["template"], checkpoint["template"]),
        max_new_tokens=evaluation.max_new_tokens or task.max_new_tokens,
    )
    run = TaskRun(name=name, data=evaluation.data, limit=evaluation.limit, options=options, folder=evaluation.output)
    questions = run.questions()
    source = evaluation.source
    settings = {
        **answer_settings(options),
        "questions_sha256": questions_hash(questions),
        "checkpoint_sha256": checkpoint["sha256"],
        "base_sha256": checkpoint["base_sha256"],
        "vision_tower": source.vision_tower,
        "asked_reduction": str(source.reduction) if source.reduction is not None else None,
        "asked_dtype": str(source.dtype).removeprefix("torch.") if source.dtype is not None else None,
    }
    mark = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    gathered = evaluation.output / f".{name}.{mark}.answers"
    return _Prepared(task, replace(run, folder=gathered), questions, settings, evaluation.output / name)


def _is_done(task: _Prepared, evaluation: Evaluation) -> bool:
    """Whether the result of these very settings is there.

    Raises:
        ValueError: one of other settings is there, or something that is no result, and is not to be replaced.
    """
    if not task.target.exists():
        return False
    try:
        result = read_result(task.target)
    except ValueError as error:
        if evaluation.overwrite:
            return False
        raise ValueError(f"{error}; choose another --output, or pass --overwrite to replace {task.target}") from error
    differing = _differing(task, result)
    if differing and not evaluation.overwrite:
        raise ValueError(
            f"{task.target} holds a result of other settings ({', '.join(differing)} differ): choose another --output, "
            "or pass --overwrite to replace it"
        )
    if differing or _wants_other_judge(task.task, result, evaluation.judge):
        return False
    logger.info("%s is there already: %s", task.run.name, task.target)
    return True


def _wants_other_judge(task: Task, result: Mapping[str, Any], judge: Judge | None) -> bool:
    return task.judged and judge is not None and result.get("judge") != judge.describe()


def _unanswered(task: _Prepared) -> list[int]:
    """Numbers of the questions without an answer; answers of a result that lacks only its grades are taken over."""
    answered = task.run.answered()
    if not answered and _lacks_only_grades(task):
        answered = _take_over(task)
    if answered:
        logger.info("%s: going on after %d of %d answers", task.run.name, len(answered), len(task.questions))
    return [number for number in range(len(task.questions)) if number not in answered]


def _differing(task: _Prepared, result: Mapping[str, Any]) -> list[str]:
    """The settings in which an earlier result is another one."""
    return [key for key, value in task.settings.items() if result["settings"].get(key) != value]


def _lacks_only_grades(task: _Prepared) -> bool:
    """Whether a result of these settings is there; a damaged one is none (`_is_done` has asked for leave)."""
    try:
        return not _differing(task, read_result(task.target))
    except ValueError:
        return False


def _take_over(task: _Prepared) -> dict[int, dict[str, Any]]:
    rows = {
        index: {"text": row["text"], **row["metadata"]}
        for index, (_, row) in enumerate(read_jsonl(task.target / ANSWERS_FILE))
    }
    lines = (json.dumps({"index": index, **row}, ensure_ascii=False) + "\n" for index, row in rows.items())
    (task.run.folder / "answers-before.jsonl").write_text("".join(lines), encoding="utf-8")
    model = read_result(task.target)["model"]
    (task.run.folder / MODEL_FILE).write_text(json.dumps(model), encoding="utf-8")
    return rows


def _finish(task: _Prepared, evaluation: Evaluation, checkpoint: Mapping[str, Any]) -> None:
    """Grade the answers of a task and write its folder."""
    answered = task.run.answered()
    rows = [answered[number] for number in range(len(task.questions))]
    answers = [str(row["text"]) for row in rows]
    grades = _grade(task.task, task.questions, answers, evaluation.judge)
    judge = evaluation.judge if task.task.judged else None
    model = read_json(task.run.folder / MODEL_FILE)
    result = {
        **task_facts(task.task, task.questions, evaluation.limit),
        "metrics": task.task.summarize(grades) if grades else {},
        "checkpoint": {key: value for key, value in checkpoint.items() if key != "template"},
        "model": model,
        "reduction": model["reduction"] or None,
        "settings": {
            **task.settings,
            "prompt": whole_prompt(task.questions[0], task.run.options),
            "batch_size": task.run.options.batch_size,
            "dtype": model["dtype"],
            "image_aspect_ratio": model["image_aspect_ratio"],
            **({"frames": model["frames"]} if any(question.videos for question in task.questions) else {}),
        },
        "judge": None if judge is None else judge.describe(),
        "visual_tokens": visual_tokens(rows),
        "versions": versions(),
        "commit": git_state(Path(__file__).resolve().parent),
        **speed(rows, len(evaluation.devices)),
        "flops_per_question": _flops(rows, evaluation.source, model["reduction"]),
    }
    with new_folder(task.target, overwrite=True) as folder:
        _write_answers(folder / ANSWERS_FILE, task.questions, rows, str(checkpoint["name"]))
        if grades:
            write_grades(folder / GRADES_FILE, task.questions, grades)
        files = task.task.write_submission(task.questions, answers, folder)
        result["submission"] = [file.relative_to(folder).as_posix() for file in files]
        (folder / RESULT_FILE).write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    shutil.rmtree(task.run.folder)


def _flops(rows: Sequence[Mapping[str, Any]], source: Source, reduction: Mapping[str, Any]) -> float | None:
    """Of a question on average; None where the formulas do not know this model or method."""
    try:
        return mean_flops(rows, open_model(local_folder(source.model_path), source.vision_tower), reduction)
    except (ValueError, OSError) as error:
        logger.warning("the result holds no FLOPs: %s", error)
        return None


def _grade(task: Task, questions: Sequence[Question], answers: Sequence[str], judge: Judge | None) -> list[Grade]:
    """The grades of all answers; none where a server scores, or a judge that is not there."""
    if task.main is None:
        return []
    if task.judged and judge is None:
        logger.warning("%s: a model grades its answers, and none is named (--judge-model): no score yet", task.name)
        return []
    if not task.judged:
        return [task.grade(question, answer) for question, answer in zip(questions, answers, strict=True)]
    with ThreadPoolExecutor(JUDGED_AT_ONCE) as pool:
        judged = pool.map(task.grade, questions, answers, repeat(judge))
        return list(tqdm(judged, total=len(questions), desc=f"{task.name}: judge", disable=None))


def _write_answers(path: Path, questions: Sequence[Question], rows: Sequence[Mapping[str, Any]], model_id: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        for question, row in zip(questions, rows, strict=True):
            line = answer_row(question, Answer(row["text"]), model_id)
            line["metadata"] = {key: value for key, value in row.items() if key != "text"}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def results_table(results: Sequence[Mapping[str, Any]]) -> Table:
    """A row for each result: score, questions, visual tokens an image, questions a second."""
    table = Table("task", "metric", "score", "questions", "tokens", "questions/s")
    for result in results:
        tokens, rate, main = result["visual_tokens"], result["questions_per_second"], result["main"]
        score = f"{result['metrics'][main]:.2f}" if main in result["metrics"] else _unscored(result)
        counted = f"{tokens['mean']:.1f} of {tokens['before_mean']:.0f}" if tokens else "-"
        speed_text = f"{rate:.1f}" if rate else "-"
        table.add_row(result["title"], main or "-", score, str(result["questions"]), counted, speed_text)
    return table


def _unscored(result: Mapping[str, Any]) -> str:
    return "to be submitted: " + ", ".join(result["submission"]) if result["submission"] else "not judged"
