"""Benchmarks with short answers: how they are read, asked, scored and submitted."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from llava.eval.questions import Question
from llava.eval.scoring.anls import anls, edit_distance
from llava.eval.scoring.relaxed import relaxed_match
from llava.eval.scoring.vqa import agreement, normalize, official_form
from llava.eval.tasks import get_task
from llava.eval.tasks.short_answer.gqa import prediction
from llava.eval.tasks.short_answer.textvqa import bare_question
from tests.conftest import ROOT
from tests.standins import make
from tests.standins.short_answer import STANDINS

SHORT = "Answer the question using a single word or phrase."
SERVERS = {"vqav2", "vizwiz", "docvqa_test", "infovqa_test"}
MADE: dict[str, Any] = json.loads((ROOT / "tests/data/short_answers.json").read_text(encoding="utf-8"))


def wide(digits: str) -> str:
    """The fullwidth digits of East Asian text."""
    return "".join(chr(ord(digit) - ord("0") + 0xFF10) for digit in digits)


def lmms(module: str, function: str) -> Any:
    """A function of lmms-eval."""
    pytest.importorskip("lmms_eval", reason="lmms-eval is not installed")
    return getattr(import_module(f"lmms_eval.{module}"), function)


def asked(name: str, root: Path) -> list[Question]:
    """The questions of a task's stand-in."""
    make(name, root)
    return get_task(name).questions(root)


def scored(name: str, questions: list[Question], answers: list[str]) -> dict[str, float]:
    """The metrics of answers."""
    task = get_task(name)
    return task.summarize([task.grade(question, answer) for question, answer in zip(questions, answers, strict=True)])


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("", ""),
        ("The Cat.", "cat"),
        ("a an the", ""),
        ("two dogs", "2 dogs"),
        ("None", "0"),
        ("eleven", "eleven"),
        ("dont", "don't"),
        ("couldn'tve", "couldn't've"),
        ("couldntve", "couldntve"),
        ("it's", "it 's"),
        ("t-shirt", "t shirt"),
        ("t-shirt - red", "tshirt red"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("U.S.A.", "usa"),
        ("stop!", "stop"),
        ("red,\n blue\t?", "red blue"),
        (f"{wide('12')}.", wide("12")),
        (f"{wide('3')}.{wide('5')}.", f"{wide('3')}.{wide('5')}"),
        ("10:30", "10:30"),
    ],
)
def test_llava_normalisation(text: str, form: str) -> None:
    assert normalize(text) == form


def test_official_form_keeps_what_only_llava_changes() -> None:
    assert official_form("It's 1,000") == "it's 1000"  # the comma stands in a number: all punctuation goes
    assert official_form("It's 1,000 t-shirts") == "it's 1000 tshirts"
    assert official_form("red,blue") == "red blue"
    assert official_form(f"{wide('1')},{wide('000')}") == wide("1000")


