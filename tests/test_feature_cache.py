"""Stored features in place of pixels: the same losses, no image opened, and no cache that does not fit."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate.utils import send_to_device
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.data._utils.pin_memory import pin_memory
from typer.testing import CliRunner

from llava import cli
from llava.data import items
from llava.data.feature_cache import SHARDS, FeatureCache, NotCachedError, ShardWriter, picture_key
from llava.data.stored_features import StoredFeatures, join_features, join_images
from llava.model.multimodal_encoder.vision_tower import VisionTower
from llava.model.visual_encoding import store_features
from llava.train import cache_features
from llava.train import train as train_module
from llava.train.launching.launch import FOLDER, launch_command
from llava.train.settings.config import LaunchOptions
from llava.train.settings.parsing import parse_args
from llava.train.train import train
from tests.ranks import Ranks, train_in_ranks, zero_flags
from tests.results import check_losses
from tests.test_model import SIZES, pictures
from tests.tiny_models import prompt, tiny_model
from tests.tiny_world import COLORS, SIDE, TinyWorld, make_readable, make_tiny_world, run_python

ANYRES = {
    "image_aspect_ratio": "anyres",
    "image_grid_pinpoints": "[(32, 64), (64, 32)]",
    "mm_patch_merge_type": "spatial_unpad",
}
PYRAMID = "{name: pyramiddrop, layers: [1], ratios: [0.5]}"
RUNS: dict[str, dict[str, Any]] = {
    "baseline": {"gradient_accumulation_steps": 2},
    "anyres, prumerge": {**ANYRES, "reduction": "prumerge"},
    "stf": {"reduction": "{name: stf, mbtf: [3, 1]}"},
    "packed, m3": {"reduction": "{name: m3, scales: [1, 4]}", "packing": True},
    "packed, pyramiddrop": {"reduction": PYRAMID, "packing": True, "dataloader_num_workers": 1},
}
METHODS = (
    "none",
    "prumerge",
    "{name: prumerge_plus, ratio: 0.5}",
    "{name: spatial, rows: 2, columns: 2}",
    "{name: stf, mbtf: [3, 1]}",
    "{name: stf, mbtf: off}",
    "avgpool",
    "{name: m3, tokens: 4}",
    "tokenpacker",
    "{name: mqt, tokens: 6}",
    "{tower: {name: resize, tokens: 4}, projector: {name: m3, tokens: 1}}",
    PYRAMID,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    world = make_tiny_world(tmp_path_factory.mktemp("world"))
    make_readable(world.clip)
    return world


def flags(world: TinyWorld, folder: Path, **settings: Any) -> list[str]:
    """Of a run of float32 features beside its output."""
    values = {"feature_cache": folder.parent / "cache", "feature_cache_dtype": "float32", "max_steps": 3, **settings}
    return world.flags(folder, **values)


def losses(world: TinyWorld, folder: Path, **settings: Any) -> list[float]:
    trainer = train(parse_args(flags(world, folder, **settings)))
    assert trainer is not None
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture
def no_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on nothing opens an image or runs the tower."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("pixels are not needed")

    monkeypatch.setattr(items, "open_picture", refuse)
    monkeypatch.setattr(VisionTower, "forward", refuse)
    monkeypatch.setattr("llava.train.preflight.samples.LOOKED_AT", 0)


def make_cache(world: TinyWorld, folder: Path, **settings: Any) -> Path:
    """The cache of the run in a folder."""
    cache_features.main(flags(world, folder, **settings))
    return folder.parent / "cache"


def contents(cache: Path) -> dict[bytes, tuple[Any, ...]]:
    """Features of every picture of a cache."""
    found = FeatureCache(cache)
    assert len(set(found._keys.tolist())) == len(found), "a picture was stored twice"
    read = {}
    for color in COLORS:
        picture = str(cache.parent / "images" / f"{color}.png")
        features, size = found.read(picture)
        read[picture_key(picture)] = (features.tokens.tolist(), features.lengths, size)
    return read


@pytest.fixture
def own_images(world: TinyWorld, tmp_path: Path) -> Path:
    return Path(shutil.copytree(world.images, tmp_path / "images"))


# Losses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS)
def test_losses_are_those_from_pixels(name: str, world: TinyWorld, tmp_path: Path, request: Any) -> None:
    settings = {**RUNS[name], "preflight_seconds": 0}
    expected = losses(world, tmp_path / "pixels", feature_cache=None, **settings)
    make_cache(world, tmp_path / "run", **settings)
    request.getfixturevalue("no_pixels")
    assert losses(world, tmp_path / "run", **settings) == pytest.approx(expected, abs=1e-5)


def test_a_run_goes_on_from_its_checkpoint_and_another_from_its_result(world: TinyWorld, tmp_path: Path) -> None:
    """The result holds the tower's weights itself: they are the same."""
    make_cache(world, tmp_path / "whole")
    saves = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    expected = losses(world, tmp_path / "whole", max_steps=4, lr_scheduler_type="constant")
    assert losses(world, tmp_path / "run", **saves, max_steps=2) == pytest.approx(expected[:2], abs=1e-6)
    assert losses(world, tmp_path / "run", **saves, max_steps=4) == pytest.approx(expected, abs=1e-6)
    keys = load_file(tmp_path / "whole" / "model.safetensors")
    assert any("vision_tower" in key for key in keys)
    assert losses(world, tmp_path / "next", model_name_or_path=tmp_path / "whole", vision_tower=None, max_steps=1)


