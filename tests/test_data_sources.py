"""Where data comes from: files of each kind, folders, globs, URLs, the hub, and mixtures with weights."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import multiprocessing
import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from llava.data import LazySupervisedDataset, records
from llava.data.dataset import weighted_choice
from llava.data.records import DataError, read_records
from llava.data.rejects import Rejects, join_rejects
from llava.data.sources import parse_data_path
from llava.data.streaming import estimate_samples
from llava.data.table import load_table
from llava.train.settings.config import load_config
from llava.train.settings.parsing import parse_args
from tests.test_dataset import Letters, processor, turns
from tests.tiny_world import make_tiny_world


def text_sample(sample_id: object, **more: Any) -> dict[str, Any]:
    return {"id": sample_id, "conversations": turns("two words", "an answer"), **more}


MIXED: list[dict[str, Any]] = [
    text_sample(1),
    text_sample("two", extra={"nested": [1, "a", None]}),
    {"id": 3, "image": "red.png", "conversations": turns("<image>\nWhat?", "red")},
    {"id": "4", "image": ["red.png", "red.png"], "conversations": turns("<image> <image>", "same"), "score": 0.5},
    text_sample("five", image=None, score="high"),
    text_sample("\ud800 lone surrogate, and \u2028"),
]
"""No schema holds these: ids, images and further keys differ in their types."""


def write(folder: Path, name: str, samples: list[dict[str, Any]]) -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(samples), path)
    elif name.endswith(".jsonl"):
        path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    else:
        path.write_text(json.dumps(samples, indent=1))
    return str(path)


def dataset(data_path: Any, folder: Path, **options: Any) -> LazySupervisedDataset:
    settings = {"version": "v1", "image_folder": folder, "image_processor": processor()}
    return LazySupervisedDataset(data_path, Letters(), **{**settings, **options})


def ids(data: LazySupervisedDataset) -> list[Any]:
    return [data[index]["id"] for index in range(len(data))]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (20, 10), "red").save(tmp_path / "red.png")
    return tmp_path


@pytest.fixture
def memory() -> Iterator[Any]:
    """fsspec's file system in memory, in the place of an object store."""
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()


# Kinds of files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_samples_without_a_common_schema(name: str, folder: Path) -> None:
    data = dataset(write(folder, name, MIXED), folder)
    assert [data.sample(index) for index in range(len(data))] == MIXED
    assert ids(data) == [sample["id"] for sample in MIXED]
    assert [len(data[index]["images"]) for index in range(len(data))] == [0, 0, 1, 2, 0, 0]


def test_parquet_gives_the_items_of_json(folder: Path) -> None:
    samples = [
        text_sample("a", image=None),
        {"id": "b", "image": "red.png", "conversations": turns("<image>\nWhat?", "red")},
    ]
    by_json, by_parquet = (dataset(write(folder, f"data.{end}", samples), folder) for end in ("json", "parquet"))
    for index in range(2):
        one, other = by_json[index], by_parquet[index]
        assert one["input_ids"].tolist() == other["input_ids"].tolist()
        assert one["labels"].tolist() == other["labels"].tolist()
        assert [i.tolist() for i in one["images"]] == [i.tolist() for i in other["images"]]
    assert by_json.modality_lengths == by_parquet.modality_lengths


def test_images_inside_parquet(folder: Path) -> None:
    """As `datasets` writes its feature Image: {"bytes", "path"}; one image, several, or none."""
    content = (folder / "red.png").read_bytes()
    embedded = [
        {"id": 1, "image": [{"bytes": content, "path": None}], "conversations": turns("<image>\nWhat?", "red")},
        {"id": 2, "image": [{"bytes": content, "path": "x.png"}] * 2, "conversations": turns("<image><image>", "red")},
        {"id": 3, "image": None, "conversations": turns("What?", "red")},
    ]
    data = dataset(write(folder, "data.parquet", embedded), folder / "nowhere")
    assert [data[index]["image_sizes"] for index in range(3)] == [[(20, 10)], [(20, 10)] * 2, []]
    single = [{"id": 1, "image": {"bytes": content, "path": "a"}, "conversations": turns("<image>\nWhat?", "red")}]
    assert dataset(write(folder, "single.parquet", single), folder)[0]["image_sizes"] == [(20, 10)]
    named = [{"id": 1, "image": {"bytes": None, "path": "red.png"}, "conversations": turns("<image>\nWhat?", "red")}]
    assert dataset(write(folder, "named.parquet", named), folder)[0]["image_sizes"] == [(20, 10)]


