"""Stand-ins of the benchmarks that a model grades."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image


def write_rows(file: Path, rows: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_pictures(folder: Path, names: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        Image.new("RGB", (40 + 8 * number, 50), (60 * number % 256, 90, 10)).save(folder / name)


def make_llavabench(root: Path) -> None:
    folder, names = root / "llava-bench-in-the-wild", ["001.jpg", "002.jpg"]
    write_pictures(folder / "images", names)
    categories = ["conv", "detail", "complex", "conv"]
    rows = [
        {"question_id": number, "image": names[number % 2], "text": f"What is number {number}?", "category": category}
        for number, category in enumerate(categories)
    ]
    write_rows(folder / "questions.jsonl", rows)
    write_rows(folder / "context.jsonl", [{"id": n, "image": n, "caption": f"A picture called {n}."} for n in names])
    write_rows(
        folder / "answers_gpt4.jsonl",
        [{"question_id": n, "text": f"It is a {n}.", "answer_id": f"a{n}"} for n in range(4)],
    )
    rule = {"role": "Assistant", "prompt": "Give both a number."}
    rules = {f"llava_bench_{category}": rule for category in categories}
    (folder / "rule.json").write_text(json.dumps(rules))


def make_mmvet(root: Path) -> None:
    folder, names = root / "mm-vet", ["v1_0.png", "v1_1.jpg"]
    write_pictures(folder / "images", names)
    rows = [{"question_id": n, "image": names[n % 2], "text": f"What is x in {n}?"} for n in range(4)]
    write_rows(folder / "llava-mm-vet.jsonl", [{**row, "question_id": f"v1_{row['question_id']}"} for row in rows])
    metadata = {
        f"v1_{n}": {
            "imagename": names[n % 2],
            "question": f"What is x in {n}?",
            "answer": "-1<AND>-5",
            "capability": ["math", "ocr"] if n % 2 else ["rec"],
        }
        for n in range(4)
    }
    (folder / "mm-vet.json").write_text(json.dumps(metadata))
    (folder / "mm-vet_evaluator.py").write_text('import os\n\nprompt = """Question | Truth | Answer | Score\n"""\n')


STANDINS = {"llavabench": make_llavabench, "mmvet": make_mmvet}
