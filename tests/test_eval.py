"""Question answering and scoring: LLaVA's files in, LLaVA's files out, resumable, and clear errors."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest
import torch
from PIL import Image
from rich.console import Console

from llava.eval import accuracy, model_vqa
from llava.eval.answering import Answer, Answerer, Batch, VqaOptions
from llava.eval.questions import Question, get_chunk, read_questions
from llava.model.builder import load_pretrained_model
from llava.video import Sampling
from tests.standins.video_qa import write_clip
from tests.tiny_llava import save_tiny_llava

PATCHES = 16


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaVA of 4 x 4 patches that reduces with PruMerge, in a folder."""
    return save_tiny_llava(tmp_path_factory.mktemp("llava-tiny"))


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Six questions: one image, two images and none, in turn."""
    for index in range(3):
        Image.new("RGB", (40 + 10 * index, 50), (80 * index, 90, 10)).save(tmp_path / f"{index}.png")
    images = ["0.png", ["1.png", "2.png"], None]
    rows = [
        {"question_id": i, "image": images[i % 3], "text": f"How many objects are there? {i}", "answer": "2"}
        for i in range(6)
    ]
    rows = [{k: v for k, v in row.items() if v is not None} for row in rows]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "questions.jsonl"


def ask(checkpoint: Path, questions: Path, name: str, *more: str) -> list[dict]:
    answers = questions.parent / f"{name}.jsonl"
    flags = {
        "--model-path": checkpoint,
        "--image-folder": questions.parent,
        "--question-file": questions,
        "--answers-file": answers,
        "--temperature": 0,
        "--max_new_tokens": 5,
    }
    model_vqa.main([str(part) for pair in flags.items() for part in pair] + list(more))
    assert not list(questions.parent.glob("*.partial"))
    return [json.loads(line) for line in answers.read_text().splitlines()]


def test_a_link_to_the_answers_stays_one(checkpoint: Path, questions: Path, tmp_path: Path) -> None:
    link = tmp_path / "answers.jsonl"
    link.symlink_to(tmp_path / "elsewhere.jsonl")
    options = VqaOptions(image_folder=str(questions.parent), conv_mode="v1", max_new_tokens=1)
    model_vqa.evaluate(str(checkpoint), questions, link, options=options, device="cpu")
    assert link.is_symlink()
    assert link.read_text().count("question_id") == len(questions.read_text().splitlines())


def test_answers_have_llavas_format(checkpoint: Path, questions: Path) -> None:
    rows = ask(checkpoint, questions, "answers", "--count-visual-tokens")
    assert [set(row) for row in rows] == [{"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}] * 6
    assert [row["question_id"] for row in rows] == list(range(6))
    assert rows[0]["prompt"] == "How many objects are there? 0"
    assert {row["model_id"] for row in rows} == {"model"}
    counts = [row["metadata"]["visual_tokens"] for row in rows]
    assert [len(count) for count in counts] == [1, 2, 0] * 2
    assert all(before == PATCHES and after < PATCHES for row in counts for before, after in row)


def test_an_answer_does_not_depend_on_its_batch(checkpoint: Path, questions: Path) -> None:
    alone = ask(checkpoint, questions, "alone", "--batch-size", "1")
    together = ask(checkpoint, questions, "together", "--batch-size", "6")
    assert [row["text"] for row in alone] == [row["text"] for row in together]


def test_chunks_together_are_the_whole(checkpoint: Path, questions: Path) -> None:
    chunks = [
        row["question_id"]
        for i in range(4)
        for row in ask(checkpoint, questions, f"chunk{i}", "--num-chunks", "4", "--chunk-idx", str(i))
    ]
    assert chunks == list(range(6))


def test_without_images_no_tokens_are_visual(checkpoint: Path, questions: Path) -> None:
    rows = ask(checkpoint, questions, "blind", "--no-images", "--count-visual-tokens")
    assert all(row["metadata"]["visual_tokens"] == [] for row in rows)


def test_questions_about_clips(checkpoint: Path, questions: Path) -> None:
    """Alone, with pictures and beside questions without one; `--num-frames` in place of the checkpoint's 8."""
    rows = [
        {"question_id": 0, "video": ["frames"], "text": "<video>\nWhat moves?"},
        {
            "question_id": 1,
            "video": [["2.png", "0.png"], "frames"],
            "image": "1.png",
            "text": "What is in all of them?",
        },
        {"question_id": 2, "text": "Nothing?"},
        {"question_id": 3, "image": "2.png", "text": "What?"},
    ]
    write_clip(questions.parent / "frames", 3, frames=6)
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("--count-visual-tokens", "--video-folder", str(questions.parent), "--num-frames", "3")
    alone = ask(checkpoint, questions, "alone", *flags, "--batch-size", "1")
    together = ask(checkpoint, questions, "together", *flags, "--batch-size", "4")
    assert [row["text"] for row in alone] == [row["text"] for row in together]
    assert [row["prompt"] for row in alone][:2] == ["What moves?", "What is in all of them?"]
    for row in alone, together:
        counts = [one["metadata"]["visual_tokens"] for one in row]
        assert [[before for before, _ in count] for count in counts] == [
            [3 * PATCHES],
            [PATCHES, 3 * PATCHES, 3 * PATCHES],
            [],
            [PATCHES],
        ]
        assert all(0 < after < before for count in counts for before, after in count)
    usual = ask(checkpoint, questions, "usual", "--count-visual-tokens", "--max-frames", "5", "--video-fps", "1")
    assert usual[0]["metadata"]["visual_tokens"][0][0] == 5 * PATCHES  # pictures have no times: all, but for the most
    with pytest.raises(ValueError, match=r"(?s)question 0: .*nowhere"):
        ask(checkpoint, questions, "missing", "--video-folder", str(questions.parent / "nowhere"))


