"""Benchmarks end to end on stand-ins of their files: the same answers however a run is cut; what a result says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llava.cost import flops_per_question
from llava.eval import running
from llava.eval.answering import Answerer, VqaOptions
from llava.eval.judge import Judge
from llava.eval.questions import Question
from llava.eval.running import Evaluation, run_tasks
from llava.eval.sharding import Source, answer_all, cut, deal
from llava.eval.tasks import TASKS, get_task
from llava.eval.tasks.base import Grade, Needed, Task
from tests.endpoint import make_endpoints
from tests.standins import STANDINS, make
from tests.tiny_llava import save_tiny_llava

VIDEO = ("msvd_qa", "msrvtt_qa", "activitynet_qa", "tgif_qa")  # questions about clips
OPTIONS = VqaOptions(temperature=0.0, count_visual_tokens=True, batch_size=8)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llava(tmp_path_factory.mktemp("llava-tiny"))


@pytest.fixture
def endpoints() -> Iterator[Any]:
    yield from make_endpoints()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data folder with stand-ins of all tasks."""
    root = tmp_path_factory.mktemp("data")
    for name in TASKS:
        make(name, root)
    return root


def evaluation(checkpoint: Path, data: Path, output: Path, *tasks: str, **more: Any) -> Evaluation:
    source = Source(model_path=str(checkpoint))
    settings = {"options": OPTIONS, "max_new_tokens": 4, "data": data, "output": output} | more
    return Evaluation(source=source, tasks=tasks or tuple(TASKS), **settings)


def answers(output: Path, task: str) -> list[tuple[Any, str]]:
    rows = [json.loads(line) for line in (output / task / "answers.jsonl").read_text().splitlines()]
    return [(row["question_id"], row["text"]) for row in rows]