def test_a_broken_parquet_file_is_named(folder: Path) -> None:
    path = Path(write(folder, "data.parquet", [text_sample("a")]))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"data\.parquet' is no whole Parquet file"):
        dataset(str(path), folder)


@pytest.mark.parametrize("chunk", [1, 2, 7, 1 << 20])
def test_a_json_list_is_read_in_pieces(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "CHUNK", chunk)
    path = tmp_path / "a.json"
    values = [{"a": [1, 2.5, "x\ny"]}, 12345, "\u2028", [], True, {"b": {}}]
    for text in (json.dumps(values), json.dumps(values, indent=2), "  [ 12 , 3\n]\n", "[]", " [ ] "):
        path.write_text(text)
        assert list(read_records(str(path))) == json.loads(text)
    for text in ("[1, 2", "[1,]", "[1] 2", '[{"a": 1}\n {"b": 2}]', '[\n1,\n "unended]', "[1,\n\n 2 3]"):
        path.write_text(text)
        with pytest.raises(json.JSONDecodeError) as expected:
            json.loads(text)
        with pytest.raises(ValueError, match="is malformed JSON at line") as caught:
            list(read_records(str(path)))
        assert f"at line {expected.value.lineno}, " in str(caught.value)


def test_a_compressed_file(folder: Path) -> None:
    path = folder / "data.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(text_sample("zipped")).encode()))
    assert ids(dataset(str(path), folder)) == ["zipped"]


LIST = json.dumps([text_sample(i) for i in range(20)]).encode()
LINES = b"\n".join(json.dumps(text_sample(i)).encode() for i in range(3)) + b"\n"


def parquet_of(samples: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(samples), buffer)
    return buffer.getvalue()


PARQUET = parquet_of([text_sample(i) for i in range(300)])
UNREADABLE = {
    "torn.json": (LIST[:-30], "malformed JSON at line 1"),
    "nested.json": (b"[" * 100_000, "nested too deeply"),
    "objects.json": (b'[{"a":' * 50_000, "nested too deeply"),
    "digits.json": (b"[1" + b"0" * 5000 + b"]", "cannot be read"),
    "latin.json": (LIST[:100] + b"\xff" + LIST[100:], "not UTF-8"),
    "wide.json": (LIST.decode().encode("utf-16"), "not UTF-8"),
    "torn.json.gz": (gzip.compress(LIST)[:-20], "cannot be read"),
    "no.json.gz": (LIST, "cannot be read"),
    "flipped.json.gz": (gzip.compress(LIST)[:30] + bytes(9) + gzip.compress(LIST)[39:], "cannot be read"),
    "tail.jsonl.gz": (gzip.compress(LINES) + b"junk", "cannot be read"),
    "no.json.zip": (b"PK\3\4junk", "cannot be read"),
    "torn.json.bz2": (bz2.compress(LIST)[:-10], "cannot be read"),
    "torn.json.xz": (lzma.compress(LIST)[:-10], "cannot be read"),
    "torn.parquet": (PARQUET[:-30], "no whole Parquet file"),
    "head.parquet": (PARQUET[:20] + bytes(60) + PARQUET[80:], "no whole Parquet file"),
    "foot.parquet": (PARQUET[:-60] + bytes(20) + PARQUET[-40:], "no whole Parquet file"),
    "empty.parquet": (parquet_of([]), "no samples in data file"),
    "blank.jsonl": (b"\n\n", "no samples in data file"),
}