def test_clips_are_shown_as_the_checkpoint_was_trained() -> None:
    config = SimpleNamespace(num_frames=4, video_fps=2.0, max_frames=9)
    asked = {"num_frames": 6}, {"video_fps": 1.0}, {"max_frames": 3}, {}
    given = [VqaOptions(**each).sampling(config) for each in asked]
    assert given == [Sampling(6, None, 9), Sampling(4, 1.0, 9), Sampling(4, 2.0, 3), Sampling(4, 2.0, 9)]
    assert VqaOptions().sampling(SimpleNamespace()) == Sampling(8)


def test_reduction_can_be_switched_off(checkpoint: Path, questions: Path) -> None:
    rows = ask(checkpoint, questions, "full", "--reduction", "none", "--count-visual-tokens")
    assert rows[0]["metadata"]["visual_tokens"] == [[PATCHES, PATCHES]]


def test_an_interrupted_run_goes_on(checkpoint: Path, questions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, model, processor, _ = load_pretrained_model(checkpoint, dtype=torch.float32)
    options = VqaOptions(image_folder=str(questions.parent), batch_size=2, max_new_tokens=3)
    answerer = Answerer(tokenizer, model, processor, options)
    target, asked, calls = questions.parent / "answers.jsonl", read_questions(questions), []

    def answer(batch: Batch) -> list[Answer]:
        numbers = [int(text[-1]) for text in batch.texts]
        calls.append(numbers)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return [Answer(f"answer {number}") for number in numbers]

    monkeypatch.setattr(answerer, "answer_batch", answer)
    with pytest.raises(KeyboardInterrupt):
        model_vqa.answer_questions(answerer, asked, target, "tiny", "run")
    assert not target.exists()
    (partial,) = questions.parent.glob("*.partial")
    partial.write_text(partial.read_text() + '{"question_id": 4, "te')  # killed while writing
    model_vqa.answer_questions(answerer, asked, target, "tiny", "run")
    assert calls == [[0, 1], [2, 3], [4, 5], [4, 5]]
    assert [json.loads(line)["text"] for line in target.read_text().splitlines()] == [f"answer {i}" for i in range(6)]
    model_vqa.answer_questions(answerer, asked, target, "tiny", "another run")
    assert calls[4:] == [[0, 1], [2, 3], [4, 5]]


def test_a_missing_image_is_named(checkpoint: Path, questions: Path) -> None:
    (questions.parent / "2.png").unlink()
    with pytest.raises(ValueError, match=r"2\.png"):
        ask(checkpoint, questions, "answers")


@pytest.mark.parametrize("kind", ["torn", "pipe", "URL", "outside"])
def test_an_image_that_cannot_be_asked_about_is_named_with_its_question(
    kind: str, checkpoint: Path, questions: Path
) -> None:
    image = questions.parent / "1.png"
    if kind == "torn":
        image.write_bytes(image.read_bytes()[:60])
    elif kind == "pipe":
        image.unlink()
        os.mkfifo(image)
    else:
        place = {"URL": "memory://1.png", "outside": "/dev/null"}[kind]
        questions.write_text(questions.read_text().replace("1.png", place))
    reason = {"torn": "truncated", "pipe": "a pipe", "URL": "--image_access remote", "outside": "--image_access disk"}
    with pytest.raises(ValueError, match=rf"^question 1: image .*{reason[kind]}"):
        ask(checkpoint, questions, "answers")
    if kind != "torn":  # found before a model is opened
        with pytest.raises(ValueError, match=r"^question 1: image"):
            ask(Path("no checkpoint"), questions, "answers")


def test_remote_images_are_asked_about(checkpoint: Path, questions: Path) -> None:
    local = ask(checkpoint, questions, "local")
    store = fsspec.filesystem("memory")
    for index in range(3):
        store.pipe(f"/vqa/{index}.png", (questions.parent / f"{index}.png").read_bytes())
    answers = ask(checkpoint, questions, "folder", "--image-folder", "memory://vqa")
    assert [row["text"] for row in answers] == [row["text"] for row in local]
    questions.write_text(questions.read_text().replace('"0.png"', '"memory://vqa/0.png"'))
    answers = ask(checkpoint, questions, "named", "--image-access", "remote")
    assert [row["text"] for row in answers] == [row["text"] for row in local]
    store.store.clear()


def test_a_question_id_may_repeat(tmp_path: Path) -> None:
    """LLaVA's files of TextVQA and MME name a question by its image, about which there are several."""
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(f'{{"question_id": "a/0.png", "text": "{text}"}}\n' for text in "ab"))
    assert [question.text for question in read_questions(file)] == ["a", "b"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question_id": 1, "text": "a"', "line 2: not valid JSON"),
        ("[1]", "line 2: expected a JSON object, got list"),
        ('{"text": "a"}', "line 2: 'question_id' is missing"),
        ('{"question_id": 1}', "line 2: 'text' is missing"),
        ('{"question_id": 1, "text": "a", "image": [3]}', "line 2: 'image' must be a file name"),
        ('{"question_id": 1, "text": "a", "image": 3}', "line 2: 'image' must be a file name"),
        ('{"question_id": 1, "text": "a", "image": {"a": 1}}', "line 2: 'image' must be a file name"),
        ('{"question_id": 1, "text": "a", "image": [""]}', "line 2: 'image' must be a file name"),
        ('{"question_id": 1, "text": "a", "video": [3]}', 'line 2: "video" is'),
        ('{"question_id": true, "text": "a"}', "line 2: 'question_id' is missing or of the wrong type"),
        ('{"question_id": 1, "text": "\\ud800"}', "line 2: 'text' holds half a character"),
        ("[" * 100_000, "line 2: it is nested too deeply"),
        ("1" * 5000, "line 2: .*4300 digits"),
        ("\udcff", "line 2: .*can't decode byte 0xff"),
    ],
)
def test_bad_questions_are_named(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text('{"question_id": 0, "text": "a"}\n' + line + "\n", errors="surrogateescape")
    with pytest.raises(ValueError, match=r"questions\.jsonl, " + message):
        read_questions(file)


def test_missing_and_empty_question_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"empty\.jsonl holds no question"):
        read_questions(tmp_path / "empty.jsonl")
    with pytest.raises(ValueError, match=r"none\.jsonl does not exist"):
        read_questions(tmp_path / "none.jsonl")


