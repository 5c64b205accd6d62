"""Every method before the language model, every budget: alone and in a batch, trained and asked, in two types."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llava.model.language_model.families import LlavaLlamaForCausalLM
from llava.reduction import available, build
from llava.reduction.base import FIXED_WEIGHTS
from llava.reduction.registry import method_class
from llava.reduction.stand_in import StandIn, TowerShape
from tests.tiny_models import pad, prompt
from tests.tiny_world import SIDE, TinyWorld, make_readable, make_tiny_world

ADAPTIVE = ("prumerge", "prumerge_plus", "trim")
VARIANTS = {"prumerge": ("release", "paper"), "prumerge_plus": ("release", "paper"), "trim": ("release", "paper")}
BUDGETS: dict[str, dict[str, Any]] = {"adaptive": {}, "fixed": {"ratio": 0.3}, "tokens": {"tokens": 5}}
ENCODER_CASES = [
    pytest.param({"name": name, **({"variant": variant} if variant else {}), **budget}, id=f"{name}-{variant}-{kind}")
    for name in available()["encoder"]
    for variant in VARIANTS.get(name, (None,))
    for kind, budget in BUDGETS.items()
    if (kind != "adaptive" or name in ADAPTIVE) and all(hasattr(method_class(name), option) for option in budget)
]
TOWER_CASES = [
    pytest.param({"name": "tome", "tokens": 7}, id="tome-paper"),
    pytest.param({"name": "tome", "per_block": 3, "variant": "lightcompress"}, id="tome-lightcompress"),
    pytest.param({"tower": {"name": "tome", "tokens": 9}, "encoder": {"name": "prumerge"}}, id="tome-prumerge"),
    pytest.param(
        {"tower": {"name": "tome", "tokens": 9}, "encoder": {"name": "divprune", "tokens": 4}}, id="tome-divprune"
    ),
]
PROJECTOR_CASES = [
    pytest.param({"name": "stf", "mbtf": 1}, id="stf-release"),
    pytest.param({"name": "stf", "mbtf": 3, "variant": "paper", "tokens_out": 2}, id="stf-paper-two-tokens"),
    pytest.param({"name": "stf", "mbtf": None}, id="stf-alone"),
    pytest.param({"name": "stf", "kernel": 1, "mbtf": [2, 1]}, id="mbtf-alone"),
    pytest.param({"name": "avgpool"}, id="avgpool"),
    pytest.param({"name": "token_concat", "kernel": 4}, id="token_concat"),
    pytest.param({"name": "tokenpacker"}, id="tokenpacker"),
    pytest.param({"name": "tokenpacker", "scale": 4, "heads": 2}, id="tokenpacker-4"),
    pytest.param({"name": "mqt", "tokens": 5}, id="mqt"),
    pytest.param({"name": "mqt", "tokens": 7, "draws": True}, id="mqt-draws"),
    pytest.param({"name": "m3", "tokens": 4}, id="m3-tokens"),
    pytest.param({"name": "m3", "scales": [1, 16]}, id="m3-scales"),
]
CASES = [*TOWER_CASES, *ENCODER_CASES, *PROJECTOR_CASES]
# Batches of one sample, of three alike, and of three that differ: two images, none, one.
ROWS = {
    "one": [prompt(3, "image", 4)],
    "three": [prompt(3, "image", 4, seed=i) for i in range(3)],
    "ragged": [prompt("image", 3, "image", 2), prompt(4), prompt(1, "image", 6)],
}
TEXTS = ["a red bus", "no image here", "something quite different"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    world: TinyWorld = make_tiny_world(tmp_path_factory.mktemp("world"))
    make_readable(world.clip)
    torch.manual_seed(0)
    model = LlavaLlamaForCausalLM.from_pretrained(str(world.llm))
    args = {"vision_tower": str(world.clip), "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2}
    model.get_model().initialize_vision_modules(type("Args", (), args))
    return model


def inputs_of(rows: list[torch.Tensor], dtype: torch.dtype) -> list[dict[str, Any]]:
    """Keyword arguments of each row by itself."""
    generator = torch.Generator().manual_seed(1)
    single = []
    for row, text in zip(rows, TEXTS, strict=False):
        images = torch.randn(int((row < 0).sum()), 3, SIDE, SIDE, generator=generator).to(dtype)
        single.append({"input_ids": row.unsqueeze(0), "images": list(images), "texts": [text]})
    return single


def use(model: Any, reduction: dict[str, Any]) -> None:
    """Give the model this method alone: otherwise a projector's method would stay when another site's is named."""
    model.set_reduction("none")
    model.set_reduction(reduction)


def batch_of(single: list[dict[str, Any]]) -> dict[str, Any]:
    ids, mask = pad([one["input_ids"][0] for one in single], "right")
    images = [image for one in single for image in one["images"]]
    return {"input_ids": ids, "attention_mask": mask, "images": images, "texts": [one["texts"][0] for one in single]}


@pytest.mark.parametrize("reduction", CASES)
@pytest.mark.parametrize("rows", ROWS)
def test_a_sample_is_the_same_alone_and_in_a_batch(model: Any, rows: str, reduction: dict[str, Any]) -> None:
    use(model.float().eval(), reduction)
    single = inputs_of(ROWS[rows], torch.float32)
    batch = batch_of(single)
    ask = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        logits = model(**batch).logits
        tokens = model.generate(batch.pop("input_ids"), **batch, **ask)
        for i, one in enumerate(single):
            alone = model(**one).logits[0]
            torch.testing.assert_close(logits[i, : len(alone)], alone, atol=1e-4, rtol=0)
            expected = model.generate(one.pop("input_ids"), **one, **ask)
            assert tokens[i].tolist() == expected[0].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", CASES)
def test_gradients_reach_projector_and_language_model(
    model: Any, reduction: dict[str, Any], dtype: torch.dtype
) -> None:
    use(model.to(dtype).train(), reduction)
    model.zero_grad()
    batch = batch_of(inputs_of(ROWS["ragged"], dtype))
    labels = (
        batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100).masked_fill(batch["input_ids"] < 0, -100)
    )
    loss = model(**batch, labels=labels).loss
    loss.backward()
    assert loss.isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("vision_tower" not in name and not name.endswith(FIXED_WEIGHTS))
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
    for module in model.get_model().projector_modules().values():
        assert all(weight.grad.abs().sum() > 0 for weight in module.parameters() if weight.grad is not None)
    assert model.get_model().layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("reduction", CASES)
@torch.no_grad()
def test_bfloat16_answers(model: Any, reduction: dict[str, Any]) -> None:
    use(model.to(torch.bfloat16).eval(), reduction)
    batch = batch_of(inputs_of(ROWS["ragged"], torch.bfloat16))
    tokens = model.generate(batch.pop("input_ids"), **batch, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert tokens.shape == (3, 3)


@pytest.mark.parametrize("reduction", ENCODER_CASES)
@pytest.mark.parametrize("grid", [(16, 16), (12, 20), (1, 7)], ids=str)
def test_any_grid(grid: tuple[int, int], reduction: dict[str, Any]) -> None:
    p, reducer = grid[0] * grid[1], build(**reduction)
    vision = StandIn(TowerShape(grid), tiles=2, width=8, heads=2, embeds=8).features(reducer.needs)
    tokens = reducer(vision)
    assert (tokens.counts >= 1).all()
    assert (tokens.counts <= p + 1).all() or reduction["name"] == "prumerge_plus"
    assert tokens.source is not None
    assert tokens.source.max() < p
