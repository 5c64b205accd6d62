"""Stand-ins of the benchmarks that want a short answer."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

SHORT = "\nAnswer the question using a single word or phrase."
ASKED = ("Is there a dog?", "What color is the car?", "How many cups are there?", "What is on the table?", "Who is it?")
RIGHT = ("yes", "red", "2", "an apple", "unanswerable")
KINDS = ("yes/no", "other", "number", "other", "other")


def picture(path: Path, number: int = 0) -> None:
    """A small picture of the format that the name says; its colours and width are those of the number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", (32 + 8 * (number % 3), 32), (40 * number % 256, 90, 200))
    ImageDraw.Draw(image).rectangle((4, 4, 12 + number % 16, 20), fill=(250, 60 * number % 256, 30))
    image.save(path)


def json_file(path: Path, content: Any) -> None:
    """A file of JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def json_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """A file of JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _answers(right: str) -> list[str]:
    """Of ten annotators: seven agree, two say another thing, one nothing."""
    return [right] * 7 + ["no", "blue", ""]


def vqav2(root: Path) -> None:
    """Five questions of test-dev, among eight of the whole test set."""
    folder = root / "vqav2"
    rows = [
        {
            "question_id": 1000 + n,
            "image": f"COCO_test2015_{n // 2:012d}.jpg",
            "text": text + SHORT,
            "category": "default",
        }
        for n, text in enumerate((*ASKED, "Where?", "When?", "Why?"))
    ]
    json_lines(folder / "llava_vqav2_mscoco_test2015.jsonl", rows)
    json_lines(folder / "llava_vqav2_mscoco_test-dev2015.jsonl", [rows[n] for n in (0, 2, 3, 5, 7)])
    for n in range(4):
        picture(folder / "test2015" / f"COCO_test2015_{n:012d}.jpg", n)


