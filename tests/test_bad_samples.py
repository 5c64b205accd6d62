"""`--on_bad_sample`: what stops a run, what is skipped, and that a skipped sample changes nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llava.constants import IGNORE_INDEX
from llava.data import LazySupervisedDataset
from llava.data.rejects import Rejects, join_rejects
from llava.data.samples import BadSampleError
from llava.train.settings.parsing import parse_args
from llava.train.train import train
from llava.train.trainer import LLaVATrainer
from tests.test_dataset import Letters, processor, turns
from tests.tiny_world import TinyWorld, make_tiny_world

DEFECTS: dict[str, dict[str, Any]] = {
    "missing": {"id": "missing", "image": "gone.png", "conversations": turns("<image>\nWhat?", "red")},
    "torn": {"id": "torn", "image": "torn.png", "conversations": turns("<image>\nWhat?", "red")},
    "tags": {"id": "tags", "image": "red.png", "conversations": turns("<image> <image>", "red")},
    "unanswered": {"id": "unanswered", "conversations": turns("What?")},
    "shapeless": {"id": "shapeless"},
}
KINDS = {"missing": "image", "torn": "image", "tags": "image tags", "unanswered": "nothing to learn"}
KINDS["shapeless"] = "format"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    world = make_tiny_world(tmp_path_factory.mktemp("world"))
    (world.images / "torn.png").write_bytes((world.images / "red.png").read_bytes()[:60])
    return world


def with_defects(world: TinyWorld, folder: Path, places: dict[int, str]) -> Path:
    """The world's data, with a bad sample in the place of some good ones."""
    samples = json.loads(world.data.read_text())
    for place, defect in places.items():
        samples[place] = DEFECTS[defect]
    path = folder / "bad.json"
    path.write_text(json.dumps(samples))
    return path


def dataset(world: TinyWorld, path: Path, **options: Any) -> LazySupervisedDataset:
    return LazySupervisedDataset(path, Letters(), processor(), version="v1", image_folder=world.images, **options)


PLACES = dict(enumerate(DEFECTS, start=1))


@pytest.mark.parametrize("defect", DEFECTS)
def test_stop_names_the_sample(defect: str, world: TinyWorld, tmp_path: Path) -> None:
    path = with_defects(world, tmp_path, {3: defect})
    with pytest.raises(ValueError, match=rf"sample '{defect}' \(index 3 of .*bad\.json\)"):
        dataset(world, path)[3]


def test_skip_keeps_the_place_of_every_other_sample(world: TinyWorld, tmp_path: Path) -> None:
    whole = dataset(world, world.data)
    data = dataset(world, with_defects(world, tmp_path, PLACES), on_bad_sample="skip", rejects=Rejects(tmp_path))
    assert len(data) == len(whole)
    for index in range(len(data)):
        item = data[index]
        if index in PLACES:
            assert item["id"] == PLACES[index]
            assert set(item["labels"].tolist()) == {IGNORE_INDEX}
            assert item["images"] == []
        else:
            assert torch.equal(item["input_ids"], whole[index]["input_ids"])
    data[1]  # once more: one line a sample
    entries = join_rejects(tmp_path)
    assert [(e["id"], e["index"], e["kind"]) for e in entries] == [(n, i, KINDS[n]) for i, n in PLACES.items()]
    assert "gone.png' does not exist" in entries[0]["reason"]
    assert [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()] == entries


def test_nothing_but_bad_samples_is_refused(world: TinyWorld, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text(json.dumps([DEFECTS["tags"], DEFECTS["unanswered"]]))
    with pytest.raises(ValueError, match=r"none of the 2 samples can be trained on; the first: sample 'tags'"):
        dataset(world, path, on_bad_sample="skip")


def test_rejects_of_several_processes_are_joined(tmp_path: Path) -> None:
    for rank, indices in enumerate(([2, 0], [1, 2])):
        rejects = Rejects(tmp_path, rank)
        for index in [*indices, indices[0]]:
            rejects.add(f"s{index}", "a.json", index, BadSampleError("gone", "image"))
        assert len(rejects.path.read_text().splitlines()) == len(indices)
    with (tmp_path / "rejects.rank1.jsonl").open("a") as file:
        file.write('{"id": "cut o')  # of a process that was killed
    assert [entry["id"] for entry in join_rejects(tmp_path)] == ["s0", "s1", "s2"]
    assert [path.name for path in tmp_path.iterdir()] == ["rejects.jsonl"]
    Rejects(tmp_path).add("s7", "a.json", 7, BadSampleError("gone", "image"))  # after a resumption
    assert [entry["id"] for entry in join_rejects(tmp_path)] == ["s0", "s1", "s2", "s7"]


def run(world: TinyWorld, folder: Path, data: Path, **settings: Any) -> LLaVATrainer:
    settings = {"tune_mm_mlp_adapter": True, "train_sampling_strategy": "sequential", **settings}
    return train(parse_args(world.flags(folder, data_path=data, on_bad_sample="skip", **settings)))


def losses(trainer: LLaVATrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_skips_and_counts(
    workers: int, world: TinyWorld, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Steps of 2 samples: the second holds one bad sample, the third bad ones only; the rest equals a clean run."""
    data = with_defects(world, tmp_path, {3: "missing", 4: "tags", 5: "torn"})
    settings = {"max_steps": 9, "optim": "sgd", "learning_rate": 1e-30, "dataloader_num_workers": workers}
    settings["logging_nan_inf_filter"] = False
    clean = losses(run(world, tmp_path / "clean", world.data, **settings))
    trainer = run(world, tmp_path / "out", data, **settings)
    skipped = losses(trainer)
    assert skipped[2] == skipped[8] == 0.0
    assert skipped[1] != clean[1]
    untouched = [0, 3, 4, 5, 6]
    assert [skipped[i] for i in untouched] == pytest.approx([clean[i] for i in untouched], rel=1e-5)
    lines = (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["missing", "tags", "torn"]
    assert "skipped 3 bad samples (image 2, image tags 1)" in caplog.text
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_a_new_run_forgets_what_an_old_one_skipped(world: TinyWorld, tmp_path: Path) -> None:
    run(world, tmp_path / "out", with_defects(world, tmp_path, {0: "missing"}), max_steps=1)
    assert (tmp_path / "out" / "rejects.jsonl").is_file()
    run(world, tmp_path / "out", world.data, max_steps=1)
    assert not (tmp_path / "out" / "rejects.jsonl").exists()


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(
    "reduction",
    ["prumerge", "{name: pyramiddrop, layers: [1], ratios: [0.5]}", "{name: fastv, layer: 1, ratio: 0.5}"],
)
def test_methods_take_a_batch_of_skipped_samples(
    packing: bool, reduction: str, world: TinyWorld, tmp_path: Path
) -> None:
    data = with_defects(world, tmp_path, {0: "missing", 1: "torn", 2: "tags"})
    settings = {
        "max_steps": 2,
        "reduction": reduction,
        "packing": packing,
        "lora_enable": True,
        "lora_r": 2,
        "tune_mm_mlp_adapter": None,
    }
    trainer = run(world, tmp_path / "out", data, **settings)
    assert losses(trainer)[0] == 0.0
    assert losses(trainer)[1] > 0
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
