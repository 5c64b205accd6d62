"""Training on clips: beside pictures and text, with a tower of their own, over ranks that see different kinds."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import CLIPModel

from llava.data.dataset import LazySupervisedDataset
from llava.model.builder import load_pretrained_model
from llava.reduction import ReductionConfig
from llava.train.checkpoints.resume import SETTINGS_FILE, check_checkpoint, run_settings
from llava.train.data import load_dataset
from llava.train.lengths import sample_lengths
from llava.train.modeling import load_tokenizer, read_config
from llava.train.preflight.doctor import examine
from llava.train.settings.parsing import parse_args
from llava.train.settings.problems import SettingsError
from llava.train.train import train
from tests.ranks import Ranks, zero_flags
from tests.results import KINDS, check_losses, losses
from tests.tiny_world import SIDE, TinyWorld, make_tiny_world

FRAMES = 3


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return make_tiny_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def video_tower(world: TinyWorld) -> Path:
    """Another encoder of the same shape."""
    folder = world.root / "video-tower"
    clip = CLIPModel.from_pretrained(world.clip)
    torch.manual_seed(7)
    for weight in clip.vision_model.parameters():
        if weight.ndim > 1:
            weight.data.normal_(std=0.2)
    clip.save_pretrained(folder)
    for file in world.clip.glob("preprocessor_config.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


@pytest.fixture(scope="module")
def data(world: TinyWorld) -> Path:
    """A clip, a picture, a clip, text, ...: with one sample a batch, the second of two ranks never sees a clip."""
    for number in range(4):
        folder = world.images / f"clip-{number}"
        folder.mkdir()
        for frame in range(5 + number):
            Image.new("RGB", (40, 30), (60 * number, 40 * frame, 90)).save(folder / f"{frame}.png")
    picture = next(sample for sample in json.loads(world.data.read_text()) if "image" in sample)
    samples: list[dict[str, Any]] = []
    for number in range(8):
        mark = "<video>" if number % 2 else "<image>"  # LLaVA-Video's data has the other one
        said = turns(f"{mark}\nwhat happens ?", f"it turns {number}")
        samples.append({"id": f"clip {number}", "video": f"clip-{number % 4}", "conversations": said})
        text = {"id": f"text {number}", "conversations": turns("what ?", "red")}
        samples.append({**picture, "id": f"picture {number}"} if number % 2 else text)
    file = world.root / "clips.json"
    file.write_text(json.dumps(samples))
    return file


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "kind", "towers", "reduction"),
    [
        (2, "lora", 1, "prumerge"),
        (
            2,
            "full",
            2,
            "{encoder: {name: divprune, tokens: 3, frames: joint}, decoder: {name: fastv, layer: 1, ratio: 0.5}}",
        ),
        (3, "full", 2, "prumerge"),
    ],
)
def test_ranks_that_see_different_kinds(
    stage: int,
    kind: str,
    towers: int,
    reduction: str,
    world: TinyWorld,
    data: Path,
    video_tower: Path,
    tmp_path: Path,
) -> None:
    """Two ranks, two micro-batches a step; the losses are those of one process that sees all of them."""
    settings = {**KINDS[kind], **zero_flags(stage), "reduction": reduction, "data_path": data, "num_frames": FRAMES}
    settings |= {"train_sampling_strategy": "sequential", "max_steps": 2, "lora_dropout": 0.0}
    settings |= {"video_tower": video_tower} if towers == 2 else {}
    small = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    run = Ranks(world.flags(tmp_path / "run", **settings, **small), 2, log=tmp_path / "log")
    assert run.join() == [0, 0], run.printed()[-4000:]
    check_losses(tmp_path / "run", steps=2)
    alone = {**settings, "per_device_train_batch_size": 4, "deepspeed": None}
    train(parse_args(world.flags(tmp_path / "alone", **alone)))
    expected, actual = losses(tmp_path / "alone"), losses(tmp_path / "run")
    assert actual[1] == pytest.approx(expected[1], rel=2e-2)


def test_a_video_tower_is_kept_with_the_model(world: TinyWorld, data: Path, video_tower: Path, tmp_path: Path) -> None:
    """Trained, written and opened again: both towers, how frames are sampled, and their weights."""
    settings = {"data_path": data, "video_tower": video_tower, "num_frames": FRAMES, "max_steps": 1}
    train(parse_args(world.flags(tmp_path, **settings)))
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert (config["num_frames"], config["mm_video_tower"]) == (FRAMES, str(video_tower))
    _, model, *_ = load_pretrained_model(tmp_path, device="cpu", dtype=torch.float32)
    inner, trained = model.get_model(), CLIPModel.from_pretrained(video_tower).vision_model.state_dict()
    weights = inner.video_tower.vision_tower.state_dict()
    torch.testing.assert_close(
        weights["embeddings.patch_embedding.weight"], trained["embeddings.patch_embedding.weight"]
    )
    assert not torch.equal(
        weights["embeddings.patch_embedding.weight"],
        inner.vision_tower.vision_tower.state_dict()["embeddings.patch_embedding.weight"],
    )


def test_items_of_clips(world: TinyWorld, data: Path) -> None:
    """Both files' marks become the clip's marker, lengths know frames."""
    from transformers import AutoTokenizer

    arguments = parse_args(world.flags(world.root / "out", data_path=data, num_frames=FRAMES))
    config = read_config(arguments)
    tokenizer = AutoTokenizer.from_pretrained(world.llm)
    dataset = load_dataset(arguments, config, tokenizer)
    assert isinstance(dataset, LazySupervisedDataset)
    for number in (0, 2):
        item = dataset[number]
        assert int((item["input_ids"] == -201).sum()) == 1
        assert not (item["input_ids"] == -200).any()
        assert [tuple(clip.shape) for clip in item["videos"]] == [(FRAMES, 3, SIDE, SIDE)]
        assert item["text"] == "what happens ?"
    assert dataset.modality_lengths[0] > 0 > dataset.modality_lengths[1]
    assert dataset.lengths[0] == dataset.lengths[1] + FRAMES * 128 + 4


def test_lengths_count_each_frame(world: TinyWorld, data: Path, video_tower: Path, tmp_path: Path) -> None:
    """With its class token where the model keeps it; without a bound on frames there are no lengths."""

    def length_and_ids(**settings: Any) -> tuple[int, int]:
        flags = world.flags(tmp_path, data_path=data, video_tower=video_tower, tokens_per_batch=512, **settings)
        arguments = parse_args(flags)
        config = read_config(arguments)
        dataset = load_dataset(arguments, config, load_tokenizer(arguments))
        assert isinstance(dataset, LazySupervisedDataset)
        return sample_lengths(arguments, config, dataset)[0], len(dataset[0]["input_ids"])

    for settings, frame in (({}, 17), ({"reduction": "{name: divprune, tokens: 3}"}, 4)):
        length, ids = length_and_ids(num_frames=FRAMES, **settings)
        assert length == ids - 1 + FRAMES * frame
    with pytest.raises(ValueError, match="--video_fps alone does not say how many frames"):
        length_and_ids(video_fps=1)
    assert length_and_ids(video_fps=1, max_frames=5)[0] > 5 * 17


def test_a_run_samples_as_the_checkpoint_that_it_begins_with(world: TinyWorld, tmp_path: Path) -> None:
    base = Path(shutil.copytree(world.llm, tmp_path / "base"))
    file = base / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "video_fps": 2, "max_frames": 5}))
    for given, expected in (({}, (8, 2, 5)), ({"num_frames": 4}, (4, None, 5))):
        arguments = parse_args(world.flags(tmp_path / "run", model_name_or_path=base, **given))
        read_config(arguments)
        taken = arguments.data
        assert (taken.num_frames, taken.video_fps, taken.max_frames) == expected


def test_another_video_tower_is_another_run(world: TinyWorld, video_tower: Path, tmp_path: Path) -> None:
    arguments = parse_args(world.flags(tmp_path, video_tower=video_tower))
    settings = run_settings(arguments, ReductionConfig(), None, 1)
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / SETTINGS_FILE).write_text(json.dumps({**settings, "video_tower": None}))
    with pytest.raises(SettingsError, match=r"video_tower: none -> .*video-tower"):
        check_checkpoint(str(tmp_path / "checkpoint-1"), settings, "optimizer")


def test_a_bad_clip_is_a_reject(world: TinyWorld, data: Path, tmp_path: Path) -> None:
    samples = json.loads(data.read_text())[:4]
    (world.images / "empty.mp4").write_bytes(b"")
    samples[0]["video"] = "empty.mp4"
    samples[2]["video"] = "nowhere.mp4"
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps(samples))
    settings = {"data_path": bad, "max_steps": 2, "num_frames": FRAMES}
    train(parse_args(world.flags(tmp_path / "run", **settings, on_bad_sample="skip")))
    rejects = [json.loads(line) for line in (tmp_path / "run" / "rejects.jsonl").read_text().splitlines()]
    assert {(entry["id"], entry["kind"]) for entry in rejects} == {("clip 0", "video"), ("clip 1", "video")}
    assert any("empty.mp4" in json.dumps(entry) for entry in rejects)


def test_the_doctor_reads_clips(world: TinyWorld, data: Path, tmp_path: Path) -> None:
    def errors(file: Path) -> str:
        flags = world.flags(tmp_path / "out", data_path=file, num_frames=FRAMES)
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text("".join(f"{flag[2:].replace('=', ': ', 1)}\n" for flag in flags))
        return " ".join(finding.message for finding in examine(recipe, []).findings if finding.level == "error")

    assert not errors(data)
    samples = json.loads(data.read_text())
    samples[2]["video"] = "nowhere.mp4"
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps(samples))
    said = errors(bad)
    assert "clip 1" in said
    assert "nowhere.mp4" in said


def test_files_without_a_reader_end_before_the_run(
    world: TinyWorld, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where bad samples are skipped: it is no fault of theirs. Folders of frames need no reader."""
    monkeypatch.setitem(sys.modules, "av", None)
    settings = {"num_frames": FRAMES, "max_steps": 1, "on_bad_sample": "skip"}
    samples = json.loads(data.read_text())[:4]
    (world.images / "film.mp4").write_bytes(b"any")
    file = tmp_path / "files.json"
    file.write_text(json.dumps([*samples, {**samples[0], "id": "film", "video": "film.mp4"}]))
    with pytest.raises(ValueError, match=r"film\.mp4 of sample 'film' needs the package av.*llava\[video\]"):
        train(parse_args(world.flags(tmp_path / "run", data_path=file, **settings)))
    train(parse_args(world.flags(tmp_path / "run", data_path=data, **settings)))


def test_the_doctor_looks_for_a_new_video_tower(
    world: TinyWorld, data: Path, video_tower: Path, tmp_path: Path
) -> None:
    """Also where the checkpoint holds the tower for pictures."""
    train(parse_args(world.flags(tmp_path / "base", max_steps=1)))
    folder = Path(shutil.copytree(video_tower, tmp_path / "torn"))
    (folder / "model.safetensors").write_bytes(b"torn")
    settings = {"model_name_or_path": tmp_path / "base", "data_path": data, "video_tower": folder}
    flags = world.flags(tmp_path / "out", num_frames=FRAMES, **settings)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("".join(f"{flag[2:].replace('=', ': ', 1)}\n" for flag in flags))
    errors = [finding for finding in examine(recipe, []).findings if finding.level == "error"]
    assert [finding.kind for finding in errors] == ["video tower"]
