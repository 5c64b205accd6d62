"""The dataset and the collator: what they read, what they refuse, and what they batch."""

from __future__ import annotations

import json
import logging
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import CLIPImageProcessor

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.data import DataCollatorForSupervisedDataset, LazySupervisedDataset


class Letters:
    """A slow tokenizer of characters; </s> is one token, and padding is the letter a."""

    is_fast = False
    bos_token_id = 1
    eos_token = "</s>"
    pad_token_id: int | None = ord("a")
    padding_side = "right"

    def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> Any:
        pieces = text.split("</s>")
        ids = [ord(letter) for letter in pieces[0]]
        for piece in pieces[1:]:
            ids += [2, *map(ord, piece)]
        return Encoding(input_ids=[1] * add_special_tokens + ids)


class Encoding(SimpleNamespace):
    def __getitem__(self, key: str) -> Any:
        return getattr(self, key)


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": "gpt" if index % 2 else "human", "value": text} for index, text in enumerate(texts)]


SAMPLES: list[dict[str, Any]] = [
    {"id": "one", "image": "wide.png", "conversations": turns("<image>\nWhat is it?", "a bus")},
    {"id": "text", "conversations": turns("two words", "a b c", "More on <image> tags?", "no")},
    {
        "id": "two",
        "image": ["wide.png", "tall.jpg"],
        "conversations": turns("<image>\n<image>\nSame?", "no \u2028"),
    },
    {"image": "tall.jpg", "conversations": turns("Look. <image>", "yes")},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.effect_noise((80, 40), 50).save(tmp_path / "wide.png")
    Image.effect_noise((30, 60), 50).save(tmp_path / "tall.jpg")
    (tmp_path / "data.json").write_text(json.dumps(SAMPLES))
    lines = "\n".join(json.dumps(sample, ensure_ascii=False) for sample in SAMPLES)
    (tmp_path / "data.jsonl").write_text(lines + "\n\n", encoding="utf-8")
    return tmp_path


def processor() -> Any:
    return CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})


def dataset(folder: Path, data: Any = None, **options: Any) -> LazySupervisedDataset:
    """The data set of a file, or of samples that are first written to one."""
    path: Any = folder / "data.json"
    if isinstance(data, str):
        path = data
    elif data is not None:
        path = folder / "given.json"
        path.write_text(json.dumps(data))
    settings = {"version": "v1", "image_folder": folder, "image_processor": processor()}
    return LazySupervisedDataset(path, Letters(), **(settings | options))


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_items(folder: Path, name: str) -> None:
    data = dataset(folder, str(folder / name), image_aspect_ratio="pad")
    items = [data[index] for index in range(len(data))]
    assert [item["id"] for item in items] == ["one", "text", "two", 3]
    assert [[tuple(image.shape) for image in item["images"]] for item in items] == [
        [(3, 56, 56)],
        [],
        [(3, 56, 56)] * 2,
        [(3, 56, 56)],
    ]
    assert [item["image_sizes"] for item in items] == [[(80, 40)], [], [(80, 40), (30, 60)], [(30, 60)]]
    assert [item["text"] for item in items] == [
        "What is it?",
        "two words\nMore on <image> tags?",
        "Same?",
        "Look.",
    ]
    assert [int((item["input_ids"] == IMAGE_TOKEN_INDEX).sum()) for item in items] == [1, 0, 2, 1]
    learned = "".join(map(chr, items[2]["labels"][items[2]["labels"] != IGNORE_INDEX].tolist()))
    assert learned == " no \u2028\x02"
    assert data.sample(1) == SAMPLES[1]
    assert torch.equal(data[-1]["input_ids"], items[-1]["input_ids"])
    with pytest.raises(IndexError):
        data[len(data)]


def test_anyres_items_have_tiles(folder: Path) -> None:
    data = dataset(folder, image_aspect_ratio="anyres", image_grid_pinpoints="[[56, 112], [112, 56]]")
    assert [tuple(image.shape) for image in data[2]["images"]] == [(3, 3, 56, 56)] * 2


def test_lengths(folder: Path) -> None:
    data = dataset(folder)
    assert data.lengths == [4 + 2 + 128, 2 + 3 + 4 + 1, 3 + 1 + 256, 2 + 1 + 128]
    assert data.modality_lengths == [134, -10, 260, 131]


