"""Benchmarks whose answers are a letter, or yes or no: read and scored by hand-made cases and by others' programs."""

from __future__ import annotations

import importlib
import io
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageFile

from llava.eval.questions import Question, read_json, read_json_list, read_table
from llava.eval.reports.published import BENCHMARKS
from llava.eval.scoring.choices import inferred_letter, likeliest_letter, stated_letter
from llava.eval.tasks import get_task
from llava.eval.tasks.base import Task
from llava.eval.tasks.choices.mme import COGNITION, PERCEPTION, said
from llava.eval.tasks.choices.pope import CATEGORIES, binary_metrics, says_yes
from llava.eval.tasks.choices.qbench import read_qbench_questions
from tests.standins import make
from tests.standins.choices import STANDINS

MADE = json.loads((Path(__file__).parent / "data" / "choice_scores.json").read_text(encoding="utf-8"))
PROGRAMS = MADE["programs"]
LETTER_ROWS, YES_NO_ROWS = MADE["letters"], MADE["yes_no"]
OPTIONS = dict(zip("ABCDE", ["red", "green", "blue", "black", "white"], strict=True))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


def scores(task: Task, questions: Sequence[Question], answers: Sequence[str]) -> dict[str, float]:
    return task.summarize([task.grade(q, a) for q, a in zip(questions, answers, strict=True)])


# How answers are read --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "stated", "inferred", "likeliest"),
    [
        ("B", "B", "B", "B"),
        ("", None, None, None),
        ("  ", None, None, None),
        ("...", None, None, None),
        ("?!", None, None, None),
        ("b", None, None, None),
        ("B.", None, "B", "B"),
        ("(B)", None, "B", "B"),
        ("(B).", None, "B", "B"),
        ("B)", None, "B", "B"),
        ("B. green", "B", "B", "B"),
        ("B.green", None, "B", "B"),  # by its text; by its start
        ("B: green", None, "B", "B"),
        ("The answer is B.", "B", "B", "B"),
        ("The answer is B", None, "B", "B"),  # LLaVA wants a character after it
        ("The answer is B, I think", "B", "B", "B"),
        ("The answer is B. No, The answer is C.", None, None, "C"),
        ("the answer is B.", None, "B", "B"),
        ("A or B", None, None, "A"),
        ("It is A or B", None, None, "B"),
        ("A green thing is there", None, "B", "A"),  # an article, which only one of them knows
        ("green", None, "B", None),
        ("It is Green.", None, "B", None),
        ("green and blue", None, None, None),
        ("\uff22", None, None, None),
        ("\uff12", None, None, None),  # full-width B and 2
        ("2", None, None, None),
        ("B\nbecause it is so", None, "B", "B"),
        ("E", "E", "E", None),
        ("答案是B。", None, None, "B"),
    ],
)
def test_letters(answer: str, stated: str | None, inferred: str | None, likeliest: str | None) -> None:
    options = {letter: OPTIONS[letter] for letter in "ABCD"}
    found = stated_letter(answer), inferred_letter(answer, options), likeliest_letter(answer)
    assert found == (stated, inferred, likeliest)


@pytest.mark.parametrize(
    ("answer", "pope", "mme"),
    [
        ("Yes", True, "yes"),
        ("No", False, "no"),
        ("Yes, there is", True, "yes"),
        ("No, there is not.", False, "no"),
        ("There is no dog.", False, "other"),
        ("There are several. No.", True, "other"),  # POPE reads the first sentence, MME the first four characters
        ("NO", True, "no"),  # POPE knows No, no and not
        ("Not sure", True, "no"),
        ("It is, not", False, "other"),
        ("", True, "other"),
        ("...", True, "other"),
        ("\uff2e\uff4f", True, "other"),  # full-width No
        ("snow", True, "no"),
        ("Yes and no", False, "yes"),
    ],
)
def test_yes_and_no(answer: str, pope: bool, mme: str) -> None:
    assert (says_yes(answer), said(answer)) == (pope, mme)