@pytest.mark.parametrize("name", UNREADABLE)
@pytest.mark.parametrize("on_bad_sample", ["stop", "skip"])
def test_a_file_that_cannot_be_read_to_its_end_is_named(on_bad_sample: str, name: str, tmp_path: Path) -> None:
    """Also where bad samples are skipped: nobody knows how many are missing."""
    content, reason = UNREADABLE[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=reason) as caught:
        dataset(path, tmp_path, on_bad_sample=on_bad_sample, cache_dir=str(tmp_path))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=re.escape(name)):
        estimate_samples(str(path))
        list(read_records(str(path)))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"id": 1', "malformed JSON at line 2, column 9"),
        (b"[" * 100_000, "nested too deeply"),
        (b"1" * 5000, "4300 digits"),
        (b'{"id": "\xff"}', "not UTF-8 at line 2"),
        (b"\0\0", "malformed JSON at line 2, column 1"),
    ],
)
def test_a_line_that_cannot_be_decoded_is_a_bad_sample(line: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(codecs.BOM_UTF8 + LINES[: LINES.index(b"\n") + 1] + line + b"\n" + LINES)
    with pytest.raises(ValueError, match=rf"lines\.jsonl' .*{reason}"):
        dataset(path, tmp_path)
    data = dataset(path, tmp_path, on_bad_sample="skip", rejects=Rejects(tmp_path))
    assert ids(data) == [0, 1, 0, 1, 2]
    (entry,) = join_rejects(tmp_path)
    assert (entry["index"], entry["kind"]) == (1, "format")
    assert re.search(reason, entry["reason"])


def test_no_sample_fills_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a line without end nor a list whose sample never ends, as a compressed file of zeros has."""
    monkeypatch.setattr(records, "MAX_SAMPLE", 1000)
    monkeypatch.setattr(records, "CHUNK", 100)
    endless = {"a.jsonl.gz": bytes(10**6), "b.json.gz": b"[" + bytes(10**6), "c.json.gz": b'["' + b"a" * 10**6}
    for name, content in endless.items():
        (tmp_path / name).write_bytes(gzip.compress(content))
        with pytest.raises(DataError, match=rf"{name}.* more than 1000"):
            list(read_records(str(tmp_path / name)))


def test_spaces_before_a_sample_cost_little(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[" + " " * 30_000_000 + "1]")
    began = time.process_time()
    assert list(read_records(str(tmp_path / "a.json"))) == [1]
    assert time.process_time() - began < 1.5


def test_a_store_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch, memory: Any) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("no credentials")

    for name in ("isdir", "open", "ukey"):
        monkeypatch.setattr(type(memory), name, fail)
    with pytest.raises(ValueError, match=r"memory://bucket' cannot be looked up: no credentials"):
        parse_data_path("memory://bucket")[0].files()
    for read in (lambda: list(read_records("memory://a.json")), lambda: load_table("memory://a.json", "v1")):
        with pytest.raises(DataError, match=r"memory://a\.json' cannot be read \(no credentials\)"):
            read()
    with pytest.raises(ValueError, match=r"weird://a' cannot be looked up: .*weird"):
        parse_data_path("weird://a")[0].files()


@pytest.mark.parametrize("path", ["n" * 300, "a/" * 3000, "owner/" + "n" * 300, '[{"path": ' + "[" * 500])
def test_odd_paths_of_data(path: str) -> None:
    with pytest.raises(ValueError, match=r"data_path|data file"):
        parse_data_path(path)[0].files()


def test_a_mixture_whose_text_is_longer_than_a_path(folder: Path) -> None:
    path = write(folder, "data.json", MIXED[:1])
    assert len(parse_data_path(json.dumps([{"path": path}] * 200))) == 200


# Places ----------------------------------------------------------------------------------------------------------


def test_folders_and_globs(folder: Path) -> None:
    for name in ("set/b.jsonl", "set/deep/a.json", "set/c.parquet"):
        write(folder, name, [text_sample(name)])
    (folder / "set" / "notes.txt").write_text("no data")
    assert ids(dataset(folder / "set", folder)) == ["set/b.jsonl", "set/c.parquet", "set/deep/a.json"]
    assert ids(dataset(str(folder / "set" / "*.jsonl"), folder)) == ["set/b.jsonl"]
    assert ids(dataset(str(folder / "set/**/*.json"), folder)) == ["set/deep/a.json"]
    for nothing in (folder / "set" / "*.csv", folder / "empty"):
        (folder / "empty").mkdir(exist_ok=True)
        with pytest.raises(ValueError, match=r"nothing there that ends in \.json, \.jsonl, \.parquet"):
            dataset(str(nothing), folder)


def test_object_stores(folder: Path, memory: Any) -> None:
    """Data and images at URLs; a change is seen."""
    memory.pipe("/bucket/images/red.png", (folder / "red.png").read_bytes())
    sample = {"id": "far", "image": "red.png", "conversations": turns("<image>\nWhat?", "red")}
    memory.pipe("/bucket/set/a.json", json.dumps([sample]).encode())
    memory.pipe("/bucket/set/b.jsonl", json.dumps(text_sample("near")).encode())
    for path in ("memory://bucket/set", "memory://bucket/set/*.json*"):
        data = dataset(path, folder, image_folder="memory://bucket/images")
        assert ids(data) == ["far", "near"]
        assert data[0]["image_sizes"] == [(20, 10)]
    memory.pipe("/bucket/set/b.jsonl", json.dumps(text_sample("new")).encode())
    assert ids(dataset("memory://bucket/set/b.jsonl", folder)) == ["new"]
    with pytest.raises(ValueError, match=r"memory://bucket/gone\.json' does not exist"):
        dataset("memory://bucket/gone.json", folder)
    gone = dataset("memory://bucket/set/a.json", folder, image_folder="memory://bucket")
    with pytest.raises(ValueError, match=r"sample 'far' .*memory://bucket/red\.png' does not exist"):
        gone[0]


def test_a_hub_dataset_by_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its splits are told apart as `datasets` does; here on a folder in the place of a repository."""
    for split in ("train", "test"):
        write(folder, f"repository/{split}.jsonl", [text_sample(split)])
    load = datasets.load_dataset_builder
    asked = []

    def local(name: str, subset: str | None) -> Any:
        asked.append((name, subset))
        return load(str(folder / "repository"), subset)

    monkeypatch.setattr(datasets, "load_dataset_builder", local)
    assert ids(dataset("owner/conversations", folder)) == ["train"]
    assert ids(dataset({"path": "owner/conversations", "split": "test"}, folder)) == ["test"]
    assert asked == [("owner/conversations", None)] * 2
    with pytest.raises(ValueError, match=r"no split 'dev' of data files; it has: .*train"):
        dataset({"path": "owner/conversations", "split": "dev"}, folder)


def test_a_hub_dataset_that_is_not_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise datasets.exceptions.DatasetNotFoundError("no such repository")

    monkeypatch.setattr(datasets, "load_dataset_builder", refuse)
    with pytest.raises(ValueError, match="neither a file here nor a hub dataset that can be read: no such"):
        dataset("owner/conversations", folder)


# Mixtures --------------------------------------------------------------------------------------------------------


def test_a_mixture_with_weights(folder: Path) -> None:
    a = write(folder, "a.json", [text_sample(f"a{i}") for i in range(10)])
    b = write(folder, "b.jsonl", [text_sample(f"b{i}") for i in range(10)])
    mixture = [{"path": a, "weight": 0.5}, {"path": b, "weight": 2.3}]
    data = dataset(mixture, folder, seed=1)
    counts = Counter(ids(data))
    assert sum(counts[f"a{i}"] for i in range(10)) == 5
    assert max(counts[f"a{i}"] for i in range(10)) == 1
    assert sorted(counts[f"b{i}"] for i in range(10)) == [2] * 7 + [3] * 3
    assert len(data.modality_lengths) == len(data) == 28
    assert ids(dataset(mixture, folder, seed=1)) == ids(data)
    assert ids(dataset(mixture, folder, seed=2)) != ids(data)
    for text in (json.dumps(mixture), f"[{{path: {a}, weight: 0.5}}, {{path: {b}, weight: 2.3}}]"):
        assert ids(dataset(text, folder, seed=1)) == ids(data)


def test_weighted_choice() -> None:
    assert weighted_choice(4, 1, 0).tolist() == [0, 1, 2, 3]
    assert weighted_choice(3, 2, 0).tolist() == [0, 1, 2, 0, 1, 2]
    assert len(weighted_choice(1000, 0.25, 0)) == 250


def test_each_source_has_its_image_folder(folder: Path) -> None:
    (folder / "blue").mkdir()
    Image.new("RGB", (6, 6), "blue").save(folder / "blue" / "red.png")
    sample = {"id": "x", "image": "red.png", "conversations": turns("<image>\nWhat?", "a color")}
    a, b = write(folder, "a.json", [sample]), write(folder, "b.json", [sample])
    mixture = [a, {"path": b, "image_folder": str(folder / "blue"), "weight": 2}]
    sizes = [item["image_sizes"] for item in dataset(mixture, folder)]  # type: ignore[attr-defined]
    assert sizes == [[(20, 10)], [(6, 6)], [(6, 6)]]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"path": "a.json", "wieght": 1}, r"unknown key wieght; known: path, weight, image_folder"),
        ({"path": "a.json", "weight": 0}, r"weight=0, expected a number above 0"),
        ({"path": "a.json", "weight": "half"}, r"weight='half', expected a number above 0"),
        ({"weight": 1}, r"neither a path nor a mapping with the key 'path'"),
        ({"path": "gone.json"}, r"gone\.json' does not exist"),
        ({"path": "a.json", "image_folder": 7}, r"image_folder=7, expected text"),
    ],
)
def test_wrong_mixtures_are_refused(
    entry: dict[str, Any], message: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    write(folder, "a.json", [text_sample(1)])
    with pytest.raises(ValueError, match=message):
        parse_data_path([entry])


def test_a_mixture_in_a_recipe(tmp_path: Path) -> None:
    world = make_tiny_world(tmp_path / "world")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"data_path:\n  - {{path: {world.data}, weight: 0.5}}\n"
        f"  - path: {world.captions}\n    image_folder: {tmp_path}\n"
    )
    flags, _ = load_config(recipe)
    rest = [flag for flag in world.flags(tmp_path / "out") if not flag.startswith("--data_path")]
    sources = parse_data_path(parse_args([*flags, *rest]).data.data_path or "")
    assert [(s.path, s.weight, s.image_folder) for s in sources] == [
        (str(world.data), 0.5, None),
        (str(world.captions), 1.0, str(tmp_path)),
    ]


