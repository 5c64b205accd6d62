"""What a model costs: the formulas against torch's FLOP counter, the papers' figures, and the command."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode

from llava.cost import Scenario, TrainingRun, open_model, question_cost, training_cost
from tests.tiny_models import BACKBONES, SIDE, prompt, tiny_model

TEXT = 60
# Wide enough that a method's own work is about as small a part of the whole as at 7B.
WIDE = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 8, "head_dim": 24, "vocab_size": 96}
METHODS: list[Any] = [
    None,
    {"name": "prumerge", "ratio": 0.25},
    {"name": "prumerge_plus", "tokens": 3, "variant": "paper"},
    {"name": "spatial", "ratio": 0.25},
    {"name": "avgpool"},
    {"name": "stf", "mbtf": 2},
    {"name": "stf", "mbtf": [3, 1], "variant": "paper", "tokens_out": 2},
    {"name": "pyramiddrop"},
    {"name": "fastv"},
    {"encoder": {"name": "prumerge", "ratio": 0.5}, "decoder": {"name": "fastv"}},
    {"projector": {"name": "avgpool"}, "decoder": {"name": "pyramiddrop", "layers": [2, 5], "ratios": [0.5, 0.25]}},
]


def counted(run: Any) -> float:
    """What torch counts of a call, backward passes included."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def wide_model(reduction: Any, **settings: Any) -> Any:
    model = tiny_model(attn_implementation="eager", reduction=reduction, **{**WIDE, **settings})
    model.set_attn_implementation("eager")
    return model