@pytest.mark.parametrize("anyres", [False, True], ids=["one tile", "anyres"])
@pytest.mark.parametrize("method", METHODS)
def test_the_same_tokens_enter_the_language_model(method: str, anyres: bool) -> None:
    model = tiny_model(anyres=anyres)
    model.set_reduction(method)
    inner, images, sizes = model.get_model(), pictures(anyres), SIZES
    with torch.no_grad():
        expected, lengths = inner.encode_images(images, sizes)
        tiles = [image.reshape(-1, *image.shape[-3:]) for image in images]
        read = inner.read_tiles(torch.cat(tiles), None, inner.reducers())
        stored = store_features(read, [len(one) for one in tiles])
        joined = join_features(stored.split())
        tokens, counts = inner.encode_images(joined, sizes)
    assert counts.tolist() == lengths.tolist()
    torch.testing.assert_close(tokens, expected, atol=1e-6, rtol=1e-5)


def test_pictures_that_a_data_file_holds(world: TinyWorld, own_images: Path, tmp_path: Path, request: Any) -> None:
    """They are known by their content: two rows of one picture have one entry."""
    rows = json.loads(world.captions.read_text())
    for row in rows:
        row["image"] = {"bytes": (own_images / row["image"]).read_bytes(), "path": row["image"]}
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    settings = {"data_path": tmp_path / "data.parquet", "image_folder": None, "max_steps": 2, "preflight_seconds": 0}
    expected = losses(world, tmp_path / "pixels", feature_cache=None, **settings)
    assert len(FeatureCache(make_cache(world, tmp_path / "run", **settings))) == len(COLORS) < len(rows)
    request.getfixturevalue("no_pixels")
    assert losses(world, tmp_path / "run", **settings) == pytest.approx(expected, abs=1e-5)


def test_features_of_half_the_bytes_give_the_losses_to_their_rounding(world: TinyWorld, tmp_path: Path) -> None:
    expected = losses(world, tmp_path / "pixels", feature_cache=None, max_steps=1)
    cache = make_cache(world, tmp_path / "run", feature_cache_dtype="bfloat16")
    assert FeatureCache(cache).empty().tokens.dtype == torch.bfloat16
    assert losses(world, tmp_path / "run", feature_cache_dtype="bfloat16", max_steps=1) == pytest.approx(
        expected, rel=1e-2
    )


@pytest.mark.parametrize("method", ["none", "{tower: {name: resize, tokens: 4}, projector: {name: m3, tokens: 1}}"])
def test_a_batch_of_text_alone_trains_the_same_weights(method: str) -> None:
    """On another rank the same modules run for a picture: without a gradient for the projector, DDP would wait."""
    model = tiny_model(reduction=method).train()
    empty = StoredFeatures(torch.zeros(0, 32), [], [])
    ids = prompt(5).unsqueeze(0)
    model.get_vision_tower().forward = None  # is not called
    model(input_ids=ids, labels=ids, images=empty).loss.backward()
    assert all(weight.grad is not None for weight in model.get_model().mm_projector.parameters())


