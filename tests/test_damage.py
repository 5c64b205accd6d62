"""Damaged checkpoints: the file that is at fault is named, for every layout, before a model is answered with."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava.model.builder import load_pretrained_model
from llava.train.modeling import read_config
from llava.train.settings.parsing import parse_args
from tests.test_builder import edit_config, llava_on, projector_folder, save
from tests.tiny_world import TinyWorld, make_tiny_world

ADAPTER, OTHERS, PROJECTOR = "adapter_model.safetensors", "non_lora_trainables.bin", "mm_projector.bin"
INDEX = "model.safetensors.index.json"
Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return make_tiny_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def whole(world: TinyWorld) -> Path:
    """A checkpoint of each layout, by its name."""
    from peft import LoraConfig, get_peft_model

    root, model = world.root / "whole", llava_on(world)
    save(model, world, root / "full")
    save(model, world, root / "shards", max_shard_size="20KB")
    projector_folder(world, root / "projector", model)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=r".*\.layers\.\d+\.self_attn\.[qv]_proj"))
    adapted.save_pretrained(root / "lora")
    model.config.save_pretrained(root / "lora")
    weights = {name: weight for name, weight in adapted.state_dict().items() if "mm_projector" in name}
    torch.save(weights, root / "lora" / OTHERS)
    shutil.copytree(world.clip, root / "tower")
    return root


def text(content: str) -> Change:
    return lambda file: file.write_text(content)


def tear(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def change_first(change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    """Change one weight of a file."""

    def edit(file: Path) -> None:
        is_safe = file.suffix == ".safetensors"
        weights = load_file(file) if is_safe else torch.load(file, weights_only=True)
        name = next(name for name in sorted(weights) if weights[name].ndim == 2)
        weights[name] = change(weights[name])
        save_file(weights, file, metadata={"format": "pt"}) if is_safe else torch.save(weights, file)

    return edit


class Code:
    """Runs a command where it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("exit 1",)


def hold(content: Any) -> Change:
    return lambda file: torch.save(content, file)


NAN = change_first(lambda weight: weight.index_fill(0, torch.tensor([0]), torch.nan))
WHOLE_NUMBERS = change_first(torch.Tensor.long)
DEEP = "[" * 5000 + "]" * 5000
CASES: list[tuple[str, str, Change, str]] = [
    ("full", "model.safetensors", tear, r"full/model.safetensors can't be read .* torn"),
    ("full", "model.safetensors", text("version https://git-lfs.github.com/spec/v1"), "a pointer of Git LFS; fetch"),
    ("full", "model.safetensors", NAN, "full holds NaN or infinity in 1 weights: lm_head.weight.*earlier checkpoint"),
    ("full", "model.safetensors", WHOLE_NUMBERS, r"full/model.safetensors .* not of floats \(1\): lm_head.weight I64"),
    ("full", "config.json", text("[]"), r"full/config.json holds \[\], expected a JSON object"),
    ("full", "config.json", text(DEEP), "full/config.json can't be read as JSON"),
    ("full", "config.json", lambda file: file.write_bytes(b'{"a": "\xff"}'), "full/config.json can't be read as JSON"),
    ("full", "generation_config.json", text("[]"), r"full/generation_config.json holds \[\]"),
    ("full", "preprocessor_config.json", text("5"), "full/preprocessor_config.json holds 5, expected a JSON object"),
    ("shards", "model-00001-of-*.safetensors", Path.unlink, "no weights at .*shards/model-00001-of-.* does not exist"),
    ("shards", "model-00002-of-*.safetensors", text(""), "shards/model-00002-of-.* can't be read"),
    ("shards", INDEX, text("{}"), f"shards/{INDEX} has no weight_map"),
    ("shards", INDEX, text("[1]"), rf"shards/{INDEX} holds \[1\], expected"),
    ("shards", INDEX, text('{"weight_map": {"a": "../b"}}'), f"shards/{INDEX}: weight_map has '../b' for a"),
    ("projector", PROJECTOR, tear, f"projector/{PROJECTOR} can't be read"),
    ("projector", PROJECTOR, NAN, f"projector/{PROJECTOR} holds NaN or infinity"),
    ("projector", PROJECTOR, WHOLE_NUMBERS, rf"projector/{PROJECTOR} .* not of floats \(1\)"),
    ("projector", PROJECTOR, hold({}), rf"weights of .*projector/{PROJECTOR} do not fit .*missing \(4\)"),
    ("projector", PROJECTOR, hold([1]), f"projector/{PROJECTOR} .* holds a list, and not tensors by their names"),
    ("projector", PROJECTOR, hold({"a": Code()}), f"projector/{PROJECTOR} .* not read because it may run code"),
    ("lora", "adapter_config.json", text("null"), "lora/adapter_config.json holds null"),
    ("lora", "adapter_config.json", text('{"r": "a"}'), "lora: adapter_config.json and the adapter's weights can't be"),
    ("lora", ADAPTER, Path.unlink, f"no weights at .*lora/{ADAPTER}: the file does not exist"),
    ("lora", ADAPTER, NAN, f"lora/{ADAPTER} holds NaN or infinity"),
    ("lora", ADAPTER, WHOLE_NUMBERS, f"lora/{ADAPTER} .* not of floats"),
    ("lora", OTHERS, change_first(lambda weight: weight[:1]), rf"weights of .*lora/{OTHERS} do not fit .*wrong shape"),
    ("lora", OTHERS, hold({}), rf"weights of .*lora/{OTHERS} do not fit .*missing \(4\)"),
    ("tower", "model.safetensors", tear, "tower/model.safetensors can't be read"),
    ("tower", "model.safetensors", Path.unlink, "tower holds no weights, or can't be reached"),
    ("tower", "preprocessor_config.json", text("[]"), r"tower/preprocessor_config.json holds \[\]"),
    ("tower", "preprocessor_config.json", text('{"image_processor_type": 5}'), "no image processor"),
]