# Each task on its stand-in ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STANDINS)
def test_what_is_missing_is_named_with_its_place(name: str, data: Path) -> None:
    task = get_task(name)
    make(name, data)
    assert task.main in scores(task, task.questions(data), ["A"] * len(task.questions(data)))
    for need in task.needs:
        place = data / task.folder / need.path
        place.rename(place.with_name("aside"))
        with pytest.raises(ValueError, match=f"task {name}: files are missing") as caught:
            task.questions(data)
        assert str(place) in str(caught.value) and need.source in str(caught.value)
        place.with_name("aside").rename(place)


@pytest.mark.parametrize("name", STANDINS)
def test_pictures_open_and_metrics_are_named(name: str, data: Path) -> None:
    task = get_task(name)
    make(name, data)
    questions = task.questions(data)
    for question in questions:
        for image in question.images:
            Image.open(data / task.folder / task.images / image).verify()
        for picture in question.pictures:
            Image.open(io.BytesIO(picture)).verify()
    metrics = scores(task, questions, ["Yes"] * len(questions))
    assert {task.main, *task.published.values()} <= metrics.keys()
    assert task.published.keys() <= set(BENCHMARKS)


@pytest.mark.parametrize("name", STANDINS)
def test_metrics_are_those_of_grades_in_any_order_and_drawn_twice(name: str, data: Path) -> None:
    task = get_task(name)
    make(name, data)
    questions = task.questions(data)
    answers = [("A", "Yes", "B", "No")[number % 4] for number in range(len(questions))]
    grades = [task.grade(question, answer) for question, answer in zip(questions, answers, strict=True)]
    before = task.summarize(grades)
    assert task.summarize([*grades[::-1], *grades]) == pytest.approx(before)
    assert json.loads(json.dumps(grades)) == grades


def test_scienceqa(data: Path) -> None:
    make("scienceqa", data)
    task = get_task("scienceqa")
    questions = task.questions(data)
    assert questions[0].text.endswith("B. green\nAnswer with the option's letter from the given choices directly.")
    assert "<image>" not in questions[0].text and questions[0].row["prompt"].startswith("<image>\n")
    # Right are A, B, A, B, A, B; the first four have pictures.
    assert scores(task, questions, ["A", "B. green", "a", "The answer is B.", "", "A or B"]) == {
        "accuracy_image": 75.0,
        "accuracy": 50.0,
    }
    (data / "scienceqa/pid_splits.json").write_text(json.dumps({"test": ["5"]}))
    with pytest.raises(ValueError, match="asks other questions than those of 'test'"):
        task.questions(data)


def test_pope(data: Path) -> None:
    make("pope", data)
    task = get_task("pope")
    questions = task.questions(data)
    assert len({question.group for question in questions}) == 3
    # Each category has a yes and a no.
    found = scores(task, questions, ["Yes", "No", "Yes", "Yes", "No", "No"])
    f1 = {"adversarial": 100.0, "popular": 200 / 3, "random": 0.0}
    assert {name: found[f"f1_{name}"] for name in CATEGORIES} == pytest.approx(f1)
    assert found["f1"] == pytest.approx(500 / 9)
    assert (found["accuracy"], found["yes"], found["recall"]) == pytest.approx((200 / 3, 50, 200 / 3))
    assert (found["precision_random"], found["recall_random"]) == (0.0, 0.0)


def test_pope_of_two_releases_is_refused(data: Path) -> None:
    make("pope", data)
    labels = data / "pope/coco/coco_pope_random.json"
    more = labels.read_text() + json.dumps({"image": "x.jpg", "label": "no"}) + "\n"
    labels.write_text(more)
    with pytest.raises(ValueError, match=r"asks fewer questions than .*coco_pope_random\.json"):
        get_task("pope").questions(data)
    labels.write_text(more.replace("COCO", "OTHER"))
    with pytest.raises(ValueError, match="question 4 of category 'random' is not the next one"):
        get_task("pope").questions(data)


