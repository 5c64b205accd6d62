"""A model spread over several devices, without having them: the meta device and the disk stand in for a second GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model, infer_auto_device_map

from llava.constants import IMAGE_TOKEN_INDEX
from llava.model import builder
from llava.model.splice import plan_splice, splice
from tests.tiny_models import BACKBONES, SIDE, prompt, tiny_model


def test_the_splice_takes_visual_tokens_from_another_device() -> None:
    ids = torch.tensor([[1, IMAGE_TOKEN_INDEX, 5]])
    plan = plan_splice(ids, torch.ones_like(ids, dtype=torch.bool), torch.tensor([2]))
    text, visual = torch.zeros(1, 3, 8, device="meta"), torch.zeros(2, 8, dtype=torch.float16)
    embeds = splice(text, visual, None, plan).inputs_embeds
    assert (embeds.device.type, embeds.dtype, embeds.shape) == ("meta", torch.float32, (1, 4, 8))


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_tower_is_not_cut_between_devices(backbone: str, tower: str) -> None:
    model = tiny_model(backbone, tower)
    size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    placed = []
    for tenths in range(1, 20):  # the first device fills up at another place each time
        limits: Any = {"cpu": size * tenths // 10}  # what is over goes to the disk
        devices = infer_auto_device_map(model, limits, no_split_module_classes=list(model._no_split_modules))
        inside = [name for name in devices if name.startswith("model.vision_tower.")]
        assert not inside
        placed.append(devices.get("model.vision_tower", devices.get("model", devices.get(""))))
    assert set(placed) == {"cpu", "disk"}


@pytest.mark.parametrize("bits", ["load_8bit", "load_4bit"])
@pytest.mark.parametrize(("given", "expected"), [(None, {"": torch.device("cpu")}), ("auto", "auto")])
def test_a_quantized_model_lies_on_one_device_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, bits: str, given: Any, expected: Any
) -> None:
    class Opened(Exception):  # noqa: N818
        """Carries what the model would be opened with."""

    def stop(*args: Any) -> Any:
        raise Opened(args[-1]["device_map"])

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(builder, "_quantization", lambda *_: None)
    monkeypatch.setattr(builder, "_open", stop)
    with pytest.raises(Opened) as opened:
        builder.load_pretrained_model(tmp_path, device_map=given, **{bits: True})
    assert opened.value.args[0] == expected


@torch.no_grad()
def test_a_tower_whose_weights_are_offloaded_still_reads(tmp_path: Path) -> None:
    model = tiny_model()
    model.set_reduction("prumerge")
    inputs = {"input_ids": prompt(3, "image", 4).unsqueeze(0), "images": torch.randn(1, 3, SIDE, SIDE)}
    expected = model(**inputs).logits
    places = {"model.vision_tower": "disk", "model.mm_projector": "cpu", "model.layers": "cpu", "lm_head": "cpu"}
    others = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    dispatch_model(model, {**places, **others}, main_device="cpu", offload_dir=tmp_path)
    assert next(model.get_vision_tower().parameters()).is_meta
    torch.testing.assert_close(model(**inputs).logits, expected)