@pytest.mark.parametrize(("same", "value"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_agreement_is_the_mean_over_nine_others(same: int, value: float) -> None:
    assert agreement("red", ["red"] * same + ["blue"] * (10 - same)) == pytest.approx(value)


def test_annotators_who_tie() -> None:
    answers = ["red"] * 5 + ["blue"] * 5
    assert agreement("red", answers) == agreement("blue", answers) == 1
    assert agreement("red blue", answers) == 0
    assert agreement("", ["", "", "red"]) == pytest.approx((1 / 3 + 1 / 3 + 2 / 3) / 3)


def test_edit_distance() -> None:
    assert edit_distance("kitten", "sitting") == 3
    assert edit_distance("", "abc") == edit_distance("abc", "") == 3
    assert edit_distance("", "") == 0


@pytest.mark.parametrize(
    ("answer", "right", "value"),
    [
        ("Dakota", ["dakota"], 1.0),
        ("  north   dakota ", ["North Dakota"], 1.0),
        ("dakotas", ["dakota"], 6 / 7),
        ("nokia", ["dakota", "Nokia"], 1.0),
        ("abcd", ["abxy"], 0.5),
        ("abcd", ["axyz"], 0.0),
        ("", ["dakota"], 0.0),
        ("", [""], 1.0),
        (wide("12"), ["12"], 0.0),
    ],
)
def test_anls(answer: str, right: list[str], value: float) -> None:
    assert anls(answer, right) == pytest.approx(value)


@pytest.mark.parametrize(
    ("answer", "right", "hit"),
    [
        ("105", "100", True),
        ("95", "100", True),
        ("106", "100", False),
        ("-95", "-100", True),
        ("12%", "12%", True),
        ("0.12", "12%", True),
        ("12", "12%", False),
        ("1,000", "1000", False),
        ("1,000", "1,000", True),
        ("12.", "12", True),
        (wide("12"), "12", True),
        ("0", "0", True),
        ("0.0", "0", False),
        ("0.01", "0", False),
        ("", "12", False),
        ("dark blue", "Dark Blue", True),
        ("blue", "Dark Blue", False),
        ("[2014, 2018]", "[2014, 2018]", True),
        ("nan", "12", False),
    ],
)
def test_relaxed_match(answer: str, right: str, hit: bool) -> None:
    assert relaxed_match(answer, right) is hit


def test_answers_as_llava() -> None:
    """The file holds what LLaVA's own functions say of 200 made answers."""
    assert len(MADE["answers"]) == len(MADE["prompts"]) == 200
    for row in MADE["answers"]:
        assert normalize(row["answer"]) == row["processed"]
        score = agreement(normalize(row["answer"]), [normalize(text) for text in row["annotators"]])
        assert score == pytest.approx(row["textvqa"])
        assert prediction(row["answer"]) == row["gqa"]
    for row in MADE["prompts"]:
        assert bare_question(row["prompt"]).lower() == row["question"]


@pytest.mark.parametrize("name", ["textvqa", "vizwiz_vqa"])
def test_answers_as_lmms_eval(name: str) -> None:
    function = lmms(f"tasks.{name}.utils", f"{name}_process_results")
    for row in MADE["answers"]:
        theirs = function({"question_id": 1, "answers": list(row["annotators"])}, [row["answer"]])
        ours = agreement(normalize(row["answer"]), [normalize(text) for text in row["annotators"]])
        assert theirs["exact_match"] == pytest.approx(ours)
        assert theirs["submission"]["answer"] == normalize(row["answer"])


def test_vqav2_as_lmms_eval() -> None:
    function = lmms("tasks.vqav2.utils", "vqav2_process_results")
    for row in MADE["answers"]:
        given = [{"answer": text, "answer_id": number} for number, text in enumerate(row["annotators"])]
        theirs = function({"question_id": 1, "answers": given}, [row["answer"]])
        ours = agreement(official_form(row["answer"]), [official_form(text) for text in row["annotators"]])
        assert theirs["exact_match"] == pytest.approx(ours)
        assert theirs["submission"]["answer"] == official_form(row["answer"])


def test_documents_as_lmms_eval() -> None:
    function = lmms("api.metrics", "anls")
    for row in MADE["documents"]:
        assert function(row["right"], [row["answer"]])["anls"] == pytest.approx(anls(row["answer"], row["right"]))


def test_charts_as_lmms_eval() -> None:
    function = lmms("tasks.chartqa.utils", "relaxed_correctness")
    for row in MADE["charts"]:
        assert function(row["answer"], row["label"]) == relaxed_match(row["answer"], row["label"]), row


@pytest.mark.parametrize("name", STANDINS)
def test_every_question_is_asked_in_llavas_words(name: str, tmp_path: Path) -> None:
    task, questions = get_task(name), asked(name, tmp_path)
    assert 4 <= len(questions) <= 6
    for question in questions:
        assert question.text.endswith(f"\n{SHORT}")
        assert ("\nReference OCR token: " in question.text) is (name == "textvqa")
        assert ("'Unanswerable'" in question.text) is name.startswith("vizwiz")
        (image,) = question.images
        assert (tmp_path / task.folder / task.images / image).is_file()
        assert question.group == (None if name in {"vqav2", "vizwiz"} else image)


@pytest.mark.parametrize("name", STANDINS)
def test_a_missing_file_is_named_with_its_place(name: str, tmp_path: Path) -> None:
    task = get_task(name)
    with pytest.raises(ValueError, match="files are missing") as caught:
        task.questions(tmp_path)
    for need in task.needs:
        assert str(tmp_path / task.folder / need.path) in str(caught.value)
        assert need.source in str(caught.value)


@pytest.mark.parametrize(
    ("name", "answers", "metrics"),
    [
        (
            "vqav2_val",
            ["Yes.", "blue", "Two", "the apple", ""],
            {
                "accuracy": 72.0,
                "accuracy_yes/no": 100.0,
                "accuracy_number": 100.0,
                "accuracy_other": 160 / 3,
            },
        ),
        (
            "gqa",
            ["Yes.", "red", "two", "apple", "Unanswerable"],
            {
                "accuracy": 60.0,
                "accuracy_open": 50.0,
                "accuracy_binary": 200 / 3,
                "accuracy_verify": 100.0,
                "accuracy_query": 50.0,
                "accuracy_choose": 0.0,
                "accuracy_logical": 100.0,
                "accuracy_obj": 100.0,
                "accuracy_attr": 50.0,
                "accuracy_rel": 0.0,
            },
        ),
        (
            "vizwiz_val",
            ["yes", "no", "2", "apple", "Unanswerable."],
            {
                "accuracy": 86.0,
                "accuracy_yes/no": 100.0,
                "accuracy_number": 100.0,
                "accuracy_other": 65.0,
                "accuracy_unanswerable": 100.0,
            },
        ),
        ("textvqa", ["Dakota", "STOP!", "dakota", "twelve", "Times"], {"accuracy": 60.0}),
        ("textvqa_no_ocr", ["", "no", "Nokia", "12", "blue"], {"accuracy": 58.0}),
        ("docvqa", ["Yes", "reed", "3", "apple", "un"], {"anls": 100 * (1 + 3 / 4 + 5 / 8) / 5}),
        ("infovqa", ["yes", "red", "2", "an apple", "unanswerable"], {"anls": 100.0}),
        ("chartqa", ["4.1", "0.13", "blue", "2400", "0"], {"overall": 80.0, "human": 200 / 3, "augmented": 100.0}),
        ("ocrvqa", ["ann lee", "Night  sky.", "Yes", "Bo Wu, Jr", ""], {"accuracy": 60.0}),
    ],
)
def test_scores_on_known_answers(name: str, answers: list[str], metrics: dict[str, float], tmp_path: Path) -> None:
    assert scored(name, asked(name, tmp_path), answers) == pytest.approx(metrics)
    assert get_task(name).main in metrics
    assert set(get_task(name).published.values()) <= set(metrics)


@pytest.mark.parametrize("name", sorted(SERVERS))
def test_servers_score_is_not_made_up(name: str, tmp_path: Path) -> None:
    task = get_task(name)
    assert task.main is None and not task.published
    with pytest.raises(NotImplementedError, match="server"):
        task.grade(asked(name, tmp_path)[0], "yes")


def submitted(name: str, root: Path, answers: list[str]) -> tuple[str, Any]:
    """Name and content of what a task writes for its server."""
    questions = asked(name, root)
    (file,) = get_task(name).write_submission(questions, answers, root)
    return file.name, json.loads(file.read_text(encoding="utf-8"))


def test_submission_of_vqav2_answers_the_whole_test_set(tmp_path: Path) -> None:
    _, rows = submitted("vqav2", tmp_path, ["Yes.", "two", "The apple", "", "It's"])
    assert [row["question_id"] for row in rows] == [1000 + number for number in range(8)]
    assert [row["answer"] for row in rows] == ["yes", "", "2", "apple", "", "", "", "it 's"]


def test_submission_of_vizwiz_names_images(tmp_path: Path) -> None:
    _, rows = submitted("vizwiz", tmp_path, ["Unanswerable.", "two", "", "a cup", "1,000"])
    assert rows[0] == {"image": "VizWiz_test_00000000.jpg", "answer": "unanswerable"}
    assert [row["answer"] for row in rows] == ["unanswerable", "2", "", "cup", "1000"]


def test_predictions_for_gqas_program(tmp_path: Path) -> None:
    name, rows = submitted("gqa", tmp_path, ["Yes.", "Red", "2..", "", "U.S."])
    assert name == "testdev_balanced_predictions.json"
    assert rows[0] == {"questionId": "20130720", "prediction": "yes"}
    assert [row["prediction"] for row in rows] == ["yes", "red", "2", "", "u.s"]


@pytest.mark.parametrize("name", ["docvqa_test", "infovqa_test"])
def test_submission_of_documents_is_what_the_model_said(name: str, tmp_path: Path) -> None:
    _, rows = submitted(name, tmp_path, ["Yes.", "é", "", "A b", "2"])
    assert rows[:2] == [{"questionId": 300, "answer": "Yes."}, {"questionId": 301, "answer": "é"}]
    assert get_task(name.removesuffix("_test")).write_submission([], [], tmp_path) == []


def test_the_same_question_about_two_pictures(tmp_path: Path) -> None:
    questions = asked("textvqa", tmp_path)
    assert questions[0].text.split("\n")[0] == questions[2].text.split("\n")[0]
    assert (questions[0].facts["answers"][0], questions[2].facts["answers"][0]) == ("dakota", "nokia")


def test_covers_as_llava_names_them(tmp_path: Path) -> None:
    images = {question.images[0] for question in asked("ocrvqa", tmp_path)}
    assert images == {"0001.jpg", "0002.gif"}
    folder = tmp_path / "ocrvqa/images"
    (folder / "0002.gif").rename(folder / "0002.jpg")
    assert {question.images[0] for question in get_task("ocrvqa").questions(tmp_path)} == {"0001.jpg", "0002.jpg"}


def edit(path: Path, change: Any) -> None:
    """Change the content of a JSON file."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("name", "file", "change", "message"),
    [
        ("gqa", "gqa/data/testdev_balanced_questions.json", lambda c: c.pop("20130721"), "question 20130721"),
        ("gqa", "gqa/data/testdev_balanced_questions.json", lambda c: c["20130720"].pop("answer"), "'answer'"),
        ("vqav2_val", "vqav2/v2_mscoco_val2014_annotations.json", lambda c: c["annotations"].pop(), "question 44"),
        ("vqav2_val", "vqav2/v2_mscoco_val2014_annotations.json", lambda c: c.pop("annotations"), "'annotations'"),
        ("vizwiz_val", "vizwiz/val.json", lambda c: c[2].update(answers=[]), "entry 2: 'answers'"),
        ("vizwiz_val", "vizwiz/val.json", lambda c: c[1].update(answers=["red"]), "VizWiz_val_00000001.jpg"),
        ("textvqa", "textvqa/TextVQA_0.5.1_val.json", lambda c: c["data"].pop(1), "what does the sign say"),
        ("docvqa", "docvqa/val_v1.0_withQT.json", lambda c: c["data"][3].pop("answers"), "question 303"),
        ("infovqa", "infovqa/infographicsVQA_val_v1.0_withQT.json", lambda c: c["data"].append(1), "entry 5"),
        ("chartqa", "chartqa/test/test_human.json", lambda c: c[0].update(label=4), "'label' is 4"),
        ("ocrvqa", "ocrvqa/dataset.json", lambda c: c["0002"]["answers"].pop(), "0002: 2 questions, 1 answers"),
    ],
)
def test_a_bad_entry_is_named(name: str, file: str, change: Any, message: str, tmp_path: Path) -> None:
    make(name, tmp_path)
    edit(tmp_path / file, change)
    with pytest.raises(ValueError, match=message) as caught:
        get_task(name).questions(tmp_path)
    assert Path(file).name in str(caught.value)


def test_the_test_set_must_hold_test_dev(tmp_path: Path) -> None:
    make("vqav2", tmp_path)
    file = tmp_path / "vqav2/llava_vqav2_mscoco_test2015.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(ValueError, match=r"test2015\.jsonl: lacks question 1007 of"):
        get_task("vqav2").questions(tmp_path)


def test_torn_and_foreign_files_are_named(tmp_path: Path) -> None:
    make("vizwiz_val", tmp_path)
    file = tmp_path / "vizwiz/val.json"
    torn = file.read_bytes()[:-20]
    for content, message in ((torn, "not valid JSON"), (b"{}", "expected a JSON list"), (b"\xff", "can't be read")):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=message) as caught:
            get_task("vizwiz_val").questions(tmp_path)
        assert str(file) in str(caught.value)


def test_a_prompt_without_question_is_named(tmp_path: Path) -> None:
    make("textvqa", tmp_path)
    file = tmp_path / "textvqa/llava_textvqa_val_v051_ocr.jsonl"
    file.write_text('{"question_id": "a1", "image": "a.jpg", "text": "what is it?"}\n')
    with pytest.raises(ValueError, match=r"question_id 'a1': .*what is it") as caught:
        get_task("textvqa").questions(tmp_path)
    assert str(file) in str(caught.value)
