"""Questions about clips with open answers, in Video-LLaVA's layout: a judge says whether an answer is right.

Video-LLaVA: https://arxiv.org/abs/2311.10122; the protocol is Video-ChatGPT's: https://arxiv.org/abs/2306.05424
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from llava.eval.questions import Question, read_json_list
from llava.eval.tasks.base import Grade, Needed, Task, percent

if TYPE_CHECKING:
    from llava.eval.judge import Judge

FOLDER = "GPT_Zero_Shot_QA"
QUESTIONS, ANSWERS, EVALUATOR = "test_q.json", "test_a.json", "eval_video_qa.py"
TURNS = 6  # as often a judge is asked that does not answer in the form; the official program asks without end
MOST_POINTS = 5
_NAMES = ("question", "answer", "pred")  # what the official program puts into its prompt


@dataclass(frozen=True, kw_only=True)
class VideoQa(Task):
    """Main metric: the share of answers that the judge calls right, in percent; `score` is its mean grade, 0 to 5.

    The judge's prompt is the official program's own. Answers without a verdict are left out of both, as there, and
    counted in `unjudged`.

    Attributes:
        part: folder of the questions, within the task's folder.
        prefix: what the names of files have in front of those in the questions.
    """

    part: str
    prefix: str = ""

    def read(self, folder: Path) -> list[Question]:
        """Questions with their right answers, which belong together by their ids, whatever their order."""
        prompt = read_prompt(folder / EVALUATOR)
        files = folder / self.part / QUESTIONS, folder / self.part / ANSWERS
        right = {}
        for place, row in read_json_list(files[1], "the answers, a list of {question_id, answer}"):
            right[_text(row, "question_id", place)] = _text(row, "answer", place)
        questions = []
        for place, row in read_json_list(files[0], "the questions, a list of {question_id, question, video_name}"):
            name, clip = _text(row, "question_id", place), self.prefix + _text(row, "video_name", place)
            if name not in right:
                raise ValueError(f"{files[1]} has no answer to question_id {name!r} of {files[0]}")
            facts = {"truth": right[name], "prompt": prompt}
            text = _text(row, "question", place)
            questions.append(Question(name, text, videos=(clip,), group=clip, facts=facts))
        return questions

    def grade(self, question: Question, answer: str, judge: Judge | None = None) -> Grade:
        """`score`, 1 or 0, and `points`, 0 to 5; None where the judge gave no verdict in six attempts."""
        assert judge is not None
        values = dict(zip(_NAMES, (question.text, question.facts["truth"], answer), strict=True))
        messages = {role: text.format(**values) for role, text in question.facts["prompt"].items()}
        verdict = None
        for turn in range(TURNS):
            reply = judge.ask(
                messages["user"], system=messages.get("system"), temperature=float(turn > 0), max_tokens=64, turn=turn
            )
            verdict = parse_verdict(reply.text)
            if verdict is not None:
                break
        right, points = verdict or (None, None)
        return {"score": None if right is None else float(right), "points": points, "judge": reply.model}

    def summarize(self, grades: Sequence[Grade]) -> dict[str, float]:
        """`accuracy`, the mean `score` and how many are `unjudged`."""
        judged = [grade for grade in grades if grade["score"] is not None]
        points = fmean(grade["points"] for grade in judged) if judged else float("nan")
        accuracy = percent(grade["score"] for grade in judged)
        return {"accuracy": accuracy, "score": points, "unjudged": float(len(grades) - len(judged))}


def parse_verdict(reply: str) -> tuple[bool, int] | None:
    """Whether an answer is right, and its points as a whole number, rounded down as in the official program.

    Args:
        reply: with {'pred': 'yes' or 'no', 'score': 0 to 5} in it; anything else is no verdict: None.
    """
    try:
        verdict = ast.literal_eval(reply[reply.index("{") : reply.rindex("}") + 1])
        said, points = str(verdict["pred"]).lower(), int(verdict["score"])
    except (ValueError, SyntaxError, TypeError, KeyError, OverflowError, MemoryError, RecursionError):
        return None
    if not 0 <= points <= MOST_POINTS or ("yes" not in said and "no" not in said):
        return None
    return "yes" in said, points


def read_prompt(file: Path) -> dict[str, str]:
    """The messages to the judge by role, from the official program, which is read and not run.

    Returns:
        Texts for `str.format`, with the names question, answer and pred.

    Raises:
        ValueError: there are none; the file is named.
    """
    try:
        nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    except (SyntaxError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: expected Video-LLaVA's program in Python ({error})") from error
    for node in nodes:
        if isinstance(node, ast.keyword) and node.arg == "messages" and isinstance(node.value, ast.List):
            found = dict(_message(entry, file) for entry in node.value.elts)
            if all("{" + name + "}" in found.get("user", "") for name in _NAMES):
                return found
    raise ValueError(
        f"{file}: expected Video-LLaVA's or Video-ChatGPT's program, in which messages with {', '.join(_NAMES)} are "
        "sent to a judge; there are none"
    )


def _message(node: ast.expr, file: Path) -> tuple[str, str]:
    """Role and text of a message that stands in a program."""
    if isinstance(node, ast.Dict) and all(isinstance(key, ast.Constant) for key in node.keys):
        parts: dict[Any, ast.expr] = dict(zip((key.value for key in node.keys), node.values, strict=True))  # type: ignore[union-attr]
        role, content = parts.get("role"), parts.get("content")
        if isinstance(role, ast.Constant) and content is not None:
            pieces = content.values if isinstance(content, ast.JoinedStr) else [content]
            return str(role.value), "".join(_piece(piece, file) for piece in pieces)
    raise ValueError(f"{file}: a message to the judge is no {{role, content}}")


def _piece(node: ast.expr, file: Path) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value).replace("{", "{{").replace("}", "}}")
    if isinstance(node, ast.FormattedValue) and isinstance(node.value, ast.Name) and node.value.id in _NAMES:
        return "{" + node.value.id + "}"
    raise ValueError(f"{file}: the prompt for the judge has something other than {', '.join(_NAMES)} in it")


def _text(row: dict[str, Any], key: str, place: str) -> str:
    value = row.get(key)
    if not isinstance(value, str | int) or isinstance(value, bool) or value == "":
        raise ValueError(f"{place}: {key!r} is missing or no text")
    return str(value)


_SOURCE = "https://github.com/PKU-YuanGroup/Video-LLaVA/blob/main/TRAIN_AND_VALIDATE.md"
_PROGRAM = (
    "videollava/eval/video/eval_video_qa.py of https://github.com/PKU-YuanGroup/Video-LLaVA, its prompt alone is read"
)


def _task(name: str, title: str, part: str, clips: str = "videos", prefix: str = "", known: bool = True) -> VideoQa:
    return VideoQa(
        name=name,
        title=title,
        folder=FOLDER,
        needs=(
            *(Needed(f"{part}/{file}", f"{part} of {_SOURCE}") for file in (QUESTIONS, ANSWERS, clips)),
            Needed(EVALUATOR, _PROGRAM),
        ),
        main="accuracy",
        published={title: "accuracy", f"{title} score": "score"} if known else {},
        images=f"{part}/{clips}",
        templates={"vicuna_v1": "llava_v1"},
        max_new_tokens=1024,
        judged=True,
        part=part,
        prefix=prefix,
    )


TASKS = (
    _task("msvd_qa", "MSVD-QA", "MSVD_Zero_Shot_QA"),
    _task("msrvtt_qa", "MSRVTT-QA", "MSRVTT_Zero_Shot_QA"),
    _task("activitynet_qa", "ActivityNet-QA", "Activitynet_Zero_Shot_QA", "all_test", "v_"),
    _task("tgif_qa", "TGIF-QA", "TGIF_Zero_Shot_QA", "mp4", known=False),
)