def test_several_files(folder: Path) -> None:
    (folder / "more.json").write_text(json.dumps([SAMPLES[0] | {"image": "gone.png"}]))
    names = [folder / "data.json", folder / "more.json"]
    for path in (names, f"{names[0]}, {names[1]}"):
        data = LazySupervisedDataset(path, Letters(), processor(), version="v1", image_folder=folder)
        assert len(data) == 5
        with pytest.raises(ValueError, match=r"sample 'one' \(index 0 of .*more\.json\)"):
            data[4]
    comma = folder / "a,b.json"
    comma.write_text(json.dumps(SAMPLES))
    assert len(dataset(folder, str(comma))) == len(SAMPLES)


def test_an_item_survives_workers(folder: Path) -> None:
    data = dataset(folder, image_aspect_ratio="pad")
    copied = pickle.loads(pickle.dumps(data))  # noqa: S301
    assert torch.equal(copied[0]["input_ids"], data[0]["input_ids"])
    loader = DataLoader(data, batch_size=2, num_workers=1, collate_fn=DataCollatorForSupervisedDataset(Letters()))
    assert [len(batch["images"]) for batch in loader] == [1, 3]


@pytest.mark.parametrize(
    ("text", "suffix", "match"),
    [
        (
            '[\n  {"id": 1,\n  "conversations" []}\n]',
            "json",
            r"bad\.json' is malformed JSON at line 3, column 19",
        ),
        ('[{"id": 1', "json", r"line 1, column 10"),
        ("", "json", r"line 1, column 1"),
        ('{"conversations": []}', "json", r"holds a JSON dict, expected a list"),
        ('\n{"id": 1}\n{"id": }\n', "jsonl", r"(line 3, column 8|index 0)"),
        ("[]", "json", "no samples in"),
        ("[7]", "json", r"index 0 of .*bad\.json\): expected an object"),
        ('[{"id": "x"}]', "json", r"sample 'x' \(index 0 of .*: the key 'conversations' is missing"),
    ],
)
def test_malformed_files(folder: Path, text: str, suffix: str, match: str) -> None:
    bad = folder / f"bad.{suffix}"
    bad.write_text(text)
    with pytest.raises(ValueError, match=match):
        dataset(folder, str(bad))


def test_malformed_line_of_json_lines(folder: Path) -> None:
    bad = folder / "bad.jsonl"
    bad.write_text(json.dumps(SAMPLES[0]) + "\n\n" + '{"id": }\n')
    with pytest.raises(ValueError, match="line 3, column 8"):
        dataset(folder, str(bad))


def test_files_that_are_not_there_or_no_text(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"gone\.json' does not exist; check data_path"):
        dataset(folder, str(folder / "gone.json"))
    with pytest.raises(ValueError, match="data_path is empty"):
        dataset(folder, " , ")
    (folder / "latin.json").write_bytes(b'["\xe9"]')
    with pytest.raises(ValueError, match=r"latin\.json' is not UTF-8"):
        dataset(folder, str(folder / "latin.json"))