def cache_in_place_of_training(rank: int) -> None:
    """Trap: the ranks make the cache of the run."""
    train_module.parse_args = lambda argv: argv  # type: ignore[assignment, return-value]
    train_module.train = cache_features.main  # type: ignore[assignment]


@pytest.mark.slow
def test_ranks_make_a_cache_and_train_from_it(world: TinyWorld, own_images: Path, tmp_path: Path) -> None:
    """With ZeRO-3 and one sample a rank, so that a rank with a picture meets one without."""
    settings = {**zero_flags(3), "image_folder": own_images, "per_device_train_batch_size": 1}
    argv = flags(world, tmp_path / "run", **settings)
    making = Ranks(argv, 2, log=tmp_path / "log", before=cache_in_place_of_training)
    assert making.join() == [0, 0], making.printed()
    assert "4 pictures will take about 0.00 GiB" in making.printed()
    assert len(list((tmp_path / "cache").glob(SHARDS))) == 2
    assert len(contents(tmp_path / "cache")) == len(COLORS)
    train_in_ranks(argv, 2, tmp_path / "log")
    check_losses(tmp_path / "run", steps=3)


# Making one ------------------------------------------------------------------------------------------------------


def test_a_cache_that_was_killed_goes_on(
    world: TinyWorld, own_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"image_folder": own_images, "per_device_train_batch_size": 1}
    encode, calls = cache_features.Encoder.encode, []

    def kill(self: Any, pixels: Any) -> Any:
        calls.append(len(pixels))
        if len(calls) == len(COLORS) + 3:  # each picture once to tell their size, two to keep
            raise KeyboardInterrupt
        return encode(self, pixels)

    monkeypatch.setattr(cache_features.ShardWriter, "__init__", small_shards)
    monkeypatch.setattr(cache_features.Encoder, "encode", kill)
    with pytest.raises(KeyboardInterrupt):
        make_cache(world, tmp_path / "run", **settings)
    cache = tmp_path / "cache"
    (cache / ".writing-1234").mkdir()  # of a process that was killed in it
    assert len(FeatureCache(cache)) == 2
    monkeypatch.setattr(cache_features.Encoder, "encode", encode)
    make_cache(world, tmp_path / "run", **settings)
    kept = contents(cache)
    assert sorted(path.name for path in cache.iterdir() if path.name.startswith(".")) == []
    shutil.rmtree(cache)
    monkeypatch.undo()
    make_cache(world, tmp_path / "run", **settings)
    assert len(list(cache.glob(SHARDS))) == 1
    for key, (tokens, lengths, size) in contents(cache).items():
        assert (lengths, size) == kept[key][1:]
        torch.testing.assert_close(torch.tensor(tokens), torch.tensor(kept[key][0]), atol=1e-5, rtol=1e-4)


def small_shards(self: ShardWriter, folder: Path, empty: StoredFeatures) -> None:
    """A shard for each picture."""
    self._folder, self._empty, self._shard_bytes = folder, empty, 1
    self._begin()


def test_the_file_that_launchers_start(world: TinyWorld, tmp_path: Path) -> None:
    command = launch_command(flags(world, tmp_path / "run"), LaunchOptions(num_gpus=2), FOLDER / "cache_features.py")
    assert command is not None
    script = command.index(str(FOLDER / "cache_features.py"))
    done = run_python(*command[script:])
    assert done.returncode == 0, done.stderr[-3000:]
    assert "4 pictures will take about 0.00 GiB" in done.stderr
    assert len(FeatureCache(tmp_path / "cache")) == len(COLORS)


def test_the_disk_is_stated_and_must_do(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match=r"4 pictures will take about .*1\.5 KiB each.* GiB are free in .*cache"):
        make_cache(world, tmp_path / "run")
    assert not (tmp_path / "cache").exists()
    monkeypatch.undo()
    caplog.set_level(logging.INFO, logger="llava")
    make_cache(world, tmp_path / "run")
    assert "4 pictures will take about 0.00 GiB (1.5 KiB each, by 4 of them)" in caplog.text


