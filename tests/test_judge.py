"""A model that grades answers: asked over HTTP, again where it is busy, once for each question; and what it scores."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llava.eval.judge import Judge, Verdict
from llava.eval.tasks import get_task
from llava.eval.tasks.judged import llavabench, mmvet, video_qa
from tests.endpoint import make_endpoints
from tests.standins import STANDINS


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


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("{'pred': 'yes', 'score': 4}", (True, 4)),
        ('```python\n{"pred": "No", "score": 4.8}\n```', (False, 4)),
        ("{'pred': 'yes', 'score': '5'}", (True, 5)),
        ("yes, 4", None),
        ("{'pred': 'perhaps', 'score': 4}", None),
        ("{'pred': 'yes', 'score': 6}", None),
        ("{'pred': 'yes'}", None),
        ("{'pred', 'score'}", None),
        ("{'pred': 'yes', 'score': 1e999}", None),
        ("} {", None),
        ("{" * 5000 + "}", None),
    ],
)
def test_verdicts_about_clips(reply: str, verdict: tuple[bool, int] | None) -> None:
    assert video_qa.parse_verdict(reply) == verdict


@pytest.mark.parametrize("name", ["msvd_qa", "activitynet_qa"])
def test_answers_about_clips(name: str, endpoints: Any, tmp_path: Path) -> None:
    STANDINS[name](tmp_path)
    task = get_task(name)
    questions = task.questions(tmp_path)
    prefix = "v_" if name == "activitynet_qa" else ""
    assert [question.videos for question in questions] == [(f"{prefix}clip{n % 2}.x",) for n in range(4)]
    yes, no = "{'pred': 'yes', 'score': 5}", "{'pred': 'no', 'score': 2.9}"
    endpoint = endpoints(yes, "hm", no, yes, "hm")
    judge = Judge(model="judge", url=endpoint.url)
    grades = [task.grade(question, f"{{it}} {n}", judge) for n, question in enumerate(questions)]
    assert [(grade["score"], grade["points"]) for grade in grades] == [(1, 5), (0, 2), (1, 5), (None, None)]
    assert {grade["judge"] for grade in grades} == {"judge-0613"}
    assert task.summarize(grades) == {"accuracy": pytest.approx(200 / 3), "score": 4, "unjudged": 1}
    assert task.summarize(grades[3:])["unjudged"] == 1
    system, user = endpoint.requests[0]["messages"]
    assert (system["role"], system["content"]) == ("system", "You compare answers.")
    # The right answer is that of the question's id, and not of its place in the file.
    expected = "Asked:\nwhat happens in 0? Right: thing 0 Given: {it} 0\nReply as {'pred': 'yes', 'score': 4}."
    assert user["content"] == expected
    assert [request["temperature"] for request in endpoint.requests[:3]] == [0, 0, 1]


def test_answers_that_belong_to_no_question_are_named(tmp_path: Path) -> None:
    STANDINS["msvd_qa"](tmp_path)
    file = tmp_path / "GPT_Zero_Shot_QA" / "MSVD_Zero_Shot_QA" / "test_a.json"
    file.write_text(json.dumps([{"question_id": "other", "answer": "red"}]))
    with pytest.raises(ValueError, match=r"test_a\.json has no answer to question_id '0_0'"):
        get_task("msvd_qa").questions(tmp_path)
    file.write_text(json.dumps([{"question_id": "0_0"}]))
    with pytest.raises(ValueError, match=r"test_a\.json, entry 0: 'answer' is missing"):
        get_task("msvd_qa").questions(tmp_path)


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("send(text='compare')", "there are none"),
        ("send(messages=[{'role': 'user', 'content': 'compare'}])", "there are none"),
        ("send(messages=[{'role': 'user', 'content': f'{exit()}'}])", "something other than question"),
        ("send(messages=[3])", "no {role, content}"),
        ("send(", "in Python"),
    ],
)
def test_a_program_without_a_prompt_is_named(program: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "eval_video_qa.py").write_text(program)
    with pytest.raises(ValueError, match=rf"eval_video_qa\.py: .*{message}"):
        video_qa.read_prompt(tmp_path / "eval_video_qa.py")