# The cache -------------------------------------------------------------------------------------------------------


def test_a_file_is_converted_once_and_again_when_it_changes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(folder, "data.json", [text_sample(1)])
    load_table(path, "v1", str(folder / "cache"))
    reads = []
    monkeypatch.setattr("llava.data.table.read_records", lambda file: reads.append(file) or read_records(file))
    assert len(load_table(path, "v1", str(folder / "cache"))) == 1
    assert not reads
    write(folder, "data.json", [text_sample(1), text_sample(2)])
    assert len(load_table(path, "v1", str(folder / "cache"))) == 2
    os.utime(path, (0, 0))
    load_table(path, "v1", str(folder / "cache"))
    assert reads == [path] * 2
    load_table(path, "plain", str(folder / "cache"))  # which refuses other samples
    assert len(reads) == 3


def test_processes_may_convert_at_the_same_time(folder: Path) -> None:
    path = write(folder, "data.json", [text_sample(i) for i in range(3000)])
    arguments = [(path, "v1", str(folder / "cache"))] * 3
    with multiprocessing.get_context("fork").Pool(3) as pool:
        assert [len(table) for table in pool.starmap(load_table, arguments)] == [3000] * 3
    assert len(list((folder / "cache").rglob("*.arrow"))) == 1
    assert not list((folder / "cache").rglob("*.incomplete"))


def test_a_conversion_that_fails_leaves_nothing_to_read(folder: Path) -> None:
    path = folder / "data.json"
    path.write_text("[" + json.dumps(text_sample(1)) + ",\n{broken\n")
    for _ in range(2):
        with pytest.raises(ValueError, match="line 2"):
            load_table(str(path), "v1", str(folder / "cache"))
    assert not list((folder / "cache").rglob("*.arrow"))


def test_tables_are_mapped_into_memory(folder: Path) -> None:
    data = dataset(write(folder, "data.json", MIXED), folder)
    files = [Path(file["filename"]) for file in data.table.cache_files]
    assert files
    assert all(file.suffix == ".arrow" for file in files)
    before = pa.total_allocated_bytes()
    dataset(folder / "data.json", folder)
    assert pa.total_allocated_bytes() - before < 100_000
