"""How often the host waits for the device in a step, by method: counted on a device that is not there."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.utils import clip_grad
from transformers import TrainerCallback

from llava.constants import IMAGE_TOKEN_INDEX, VIDEO_TOKEN_INDEX
from llava.cost.bench.workload import StandInWords
from llava.model.language_model.packed import PACKED_SDPA, PACKED_VARLEN
from llava.model.visual_encoding import store_features
from llava.train.settings import arguments
from llava.train.settings.arguments import TrainingArguments
from llava.train.settings.parsing import parse_args
from llava.train.train import train
from llava.train.trainer import LLaVATrainer
from llava.transfer import HostBatch, to_device
from tests.pretend_device import DEVICE, PretendDevice, put
from tests.test_model import pictures
from tests.test_staged import PYRAMID, gradients, padded, staged_model, training_batch
from tests.tiny_models import prompt
from tests.tiny_world import make_readable, make_tiny_world
from tests.varlen_kernels import kernels, set_attention

__all__ = ["kernels"]  # a fixture

PYRAMID_OF_2 = "{name: pyramiddrop, layers: [1], ratios: [0.5]}"  # for a model of two layers
VSCAN_DROP = {"name": "vscan_drop", "layers": [2], "keep": [4]}
FASTV = {"name": "fastv", "layer": 2, "ratio": 0.6}
# Each method with the waits of a training step: for flat tokens, and for anyres, which lays tiles out by their patches.
METHODS: dict[str, tuple[Any, int, int]] = {
    "none": ("none", 0, 0),
    "prumerge": ("prumerge", 1, 2),
    "prumerge without merging": ({"name": "prumerge", "neighbours": 0}, 1, 2),
    "prumerge paper": ({"name": "prumerge", "variant": "paper"}, 1, 2),
    "prumerge at a budget": ({"name": "prumerge", "ratio": 0.25}, 0, 1),
    "prumerge at a budget, without merging": ({"name": "prumerge", "ratio": 0.25, "neighbours": 0}, 0, 1),
    "prumerge_plus": ("prumerge_plus", 1, 2),
    "prumerge_plus at a budget": ({"name": "prumerge_plus", "tokens": 4}, 0, 1),
    "prumerge_plus paper": ({"name": "prumerge_plus", "variant": "paper"}, 1, 2),
    "prumerge_plus paper at a budget": ({"name": "prumerge_plus", "variant": "paper", "ratio": 0.25}, 0, 1),
    "sequential": ({"name": "sequential", "ratio": 0.5}, 0, 0),
    "spatial": ({"name": "spatial", "rows": 2, "columns": 3}, 0, 0),
    "random": ({"name": "random", "tokens": 5}, 0, 0),
    "divprune": ({"name": "divprune", "tokens": 5}, 0, 1),
    "fastervlm": ({"name": "fastervlm", "tokens": 5}, 0, 1),
    "vispruner": ({"name": "vispruner", "tokens": 5}, 0, 1),
    "holov": ({"name": "holov", "tokens": 5}, 0, 1),
    "visionzip": ({"name": "visionzip", "tokens": 5}, 0, 1),
    "tome": ({"name": "tome", "tokens": 5}, 0, 1),
    "evit": ({"name": "evit", "tokens": 5}, 0, 1),
    "resize": ({"name": "resize", "tokens": 4}, 0, 0),
    "resize and divprune": (
        {"tower": {"name": "resize", "tokens": 9}, "encoder": {"name": "divprune", "tokens": 5}},
        0,
        1,
    ),
    "ats": ({"name": "ats", "blocks": [0, 1]}, 3, 4),
    "stf": ({"name": "stf", "mbtf": 2}, 0, 0),
    "avgpool": ({"name": "avgpool"}, 0, 0),
    "token_concat": ({"name": "token_concat"}, 0, 0),
    "tokenpacker": ("tokenpacker", 0, 0),
    "mqt": ({"name": "mqt", "draws": True}, 0, 0),
    "m3": ({"name": "m3", "scales": [1, 4]}, 0, 0),
    "pyramiddrop": (PYRAMID, 0, 0),
    "fastv": (FASTV, 0, 0),
    "dart": ({"name": "dart", "layer": 1, "tokens": 8}, 1, 1),
    "dart paper": ({"name": "dart", "layer": 1, "tokens": 8, "variant": "paper"}, 0, 0),
    "mmtok": ({"name": "mmtok", "tokens": 5}, 0, 1),
    "vscan": ({"encoder": {"name": "vscan", "tokens": 32}, "decoder": VSCAN_DROP}, 0, 1),
    "sparsevlm": ({"name": "sparsevlm", "layers": [1, 3], "keep": [9, 4]}, 1, 1),
    "sparsevlm 2.0": ({"name": "sparsevlm", "version": "2.0", "layers": [1, 3], "keep": [9, 4]}, 1, 1),
    "prumerge and pyramiddrop": ({"encoder": {"name": "prumerge"}, "decoder": PYRAMID}, 1, 2),
    "stf and fastv": ({"projector": {"name": "stf", "mbtf": 2}, "decoder": FASTV}, 0, 0),
}
ON_DEVICE = ("input_ids", "attention_mask", "labels", "images")
ATTENTIONS = ("sdpa", "eager", PACKED_SDPA, PACKED_VARLEN, "flash_attention_2")


def copied(value: Any) -> Any:
    """A tensor, or a list of them, as accelerate copies it to the device."""
    return put(value.clone()) if isinstance(value, torch.Tensor) else [copied(one) for one in value]


def collated(anyres: bool = False) -> dict[str, Any]:
    """A batch as it reaches the model from our collator: on the device, with what the host knows."""
    batch = {**training_batch(), "images": pictures(anyres)}
    host = HostBatch(batch["input_ids"], batch["attention_mask"].bool(), batch["labels"])
    return {**{key: copied(value) if key in ON_DEVICE else value for key, value in batch.items()}, "host": host}


def waits_of_a_step(model: Any, batch: dict[str, Any], **settings: Any) -> list[str]:
    put(model.train())
    with PretendDevice() as device:
        model(**batch, use_cache=False, **settings).loss.backward()
    return device.waits


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("method", METHODS)
def test_a_training_step(method: str, packed: bool) -> None:
    reduction, flat, anyres = METHODS[method]
    for is_anyres, expected in ((False, flat), (True, anyres)):
        settings = {"mm_patch_merge_type": "spatial_unpad", "image_aspect_ratio": "anyres"} if is_anyres else {}
        model = staged_model(reduction=reduction, anyres=is_anyres, **settings)
        if packed:
            model.set_attn_implementation(PACKED_SDPA)
        model.tokenizer = StandInWords(model.config.vocab_size)
        texts = ["a red bus", "two", "no image", "how many", "left of it"]
        waits = waits_of_a_step(model, collated(anyres=is_anyres), packed=packed, texts=texts)
        assert len(waits) == expected, waits


CLIPS: dict[str, Any] = {
    "none": "none",
    "divprune": {"name": "divprune", "tokens": 5},
    "divprune of all frames": {"name": "divprune", "tokens": 5, "frames": "joint"},
    "of each frame": {"encoder": METHODS["prumerge at a budget"][0], "decoder": {**FASTV, "pool": "frame"}},
}


@pytest.mark.parametrize("towers", [1, 2])
@pytest.mark.parametrize("method", CLIPS)
def test_clips_beside_pictures(method: str, towers: int) -> None:
    model = staged_model(reduction=CLIPS[method])
    if towers == 2:
        model.get_model().video_tower = copy.deepcopy(model.get_vision_tower())
    batch, stills = training_batch(), list(pictures(False))
    is_image = (batch["input_ids"] == IMAGE_TOKEN_INDEX) & batch["attention_mask"].bool()
    batch["input_ids"][tuple(is_image.nonzero()[0])] = VIDEO_TOKEN_INDEX
    host = HostBatch(batch["input_ids"].clone(), batch["attention_mask"].bool(), batch["labels"].clone())
    batch |= {"images": stills[1:], "image_sizes": None, "videos": [torch.stack([stills[0]] * 3)]}
    on_device = {key: copied(value) if key in (*ON_DEVICE, "videos") else value for key, value in batch.items()}
    waits = waits_of_a_step(model, {**on_device, "host": host})
    assert not waits


@pytest.mark.parametrize("method", ["none", "prumerge", "pyramiddrop"])
def test_a_batch_of_another_collator_is_read_once(method: str) -> None:
    reduction, waits, _ = METHODS[method]
    batch = collated()
    del batch["host"]
    counted = waits_of_a_step(staged_model(reduction=reduction), batch)
    assert len(counted) == waits + 1, counted


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("backbone", ["llama", "mistral-window", "qwen2-window"])
@pytest.mark.parametrize("reduction", ["none", PYRAMID], ids=["none", "pyramiddrop"])
def test_no_attention_waits(attention: str, backbone: str, reduction: Any, kernels: None) -> None:
    """Nor in the backward pass, where the layers run again."""
    model = staged_model(backbone, reduction)
    set_attention(model, attention)
    model.gradient_checkpointing_enable({"use_reentrant": False, "determinism_check": "none"})  # it compares devices
    for packed in (False, True):
        if packed and attention in ("sdpa", "eager"):
            continue
        waits = waits_of_a_step(model, collated(), packed=packed)
        assert waits == []


@pytest.mark.parametrize("method", ["none", "prumerge", "pyramiddrop"])
def test_what_the_host_knows_changes_no_gradient(method: str) -> None:
    model = staged_model(reduction=METHODS[method][0]).train()
    batch = training_batch()
    host = HostBatch(batch["input_ids"], batch["attention_mask"].bool(), batch["labels"])
    loss, expected = gradients(model, {**batch, "use_cache": True})  # by transformers' own forward, where it can
    for known in ({}, {"host": host}):
        other, got = gradients(model, {**batch, **known, "use_cache": False})
        torch.testing.assert_close(other, loss, atol=1e-6, rtol=0)
        for name, gradient in expected.items():
            torch.testing.assert_close(got[name], gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("host", "message"),
    [
        (HostBatch(torch.ones(1, 3, dtype=torch.long), torch.ones(1, 3, dtype=torch.bool)), "leave host out where"),
        ({"input_ids": 1}, "expected the HostBatch that the collator made"),
    ],
)
def test_what_does_not_go_with_the_batch_is_refused(host: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        staged_model()(**{**training_batch(), "host": host})


@pytest.mark.parametrize("name", ["input_ids", "attention_mask", "labels"])
def test_what_the_host_knew_of_another_batch_is_refused(name: str) -> None:
    batch = training_batch()
    host = HostBatch(batch["input_ids"].clone(), batch["attention_mask"].bool(), batch["labels"].clone())
    batch[name] = batch[name].clone()
    batch[name][0, 1] = 1 - batch[name][0, 1].clamp(0, 1)
    with pytest.raises(ValueError, match=f"host holds other {name} than the batch"):
        staged_model()(**batch, host=host)


def test_a_mask_of_another_shape_on_the_host_is_refused() -> None:
    batch = training_batch()
    host = HostBatch(batch["input_ids"], batch["attention_mask"].bool()[:, 1:], batch["labels"])
    with pytest.raises(ValueError, match="leave host out where"):
        staged_model()(**batch, host=host)


class _CountSteps(TrainerCallback):
    """Runs the steps of a training, from their first micro-batch to the optimizer's last update, on the device."""

    def __init__(self) -> None:
        self.waits: list[list[str]] = []

        self.mode = ExitStack()
        self.is_running = False

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.waits.append(self.mode.enter_context(PretendDevice()).waits)
        self.is_running = True

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.mode.close()
        self.is_running = False