def test_mme(data: Path) -> None:
    make("mme", data)
    task = get_task("mme")
    questions = task.questions(data)
    assert [question.group for question in questions[:3]] == ["existence/0000.png"] * 2 + ["OCR/0001.png"]
    assert questions[4].images == ("landmark/images/0002.png",)  # whose answers are in a folder of their own
    # Right are Yes, No for each picture: both, one, none; and in code_reasoning one.
    found = scores(task, questions, ["Yes", "no.", "Yes", "Yes, it is", "", "Yes", "No", "No"])
    assert (found["perception"], found["cognition"], found["total"]) == (250.0, 50.0, 300.0)
    assert (found["accuracy_OCR"], found["accuracy_plus_OCR"], found["accuracy_plus_existence"]) == (50.0, 0.0, 100.0)


def test_mme_names_what_does_not_fit(data: Path) -> None:
    make("mme", data)
    file = data / "MME/llava_mme.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[1:]))
    with pytest.raises(ValueError, match=r"1 questions about picture 'existence/0000\.png'"):
        get_task("mme").questions(data)
    file.write_text("".join(lines).replace("Is it red?", "Is it pink?"))
    with pytest.raises(ValueError, match=r"'Is it pink\? Please answer yes or no.', is not in MME's own files"):
        get_task("mme").questions(data)
    file.write_text("".join(lines).replace("existence/", "../"))
    with pytest.raises(ValueError, match="of no category of MME"):
        get_task("mme").questions(data)
    answers = data / "MME/MME_Benchmark_release_version/existence/0000.txt"
    file.write_text("".join(lines))
    answers.write_text("Is it red? Please answer yes or no.\tPerhaps\n")
    with pytest.raises(ValueError, match=r"0000\.txt: expected lines of a question, a tab, and Yes or No"):
        get_task("mme").questions(data)


def test_mmbench(data: Path) -> None:
    make("mmbench", data)
    task = get_task("mmbench")
    questions = task.questions(data)
    assert [question.question_id for question in questions] == [0, 1_000_000, 1, 1_000_001, 2_000_001]
    assert [question.group for question in questions] == ["0", "0", "1", "1", "1"]
    ending = "\nAnswer with the option's letter from the given choices directly."
    assert questions[0].text == f"Look.\nWhich color?\nA. red\nB. green{ending}"
    # Right are A, B; A, C, B.
    assert scores(task, questions, ["A", "(B)", "A", "C", "blue"]) == {
        "accuracy": 100.0,
        "circular": 50.0,
        "circular_attributes": 50.0,
    }
    assert scores(task, questions, ["b", "B", "green", "C", "B."])["accuracy"] == 50.0
    make("mmbench_cn", data)
    question, *_ = get_task("mmbench_cn").questions(data)
    assert question.text == "请看。\n什么颜色\nA. red\nB. green\n请直接回答选项字母。"


def test_mmbench_names_a_table_without_answers(data: Path) -> None:
    make("mmbench", data)
    file = data / "mmbench/mmbench_dev_20230712.tsv"
    file.write_text(file.read_text().replace("\tanswer\t", "\tother\t"))
    with pytest.raises(ValueError, match="line 2: 'answer' is None, expected one of"):
        get_task("mmbench").questions(data)


