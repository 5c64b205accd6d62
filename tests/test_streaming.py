"""`--streaming`: who gets which rows, in which order, and where a resumed run goes on."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader

from llava.data.items import ItemMaker
from llava.data.streaming import StreamingSupervisedDataset, estimate_samples
from llava.train.settings.parsing import check_args, parse_args
from llava.train.train import train
from llava.train.trainer import LLaVATrainer
from tests.test_dataset import Letters, turns
from tests.tiny_world import TinyWorld, make_tiny_world

OPTIONS = {"image_folder": None, "image_aspect_ratio": None, "image_grid_pinpoints": None, "text": "question"}


def write(folder: Path, name: str, count: int) -> str:
    samples = [{"id": f"{name}{i}", "conversations": turns("a question", "an answer")} for i in range(count)]
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return str(path)


def stream(data_path: Any, **options: Any) -> StreamingSupervisedDataset:
    maker = ItemMaker(
        Letters(), None, version="v1", mm_use_im_start_end=False, on_bad_sample="stop", rejects=None, **OPTIONS
    )
    return StreamingSupervisedDataset(data_path, maker, **options)


def ids(data: StreamingSupervisedDataset, count: int) -> list[str]:
    return [item["id"] for item in islice(data, count)]


def batches(data: StreamingSupervisedDataset, count: int, workers: int, size: int = 2) -> list[list[str]]:
    loader = DataLoader(
        data, batch_size=size, num_workers=workers, collate_fn=lambda items: [item["id"] for item in items]
    )
    return list(islice(loader, count))


def test_every_sample_once_a_round(tmp_path: Path) -> None:
    data = stream(write(tmp_path, "a", 12), shuffle_buffer=5)
    seen = ids(data, 36)
    rounds = [seen[start : start + 12] for start in (0, 12, 24)]
    assert all(set(one) == {f"a{i}" for i in range(12)} for one in rounds)
    assert rounds[0] != rounds[1] != rounds[2]
    assert ids(data, 36) == seen
    assert ids(stream(write(tmp_path, "a", 12), shuffle_buffer=5, seed=1), 36) != seen
    assert ids(stream(write(tmp_path, "a", 12), shuffle_buffer=1), 12) == [f"a{i}" for i in range(12)]


@pytest.mark.parametrize("files", [1, 4], ids=["rows are dealt", "files are dealt"])
def test_ranks_and_workers_share_the_samples(files: int, tmp_path: Path) -> None:
    paths = ",".join(write(tmp_path, f"f{i}-", 24 // files) for i in range(files))
    folder = {"path": str(tmp_path)} if files > 1 else paths
    seen = [
        one
        for rank in range(2)
        for batch in batches(stream(folder, rank=rank, world_size=2, shuffle_buffer=3), count=6, workers=2)
        for one in batch
    ]
    assert len(seen) == 24
    assert set(Counter(seen).values()) == {1}


def test_sources_are_drawn_by_weight_and_size(tmp_path: Path) -> None:
    mixture = [{"path": write(tmp_path, "a", 300), "weight": 1.0}, {"path": write(tmp_path, "b", 100), "weight": 6.0}]
    drawn = Counter(one[0] for one in ids(stream(mixture), 900))
    assert drawn["b"] / 900 == pytest.approx(6 * 100 / (300 + 6 * 100), abs=0.06)


def test_sizes_are_counted_or_estimated(tmp_path: Path) -> None:
    assert estimate_samples(write(tmp_path, "a", 1000)) == pytest.approx(1000, rel=0.05)
    rows = [{"id": str(i), "conversations": turns("a", "b")} for i in range(321)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert estimate_samples(str(tmp_path / "a.parquet")) == 321
    (tmp_path / "empty.json").write_text("[]")
    with pytest.raises(ValueError, match=r"no samples in data file .*empty\.json"):
        stream(tmp_path / "empty.json")


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("done", [1, 4, 11])
def test_a_resumed_stream_goes_on_where_it_was(done: int, workers: int, tmp_path: Path) -> None:
    mixture = [write(tmp_path, "a", 10), {"path": write(tmp_path, "b", 7), "weight": 2}]
    whole = batches(stream(mixture, shuffle_buffer=4), 16, workers)
    resumed = stream(mixture, shuffle_buffer=4)
    resumed.resume(done, batch_size=2)
    assert batches(resumed, 16 - done, workers) == whole[done:]


def test_too_few_samples_for_all_workers(tmp_path: Path) -> None:
    data = stream(write(tmp_path, "a", 2), rank=3, world_size=4, shuffle_buffer=1)
    with pytest.raises(ValueError, match=r"fewer samples than processes x workers \(4\)"):
        next(iter(data))


# Training --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return make_tiny_world(tmp_path_factory.mktemp("world"))


def run(world: TinyWorld, folder: Path, **settings: Any) -> LLaVATrainer:
    settings = {"streaming": True, "tune_mm_mlp_adapter": True, "max_steps": 6, **settings}
    return train(parse_args(world.flags(folder, **settings)))


def losses(trainer: LLaVATrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_an_interrupted_streaming_run_ends_like_an_uninterrupted_one(world: TinyWorld, tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 4, "gradient_accumulation_steps": 2, "shuffle_buffer_size": 4}
    settings |= {"dataloader_num_workers": 2}
    whole = run(world, tmp_path / "whole", **settings)
    assert not list((tmp_path / "whole").rglob("*.arrow"))
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "parts" / "checkpoint-4")
    parts = run(world, tmp_path / "parts", **settings)
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)
    weights = [torch.load(tmp_path / n / "mm_projector.bin", weights_only=True) for n in ("whole", "parts")]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name])


def test_a_streaming_run_skips_bad_samples(world: TinyWorld, tmp_path: Path) -> None:
    samples = json.loads(world.data.read_text())
    samples[3]["image"] = "gone.png"
    (tmp_path / "bad.json").write_text(json.dumps(samples))
    settings = {"data_path": tmp_path / "bad.json", "shuffle_buffer_size": 1, "max_steps": 6}
    with pytest.raises(ValueError, match=r"sample '3' .*gone\.png' does not exist"):
        run(world, tmp_path / "stop", **settings)
    run(world, tmp_path / "skip", on_bad_sample="skip", **settings)
    lines = (tmp_path / "skip" / "rejects.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["3"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_steps": None}, "--streaming has no end: say with --max_steps"),
        ({"group_by_modality_length": True}, "--streaming knows no lengths"),
        ({"train_sampling_strategy": "sequential"}, "--streaming has an order of its own"),
        ({"shuffle_buffer_size": 0}, "--shuffle_buffer_size 0: expected a number 1 or more"),
        ({"on_bad_sample": "ignore"}, "--on_bad_sample ignore: expected one of stop, skip"),
    ],
)
def test_settings_that_do_not_go_together(
    settings: dict[str, Any], message: str, world: TinyWorld, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        check_args(world.flags(tmp_path, streaming=True, **settings))
