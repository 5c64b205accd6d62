"""Two processes on the CPU with ZeRO-2 and ZeRO-3, started as a user starts them."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from llava.model.builder import load_pretrained_model
from llava.train.settings.parsing import parse_args
from llava.train.train import train
from tests.ranks import free_port, train_in_ranks
from tests.test_arguments import script_flags
from tests.tiny_world import ROOT, SIDE, TinyWorld, make_tiny_world, run_command

pytest.importorskip("deepspeed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="DeepSpeed compiles an extension with g++"),
]

LORA = {"lora_enable": True, "lora_r": 4, "lora_alpha": 8, "version": "v1"}
SCRIPTS = {"projector": "pretrain.sh", "lora": "finetune_lora.sh", "full": "finetune.sh"}
STEPS = 2


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return make_tiny_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def pretrained(world: TinyWorld) -> Path:
    """Folder of a projector, trained in this process."""
    folder = world.root / "pretrained"
    train(parse_args(world.flags(folder, tune_mm_mlp_adapter=True, version="plain", data_path=world.captions)))
    return folder


DROPS = {"pyramiddrop": "layers: [1], ratios: [0.25]", "fastv": "layer: 1, ratio: 0.75"}


def settings_of(kind: str, world: TinyWorld, pretrained: Path, **changes: Any) -> dict[str, Any]:
    kinds = {
        "projector": {"tune_mm_mlp_adapter": True, "version": "plain", "data_path": world.captions},
        "lora": {**LORA, "reduction": "prumerge"},
        "full": {"version": "v1"},
    }
    common = {"pretrain_mm_mlp_adapter": pretrained / "mm_projector.bin", "dataloader_num_workers": 0}
    common |= {"group_by_modality_length": False, "save_total_limit": 2}
    return {**kinds[kind], **common, "max_steps": STEPS, "bf16": True, **changes}


def launch_script(kind: str, folder: Path, stage: int, world: TinyWorld, **settings: Any) -> None:
    """By the shell script, with flags that override its own."""
    config = str(ROOT / f"scripts/zero{stage}.json")
    settings.setdefault("global_batch_size", 0)
    command = ["bash", f"scripts/v1_5/{SCRIPTS[kind]}", *world.flags(folder, **settings)]
    check(command, DEEPSPEED_CONFIG=config, NUM_GPUS="2", MASTER_PORT=str(free_port()))


def train_as_script(kind: str, folder: Path, stage: int, world: TinyWorld, **settings: Any) -> None:
    """With all flags of the shell script, but in forks, which start at once."""
    settings.setdefault("global_batch_size", 0)
    config, script = str(ROOT / f"scripts/zero{stage}.json"), f"scripts/v1_5/{SCRIPTS[kind]}"
    argv = script_flags(script, folder.parent, world.flags(folder, **settings), DEEPSPEED_CONFIG=config, NUM_GPUS="2")
    flags = argv[argv.index(str(ROOT / "llava/train/train_mem.py")) + 1 :]
    train_in_ranks(flags, 2, folder.parent / f"{folder.name}.log")


def launch_yaml(folder: Path, stage: int, world: TinyWorld, **settings: Any) -> None:
    """By `llava train`."""
    file = folder.parent / f"{folder.name}.yaml"
    flags = dict(flag[2:].split("=", 1) for flag in world.flags(folder, **settings))
    file.write_text(json.dumps(flags))  # JSON is YAML
    overrides = [f"deepspeed=scripts/zero{stage}.json", "num_gpus=2", f"master_port={free_port()}"]
    check([str(Path(sys.executable).with_name("llava")), "train", str(file), *overrides])


def check(command: list[str], **environment: str) -> None:
    result = run_command(command, **environment)
    assert result.returncode == 0, f"exit code {result.returncode}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"


def logits(folder: Path, base: Path | None = None) -> Tensor:
    base_path = None if base is None else str(base)
    _, model, _, _ = load_pretrained_model(str(folder), base_path, device="cpu", dtype=torch.float32, reduction="none")
    pixels = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids=torch.tensor([[1, 50, -200, 60, 61]]), images=pixels).logits[0, -1]


def losses(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def weight_files(folder: Path, kind: str) -> dict[str, Tensor]:
    if kind == "full":
        return load_file(folder / "model.safetensors")
    if kind == "projector":
        return torch.load(folder / "mm_projector.bin", weights_only=True)
    others = torch.load(folder / "non_lora_trainables.bin", weights_only=True)
    return {**load_file(folder / "adapter_model.safetensors"), **others}


@pytest.mark.parametrize(
    ("kind", "stage", "way"),
    [
        ("projector", 2, "script"),
        ("lora", 3, "yaml"),
    ],
)
def test_two_processes(kind: str, stage: int, way: str, world: TinyWorld, pretrained: Path, tmp_path: Path) -> None:
    """Exit code 0; the first loss is that of one process; what is written opens and answers otherwise.

    All kinds, stages and methods are in test_training_matrix.py; here is the way of a user's command to them.
    """
    folder = tmp_path / "run"
    settings = settings_of(kind, world, pretrained)
    if way == "script":
        launch_script(kind, folder, stage, world, **settings)
    else:
        launch_yaml(folder, stage, world, **settings)

    alone = tmp_path / "alone"
    train(parse_args(world.flags(alone, **{**settings, "per_device_train_batch_size": 4, "max_steps": 1})))
    assert losses(folder)[0] == pytest.approx(losses(alone)[0], rel=0.02)
    weights = weight_files(folder, kind)
    assert {n: w.shape for n, w in weights.items()} == {n: w.shape for n, w in weight_files(alone, kind).items()}
    base = None if kind == "full" else world.llm
    assert not torch.allclose(logits(folder, base), logits(pretrained, world.llm), atol=1e-2)


@pytest.mark.parametrize(("stage", "method"), [(2, "fastv"), (3, "pyramiddrop")])
def test_dropping_inside_the_language_model(
    stage: int, method: str, world: TinyWorld, pretrained: Path, tmp_path: Path
) -> None:
    """LoRA on adapted, gathered projections; under ZeRO-3 one of two processes sees text only, and none waits."""
    reduction = f"{{name: {method}, {DROPS[method]}}}"
    data = tmp_path / "data.json"
    data.write_text(json.dumps(alternating_samples(world)))
    settings = settings_of("lora", world, pretrained, reduction=reduction, data_path=data)
    settings |= {
        "per_device_train_batch_size": 1,
        "train_sampling_strategy": "sequential",
        "gradient_checkpointing": True,
        "packing": method == "fastv",
    }
    folder, alone = tmp_path / "run", tmp_path / "alone"
    train_as_script("lora", folder, stage, world, **settings)
    train(parse_args(world.flags(alone, **{**settings, "per_device_train_batch_size": 2, "max_steps": 1})))
    assert losses(folder)[0] == pytest.approx(losses(alone)[0], rel=0.02)
    assert {n: w.shape for n, w in weight_files(folder, "lora").items()} == {
        n: w.shape for n, w in weight_files(alone, "lora").items()
    }
    assert json.loads((folder / "config.json").read_text())["reduction"]["decoder"]["name"] == method
    assert not torch.allclose(logits(folder, world.llm), logits(pretrained, world.llm), atol=1e-2)


def alternating_samples(world: TinyWorld) -> list[dict[str, Any]]:
    """With an image, without, with, without, ..."""
    samples = json.loads(world.data.read_text())
    with_image = [sample for sample in samples if "image" in sample]
    without = [sample for sample in samples if "image" not in sample]
    return [sample for i in range(4) for sample in (with_image[i % len(with_image)], without[i % len(without)])]


def test_skipped_samples_of_a_stream_stop_no_rank(world: TinyWorld, pretrained: Path, tmp_path: Path) -> None:
    """Under ZeRO-3 one of two processes has nothing but a skipped sample, and in the second step both have."""
    samples = json.loads(world.data.read_text())
    for index in (1, 2, 3):
        samples[index] = {"id": f"bad{index}", "image": "gone.png", "conversations": samples[0]["conversations"]}
    data = tmp_path / "data.json"
    data.write_text(json.dumps(samples))
    settings = settings_of("lora", world, pretrained, data_path=data, on_bad_sample="skip", max_steps=3)
    settings |= {"per_device_train_batch_size": 1, "streaming": True, "shuffle_buffer_size": 1}
    folder, alone = tmp_path / "run", tmp_path / "alone"
    train_as_script("lora", folder, 3, world, **settings)
    train(parse_args(world.flags(alone, **{**settings, "per_device_train_batch_size": 2, "max_steps": 2})))
    assert losses(folder)[0] == pytest.approx(losses(alone)[0], rel=0.02)
    assert losses(folder)[1] == losses(alone)[1] == 0.0
    assert losses(folder)[2] > 0
    lines = (folder / "rejects.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["bad1", "bad2", "bad3"]
    assert not list(folder.glob("rejects.rank*"))


def test_a_defect_ends_all_processes(world: TinyWorld, pretrained: Path, tmp_path: Path) -> None:
    """The first process finds it before weights are read; the other would wait for it for ever."""
    samples = json.loads(world.captions.read_text())
    data = tmp_path / "data.json"
    data.write_text(json.dumps([*samples, {**samples[0], "id": "x7", "image": "gone.png"}]))
    settings = settings_of("projector", world, pretrained, data_path=data)
    command = ["bash", "scripts/v1_5/pretrain.sh", *world.flags(tmp_path / "out", **settings)]
    config = str(ROOT / "scripts/zero3.json")
    result = run_command(command, NUM_GPUS="2", MASTER_PORT=str(free_port()), DEEPSPEED_CONFIG=config)
    assert result.returncode == 2
    assert "error: image: 1 sample ('x7'); the first: image " in result.stderr
    assert "training 1,856 of" not in result.stderr
    assert "Traceback" not in result.stderr


def test_an_error_in_one_line(world: TinyWorld, pretrained: Path, tmp_path: Path) -> None:
    settings = settings_of("projector", world, pretrained, version="nosuch")
    command = ["bash", "scripts/v1_5/pretrain.sh", *world.flags(tmp_path, **settings)]
    result = run_command(command, NUM_GPUS="1", MASTER_PORT=str(free_port()))
    assert result.returncode == 2
    assert "unknown conversation template 'nosuch'" in result.stderr
    assert "Traceback" not in result.stderr
    assert "train_mem.py" not in result.stdout + result.stderr  # the command


def test_both_stages_of_a_fused_projector(world: TinyWorld, pretrained: Path, tmp_path: Path) -> None:
    """The projector learns, then it and the language model; a result whose config names no method is gone on from."""
    first, second, third = tmp_path / "first", tmp_path / "second", tmp_path / "third"
    new = {"pretrain_mm_mlp_adapter": None, "reduction": "{name: stf, mbtf: 1}"}
    train_as_script("projector", first, 3, world, **settings_of("projector", world, pretrained, **new))
    projector = weight_files(first, "projector")
    assert {name.split(".")[1] for name in projector} == {"mm_projector", "mm_projector_crosslayer"}

    settings = settings_of("full", world, pretrained, pretrain_mm_mlp_adapter=first / "mm_projector.bin")
    train_as_script("full", second, 2, world, **settings)
    learned, start = weight_files(second, "full"), load_file(world.llm / "model.safetensors")
    assert not any(torch.equal(learned[name], weight) for name, weight in projector.items())
    assert not torch.equal(learned["model.layers.0.mlp.up_proj.weight"], start["model.layers.0.mlp.up_proj.weight"])
    tower = {f"model.vision_tower.vision_tower.{k}": v for k, v in load_file(world.clip / "model.safetensors").items()}
    kept = {name: weight for name, weight in learned.items() if "vision_tower" in name}
    assert kept
    assert all(torch.equal(weight, tower[name].to(weight.dtype)) for name, weight in kept.items())

    config = json.loads((second / "config.json").read_text())
    assert config.pop("reduction") == {"projector": {"mbtf": 1, "name": "stf"}}
    (second / "config.json").write_text(json.dumps(config))
    settings |= {"model_name_or_path": second, "pretrain_mm_mlp_adapter": None, "learning_rate": 1e-30, "max_steps": 1}
    train(parse_args(world.flags(third, **settings)))
    assert json.loads((third / "config.json").read_text())["reduction"]["projector"]["name"] == "stf"
    assert all(torch.equal(weight, learned[name]) for name, weight in weight_files(third, "full").items())