@pytest.mark.parametrize(("chunks", "index"), [(0, 0), (2, 2), (2, -1)])
def test_an_impossible_chunk_is_an_error(chunks: int, index: int) -> None:
    with pytest.raises(ValueError, match="chunk_idx"):
        get_chunk([1, 2, 3], chunks, index)


@pytest.mark.parametrize(
    "wrong",
    [{"batch_size": 0}, {"temperature": -1}, {"conv_mode": "nobody"}, {"image_access": "all"}, {"num_frames": 0}],
)
def test_impossible_options_are_errors(wrong: dict) -> None:
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        VqaOptions(**wrong)


QUESTIONS = [
    Question(0, "", answer="red", category="color"),
    Question(1, "", answer="a red circle", category="color"),
    Question("x", "", answer="2"),
]


def given(*texts: str) -> list[dict]:
    ids = [question.question_id for question in QUESTIONS]
    return [{"question_id": i, "text": text} for i, text in zip(ids, texts, strict=True)]


def test_score_counts_by_category() -> None:
    result = accuracy.score(QUESTIONS, reversed(given(" Red. ", "a  red ring", "2")))
    assert (result.right, result.asked) == ({"color": 1, "other": 1}, {"color": 2, "other": 1})
    assert result.accuracy("color") == 0.5
    assert result.total == pytest.approx(2 / 3)


def test_score_demands_one_answer_for_each_question() -> None:
    with pytest.raises(ValueError, match="1 questions are not answered, such as question_id 'x'"):
        accuracy.score(QUESTIONS, given("red", "", "")[:2])
    with pytest.raises(ValueError, match="answered but not asked"):
        accuracy.score(QUESTIONS[:2], given("red", "", ""))
    with pytest.raises(ValueError, match="question_id 0 is answered twice"):
        accuracy.score(QUESTIONS, given("red", "", "") * 2)
    with pytest.raises(ValueError, match="question_id 0 is that of several questions"):
        accuracy.score([*QUESTIONS, Question(0, "", answer="blue")], given("red", "", ""))
    with pytest.raises(ValueError, match="question_id 5 has no right answer"):
        accuracy.score([Question(5, "")], [{"question_id": 5, "text": ""}])


def test_the_table_shows_measured_tokens() -> None:
    rows = given("red", "a red circle", "3")
    rows[0]["metadata"] = {"visual_tokens": [[64, 7], [64, 10]]}
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(accuracy.accuracy_table({"run": accuracy.score(QUESTIONS, rows)}, "title"))
    text = console.export_text()
    for cell in ("title", "run", "color", "other", " 64 ", "8.5 (7-10)", " 100 ", " 0 ", " 66.7 "):
        assert cell in text


def test_accuracy_names_the_broken_file(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"question_id": 0, "text": "a", "answer": "b"}\n')
    (tmp_path / "a.jsonl").write_text("{}\n{")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2"):
        accuracy.score_files(tmp_path / "q.jsonl", tmp_path / "a.jsonl")