@pytest.mark.parametrize(
    ("sample", "match"),
    [
        ({"image": "wide.png", "conversations": turns("What?", "a")}, "have 0 <image> and it names 1 image"),
        (
            {"image": "wide.png", "conversations": turns("<image> <image>", "a")},
            "have 2 <image> and it names 1",
        ),
        ({"image": ["a", "b"], "conversations": turns("<image>", "a")}, "have 1 <image> and it names 2"),
        ({"conversations": turns("<image>\nWhat?", "a")}, "have 1 <image> and it names 0"),
        ({"conversations": turns("What?\n<image>", "a")}, "have 1 <image> and it names 0"),
        ({"image": 7, "conversations": turns("<image>", "a")}, '"image" is 7, expected a file name'),
        ({"image": [""], "conversations": turns("<image>", "a")}, "expected a file name"),
        ({"conversations": turns("What?")}, "no answer"),
        ({"conversations": [{"from": ["human"], "value": "a"}]}, "from \\['human'\\]; known roles"),
        ({"conversations": [{"from": "x" * 9999, "value": "a"}]}, "from 'x{79}; known roles"),
        ({"conversations": turns("\ud800", "a")}, "turn 0 holds half a character"),
        ({"conversations": turns("a", "\udfff")}, "turn 1 holds half a character"),
        ({"k" * 99 + str(i): 0 for i in range(99)}, "the key 'conversations' is missing; it has .{200}$"),
        ({"conversations": [{"from": "user", "value": "a"}]}, "from 'user'; known roles"),
        ({"conversations": []}, "non-empty list"),
    ],
)
def test_bad_samples_are_named_before_training(folder: Path, sample: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        dataset(folder, [SAMPLES[0], {"id": "x7", **sample}])
    assert "sample 'x7' (index 1 of" in str(caught.value)


def test_image_tags_of_a_dropped_turn_do_not_count(folder: Path) -> None:
    conversation = [{"from": "gpt", "value": "<image>"}, *turns("<image>\nWhat?", "a bus")]
    item = dataset(folder, [{"id": 1, "image": "wide.png", "conversations": conversation}])[0]
    assert len(item["images"]) == int((item["input_ids"] == IMAGE_TOKEN_INDEX).sum()) == 1


@pytest.mark.parametrize("file", ["gone.png", "cut.png", "text.png"])
def test_unreadable_images_are_named(folder: Path, file: str) -> None:
    (folder / "cut.png").write_bytes((folder / "wide.png").read_bytes()[:300])
    (folder / "text.png").write_text("no image")
    data = dataset(folder, [{"id": "x7", "image": file, "conversations": turns("<image>", "a")}])
    with pytest.raises(ValueError, match=rf"sample 'x7' \(index 0 of .*{file}"):
        data[0]


def test_options_are_checked_before_training(folder: Path) -> None:
    with pytest.raises(ValueError, match="unknown conversation template 'v9'"):
        dataset(folder, version="v9")
    with pytest.raises(ValueError, match="unknown image_aspect_ratio 'padded'"):
        dataset(folder, image_aspect_ratio="padded")
    with pytest.raises(ValueError, match="there is no image_processor"):
        dataset(folder, image_processor=None)
    assert len(dataset(folder, [SAMPLES[1]], image_processor=None)) == 1


def test_a_template_of_another_family_warns(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        dataset(folder)
        assert not caplog.records
        dataset(folder, version="qwen_2")
    assert "'<|im_end|>', which is not one token" in caplog.text


@pytest.mark.parametrize("side", ["right", "left"])
def test_batches_are_padded_by_length(folder: Path, side: str) -> None:
    data = dataset(folder, image_aspect_ratio="pad")
    tokenizer = Letters()
    tokenizer.padding_side = side
    items = [data[index] for index in range(3)]
    batch = DataCollatorForSupervisedDataset(tokenizer)(items)
    width = max(len(item["input_ids"]) for item in items)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape == (3, width)
    for row, item in enumerate(items):
        # The padding id is a letter of the texts: only the length can tell one from the other.
        kept = batch["attention_mask"][row].bool()
        assert kept.sum() == len(item["input_ids"])
        assert kept[-1 if side == "left" else 0]
        assert torch.equal(batch["input_ids"][row][kept], item["input_ids"])
        assert torch.equal(batch["labels"][row][kept], item["labels"])
        assert (batch["input_ids"][row][~kept] == tokenizer.pad_token_id).all()
        assert (batch["labels"][row][~kept] == IGNORE_INDEX).all()
    assert batch["image_sizes"] == [(80, 40), (80, 40), (30, 60)]
    assert torch.equal(batch["images"][2], items[2]["images"][1])
    assert batch["texts"] == [item["text"] for item in items]


def test_a_batch_without_images(folder: Path) -> None:
    batch = DataCollatorForSupervisedDataset(Letters())([dataset(folder)[1]])
    assert batch["images"] == []
    assert batch["image_sizes"] == []


def test_a_tokenizer_without_padding_is_refused() -> None:
    tokenizer = Letters()
    tokenizer.pad_token_id = None
    with pytest.raises(ValueError, match=r"no padding token; set tokenizer\.pad_token"):
        DataCollatorForSupervisedDataset(tokenizer)([])