@pytest.mark.parametrize(
    ("reduction", "packing", "expected"),
    [("none", False, 0), (PYRAMID_OF_2, True, 0), ("prumerge", True, 1), ("trim", False, 1), ("cdpruner", False, 0)],
    ids=["none", "pyramiddrop", "prumerge", "trim", "cdpruner"],
)
def test_a_step_of_a_run(
    reduction: Any, packing: bool, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the collator's batch, through forward, backward and the optimizer; the log waits between the steps."""
    world = make_tiny_world(tmp_path / "world")
    make_readable(world.clip)
    counter = _CountSteps()
    training_step = LLaVATrainer.training_step

    def on_device(self: LLaVATrainer, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
        put([self._tr_loss, *model.parameters(), *model.buffers()])
        return training_step(self, model, inputs, put(num_items_in_batch))

    def init(self: LLaVATrainer, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.add_callback(counter)

    original, device = LLaVATrainer.__init__, TrainingArguments.device
    shown = property(lambda args: DEVICE if counter.is_running else device.__get__(args))
    monkeypatch.setattr(TrainingArguments, "device", shown)
    # It knows the devices without asking the tensors.
    by_device = clip_grad._group_tensors_by_device_and_dtype
    monkeypatch.setattr(
        clip_grad,
        "_group_tensors_by_device_and_dtype",
        lambda *args: {(DEVICE, dtype): group for (_, dtype), group in by_device(*args).items()},
    )
    monkeypatch.setattr(LLaVATrainer, "__init__", init)
    monkeypatch.setattr(LLaVATrainer, "training_step", on_device)
    settings = {"reduction": reduction, "packing": packing, "logging_steps": 10, "max_steps": 3}
    with counter.mode:
        train(parse_args(world.flags(tmp_path / "run", **settings)))
    assert [len(waits) for waits in counter.waits] == [expected] * 3, counter.waits


def waits_of_generation(model: Any, batch: dict[str, Any], tokens: int) -> Counter[str]:
    with PretendDevice() as device:
        model.generate(**batch, max_new_tokens=tokens, do_sample=False, eos_token_id=None)
    return device.by_file()


OURS = {"transfer.py": 1, "image_inputs.py": 1}  # the ids, and whether pixels are finite
THEIRS = {"utils.py": 4}  # transformers' generate: special tokens, warnings, whether all rows have ended


MASKS_PER_TOKEN = {  # how often transformers looks at a mask, for a prompt alone and in a padded batch
    ("plain", "sdpa"): (0, 1),
    ("plain", "flash_attention_2"): (0, 1),
    ("staged", "sdpa"): (0, 0),
    ("staged", "flash_attention_2"): (4, 4),  # once a stage
}


@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2"])
@pytest.mark.parametrize(
    ("method", "counts"), [("none", {}), ("prumerge", {"selection.py": 1}), ("stf", {}), ("pyramiddrop", {})]
)
def test_generation(method: str, counts: dict[str, int], attention: str, kernels: None) -> None:
    """A prefill, alone and in a padded batch; and each token after it, where transformers looks at masks."""
    model = put(staged_model(reduction=METHODS[method][0]))
    set_attention(model, attention)
    batch = padded("left")
    single = {"input_ids": copied(prompt(3, "image", 4).unsqueeze(0)), "images": copied(batch["images"][:1])}
    batch = {key: copied(value) if key in ON_DEVICE else value for key, value in batch.items()}
    masks = MASKS_PER_TOKEN["staged" if method == "pyramiddrop" else "plain", attention]
    unpads = {"modeling_flash_attention_utils.py": 2 * 6} if attention != "sdpa" else {}
    for given, looks, each in ((single, masks[0], {}), (batch, masks[1], unpads)):
        prefill = waits_of_generation(model, given, 1)
        assert prefill == {**OURS, **THEIRS, **counts}
        per_token = waits_of_generation(model, given, 2) - prefill
        assert per_token == Counter({"utils.py": 1, "masking_utils.py": looks, **each})


def test_pixels_on_the_host_are_checked_there() -> None:
    model = put(staged_model())
    given = {"input_ids": copied(prompt(3, "image", 4).unsqueeze(0)), "images": pictures(False)[:1]}
    assert waits_of_generation(model, given, 1) == {"transfer.py": 1, **THEIRS}


# The device that is not there


WAITS = {
    "item": lambda x: x.sum().item(),
    "a condition": lambda x: bool((x > 0).any()),
    "max as a number": lambda x: int(x.max()),
    "a copy to the host": lambda x: x.cpu(),
    "the same, by name": lambda x: x.to("cpu"),
    "a copy from the host": lambda x: torch.ones(3).to(x.device),
    "a list": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "places of what is true": lambda x: (x > 0).nonzero(),
    "a mask as index": lambda x: x[x > 0],
    "an index of the host": lambda x: x[torch.tensor([0, 1])],
    "a mask as index, in an assignment": lambda x: x.__setitem__(x > 0, x[:1].expand(3)),
    "repeats of unknown length": lambda x: x.repeat_interleave((x > 0).long()),
    "unique values": lambda x: x.unique(),
    "a comparison": lambda x: torch.equal(x, x),
    "printing": lambda x: x.tolist(),
}
NO_WAITS = {
    "a copy from pinned memory": lambda x: to_device(torch.ones(3), x.device),
    "made there": lambda x: torch.arange(3, device=x.device) + x,
    "shapes": lambda x: x[: len(x)].view(1, -1).shape[1],
    "places of a known number": lambda x: torch.nonzero_static(x > 0, size=3),
    "a mask as condition": lambda x: torch.where(x > 0, x, 0),
    "a number, where a mask is": lambda x: x.__setitem__(x > 0, 1.0),
    "repeats of known length": lambda x: x.repeat_interleave((x > 0).long(), output_size=3),
    "what the host has": lambda x: torch.ones(3).nonzero().tolist(),
}


@pytest.mark.parametrize("call", WAITS)
def test_what_waits_is_counted(call: str) -> None:
    values = put(torch.ones(3))
    with PretendDevice() as device:
        WAITS[call](values)
    assert len(device.waits) == 1


@pytest.mark.parametrize("call", NO_WAITS)
def test_what_does_not_wait_is_not(call: str) -> None:
    values = put(torch.ones(3))
    with PretendDevice() as device:
        NO_WAITS[call](values)
    assert device.waits == []


def test_tensors_of_two_devices_do_not_mix() -> None:
    values = put(torch.ones(3))
    with PretendDevice(), pytest.raises(RuntimeError, match="are on the host, others on the device"):
        values + torch.ones(3)


def test_batches_are_copied_while_the_device_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments, "runs_on_cpu", lambda args: False)
    given = {"output_dir": str(tmp_path), "report_to": "none"}
    assert TrainingArguments(**given).accelerator_config.non_blocking
    assert not TrainingArguments(**given, dataloader_pin_memory=False).accelerator_config.non_blocking
    chosen = {"non_blocking": False}
    assert not TrainingArguments(**given, accelerator_config=chosen).accelerator_config.non_blocking


@pytest.mark.parametrize(("method", "anyres"), [("none", False), ("prumerge", False), ("prumerge", True)])
def test_stored_features_are_waited_for_nowhere(method: str, anyres: bool) -> None:
    """Their counts and places stay on the host, also those of a method whose counts depend on the picture."""
    model = staged_model(reduction=METHODS[method][0], anyres=anyres)
    batch, inner = collated(anyres=anyres), model.get_model()
    tiles = [picture.reshape(-1, *picture.shape[-3:]) for picture in pictures(anyres)]
    with torch.no_grad():
        stored = store_features(inner.read_tiles(torch.cat(tiles), None, inner.reducers()), [len(one) for one in tiles])
    batch["images"] = dataclasses.replace(stored, tokens=put(stored.tokens))
    waits = waits_of_a_step(model, batch)
    assert waits == []