@pytest.fixture(scope="module")
def whole(checkpoint: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of all tasks, a question at a time."""
    output = tmp_path_factory.mktemp("whole")
    run_tasks(evaluation(checkpoint, data, output, options=replace(OPTIONS, batch_size=1)))
    return output


def test_every_task_has_a_stand_in() -> None:
    assert set(STANDINS) == set(TASKS)


@pytest.mark.parametrize("name", TASKS)
def test_a_result_says_what_it_depends_on(name: str, whole: Path) -> None:
    result = json.loads((whole / name / "result.json").read_text())
    task = get_task(name)
    assert result["questions"] == len(answers(whole, name)) > 0
    assert (result["task"], result["main"], result["limit"]) == (name, task.main, None)
    if task.main is not None and not task.judged:
        assert result["metrics"][task.main] >= 0
        assert set(task.published.values()) <= result["metrics"].keys()
        assert len((whole / name / "grades.jsonl").read_text().splitlines()) == result["questions"]
    assert result["reduction"]["encoder"]["name"] == "prumerge" and result["reduction"]["encoder"]["neighbours"] == 32
    assert "ASSISTANT:" in result["settings"]["prompt"] and "USER:" in result["settings"]["prompt"]
    assert len(result["checkpoint"]["sha256"]) == 64
    assert result["settings"]["temperature"] == 0 and result["settings"]["max_new_tokens"] == 4
    tokens = result["visual_tokens"]
    frames = result["settings"].get("frames", {"num_frames": 1})["num_frames"]
    assert frames == (8 if name in VIDEO else 1)
    assert tokens["before_mean"] == 16 * frames and sum(tokens["histogram"].values()) == tokens["images"]
    assert tokens["min"] <= tokens["mean"] <= tokens["max"] < 16 * frames
    assert result["versions"]["torch"] and result["seconds"] > 0 and result["questions_per_second"] > 0
    assert result["flops_per_question"] > 0
    assert all((whole / name / file).is_file() for file in result["submission"])
    assert not list(whole.glob(".*.answers"))


def test_two_processes_in_batches_give_the_same_answers(
    checkpoint: Path,
    data: Path,
    whole: Path,
    tmp_path: Path,
) -> None:
    results = run_tasks(evaluation(checkpoint, data, tmp_path, devices=("cpu", "cpu")))
    assert [result["devices"] for result in results] == [2] * len(TASKS)
    for name in TASKS:
        assert answers(tmp_path, name) == answers(whole, name), name
        one, other = (json.loads((folder / name / "result.json").read_text()) for folder in (whole, tmp_path))
        assert one["metrics"] == pytest.approx(other["metrics"], nan_ok=True)


PROGRAM = """
import sys, time
from pathlib import Path
from llava.eval import answering, sharding
from llava.eval.running import run_tasks
sys.path.insert(0, sys.argv[4])
from tests.test_eval_tasks import evaluation, OPTIONS
from dataclasses import replace
def slowly(answerer, batch, inner=answering.Answerer.answer_batch):
    time.sleep(0.2)
    return inner(answerer, batch)
answering.Answerer.answer_batch = slowly
run_tasks(evaluation(*map(Path, sys.argv[1:4]), options=replace(OPTIONS, batch_size=1)))
"""


def test_a_killed_run_goes_on(
    checkpoint: Path,
    data: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = str(Path(__file__).resolve().parent.parent)
    command = [sys.executable, "-c", PROGRAM, str(checkpoint), str(data), str(tmp_path), root]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    for _ in range(600):
        gathered = [file.read_text().count("\n") for file in tmp_path.glob(".*.answers/answers-*.jsonl")]
        if sum(gathered) >= 2:
            break
        time.sleep(0.1)
        assert process.poll() is None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = [line for file in tmp_path.glob(".*.answers/answers-*.jsonl") for line in file.read_text().splitlines()]
    assert len(kept) >= 2
    torn = next(tmp_path.glob(".*.answers/answers-*.jsonl"))
    torn.write_text(torn.read_text() + '{"index": 3, "te')
    asked = []
    monkeypatch.setattr(running, "answer_all", lambda *given: asked.append(given[2]) or answer_all(*given))
    run_tasks(evaluation(checkpoint, data, tmp_path))
    whole_number = sum(len(answers(whole, name)) for name in TASKS)
    assert sum(len(numbers) for _, numbers in asked[0]) == whole_number - len(kept)
    for name in TASKS:
        assert answers(tmp_path, name) == answers(whole, name), name


def test_what_is_there_is_not_done_again(
    checkpoint: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = run_tasks(evaluation(checkpoint, data, tmp_path, "pope"))
    monkeypatch.setattr(running, "answer_all", lambda *given: pytest.fail("asked") if given[2] else None)
    assert run_tasks(evaluation(checkpoint, data, tmp_path, "pope")) == first
    with pytest.raises(ValueError, match=r"pope holds a result of other settings \(max_new_tokens differ\).*overwrite"):
        run_tasks(evaluation(checkpoint, data, tmp_path, "pope", max_new_tokens=2))
    monkeypatch.undo()
    (again,) = run_tasks(evaluation(checkpoint, data, tmp_path, "pope", max_new_tokens=2, overwrite=True))
    assert again["settings"]["max_new_tokens"] == 2


@pytest.mark.parametrize("content", ['{"format": 1}', '{"form', None])
def test_a_damaged_result_is_named_and_can_be_replaced(
    checkpoint: Path, data: Path, tmp_path: Path, content: str | None
) -> None:
    file = tmp_path / "pope" / "result.json"
    file.parent.mkdir()
    if content is not None:
        run_tasks(evaluation(checkpoint, data, tmp_path, "pope", overwrite=True))
        file.write_text(content)
    with pytest.raises(ValueError, match=r"pope/result\.json.*--overwrite"):
        run_tasks(evaluation(checkpoint, data, tmp_path, "pope"))
    (result,) = run_tasks(evaluation(checkpoint, data, tmp_path, "pope", overwrite=True))
    assert result["questions"] == len(answers(tmp_path, "pope"))


def test_a_limit_is_kept_and_said(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    (result,) = run_tasks(evaluation(checkpoint, data, tmp_path, "pope", limit=2))
    assert (result["questions"], result["limit"]) == (2, 2)


def test_another_checkpoint_is_another_result(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    run_tasks(evaluation(checkpoint, data, tmp_path, "pope", limit=2))
    other = tmp_path / "model"
    other.mkdir()
    for file in checkpoint.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    weights = next(other.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match="checkpoint_sha256 differ"):
        run_tasks(
            replace(evaluation(checkpoint, data, tmp_path, "pope", limit=2), source=Source(model_path=str(other)))
        )


def test_answers_wait_for_a_judge(
    checkpoint: Path,
    data: Path,
    tmp_path: Path,
    endpoints: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (result,) = run_tasks(evaluation(checkpoint, data, tmp_path, "mmvet"))
    assert result["metrics"] == {} and result["judge"] is None
    before = answers(tmp_path, "mmvet")
    monkeypatch.setattr(
        running, "answer_all", lambda _source, _devices, todo: pytest.fail("asked") if todo[0][1] else 0
    )
    judge = Judge(model="judge", url=endpoints("0.5").url, cache=tmp_path / "verdicts")
    (result,) = run_tasks(evaluation(checkpoint, data, tmp_path, "mmvet", judge=judge))
    assert result["metrics"]["score"] == 50
    assert result["judge"] == {"model": "judge", "url": judge.url}
    assert answers(tmp_path, "mmvet") == before
    grade = json.loads((tmp_path / "mmvet" / "grades.jsonl").read_text().splitlines()[0])["grade"]
    assert grade["judge"] == "judge-0613"


def test_missing_files_are_named_with_their_places(data: Path, tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(
        ValueError, match=r"task pope: files are missing(.|\n)*pope/val2014  \(http://images.cocodataset"
    ):
        run_tasks(evaluation(checkpoint, tmp_path, tmp_path / "out", "pope"))
    with pytest.raises(ValueError, match=r"no task 'pop' \(did you mean pope\?\)"):
        run_tasks(evaluation(checkpoint, data, tmp_path / "out", "pop"))
    assert not (tmp_path / "out").exists()


def test_a_missing_image_is_found_before_the_model_is_opened(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make("pope", tmp_path)
    next((tmp_path / "pope" / "val2014").iterdir()).unlink()
    monkeypatch.setattr(running, "answer_all", lambda *_: pytest.fail("opened"))
    with pytest.raises(ValueError, match=r"question .*val2014"):
        run_tasks(evaluation(checkpoint, tmp_path, tmp_path / "out", "pope"))


def test_flops_follow_from_what_was_counted(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    (reduced,) = run_tasks(evaluation(checkpoint, data, tmp_path / "own", "pope"))
    source = Source(model_path=str(checkpoint), reduction="none")
    (full,) = run_tasks(replace(evaluation(checkpoint, data, tmp_path / "none", "pope"), source=source))
    rows = [json.loads(line) for line in (tmp_path / "none" / "pope" / "answers.jsonl").read_text().splitlines()]
    counted = [row["metadata"] for row in rows]
    assert all(1 <= row["new_tokens"] <= 4 and row["tiles"] == 1 and row["text_tokens"] > 30 for row in counted)
    expected = flops_per_question(
        checkpoint,
        text_tokens=round(fmean(row["text_tokens"] for row in counted)),
        new_tokens=round(fmean(row["new_tokens"] for row in counted)),
    )
    assert full["flops_per_question"] == pytest.approx(expected)
    assert reduced["flops_per_question"] < full["flops_per_question"]


def test_answers_end_with_their_first_end() -> None:
    answerer = SimpleNamespace(_eos=[2, 9])
    new = torch.tensor([[5, 6, 2, 2], [9, 0, 0, 0], [5, 6, 7, 8]])
    assert Answerer._lengths(answerer, new) == [3, 1, 4]


def test_the_toys_questions_by_category(data: Path) -> None:
    task = get_task("toy")
    first, *others = task.questions(data)
    assert (first.group, first.facts) == ("heldout/0.png", {"right": "yes", "category": "yes/no"})
    grades = [task.grade(first, " Yes. "), *(task.grade(question, "nothing") for question in others)]
    metrics = task.summarize(grades)
    assert (metrics["accuracy"], metrics["accuracy_yes/no"], metrics["accuracy_number"]) == (20, 100, 0)


def test_batches_are_dealt_in_turn() -> None:
    assert cut(range(5), 2) == [range(2), range(2, 4), range(4, 5)]
    assert deal(list(range(7)), 2, 2) == [[0, 1, 4, 5], [2, 3, 6]]
    assert deal([], 2, 2) == [[], []]


@pytest.mark.parametrize(
    ("config", "template"),
    [
        ({"model_type": "llava_llama"}, "vicuna_v1"),
        ({"model_type": "llava_mistral"}, "mistral_instruct"),
        ({"model_type": "llava", "text_config": {"model_type": "qwen2"}}, "qwen_1_5"),
    ],
)
def test_the_template_follows_the_language_model(config: dict[str, Any], template: str) -> None:
    assert running.default_template(config) == template


def test_papers_names_of_checkpoints() -> None:
    small = {"model_type": "llava_llama", "hidden_size": 4096, "num_hidden_layers": 32}
    assert running.title_of_model(small) == "LLaVA-1.5-7B"
    assert running.title_of_model({**small, "image_aspect_ratio": "anyres"}) == "LLaVA-NeXT-7B"
    assert running.title_of_model({**small, "hidden_size": 5120, "num_hidden_layers": 40}) == "LLaVA-1.5-13B"
    assert running.title_of_model({**small, "hidden_size": 64}) is None
    assert running.title_of_model({**small, "mm_video_tower": "tower"}) == "Video-LLaVA-7B"
    assert (
        running.title_of_model({"model_type": "video_llava", "text_config": {"model_type": "llama"}})
        == "Video-LLaVA-7B"
    )


class _Empty(Task):
    def read(self, folder: Path) -> list[Question]:
        return []


def test_a_task_without_questions_is_named(tmp_path: Path) -> None:
    task = _Empty(name="empty", title="Empty", folder="empty", needs=(Needed("x", "nowhere"),), main="accuracy")
    (tmp_path / "empty" / "x").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"task empty: .* holds no question"):
        task.questions(tmp_path)
    grades: list[Grade] = [{"score": 1}, {"score": 0.5}]
    assert task.summarize(grades) == {"accuracy": 75}
