"""A model that grades answers: asked over HTTP, again where it is busy, once for each question; and what it scores."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llava.eval.judge import Judge, Verdict
from llava.eval.tasks import get_task
from llava.eval.tasks.judged import llavabench, mmvet
from tests.endpoint import make_endpoints
from tests.standins.judged import STANDINS


@pytest.fixture
def endpoints() -> Iterator[Any]:
    yield from make_endpoints()


def test_a_busy_endpoint_is_asked_again(endpoints: Any) -> None:
    endpoint = endpoints(429, 500, "8 9")
    judge = Judge(model="judge", url=endpoint.url)
    assert judge.ask("Which?", system="Be fair.", temperature=0.2, max_tokens=7) == Verdict("8 9", "judge-0613")
    assert len(endpoint.requests) == 3
    request = endpoint.requests[-1]
    assert request["path"] == "/v1/chat/completions"
    assert (request["model"], request["temperature"], request["max_tokens"]) == ("judge", 0.2, 7)
    assert [m["role"] for m in request["messages"]] == ["system", "user"]


def test_a_verdict_is_asked_for_once(endpoints: Any, tmp_path: Path) -> None:
    endpoint = endpoints("1 2", "3 4")
    judge = Judge(model="judge", url=endpoint.url, cache=tmp_path / "verdicts")
    assert [judge.ask("Which?").text for _ in range(3)] == ["1 2"] * 3
    assert judge.ask("Which?", turn=1).text == "3 4"
    again = Judge(model="judge", url=endpoint.url, cache=tmp_path / "verdicts")
    assert again.ask("Which?") == Verdict("1 2", "judge-0613")
    assert len(endpoint.requests) == 2


def test_an_endpoint_that_refuses_is_named(endpoints: Any) -> None:
    endpoint = endpoints(401)
    with pytest.raises(ConnectionError, match=f"judge mine at {endpoint.url}.*goes on from here"):
        Judge(model="mine", url=endpoint.url).ask("Which?")
    assert len(endpoint.requests) == 1


def test_bad_settings_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ValueError, match="set OPENAI_API_KEY"):
        Judge(model="gpt-4")
    with pytest.raises(ValueError, match="expected http"):
        Judge(model="gpt-4", url="localhost:8000")


@pytest.mark.parametrize(
    ("verdict", "scores"),
    [
        ("8 9\nBoth are good.", (8, 9)),
        ("7.5, 6", (7.5, 6)),
        ("8", None),
        ("", None),
        ("8 9 10", None),
        ("Assistant 1: 8", None),
        ("\n8 9", None),
    ],
)
def test_scores_of_llava_bench(verdict: str, scores: tuple[float, float] | None) -> None:
    assert llavabench.parse_scores(verdict) == scores


@pytest.mark.parametrize(
    ("verdict", "score"), [("0.5", 0.5), ("1.0 |", 1), ("1.5", None), ("right", None), ("", None), ("-0.1", None)]
)
def test_scores_of_mm_vet(verdict: str, score: float | None) -> None:
    assert mmvet.parse_score(verdict) == score


def test_llava_bench(endpoints: Any, tmp_path: Path) -> None:
    STANDINS["llavabench"](tmp_path)
    task = get_task("llavabench")
    questions = task.questions(tmp_path)
    endpoint = endpoints("8 4", "no idea", "10 5", "5 5", "nothing", "nothing", "nothing")
    judge = Judge(model="judge", url=endpoint.url)
    grades = [task.grade(question, f"answer {n}", judge) for n, question in enumerate(questions)]
    assert [(g["reference"], g["answer"]) for g in grades] == [(8, 4), (10, 5), (5, 5), (None, None)]
    metrics = task.summarize(grades)
    assert metrics["score"] == pytest.approx(100 * 14 / 23)
    assert metrics["score_conv"] == 50 and metrics["score_detail"] == 50 and metrics["score_complex"] == 100
    assert metrics["unjudged"] == 1
    prompt = endpoint.requests[0]["messages"][1]["content"]
    parts = ["[Context]\nA picture called 001.jpg.", "[Question]\nWhat is number 0?", "[Assistant 1]\nIt is a 0."]
    places = [prompt.index(part) for part in [*parts, "[Assistant 2]\nanswer 0", "[System]\nGive both a number."]]
    assert places == sorted(places)


def test_mm_vet(endpoints: Any, tmp_path: Path) -> None:
    STANDINS["mmvet"](tmp_path)
    task = get_task("mmvet")
    questions = task.questions(tmp_path)
    endpoint = endpoints("1.0", "right", "0.5", "0.0", "no")
    judge = Judge(model="judge", url=endpoint.url)
    grades = [task.grade(question, f"x = {n}", judge) for n, question in enumerate(questions)]
    assert [grade["score"] for grade in grades] == [1, 0.5, 0, 0]
    assert task.summarize(grades) == {
        "score": 37.5,
        "score_math": 25,
        "score_ocr": 25,
        "score_rec": 50,
        "unjudged": 1,  # "no", six times
    }
    contents = [request["messages"][0]["content"] for request in endpoint.requests]
    assert contents[0] == "Question | Truth | Answer | Score\n\nWhat is x in 0? | -1 <AND> -5 | x = 0 | "
    assert contents[2].endswith("(digit): ")
    assert [request["temperature"] for request in endpoint.requests[4:]] == [0, 0, 0.5, 1, 1.5, 2]
    (file,) = task.write_submission(questions, ["a", "b", "c", "d"], tmp_path)
    assert json.loads(file.read_text()) == {"v1_0": "a", "v1_1": "b", "v1_2": "c", "v1_3": "d"}


def test_the_official_prompt_is_read_and_not_run(tmp_path: Path) -> None:
    file = tmp_path / "program.py"
    file.write_text("raise SystemExit\nprompt = 'Compare.'\n")
    assert mmvet.read_prompt(file) == "Compare."
    file.write_text("question = 'Compare.'\n")
    with pytest.raises(ValueError, match=r"program\.py.*there is none"):
        mmvet.read_prompt(file)