def vqav2_val(root: Path) -> None:
    """Five questions about three pictures."""
    folder = root / "vqav2"
    asked = [{"question_id": 40 + n, "image_id": 7 + n // 2, "question": text} for n, text in enumerate(ASKED)]
    annotations = [
        {
            **{key: row[key] for key in ("question_id", "image_id")},
            "question_type": "what",
            "answer_type": kind,
            "multiple_choice_answer": right,
            "answers": [{"answer": text, "answer_id": n + 1} for n, text in enumerate(_answers(right))],
        }
        for row, right, kind in zip(asked, RIGHT, KINDS, strict=True)
    ]
    json_file(folder / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": asked})
    json_file(folder / "v2_mscoco_val2014_annotations.json", {"annotations": annotations})
    for n in range(3):
        picture(folder / "val2014" / f"COCO_val2014_{7 + n:012d}.jpg", n)


def gqa(root: Path) -> None:
    """Five questions about three pictures."""
    folder = root / "gqa"
    types = (("verify", "obj"), ("query", "attr"), ("choose", "attr"), ("query", "rel"), ("logical", "obj"))
    ids = [f"2013072{n}" for n in range(5)]
    rows = [
        {"question_id": name, "image": f"n{n // 2}.jpg", "text": text + SHORT, "category": "default"}
        for n, (name, text) in enumerate(zip(ids, ASKED, strict=True))
    ]
    json_lines(folder / "llava_gqa_testdev_balanced.jsonl", rows)
    questions = {
        name: {
            "question": text,
            "answer": right,
            "imageId": f"n{n // 2}",
            "isBalanced": True,
            "types": {"structural": types[n][0], "semantic": types[n][1], "detailed": "exist"},
        }
        for n, (name, text, right) in enumerate(zip(ids, ASKED, RIGHT, strict=True))
    }
    json_file(folder / "data" / "testdev_balanced_questions.json", questions)
    for n in range(3):
        picture(folder / "data" / "images" / f"n{n}.jpg", n)


HINT = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."


def vizwiz(root: Path) -> None:
    """Five questions about a picture each."""
    names = [f"VizWiz_test_{n:08d}" for n in range(5)]
    rows = [
        {"question_id": name, "image": f"{name}.jpg", "text": text + HINT + SHORT, "category": "default"}
        for name, text in zip(names, ASKED, strict=True)
    ]
    json_lines(root / "vizwiz" / "llava_test.jsonl", rows)
    for n, name in enumerate(names):
        picture(root / "vizwiz" / "test" / f"{name}.jpg", n)


def vizwiz_val(root: Path) -> None:
    """Five questions about a picture each."""
    folder = root / "vizwiz"
    rows = [
        {
            "image": f"VizWiz_val_{n:08d}.jpg",
            "question": text,
            "answers": [{"answer": each, "answer_confidence": "yes"} for each in _answers(right)],
            "answer_type": "unanswerable" if right == "unanswerable" else kind,
            "answerable": int(right != "unanswerable"),
        }
        for n, (text, right, kind) in enumerate(zip(ASKED, RIGHT, KINDS, strict=True))
    ]
    json_file(folder / "val.json", rows)
    for n, row in enumerate(rows):
        picture(folder / "val" / row["image"], n)


def textvqa(root: Path) -> None:
    """Five questions about three pictures, two of them the same question about different pictures."""
    folder = root / "textvqa"
    asked = (
        "What brand is it?",
        "what does the sign say?",
        "What brand is it?",
        "what is the number?",
        "Who wrote it?",
    )
    right, words = (
        ("dakota", "stop", "nokia", "12", "the times"),
        ("DAKOTA, digital", "STOP", "NOKIA, 3310", "", "Times"),
    )
    images = ("0054c91397f2fe05", "0054c91397f2fe05", "005635e119b9f32f", "005635e119b9f32f", "00685bc495504d61")
    rows = [
        {"question_id": image, "image": f"{image}.jpg", "text": f"{text}\nReference OCR token: {ocr}{SHORT}"}
        for image, text, ocr in zip(images, asked, words, strict=True)
    ]
    json_lines(folder / "llava_textvqa_val_v051_ocr.jsonl", rows)
    data = [
        {"image_id": image, "question_id": 34602 + n, "question": text.capitalize(), "answers": _answers(answer)}
        for n, (image, text, answer) in enumerate(zip(images, asked, right, strict=True))
    ]
    json_file(folder / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": data})
    for n, image in enumerate(images):
        picture(folder / "train_images" / f"{image}.jpg", n)


def _documents(folder: Path, file: str, images: str, image_key: str, prefix: str, with_answers: bool) -> None:
    rows = [
        {"questionId": 300 + n, "question": text, image_key: f"{prefix}page_{n // 2}.png", "data_split": "x"}
        | ({"answers": [right, right.upper()]} if with_answers else {})
        for n, (text, right) in enumerate(zip(ASKED, RIGHT, strict=True))
    ]
    json_file(folder / file, {"dataset_name": "x", "data": rows})
    for n in range(3):
        picture(folder / images / f"page_{n}.png", n)


def docvqa(root: Path) -> None:
    """Five questions about three pages."""
    _documents(root / "docvqa", "val_v1.0_withQT.json", "spdocvqa_images", "image", "documents/", True)


def docvqa_test(root: Path) -> None:
    """The same, without answers."""
    _documents(root / "docvqa", "test_v1.0.json", "spdocvqa_images", "image", "documents/", False)


INFO = ("infographicsvqa_images", "image_local_name", "")


def infovqa(root: Path) -> None:
    """Five questions about three pictures."""
    _documents(root / "infovqa", "infographicsVQA_val_v1.0_withQT.json", *INFO, True)


def infovqa_test(root: Path) -> None:
    """The same, without answers."""
    _documents(root / "infovqa", "infographicsVQA_test_v1.0.json", *INFO, False)


def chartqa(root: Path) -> None:
    """Three questions by people and two that were made, about three charts."""
    folder = root / "chartqa" / "test"
    human = (("How many bars?", "4"), ("What is the growth?", "12.5%"), ("Which is the largest?", "Dark Blue"))
    made = (("What was the value in 2019?", "2500"), ("What is the sum?", "0"))
    for part, pairs in (("human", human), ("augmented", made)):
        rows = [{"imgname": f"chart_{n}.png", "query": text, "label": right} for n, (text, right) in enumerate(pairs)]
        json_file(folder / f"test_{part}.json", rows)
    for n in range(3):
        picture(folder / "png" / f"chart_{n}.png", n)


def ocrvqa(root: Path) -> None:
    """Five questions about two covers of the test set; one of them has another ending, one cover is for training."""
    folder = root / "ocrvqa"
    first = ("Who wrote this book?", "What is the title?", "Is this a cookbook?")
    second = ("Who is the author?", "What genre?")
    books = {
        "0001": (3, "http://x.org/a.jpg", first, ("Ann Lee", "Night Sky", "No")),
        "0002": (3, "http://x.org/b.gif", second, ("Bo Wu, Jr.", "Travel")),
        "0003": (1, "http://x.org/c.jpg", first, ("Eve", "Bread", "Yes")),
    }
    content = {
        name: {"split": split, "imageURL": url, "questions": list(asked), "answers": list(right), "title": "x"}
        for name, (split, url, asked, right) in books.items()
    }
    json_file(folder / "dataset.json", content)
    picture(folder / "images" / "0001.jpg", 1)
    picture(folder / "images" / "0002.gif", 2)


STANDINS = {
    "vqav2": vqav2,
    "vqav2_val": vqav2_val,
    "gqa": gqa,
    "vizwiz": vizwiz,
    "vizwiz_val": vizwiz_val,
    "textvqa": textvqa,
    "textvqa_no_ocr": textvqa,
    "docvqa": docvqa,
    "docvqa_test": docvqa_test,
    "infovqa": infovqa,
    "infovqa_test": infovqa_test,
    "chartqa": chartqa,
    "ocrvqa": ocrvqa,
}
