"""`result.json`: what a checkpoint scored on a task, and everything that the figure depends on."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from llava.cost import flops_per_question
from llava.data.preprocessing import build_prompt
from llava.eval.answering import VqaOptions
from llava.eval.questions import Question, read_jsonl
from llava.eval.tasks.base import Grade, Task

RESULT_FILE = "result.json"
GRADES_FILE = "grades.jsonl"
ANSWERS_FILE = "answers.jsonl"
FORMAT = 1
# What a result must hold to be read; a file may be damaged, or written by hand.
_NEEDED = {"task": str, "metrics": dict, "published": dict, "questions": int, "checkpoint": dict, "settings": dict}
# Options that say how fast answers come, not which.
_OF_SPEED = ("batch_size", "num_workers", "count_visual_tokens", "image_folder", "image_access", "video_folder")


def answer_settings(options: VqaOptions) -> dict[str, Any]:
    """The options that answers depend on."""
    return {name: value for name, value in asdict(options).items() if name not in _OF_SPEED}


def questions_hash(questions: Iterable[Question]) -> str:
    """A hash of what is asked: questions and names of images and clips, in order.

    Of images that a file holds it is their content.
    """
    digest = hashlib.sha256()
    for question in questions:
        clips = [question.videos] if question.videos else []  # results without a clip keep their hash
        digest.update(json.dumps([question.question_id, question.text, list(question.images), *clips]).encode())
        for picture in question.pictures:
            digest.update(hashlib.sha256(picture).digest())
    return digest.hexdigest()


def visual_tokens(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any] | None:
    """How many visual tokens images and clips had, with and without the reduction; None where there was none.

    Args:
        rows: answers with `visual_tokens`, pairs (before, after) for each image and clip.
    """
    pairs = [pair for row in rows for pair in row["visual_tokens"] or ()]
    if not pairs:
        return None
    before, after = zip(*pairs, strict=True)
    return {
        "images": len(pairs),
        "before_mean": fmean(before),
        "mean": fmean(after),
        "min": min(after),
        "max": max(after),
        "histogram": {str(count): images for count, images in sorted(Counter(after).items())},
    }


def speed(rows: Sequence[Mapping[str, Any]], devices: int) -> dict[str, Any]:
    """Seconds that devices spent on the answers, of all together, and questions a second of one of them."""
    seconds = sum(row["seconds"] for row in rows)
    return {"seconds": seconds, "questions_per_second": len(rows) / seconds if seconds else None, "devices": devices}


def mean_flops(rows: Sequence[Mapping[str, Any]], model: Any, reduction: Mapping[str, Any]) -> float:
    """FLOPs of a question on average, by the formulas of `llava.cost` and what was counted.

    Args:
        rows: answers, with the fields of `llava.eval.answering.Answer`.
        model: from `llava.cost.open_model`.
        reduction: methods by site, with their options.

    Raises:
        ValueError: a method that the formulas do not know.
    """
    images = [len(row["visual_tokens"] or ()) for row in rows]
    tokens = sum(after for row in rows for _, after in row["visual_tokens"] or ())
    return flops_per_question(
        model,
        reduction or None,
        image_tokens=tokens / len(rows),
        text_tokens=round(fmean(row["text_tokens"] for row in rows)),
        new_tokens=max(1, round(fmean(row["new_tokens"] for row in rows))),
        images=round(fmean(images)),
        tiles=round(sum(row["tiles"] for row in rows) / max(1, sum(images))) or None,
    )


def whole_prompt(question: Question, options: VqaOptions, config: Mapping[str, Any] | None = None) -> str:
    """A question as the model reads it, `<image>` where an image stands and `<video>` where a clip."""
    if options.no_images:
        return build_prompt(question.text, options.conv_mode, 0)
    images, clips = len(question.images) + len(question.pictures), len(question.videos)
    return build_prompt(question.text, options.conv_mode, images, num_videos=clips)


def write_grades(path: Path, questions: Sequence[Question], grades: Sequence[Grade]) -> None:
    """A line for each question: question_id, group and grade."""
    with path.open("w", encoding="utf-8") as file:
        for question, grade in zip(questions, grades, strict=True):
            row = {"question_id": question.question_id, "group": question.group, "grade": grade}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def task_facts(task: Task, questions: Sequence[Question], limit: int | None) -> dict[str, Any]:
    """What a result says of its task."""
    return {
        "format": FORMAT,
        "task": task.name,
        "title": task.title,
        "main": task.main,
        "published": dict(task.published),
        "questions": len(questions),
        "limit": limit,
    }


def read_result(folder: Path) -> dict[str, Any]:
    """The result that lies in a folder.

    Raises:
        ValueError: there is none, or it is damaged or of another format; the file is named.
    """
    file = folder / RESULT_FILE
    if not file.is_file():
        raise ValueError(f"{file} does not exist: {folder} holds no result of llava eval --task")
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error})") from error
    if not isinstance(result, dict) or result.get("format") != FORMAT:
        raise ValueError(f"{file} is no result of this program's format {FORMAT}; evaluate again")
    for key, kind in _NEEDED.items():
        if not isinstance(result.get(key), kind):
            raise ValueError(f"{file}: '{key}' is missing or of another type; evaluate the task again")
    return result


def read_grades(folder: Path) -> list[dict[str, Any]]:
    """The rows of a folder's grades, {question_id, group, grade}; none where a server scores."""
    file = folder / GRADES_FILE
    return [row for _, row in read_jsonl(file)] if file.is_file() else []
