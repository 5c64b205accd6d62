"""Score answers against the questions' right answers, by category, and print a table.

python -m llava.eval.accuracy --question-file Q --answers-file A [--answers-file B ...]
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from llava.eval.questions import Question, read_jsonl, read_questions

UNSORTED = "other"  # category of questions that name none


@dataclass(frozen=True)
class Score:
    """What became of a file of answers.

    Attributes:
        right, asked: number of questions by category, and of those the ones answered right.
        before, after: visual tokens of each image that was counted, without and with the reduction.
    """

    right: dict[str, int]
    asked: dict[str, int]
    before: list[int] = field(default_factory=list)
    after: list[int] = field(default_factory=list)

    @property
    def total(self) -> float:
        """Fraction of all questions answered right."""
        return sum(self.right.values()) / sum(self.asked.values())

    def accuracy(self, category: str) -> float:
        """Fraction of a category's questions answered right."""
        return self.right[category] / self.asked[category]


def normalize(answer: str) -> str:
    """An answer as it is compared: lower case, single spaces, no period at the end."""
    return " ".join(answer.lower().split()).removesuffix(".")


def score(questions: Iterable[Question], answers: Iterable[dict[str, Any]]) -> Score:
    """Compare answers with the right ones; equal after `normalize` is right.

    Args:
        questions: with `answer`, in any order.
        answers: rows of an answers file (question_id, text, metadata), one for each question.

    Raises:
        ValueError: a question has no right answer, not exactly one given answer, or the id of another; ids are
            named.
    """
    known = list(questions)
    repeated = next((name for name, count in Counter(q.question_id for q in known).items() if count > 1), None)
    if repeated is not None:
        raise ValueError(f"question_id {repeated!r} is that of several questions: their answers can't be told apart")
    given: dict[int | str, dict[str, Any]] = {}
    for row in answers:
        if row.get("question_id") in given:
            raise ValueError(f"question_id {row['question_id']!r} is answered twice")
        given[row.get("question_id", "")] = row
    right: dict[str, int] = {}
    asked: dict[str, int] = {}
    _check_ids({q.question_id for q in known}, set(given))
    for question in known:
        if question.answer is None:
            raise ValueError(f"question_id {question.question_id!r} has no right answer in the question file")
        category = question.category or UNSORTED
        asked[category] = asked.get(category, 0) + 1
        hit = normalize(str(given[question.question_id].get("text", ""))) == normalize(question.answer)
        right[category] = right.get(category, 0) + hit
    pairs = [pair for row in given.values() for pair in (row.get("metadata") or {}).get("visual_tokens", [])]
    return Score(right, asked, [before for before, _ in pairs], [after for _, after in pairs])


def _check_ids(asked: set[int | str], given: set[int | str]) -> None:
    for what, ids in (("not answered", asked - given), ("answered but not asked", given - asked)):
        if ids:
            named = ", ".join(sorted(map(repr, ids))[:5])
            raise ValueError(f"{len(ids)} questions are {what}, such as question_id {named}")


def score_files(question_file: str | Path, answers_file: str | Path) -> Score:
    """`score` of an answers file.

    Raises:
        ValueError: as `score`, and for a malformed file; the file is named.
    """
    try:
        return score(read_questions(question_file), (row for _, row in read_jsonl(answers_file)))
    except ValueError as error:
        raise ValueError(f"{answers_file}: {error}") from error


def spread(counts: Sequence[int]) -> str:
    """Mean of counts, with the smallest and largest where they differ; a dash for none."""
    if not counts:
        return "-"
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{fmean(counts):.1f} ({low}-{high})"


def accuracy_table(scores: dict[str, Score], title: str = "") -> Table:
    """A row for each named score: visual tokens an image, accuracy by category and in total, in percent."""
    categories = list(dict.fromkeys(c for one in scores.values() for c in one.asked))
    table = Table(title=title)
    table.add_column("")
    for name in ("tokens before", "tokens after", *categories, "all"):
        table.add_column(name, justify="right")
    for name, one in scores.items():
        cells = [f"{100 * one.accuracy(c):.0f}" if c in one.asked else "-" for c in categories]
        table.add_row(name, spread(one.before), spread(one.after), *cells, f"{100 * one.total:.1f}")
    return table


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see `accuracy_table`."""
    parser = argparse.ArgumentParser(description="Score answers by exact match.")
    parser.add_argument("--question-file", required=True)
    parser.add_argument("--answers-file", required=True, action="append", help="may be given several times")
    flags = parser.parse_args(argv)
    scores = {Path(file).stem: score_files(flags.question_file, file) for file in flags.answers_file}
    Console().print(accuracy_table(scores, "exact match, %"))


if __name__ == "__main__":
    main()