@pytest.mark.parametrize(("layout", "name", "change", "message"), CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_the_file_at_fault_is_named(
    world: TinyWorld, whole: Path, tmp_path: Path, layout: str, name: str, change: Change, message: str
) -> None:
    folder = Path(shutil.copytree(whole / layout, tmp_path / layout))
    file = next(folder.glob(name), folder / name)
    change(file)
    opened = Path(shutil.copytree(whole / "projector", tmp_path / "p")) if layout == "tower" else folder
    if layout == "tower":
        edit_config(opened, mm_vision_tower=str(folder))
    with pytest.raises(ValueError, match=message) as caught:
        load_pretrained_model(opened, None if layout in ("full", "shards") else world.llm, device="cpu")
    assert "weights_only" not in str(caught.value)
    assert str(world.llm) not in str(caught.value)  # the base is not to blame


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", r"config.json holds \[\], expected a JSON object"),
        ('{"model_type": "llama", "hidden_size": "a"}', "config.json has a value that .*Config can't take"),
        ('{"model_type": 5}', "there is no config.json with a model_type|has no model_type"),
    ],
)
def test_training_names_the_config_too(world: TinyWorld, tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "config.json").write_text(content)
    arguments = parse_args(world.flags(tmp_path / "out", model_name_or_path=tmp_path))
    with pytest.raises(ValueError, match=message):
        read_config(arguments)


def test_settings_of_a_processor_that_do_not_work(world: TinyWorld, whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole / "full", tmp_path / "full"))
    settings = json.loads((world.clip / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps({**settings, "image_std": ["a", "b", "c"]}))
    with pytest.raises(ValueError, match=r"settings of preprocessor_config\.json in .* don't work"):
        load_pretrained_model(folder, device="cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model_path": None}, "model_path=None: expected a folder, or the name of a model of the hub"),
        ({"model_path": 5}, "model_path=5: expected a folder"),
        ({"model_base": 5}, "model_base=5: expected a folder"),
        ({"vision_tower": ""}, "vision_tower='': expected a folder"),
        ({"vision_tower": "/nowhere"}, "the vision tower '/nowhere' is neither a folder with a config.json nor"),
        ({"attn_implementation": 5}, "attn_implementation=5: expected eager, sdpa"),
        ({"dtype": "float16"}, r"dtype='float16': expected a type of floats, such as torch\.float16"),
        ({"dtype": torch.int64}, "dtype=torch.int64: expected a type of floats"),
        ({"device": "gpu"}, r"device='gpu' can't be used .*: expected cpu, cuda or cuda:0"),
        ({"device": "cuda:99"}, "device='cuda:99' can't be used"),
        ({"device": "meta"}, "device='meta' holds no weights"),
        ({"load_8bit": True, "load_4bit": True}, "load_8bit and load_4bit exclude each other"),
    ],
)
def test_wrong_arguments_of_opening(whole: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_pretrained_model(**{"model_path": whole / "full", "device": "cpu", **arguments})