def test_an_unreadable_picture_is_skipped_as_without_a_cache(
    world: TinyWorld, own_images: Path, tmp_path: Path
) -> None:
    (own_images / "red.png").write_bytes((own_images / "red.png").read_bytes()[:60])
    settings = {"image_folder": own_images, "on_bad_sample": "skip", "max_steps": 4}
    with pytest.raises(ValueError, match=r"sample '\d+' .*red\.png' cannot be read"):
        make_cache(world, tmp_path / "run", **{**settings, "on_bad_sample": "stop"})
    make_cache(world, tmp_path / "run", **settings)
    expected = losses(world, tmp_path / "pixels", **{**settings, "feature_cache": None})
    assert losses(world, tmp_path / "run", **settings) == pytest.approx(expected, abs=1e-5)
    rejects = [(tmp_path / name / "rejects.jsonl").read_text() for name in ("run", "pixels")]
    assert rejects[0] == rejects[1] != ""


def test_pixels_that_differ_each_time_are_refused(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(items.ItemMaker, "process", lambda self, image: torch.rand(3, SIDE, SIDE))
    with pytest.raises(ValueError, match="other pixels of a picture each time"):
        make_cache(world, tmp_path / "run")


def test_a_folder_of_something_else_is_left_alone(world: TinyWorld, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds something else"):
        make_cache(world, tmp_path / "run", feature_cache=world.images)
    with pytest.raises(ValueError, match="where to"):
        make_cache(world, tmp_path / "run", feature_cache=None)


# What does not fit -----------------------------------------------------------------------------------------------


def test_a_cache_of_another_run_is_refused(world: TinyWorld, tmp_path: Path) -> None:
    run = tmp_path / "run"
    make_cache(world, run)
    wrong = {"reduction": "prumerge", "mm_vision_select_layer": -1, "feature_cache_dtype": "bfloat16"}
    expected = (
        r'made for a run with other features:\n  blocks: \[2\] -> \[3\]\n  reduction: null -> \{"name": "prumerge".*\n'
        r'  feature_cache_dtype: "float32" -> "bfloat16"\ngive this run'
    )
    for seconds in (0, 60):  # without and with the checks before a run
        with pytest.raises(ValueError, match=expected.replace(r"\n  ", r"\s+").replace(r"\n", r"\s+")):
            losses(world, run, **wrong, preflight_seconds=seconds)
    with pytest.raises(ValueError, match=expected):
        make_cache(world, run, **wrong)
    other = shutil.copytree(world.clip, tmp_path / "clip")
    weights = load_file(other / "model.safetensors")
    weights["vision_model.encoder.layers.0.mlp.fc1.weight"] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=" vision_tower_weights: "):
        losses(world, run, vision_tower=other)
    same = shutil.copytree(world.clip, tmp_path / "same clip")
    assert losses(world, run, vision_tower=same, max_steps=1)


def test_what_makes_features_differ_is_refused(world: TinyWorld, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="leave it out with --unfreeze_mm_vision_tower"):
        losses(world, tmp_path / "run", unfreeze_mm_vision_tower=True)
    with pytest.raises(ValueError, match="leave one out"):
        losses(world, tmp_path / "run", streaming=True)
    make_cache(world, tmp_path / "run")
    for call in (make_cache, losses):
        with pytest.raises(ValueError, match="the method 'trim' reads the text, so a picture's depend on the question"):
            call(world, tmp_path / "run", reduction="trim")


def test_clips_are_refused_before_the_run(world: TinyWorld, tmp_path: Path) -> None:
    samples = json.loads(world.data.read_text())
    said = [{"from": "human", "value": "<video>\nwhat ?"}, {"from": "gpt", "value": "red"}]
    data = tmp_path / "clips.json"
    data.write_text(json.dumps([*samples, {"id": 1, "video": "clip", "conversations": said}]))
    with pytest.raises(ValueError, match=r"images alone, and 1 of \d+ samples show clips"):
        make_cache(world, tmp_path / "out", data_path=data)
    assert len(FeatureCache(make_cache(world, tmp_path / "out")))
    with pytest.raises(ValueError, match=r"images alone, and 1 of \d+ samples show clips"):
        train(parse_args(flags(world, tmp_path / "out", data_path=data)))


def test_pictures_of_a_model_with_a_tower_for_frames(world: TinyWorld, tmp_path: Path) -> None:
    own = FeatureCache(make_cache(world, tmp_path / "one" / "out"))
    other = FeatureCache(make_cache(world, tmp_path / "two" / "out", video_tower=world.clip))
    picture = str(next(world.images.glob("*.png")))
    assert torch.equal(own.read(picture)[0].tokens, other.read(picture)[0].tokens)


def test_a_missing_or_changed_picture_is_named(
    world: TinyWorld, own_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"image_folder": own_images, "on_bad_sample": "skip", "max_steps": 6}
    make_cache(world, tmp_path / "run", **settings)
    Image.new("RGB", (90, 20), "red").save(own_images / "red.png")
    with pytest.raises(ValueError, match=r"features: 2 samples .*red\.png' is not in --feature_cache .* changed since"):
        losses(world, tmp_path / "run", **settings)
    with pytest.raises(NotCachedError, match=r"sample '\d+' .*red\.png' is not in --feature_cache"):
        losses(world, tmp_path / "run", **settings, preflight_seconds=0)
    make_cache(world, tmp_path / "run", **settings)
    assert len(losses(world, tmp_path / "run", **settings)) == 6


def test_a_torn_shard_is_named(world: TinyWorld, tmp_path: Path) -> None:
    (shard,) = make_cache(world, tmp_path / "run").glob(SHARDS)
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"{shard.name} is torn"):
        losses(world, tmp_path / "run")


