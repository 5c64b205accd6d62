"""Stand-ins of the benchmarks whose answers are a letter, or yes or no."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
COLORS = ("red", "green", "blue", "black")


def write_json(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def write_lines(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def picture(color: str) -> bytes:
    """A small PNG."""
    content = io.BytesIO()
    Image.new("RGB", (24, 16), color).save(content, format="PNG")
    return content.getvalue()


def write_picture(file: Path, color: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(picture(color))


def scienceqa(root: Path) -> None:
    """Six questions, four of them with a picture; one of the training split beside them."""
    folder = root / "scienceqa"
    ids = [str(number) for number in range(5, 11)]
    questions, problems = [], {"1": {"answer": 0, "choices": ["yes", "no"]}}
    for number, name in enumerate(ids):
        options = COLORS[: 2 + number % 3]
        text = "\n".join([f"Which color? {name}", *(f"{a}. {b}" for a, b in zip("ABCD", options, strict=False))])
        row: dict[str, Any] = {"id": name}
        if number < 4:
            row["image"] = f"{name}/image.png"
            write_picture(folder / "images/test" / row["image"], COLORS[number])
            text = f"<image>\n{text}"
        turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "The answer is A."}]
        questions.append({**row, "conversations": turns})
        problems[name] = {"answer": number % 2, "choices": list(options)}
    write_json(folder / "llava_test_CQM-A.json", questions)
    write_json(folder / "problems.json", problems)
    write_json(folder / "pid_splits.json", {"train": ["1"], "test": ids})


def pope(root: Path) -> None:
    """Two questions of each category."""
    folder = root / "pope"
    questions = []
    for number, category in enumerate(("adversarial", "popular", "random")):
        labels = []
        for thing, label in (("car", "yes"), ("dog", "no")):
            name, text = f"COCO_val2014_{number:012}.jpg", f"Is there a {thing} in the image?"
            labels.append({"question_id": len(labels) + 1, "image": name, "text": text, "label": label})
            asked = {"question_id": len(questions), "image": name, "text": f"{text}\n{SHORT}", "category": category}
            questions.append(asked)
        write_picture(folder / "val2014" / name, COLORS[number])
        write_lines(folder / f"coco/coco_pope_{category}.json", labels)
    write_lines(folder / "llava_pope_test.jsonl", questions)


def mme(root: Path) -> None:
    """Two questions about each of four pictures; one category keeps pictures and questions in folders."""
    release = root / "MME/MME_Benchmark_release_version"
    questions = []
    categories = {"existence": False, "OCR": False, "landmark": True, "code_reasoning": False}
    for number, (category, apart) in enumerate(categories.items()):
        folder = release / category
        image = f"{category}/{'images/' if apart else ''}000{number}.png"
        write_picture(release / image, COLORS[number])
        asked = [f"Is it {COLORS[number]}?", f"Is it not {COLORS[number]}?"]
        for text in asked:
            row = {"question_id": f"{category}/000{number}.png", "image": image, "text": f"{text}\n{SHORT}"}
            questions.append({**row, "category": category})
        lines = [f"{text}  Please answer yes or no.\t{a}\n" for text, a in zip(asked, ("Yes", "No"), strict=True)]
        file = (folder / "questions_answers_YN" if apart else folder) / f"000{number}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(lines), encoding="utf-8")
    write_lines(root / "MME/llava_mme.jsonl", questions)


def _mmbench(file: Path, texts: Sequence[str]) -> None:
    """Two questions, of two and three options, in each order of these."""
    names = ["index", "question", "hint", *"ABCD", "answer", "category", "image", "source", "l2-category"]
    names += ["comment", "split"]
    lines = [names]
    for number, options in enumerate((list(COLORS[:2]), list(COLORS[1:]))):
        image = base64.b64encode(picture(COLORS[number])).decode()
        for turn in range(len(options)):
            shown = [*options[turn:], *options[:turn]]
            cells = dict(zip("ABCD", [*shown, "", ""], strict=False)) | {"index": str(turn * 1_000_000 + number)}
            cells |= {"question": texts[number], "hint": "nan" if number else texts[2], "image": image}
            cells |= {"answer": "ABCD"[shown.index(options[0])], "category": "color", "l2-category": "attributes"}
            lines.append([cells.get(name, "nan") for name in names])
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join("\t".join(line) + "\n" for line in lines), encoding="utf-8")


def mmbench(root: Path) -> None:
    _mmbench(root / "mmbench/mmbench_dev_20230712.tsv", ("Which color?", "Which one is it?", "Look."))


def mmbench_cn(root: Path) -> None:
    _mmbench(root / "mmbench_cn/mmbench_dev_cn_20231003.tsv", ("什么颜色", "是哪一个", "请看。"))


def seed(root: Path) -> None:
    """Four questions about pictures and two about frames of videos."""
    seed_img(root)
    for number in (4, 5):
        write_picture(root / f"seed_bench/SEED-Bench-video-image/10_{number}.png", COLORS[number - 4])


def seed_img(root: Path) -> None:
    """The same questions, without the frames."""
    folder = root / "seed_bench"
    types = {"Instances Counting": 5, "Scene Understanding": 1, "Action Recognition": 10}
    questions, known = [], []
    for number in range(6):
        kind = "image" if number < 4 else "video"
        name = list(types)[2 if kind == "video" else number % 2]
        options = dict(zip(("choice_a", "choice_b", "choice_c", "choice_d"), COLORS, strict=True))
        text = f"Which color? {number}"
        row = {"question_id": str(100 + number), "data_type": kind, "question_type_id": types[name], "question": text}
        known.append({**row, **options, "answer": "ABCD"[number % 4], "data_id": str(number)})
        listed = [f"{letter}. {color}" for letter, color in zip("ABCD", COLORS, strict=True)]
        image = f"SEED-Bench-image/{number}" if kind == "image" else f"SEED-Bench-video-image/10_{number}.png"
        asked = {"question_id": 100 + number, "image": image, "text": "\n".join([text, *listed, LETTER])}
        questions.append({**asked, "category": name})
        if kind == "image":
            write_picture(folder / image, COLORS[number])
    write_lines(folder / "llava-seed-bench.jsonl", questions)
    write_json(folder / "SEED-Bench.json", {"questions": known, "question_type": types})


def mmstar(root: Path) -> None:
    """Four questions of two categories."""
    rows = [
        {
            "index": number,
            "question": "Which color?\nOptions: A: red, B: green, C: blue, D: black",
            "image": picture(color),
            "answer": "ABCD"[number],
            "category": ("math", "coarse perception")[number % 2],
            "l2_category": "geometry",
        }
        for number, color in enumerate(COLORS)
    ]
    file = root / "mmstar/mmstar.parquet"
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), file)


def qbench(root: Path) -> None:
    """Four questions with two to four options."""
    folder = root / "qbench"
    rows = []
    for number, color in enumerate(COLORS):
        name, options = f"{number}.jpg", ["Yes", "No", "Blurry", "Sharp"][: 2 + number % 3]
        rows.append({"img_path": name, "question": "Is it sharp?", "candidates": options, "correct_ans": options[1]})
        write_picture(folder / "images_llviqionqa" / name, color)
    write_json(folder / "llvisionqa_dev.json", [{**row, "type": 0, "concern": 1} for row in rows])


STANDINS: dict[str, Callable[[Path], None]] = {
    "scienceqa": scienceqa,
    "pope": pope,
    "mme": mme,
    "mmbench": mmbench,
    "mmbench_cn": mmbench_cn,
    "seed": seed,
    "seed_img": seed_img,
    "mmstar": mmstar,
    "qbench": qbench,
}