def test_mmbench_names_the_extra_before_it_asks(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make("mmbench", data)
    monkeypatch.setattr("llava.eval.tasks.choices.mmbench.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'llava\[eval\]'"):
        get_task("mmbench").questions(data)


def test_seed(data: Path) -> None:
    make("seed", data)
    task = get_task("seed")
    questions = task.questions(data)
    # Right are A, B, C, D of pictures, A, B of videos; more than the letter is wrong.
    found = scores(task, questions, ["A", "B", "c", "D.", "A", ""])
    assert (found["accuracy"], found["accuracy_image"], found["accuracy_video"]) == (50.0, 50.0, 50.0)
    types = ("Scene Understanding", "Instances Counting", "Action Recognition")
    assert [found[f"accuracy_{name}"] for name in types] == [50.0, 50.0, 50.0]
    shutil.rmtree(data / "seed_bench/SEED-Bench-video-image")
    assert get_task("seed_img").questions(data) == questions[:4]
    assert questions[0].group == "SEED-Bench-image/0"  # SEED-Bench has several questions about a picture
    with pytest.raises(ValueError, match="SEED-Bench-video-image"):
        task.questions(data)
    (data / "seed_bench/SEED-Bench.json").write_text('{"questions": [{}], "question_type": {}}')
    with pytest.raises(ValueError, match="expected 'question_type' and 'questions'"):
        get_task("seed_img").questions(data)


def test_mmstar(data: Path) -> None:
    make("mmstar", data)
    task = get_task("mmstar")
    questions = task.questions(data)
    assert questions[0].text == (
        "Which color?\nOptions: A: red, B: green, C: blue, D: black\n"
        "Answer with the option's letter from the given choices directly"
    )
    assert scores(task, questions, ["A", "green", "C: blue", "A"]) == {
        "accuracy": 50.0,
        "accuracy_coarse perception": 0.0,
        "accuracy_math": 100.0,
    }


def test_qbench(data: Path) -> None:
    make("qbench", data)
    task = get_task("qbench")
    questions = task.questions(data)
    assert questions[0].text == "Is it sharp?\nChoose between one of the options as follows:\nA. Yes\nB. No"
    assert scores(task, questions, ["B", "B. No", "No", "A or B"]) == {"accuracy": 75.0}
    file = data / "qbench/llvisionqa_dev.json"
    assert read_qbench_questions(file, lang="zh")[0].text == "Is it sharp?\\在下列选项中选择一个:\nA. Yes\nB. No"
    file.write_text(file.read_text().replace("correct_ans", "other"))
    with pytest.raises(ValueError, match="entry 0: 'correct_ans' is none of the candidates"):
        task.questions(data)
    file.write_text('[{"img_path": "0.jpg", "question": "Is it?", "candidates": "Yes"}]')
    with pytest.raises(ValueError, match="entry 0: expected img_path, question and candidates"):
        task.questions(data)


def test_submissions(data: Path) -> None:
    for name in ("seed", "qbench"):
        make(name, data)
        task = get_task(name)
        questions = task.questions(data)
        (file,) = task.write_submission(questions, ["A"] * len(questions), data)
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        assert len(rows) == len(questions)
        if name == "seed":
            assert (file.name, rows[0]) == ("seed.jsonl", {"question_id": "100", "prediction": "A"})
        else:
            assert file.name == "llvisionqa_dev_answers.jsonl"
            assert (rows[0]["response"], rows[0]["candidates"]) == ("A", ["Yes", "No"])


def test_mmbench_submission_is_that_of_llavas_program(data: Path) -> None:
    from openpyxl import load_workbook

    make("mmbench", data)
    task = get_task("mmbench")
    (file,) = task.write_submission(task.questions(data), PROGRAMS["mmbench_submission"]["predictions"], data)
    assert file.name == "mmbench_dev_20230712.xlsx"
    rows = [list(row) for row in load_workbook(file).active.iter_rows(values_only=True)]
    assert rows == PROGRAMS["mmbench_submission"]["rows"]
    (file,) = task.write_submission(task.questions(data), ["=1+1", "a\x07b", "1", "", "B"], data)
    cells = [row[6] for row in load_workbook(file).active.iter_rows(min_row=2)]
    assert [(cell.value, cell.data_type) for cell in cells[:3]] == [("=1+1", "s"), ("ab", "s"), ("1", "s")]


def test_files_that_can_not_be_read_are_named(tmp_path: Path) -> None:
    for read in (lambda path, what: read_json(path, list, what), lambda path, what: list(read_json_list(path, what))):
        with pytest.raises(ValueError, match=r"x\.json does not exist; it should be a list"):
            read(tmp_path / "x.json", "a list")
        (tmp_path / "y.json").write_text("[\n{]")
        with pytest.raises(ValueError, match=r"y\.json, line 2: not valid JSON"):
            read(tmp_path / "y.json", "a list")
    wrong = {
        "{}": "expected a JSON list, got dict; it should be a list",
        "[]": "empty",
        "[1]": "expected a JSON object",
    }
    for content, message in wrong.items():
        (tmp_path / "y.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            list(read_json_list(tmp_path / "y.json", "a list"))
    with pytest.raises(ValueError, match=r"x\.tsv does not exist; it should be a table"):
        list(read_table(tmp_path / "x.tsv", ("index",)))
    (tmp_path / "y.tsv").write_text("index\tquestion\n1\tWhich?\n2\tWhich\tone?\n")
    with pytest.raises(ValueError, match=r"y\.tsv, line 3: more cells than the table has columns"):
        list(read_table(tmp_path / "y.tsv", ("index",)))
    (tmp_path / "y.tsv").write_bytes(b"index\n\xff\n")
    with pytest.raises(ValueError, match=r"y\.tsv is not UTF-8"):
        list(read_table(tmp_path / "y.tsv", ("index",)))


# LLaVA's and MME's own programs ----------------------------------------------------------------------------------


def test_scienceqa_as_llavas_program() -> None:
    expected = PROGRAMS["scienceqa"]
    assert [stated_letter(row["answer"]) for row in LETTER_ROWS] == expected["letters"]
    questions = [
        Question(str(number), "q", ("x.png",) if number % 3 else (), facts={"right": "ABCDE"[row["right"]]})
        for number, row in enumerate(LETTER_ROWS)
    ]
    found = scores(get_task("scienceqa"), questions, [row["answer"] for row in LETTER_ROWS])
    assert found["accuracy"] == pytest.approx(expected["accuracy"])
    assert found["accuracy_image"] == pytest.approx(expected["accuracy_image"], abs=0.005)  # as it is printed


def test_seed_as_llavas_program() -> None:
    names = ("Scene Understanding", "Instances Counting", "Action Recognition")
    questions = [
        Question(
            number,
            "q",
            facts={
                "answer": "ABCDE"[row["right"]],
                "type": names[number % 3],
                "kind": "video" if number % 3 == 2 else "image",
            },
        )
        for number, row in enumerate(LETTER_ROWS)
    ]
    found = scores(get_task("seed"), questions, [row["answer"] for row in LETTER_ROWS])
    expected = {f"accuracy_{name}": value for name, value in PROGRAMS["seed"].items() if name != "Total"}
    assert found == pytest.approx(expected | {"accuracy": PROGRAMS["seed"]["Total"]}, abs=0.005)


def test_pope_as_llavas_program() -> None:
    for number, category in enumerate(CATEGORIES):
        rows = YES_NO_ROWS[number::3]
        found = binary_metrics([{"said": says_yes(row["answer"]), "true": row["true"]} for row in rows])
        assert found == pytest.approx({key: 100 * value for key, value in PROGRAMS["pope"][category].items()})


def mme_questions() -> list[Question]:
    names = [*PERCEPTION, *COGNITION]
    return [
        Question(
            number,
            "q",
            facts={"true": "yes" if row["true"] else "no", "category": names[number // 2 % 14]},
            group=str(number // 2),
        )
        for number, row in enumerate(YES_NO_ROWS)
    ]


def test_mme_as_its_own_program() -> None:
    expected = PROGRAMS["mme"]
    assert [said(row["answer"]) for row in YES_NO_ROWS] == expected["said"]
    found = scores(get_task("mme"), mme_questions(), [row["answer"] for row in YES_NO_ROWS])
    assert (found["perception"], found["cognition"]) == pytest.approx((expected["perception"], expected["cognition"]))
    assert found["total"] == pytest.approx(expected["perception"] + expected["cognition"])
    sums = {name: found[f"accuracy_{name}"] + found[f"accuracy_plus_{name}"] for name in expected["scores"]}
    assert sums == pytest.approx(expected["scores"])


# lmms-eval's own functions ---------------------------------------------------------------------------------------
#
# Where its rule is another than that of LLaVA's program, the answers in which they differ are named.


@pytest.fixture(scope="module")
def lmms() -> Iterator[Any]:
    """A function that opens a module of lmms-eval's tasks by its name."""
    pytest.importorskip("lmms_eval", reason="lmms-eval is not installed (pip install --no-deps lmms-eval)")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)  # which lmms-eval sets for the whole process
        yield lambda name: importlib.import_module(f"lmms_eval.tasks.{name}")


def test_mmbench_as_lmms_eval(lmms: Any) -> None:
    evaluator = lmms("mmbench.mmbench_evals").MMBench_Evaluator()
    options = {letter: OPTIONS[letter] for letter in "ABCD"}
    answers = [row["answer"] for row in LETTER_ROWS]
    assert [inferred_letter(a, options) or False for a in answers] == [
        evaluator.can_infer(a, dict(options)) for a in answers
    ]


def test_circular_accuracy_as_lmms_eval(lmms: Any) -> None:
    evaluator = lmms("mmbench.mmbench_evals").MMBench_Evaluator()
    questions, rows, answers = [], [], []
    for number, made in enumerate(LETTER_ROWS):
        # Of 100 questions in two orders, letters whose answers this program does not guess.
        group, turn = number // 2, number % 2
        right = "AB"[made["right"] % 2]
        answers.append(right if number % 5 else "ABC"[number % 3])
        facts = {"answer": right, "first": not turn, "ability": ""}
        row = {"options": list(OPTIONS.values())[:4]}
        questions.append(Question(group + turn * 1_000_000, "q", row=row, facts=facts, group=str(group)))
        cells = {"index": group + turn * 1_000_000, "answer": right, "prediction": answers[-1], "category": "x"}
        rows.append(cells | {letter: OPTIONS[letter] for letter in "ABCD"})
    found = scores(get_task("mmbench"), questions, answers)
    overall, *_ = evaluator.eval_result(rows, eval_method="static")
    assert found["circular"] == pytest.approx(100 * overall)
    assert 50 < found["circular"] < found["accuracy"] < 100


def test_mmstar_as_lmms_eval(lmms: Any) -> None:
    extract = lmms("_task_utils.mcq_extract").extract_mcq_answer
    for row in LETTER_ROWS:
        assert (likeliest_letter(row["answer"]) or "") == extract(row["answer"], choices=list("ABCD")), row["answer"]
    hits = [lmms("mmstar.utils").exact_match(row["answer"], "ABCDE"[row["right"]]) for row in LETTER_ROWS]
    questions = [Question(0, "q", category="x", facts={"answer": "ABCDE"[row["right"]]}) for row in LETTER_ROWS]
    found = scores(get_task("mmstar"), questions, [row["answer"] for row in LETTER_ROWS])
    assert found["accuracy"] == pytest.approx(100 * sum(hits) / len(hits))


def test_qbench_as_lmms_eval(lmms: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one letter as a word. Without it lmms-eval guesses, where a right option in words is right here."""
    utils = lmms("qbench.utils")
    monkeypatch.setattr(utils.random, "choice", lambda choices: "guessed")
    compared = 0
    for row in LETTER_ROWS:
        words = row["answer"].split()
        named = [word for word in words if word.strip("().") in OPTIONS]
        theirs = utils.parse_multi_choice_response(row["answer"], list(OPTIONS), OPTIONS)
        if len(named) == 1 and theirs != "guessed" and not (named == ["A"] and len(words) > 3):
            assert inferred_letter(row["answer"], OPTIONS) == theirs, row["answer"]
            compared += 1
    assert compared > 80
    assert utils.parse_multi_choice_response("green", list(OPTIONS), OPTIONS) == "guessed"
    assert inferred_letter("green", OPTIONS) == "B"


def test_scienceqa_as_lmms_eval(lmms: Any) -> None:
    """It also takes small letters, and `A.` without a space; LLaVA's program also takes `The answer is A.`"""
    grade = lmms("scienceqa.utils").sqa_process_results
    differing = set()
    for row in LETTER_ROWS:
        doc = {"choices": list(OPTIONS.values()), "answer": row["right"]}
        ours = stated_letter(row["answer"]) == "ABCDE"[row["right"]]
        if grade(doc, [row["answer"]])["exact_match"] != ours:
            differing.add(row["answer"])
    assert all(len(answer.strip()) == 1 or answer[1:2] == "." or "The answer is" in answer for answer in differing), (
        differing
    )


def test_seed_as_lmms_eval(lmms: Any) -> None:
    """It reads the first character only; LLaVA's program wants the letter alone."""
    utils = lmms("seedbench.utils")
    for row in LETTER_ROWS:
        right = "ABCDE"[row["right"]]
        result = utils.seed_process_result(
            {"answer": right, "data_type": "image", "question_id": "1"}, [row["answer"]]
        )["seed_image"]
        theirs = utils.seed_aggregation_result([result])
        facts = {"answer": right, "kind": "image", "type": "x"}
        ours = get_task("seed").grade(Question(1, "q", facts=facts), row["answer"])["score"]
        assert ours == theirs or (len(row["answer"]) > 1 or row["answer"].islower()), row["answer"]


def test_pope_as_lmms_eval(lmms: Any) -> None:
    """It wants the word alone; LLaVA's program reads sentences. On the words alone they agree."""
    utils = lmms("pope.utils")
    rows = [row for row in YES_NO_ROWS if row["answer"] in ("Yes", "No", "yes", "no", "YES")]
    assert len(rows) > 80
    results = []
    for number, row in enumerate(rows):
        doc = {"answer": "yes" if row["true"] else "no", "question_id": number}
        results.append(utils.pope_process_results(doc, [row["answer"]])["pope_f1_score"])
    found = binary_metrics([{"said": says_yes(row["answer"]), "true": row["true"]} for row in rows])
    names = ("accuracy", "precision", "recall", "f1_score")
    expected = {name.removesuffix("_score"): getattr(utils, f"pope_aggregate_{name}")(results) for name in names}
    assert {name: found[name] / 100 for name in expected} == pytest.approx(expected)


def test_mme_as_lmms_eval(lmms: Any) -> None:
    """It also takes y and n alone; MME's own program does not."""
    utils = lmms("mme.utils")
    answers = [row["answer"] if row["answer"].lower() not in ("y", "n") else "" for row in YES_NO_ROWS]
    assert [said(answer) for answer in answers] == [utils.parse_pred_ans(answer) for answer in answers]
    questions = mme_questions()
    sums = {"mme_perception_score": [], "mme_cognition_score": []}
    for question, answer in zip(questions, answers, strict=True):
        facts = {"category": question.facts["category"], "question_id": question.group}
        doc = {**facts, "answer": question.facts["true"]}
        for name, result in utils.mme_process_results(doc, [answer]).items():
            sums[name].append(result)
    found = scores(get_task("mme"), questions, answers)
    expected = [utils.mme_aggregate_results(sums[f"mme_{name}_score"]) for name in ("perception", "cognition")]
    assert [found["perception"], found["cognition"]] == pytest.approx(expected)