def test_the_doctor(world: TinyWorld, own_images: Path, tmp_path: Path) -> None:
    settings = {"image_folder": own_images, "reduction": "{name: spatial, rows: 2, columns: 2}"}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(dict(flag[2:].split("=", 1) for flag in flags(world, tmp_path / "run", **settings))))

    def findings() -> list[str]:
        result = CliRunner().invoke(cli.app, ["doctor", str(recipe)])
        return [line for line in result.stdout.splitlines() if ": features: " in line]

    (line,) = findings()
    assert "holds no features yet" in line and "4 pictures take about 0.00 GiB (0.4 KiB each)" in line
    cache = make_cache(world, tmp_path / "run", **settings)
    (line,) = findings()
    assert line.startswith(f"ok: features: {cache} holds all pictures of the data (4,")
    Image.new("RGB", (90, 20), "red").save(own_images / "red.png")
    (line,) = findings()
    assert line.startswith("error: features: 2 samples") and "red.png" in line
    recipe.write_text(recipe.read_text().replace("spatial", "sequential").replace("rows: 2, columns: 2", "tokens: 4"))
    (line,) = findings()
    assert line.startswith("error: features: ") and "made for a run with other features" in line


# Batches ---------------------------------------------------------------------------------------------------------


def test_pixels_of_one_shape_are_one_tensor() -> None:
    one, other = torch.zeros(3, 4, 4), torch.zeros(2, 3, 4, 4)
    assert torch.equal(join_images([[one], [], [one, one]]), torch.zeros(3, 3, 4, 4))
    assert [image.shape for image in join_images([[one], [other]])] == [one.shape, other.shape]
    assert join_images([[], []]) == []


def test_stored_features_go_to_the_device_and_to_pinned_memory_as_one_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = StoredFeatures(torch.zeros(3, 2), [1, 2], [1, 1])
    moved = send_to_device({"images": stored}, torch.device("meta"), non_blocking=True)["images"]
    assert moved.tokens.device.type == "meta" and moved.lengths == [1, 2]
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self + 1)
    assert pin_memory({"images": stored})["images"].tokens.sum() == 6


@pytest.mark.parametrize("on_cpu", [True, False])
def test_batches_are_copied_to_a_gpu_without_waiting(
    on_cpu: bool, world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llava.train.settings.arguments.runs_on_cpu", lambda args: on_cpu)
    training = parse_args(world.flags(tmp_path)).training
    assert training.accelerator_config.non_blocking == training.dataloader_pin_memory == (not on_cpu)
    asked = parse_args(world.flags(tmp_path, accelerator_config='{"non_blocking": false}')).training
    assert not asked.accelerator_config.non_blocking


def test_stored_features_must_match_the_markers() -> None:
    model = tiny_model()
    ids = prompt(2, "image", 2).unsqueeze(0)
    stored = StoredFeatures(torch.zeros(0, 32), [], [])
    with pytest.raises(ValueError, match=r"1 image markers .* but 0 images"):
        model(input_ids=ids, images=stored)