def ask(model: Any, batch: int = 2, **arguments: Any) -> Any:
    """One prefill of a batch with an image each."""
    ids = torch.stack([prompt(TEXT // 2, "image", TEXT - TEXT // 2 - 1, seed=i) for i in range(batch)])
    with torch.no_grad():
        return model(input_ids=ids, images=torch.randn(batch, 3, SIDE, SIDE), logits_to_keep=1, **arguments)


@pytest.mark.parametrize("reduction", METHODS, ids=str)
def test_a_prefill_costs_what_torch_counts(reduction: Any) -> None:
    model = wide_model(reduction)
    cost = question_cost(model, reduction, Scenario(batch=2, text_tokens=TEXT, new_tokens=1, fused=False))
    assert sum(cost.flops().values()) == pytest.approx(counted(lambda: ask(model)), rel=0.01)
    assert sum(cost.flops(operations=1).values()) == pytest.approx(sum(cost.flops().values()) / 2)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_any_backbone_and_tower(backbone: str) -> None:
    """Grouped queries throughout; SigLIP, which has no CLS."""
    model = wide_model({"name": "fastv"}, backbone=backbone, tower="siglip", num_key_value_heads=2)
    cost = question_cost(model, "fastv", Scenario(batch=2, text_tokens=TEXT, new_tokens=1, fused=False))
    assert sum(cost.flops().values()) == pytest.approx(counted(lambda: ask(model)), rel=0.01)


def test_the_answer_costs_what_torch_counts() -> None:
    """Decoding from a staged cache, whose bytes are counted too."""
    model, new = wide_model("pyramiddrop"), 12
    ids = prompt(TEXT // 2, "image", TEXT - TEXT // 2 - 1).unsqueeze(0)
    outputs: list[Any] = []

    def generate() -> None:
        pixels = torch.randn(1, 3, SIDE, SIDE)
        options = {"min_new_tokens": new, "max_new_tokens": new, "do_sample": False, "return_dict_in_generate": True}
        outputs.append(model.generate(ids, images=pixels, **options))

    total = counted(generate)
    cost = question_cost(model, "pyramiddrop", Scenario(text_tokens=TEXT, new_tokens=new, fused=False))
    assert sum(cost.flops().values()) == pytest.approx(total, rel=0.01)
    held = sum(layer.keys.numel() + layer.values.numel() for layer in outputs[0].past_key_values.layers)
    assert cost.cache == 2 * held


@pytest.mark.parametrize(
    "reduction", [None, {"name": "avgpool"}, {"name": "spatial", "rows": 2, "columns": 2}], ids=str
)
@pytest.mark.parametrize("size", [(56, 112), (160, 60)])
def test_tiles_are_laid_out_as_the_model_does(reduction: Any, size: tuple[int, int]) -> None:
    model = wide_model(reduction, anyres=True)
    cost = question_cost(model, reduction, Scenario(image_size=size, text_tokens=TEXT, new_tokens=1, fused=False))
    tiles = 1 + (2 if size[0] == 56 else 3)
    pixels = torch.randn(1, tiles, 3, SIDE, SIDE)
    assert cost.image_tokens == model.count_visual_tokens(pixels, [size])[0][1]
    ids = prompt(TEXT // 2, "image", TEXT - TEXT // 2 - 1).unsqueeze(0)
    with torch.no_grad():
        total = counted(lambda: model(input_ids=ids, images=pixels, image_sizes=[size], logits_to_keep=1))
    assert sum(cost.flops().values()) == pytest.approx(total, rel=0.01)


def test_llava_1_5_7b_costs_what_torch_counts() -> None:
    """The real sizes, on the meta device: tower, projector, layers and head."""
    model = open_model("7b")
    model.set_attn_implementation("eager")
    inner, length = model.get_model(), 576 + TEXT
    cost = question_cost(model, None, Scenario(text_tokens=TEXT, new_tokens=1, fused=False)).flops()
    with torch.device("meta"), torch.no_grad():
        pixels = torch.empty(1, 3, 336, 336)
        embeds, mask = torch.empty(1, length, 4096), torch.zeros(1, 1, length, length)
        features = inner.get_vision_tower()(pixels).features
        assert cost["vision"] == pytest.approx(counted(lambda: inner.get_vision_tower()(pixels)), rel=0.001)
        assert cost["projector"] == counted(lambda: inner.mm_projector(features))
        layers = counted(lambda: model(inputs_embeds=embeds, attention_mask=mask, use_cache=False, logits_to_keep=1))
    assert cost["prefill"] == pytest.approx(layers, rel=0.001)


def test_a_method_that_reads_text() -> None:
    """TRIM: CLIP's text tower, the patches in its space, the scores and the mean."""
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    text |= {"projection_dim": 24, "vocab_size": 99, "max_position_embeddings": 77}
    method = {"name": "trim", "ratio": 0.25}
    model = wide_model(method, mm_text_config=text)
    scenario = Scenario(batch=2, text_tokens=TEXT, new_tokens=1, fused=False)
    cost, plain = (question_cost(model, reduction, scenario).flops() for reduction in (method, None))
    inner, pixels = model.get_model(), torch.randn(2, 3, SIDE, SIDE)
    clip = inner.get_vision_tower().text_tower
    ids = torch.randint(3, 90, (2, TEXT))
    with torch.no_grad():
        embedded = counted(lambda: clip.text_projection(clip.text_model(ids).pooler_output))
        total = counted(lambda: inner.encode_tiles(pixels, torch.randn(2, 24)))
    assert cost["vision"] == plain["vision"]
    assert cost["vision"] + cost["reducer"] + cost["projector"] == pytest.approx(embedded + total, rel=0.01)


TRAINED = [
    ("all", False, False, "none"),
    ("all", True, False, "none"),
    ("all", False, True, "none"),
    ("all", False, False, "{name: stf, mbtf: 2}"),
    ("all", False, False, "pyramiddrop"),
    ("projector", False, False, "none"),
    ("lora", False, False, "{name: spatial, ratio: 0.25}"),
]


@pytest.mark.parametrize(("trains", "tower", "checkpointing", "reduction"), TRAINED)
def test_a_training_step_costs_what_torch_counts(trains: str, tower: bool, checkpointing: bool, reduction: str) -> None:
    model: Any = wide_model(reduction)
    run = TrainingRun(
        batch=2, text_tokens=71, trains=trains, lora_rank=4, trains_tower=tower, checkpointing=checkpointing
    )
    cost = training_cost(model, reduction, run)
    for name, parameter in model.named_parameters():
        in_tower = "vision_tower" in name
        parameter.requires_grad_(tower if in_tower else trains == "all" or "mm_projector" in name)
    if trains == "lora":
        targets = [name for name, _ in model.named_modules() if name.startswith("model.layers") and "proj" in name]
        model = get_peft_model(model, LoraConfig(r=4, target_modules=targets))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora" in name or "mm_projector" in name)
    if checkpointing:
        model.get_model().gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    ids = torch.stack([prompt(30, "image", 40, seed=i) for i in range(2)])

    def step() -> None:
        model(input_ids=ids, labels=ids.clamp(min=0), images=torch.randn(2, 3, SIDE, SIDE)).loss.backward()

    assert sum(cost.flops().values()) == pytest.approx(counted(step), rel=0.01)
