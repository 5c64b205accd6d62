"""Area `data`: files that are torn or of odd kinds, samples and pictures that are not what they should be."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

from PIL import Image

from tests.fuzz.case import KINDS_OF_RUN, Case, settings_of

ODD: list[Any] = [
    None,
    "",
    [],
    {},
    0,
    -1,
    1.5,
    True,
    "x" * 5000,
    ["x"],
    {"a": 1},
    float("nan"),
    "\x00",
    "�",
    "😀",
    [None],
]
IMAGES: list[Any] = [
    "gone.png",
    "",
    "..",
    ".",
    "/",
    "/etc/passwd",
    "../llm/config.json",
    "x" * 300,
    "pipe",
    "http://127.0.0.1:9/a.png",
    "https://example.invalid/a.png",
    "s3://nobody/a.png",
    "file:///etc/passwd",
    "memory://a.png",
    "~/a.png",
    "$HOME/a.png",
    "a\x00b",
    "torn.png",
    "empty.png",
    "text.png",
    "eps.eps",
    "huge.png",
    [],
    ["red.png", "green.png"],
    [["red.png"]],
    5,
    {"bytes": "abc"},
    {"path": "red.png"},
    None,
]
FILES = ("torn", "empty", "bytes", "utf16", "object", "lines", "lines torn", "gz", "gz torn", "parquet", "parquet torn",
         "nested", "numbers", "pipe", "folder")  # fmt: skip


def fuzz(case: Case) -> None:
    """Odd pictures beside the right ones; then an odd file, odd samples, or an odd file of questions."""
    _write_pictures(case.folder / "images")
    case.random.choice([_samples, _samples, _samples, _file, _questions])(case)


def _write_pictures(folder: Path) -> None:
    whole = (folder / "red.png").read_bytes()
    (folder / "torn.png").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("not a picture")
    (folder / "eps.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    # A header that promises 60000 x 60000 pixels.
    (folder / "huge.png").write_bytes(whole[:16] + (60000).to_bytes(4, "big") * 2 + whole[24:])
    Image.new("I;16", (20, 20), 40000).save(folder / "deep.png")
    Image.new("F", (20, 20), 0.5).save(folder / "float.tiff")
    Image.new("P", (20, 20), 3).save(folder / "palette.gif")
    Image.new("LA", (20, 20), (9, 200)).save(folder / "alpha.png")
    Image.new("RGB", (1, 400), "red").save(folder / "thin.png")
    os.mkfifo(folder / "pipe")


def _samples(case: Case) -> None:
    kind, samples = _some(case)
    for place in case.random.sample(range(len(samples)), case.random.choice((1, 1, 2, 3))):
        samples[place]["id"] = f"odd-{place}"
        samples[place] = _odd(case, samples[place])
    (case.folder / "odd.json").write_text(json.dumps(samples))
    skip = case.random.random() < 0.5
    changes: dict[str, Any] = {"on_bad_sample": "skip"} if skip else {}
    changes["dataloader_num_workers"] = case.random.choice((0, 0, 2))
    if case.random.random() < 0.25:
        changes["streaming"] = True
    _train(case, kind, "odd.json", {"odd-", "odd.json"}, "works" if skip else "either", changes)


def _some(case: Case) -> tuple[str, list[Any]]:
    """A kind of run and its samples."""
    kind = case.random.choice(KINDS_OF_RUN)
    file = "captions.json" if kind == "projector" else "data.json"
    return kind, json.loads((case.folder / file).read_text())


def _odd(case: Case, sample: dict[str, Any]) -> Any:
    """A sample with one thing changed."""
    kind = case.random.choice(["image", "image", "key", "turn", "missing", "whole", "tags", "pixels"])
    if kind == "image":
        sample["image"] = case.random.choice(IMAGES)
    elif kind == "pixels":
        sample["image"] = case.random.choice(["deep.png", "float.tiff", "palette.gif", "alpha.png", "thin.png"])
        sample["conversations"][0]["value"] = "<image>\nWhat?"
    elif kind == "key":
        sample[case.random.choice(["id", "image", "conversations"])] = case.random.choice(ODD)
    elif kind == "turn":
        turn = case.random.choice(sample["conversations"])
        turn[case.random.choice(["from", "value"])] = case.random.choice(ODD)
    elif kind == "missing":
        del sample[case.random.choice(["id", "conversations"])]
    elif kind == "tags":
        turn = case.random.choice(sample["conversations"])
        turn["value"] = case.random.choice(["<image>", "<image><image>", "", "<s></s>", "<im_start>", "a <image> b"])
    else:
        sample = case.random.choice(ODD)
    case.say(f"sample {json.dumps(sample)[:160]}")
    return sample


def _file(case: Case) -> None:
    form = case.random.choice(FILES)
    kind, samples = _some(case)
    name = _write_file(case, form, samples)
    case.say(f"data file: {form}")
    works = form in ("lines", "gz", "parquet")
    changes = {"streaming": True} if case.random.random() < 0.3 else {}
    expect = "works" if works else "refused" if form not in ("folder", "lines torn") else "either"
    _train(case, kind, name, {name, "odd"}, expect, changes)


def _write_file(case: Case, form: str, samples: list[Any]) -> str:
    text = json.dumps(samples)
    lines = "".join(json.dumps(sample) + "\n" for sample in samples)
    cut = case.random.randrange(1, len(text) - 1)
    contents: dict[str, tuple[str, bytes]] = {
        "torn": ("odd.json", text[:cut].encode()),
        "empty": (case.random.choice(["odd.json", "odd.jsonl", "odd.parquet", "odd.json.gz"]), b""),
        "bytes": ("odd.json", case.random.randbytes(500)),
        "utf16": ("odd.json", text.encode("utf-16")),
        "object": ("odd.json", json.dumps({"data": samples}).encode()),
        "lines": ("odd.jsonl", lines.encode()),
        "lines torn": ("odd.jsonl", lines[:cut].encode()),
        "gz": ("odd.json.gz", gzip.compress(text.encode())),
        "gz torn": ("odd.json.gz", gzip.compress(text.encode())[: case.random.randrange(1, 200)]),
        "nested": ("odd.json", json.dumps([samples]).encode()),
        "numbers": ("odd.json", b"[1, 2, 3]"),
    }
    if form in contents:
        name, content = contents[form]
        (case.folder / name).write_bytes(content)
        return name
    if form == "pipe":
        os.mkfifo(case.folder / "odd.json")
        return "odd.json"
    if form == "folder":
        (case.folder / "odd").mkdir()
        (case.folder / "odd/a.json").write_text(text)
        (case.folder / "odd/b.jsonl").write_text(lines[:cut])
        return "odd"
    import pyarrow
    from pyarrow import parquet

    columns = [{"id": s["id"], "image": s.get("image"), "conversations": s["conversations"]} for s in samples]
    path = case.folder / "odd.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(columns), path)
    if form == "parquet torn":
        whole = path.read_bytes()
        path.write_bytes(whole[: case.random.randrange(1, len(whole) - 1)])
    return path.name


def _train(case: Case, kind: str, data: str, names: set[str], expect: str, changes: dict[str, Any]) -> None:
    config = case.write_config(settings_of(kind, "out", data_path=data, **changes))
    case.say(f"{kind} {changes}")
    doctor = case.run(["doctor", config], names=names)
    check = case.check_run("out", kind)
    code = case.run(["train", config], outputs=["out"], names=names, expect=expect, check=check)
    # Of a stream it says that samples are checked when their turn comes.
    if doctor == 0 and code not in (0, None) and not changes.get("streaming"):
        case.blame("the doctor finds nothing, and training refuses")


def _questions(case: Case) -> None:
    rows = [json.loads(line) for line in (case.folder / "questions.jsonl").read_text().splitlines()]
    row = case.random.choice(rows)
    key = case.random.choice(["question_id", "image", "text", None])
    if key is None:
        del row[case.random.choice(list(row))]
    else:
        row[key] = case.random.choice([*IMAGES, *ODD] if key == "image" else ODD)
    text = "".join(json.dumps(r) + "\n" for r in rows)
    if case.random.random() < 0.3:
        text = text[: case.random.randrange(1, len(text))]
    (case.folder / "odd.jsonl").write_text(text)
    case.say(f"question {json.dumps(row)[:160]}")
    arguments = ["eval", "runs/full", "--question-file", "odd.jsonl", "--image-folder", "images"]
    arguments += ["--answers-file", "answers.jsonl", "--max-new-tokens", "2", "--conv-mode", "v1"]
    names = {"odd.jsonl", "question", str(row.get("image"))}
    case.run(arguments, outputs=["answers.jsonl"], names=names, check=case.check_answers("odd.jsonl", "answers.jsonl"))
