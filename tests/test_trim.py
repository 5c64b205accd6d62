"""TRIM: against a plain loop and the release, and the way of the text from the prompt to the reducer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from llava.conversation import conv_templates
from llava.data import build_prompt_ids
from llava.data.prompt_text import question_of_ids, question_of_prompt
from llava.model.builder import load_pretrained_model
from llava.model.language_model.families import LlavaLlamaForCausalLM
from llava.reduction import VisionFeatures, build
from tests.test_golden import check_answer, open_checkpoint, pixels, read_case
from tests.tiny_models import pad, prompt
from tests.tiny_world import SIDE, TinyWorld, make_readable, make_tiny_world

TEMPLATES = sorted(set(conv_templates) - {"plain", "v0_plain"})


@pytest.fixture(scope="module")
def released(golden: Path) -> Any:
    return open_checkpoint(golden, "llava-v1.5-7b-TRIM")


@pytest.mark.parametrize("ratio", ["-1", "0.05", "0.25"])
@pytest.mark.parametrize("i", range(3))
def test_release(golden: Path, released: Any, ratio: str, i: int) -> None:
    case, about = read_case(golden, f"trim_{ratio}_{i}")
    assert released.config.mm_vision_token_reduce_func == "TRIM:-1"
    assert released.get_model().encoder_reducer is not None
    released.set_reduction({"name": "trim", "ratio": None if ratio == "-1" else float(ratio)})
    image = pixels(golden, "pixels_pad")[i : i + 1]
    tower = released.get_vision_tower()
    text = tower.text_tower.embed_texts([about["question"]], tower.name)
    torch.testing.assert_close(text, case["text_embeds"], atol=1e-5, rtol=0)
    features = case["features"]
    embeds = tower.text_tower.embed_patches(features, tower.vision_tower.post_layernorm)
    reducer = released.get_model().encoder_reducer
    tokens = reducer(VisionFeatures(features, patch_embeds=embeds, text=text))
    assert tokens.counts.tolist() == [about["kept"]]
    tolerance = 1e-3 * case["output"].abs().max().item()
    torch.testing.assert_close(tokens.features, case["output"], atol=tolerance, rtol=0)
    check_answer(released, case, images=image, texts=[about["question"]])
    check_answer(released, case, images=image)  # the question is read off the prompt


def slow_trim(variant: str, y: torch.Tensor, patches: torch.Tensor, text: torch.Tensor, budget: dict[str, Any]) -> Any:
    """TRIM patch by patch: the kept patches, and all tokens."""
    p = len(y)
    if variant == "release":
        values = [-(v @ text) for v in patches]
    else:
        values = [(v @ text) / (v.norm() * text.norm()) for v in patches]
    scores = torch.stack(values).float().softmax(dim=0)
    ranked = sorted(range(p), key=lambda i: (-scores[i].item(), i))
    if budget:
        count = max(1, int(p * budget["ratio"])) if "ratio" in budget else min(budget["tokens"], p)
    else:
        q1, q3 = np.percentile(scores.numpy(), [25, 75])
        count = max(1, int((scores > q3 + 1.5 * (q3 - q1)).sum()))
    kept = sorted(ranked[:count])
    rest = [i for i in range(p) if i not in kept]
    tokens = [y[i] for i in kept] + ([y[rest].mean(dim=0)] if rest else [])
    return kept + [-1] * bool(rest), torch.stack(tokens)


@settings(max_examples=100, deadline=None)
@given(
    variant=st.sampled_from(["release", "paper"]),
    images=st.integers(1, 4),
    patches=st.integers(2, 40),
    budget=st.one_of(
        st.just({}),
        st.builds(lambda r: {"ratio": r}, st.floats(0.01, 1.0)),
        st.builds(lambda t: {"tokens": t}, st.integers(1, 50)),
    ),
    spread=st.sampled_from([0.0, 1.0, 30.0]),  # 0: all scores equal; 30: one spike
    seed=st.integers(0, 10_000),
)
def test_trim_equals_the_loop(
    variant: str, images: int, patches: int, budget: dict[str, Any], spread: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randn(images, patches, 6, generator=generator)
    embeds = spread * torch.randn(images, patches, 4, generator=generator) + (spread == 0)
    text = torch.randn(images, 4, generator=generator)
    tokens = build("trim", variant=variant, **budget)(VisionFeatures(y, patch_embeds=embeds, text=text))
    assert tokens.source is not None
    assert tokens.mask is not None
    for i in range(images):
        source, expected = slow_trim(variant, y[i], embeds[i], text[i], budget)
        real = tokens.mask[i]
        kept = tokens.source[i][real].tolist()
        if spread == 0 and variant == "paper":
            assert len(kept) == len(source)  # rounding breaks these ties
            continue
        assert kept == source
        torch.testing.assert_close(tokens.features[i][real], expected, atol=1e-5, rtol=0)
        assert not tokens.features[i][~real].any()


def test_trim_without_a_text_says_so() -> None:
    with pytest.raises(ValueError, match=r"pass patch_embeds= and text=, or call the model with texts="):
        build("trim")(VisionFeatures(torch.zeros(1, 4, 2)))
    with pytest.raises(ValueError, match="text='answer' is not known; choose one of: question, conversation"):
        build("trim", text="answer")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    world = make_tiny_world(tmp_path_factory.mktemp("world"))
    make_readable(world.clip)
    return world


@pytest.fixture
def model(world: TinyWorld) -> Any:
    torch.manual_seed(0)
    model = LlavaLlamaForCausalLM.from_pretrained(str(world.llm))
    args = {"vision_tower": str(world.clip), "mm_projector_type": "linear", "mm_vision_select_layer": -2}
    model.get_model().initialize_vision_modules(type("Args", (), args))
    model.set_reduction({"name": "trim", "ratio": 0.5})
    return model.eval()


IMAGES = torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3))
ROWS = [prompt("image", 3, "image", 2), prompt(4), prompt(1, "image", 6)]
TEXTS = ["a red bus", "no image here", "something quite different"]


@torch.no_grad()
def test_a_sample_is_compared_with_its_own_text(model: Any) -> None:
    ids, mask = pad(ROWS, "left")
    logits = model(input_ids=ids, attention_mask=mask, images=IMAGES, texts=TEXTS).logits
    for i, images in ((0, IMAGES[:2]), (2, IMAGES[2:])):
        alone = model(input_ids=ROWS[i][None], images=images, texts=[TEXTS[i]]).logits[0]
        torch.testing.assert_close(logits[i, -len(alone) :], alone, atol=1e-4, rtol=0)
        others = [
            model(input_ids=ROWS[i][None], images=images, texts=[text]).logits[0] for text in ("zzz", "q", "0 1 2")
        ]
        assert any((other - alone).abs().max() > 1e-3 for other in others)


def test_texts_that_are_missing_or_too_few(model: Any) -> None:
    with pytest.raises(ValueError, match=r"reads the prompt's text: pass texts="):
        model(input_ids=ROWS[2][None], images=IMAGES[:1])
    with pytest.raises(ValueError, match="2 texts for 1 samples"):
        model(input_ids=ROWS[2][None], images=IMAGES[:1], texts=TEXTS[:2])


@torch.no_grad()
def test_a_saved_model_opens_with_its_text_tower(model: Any, world: TinyWorld, tmp_path: Path) -> None:
    AutoTokenizer.from_pretrained(world.llm).save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    _, opened, *_ = load_pretrained_model(tmp_path, device="cpu")
    assert opened.config.reduction == {"encoder": {"name": "trim", "ratio": 0.5}}
    inputs = {"input_ids": ROWS[2][None], "images": IMAGES[:1], "texts": TEXTS[:1]}
    torch.testing.assert_close(opened(**inputs).logits, model(**inputs).logits)


def test_gradients_reach_what_learns(model: Any) -> None:
    model.train()
    ids, mask = pad(ROWS, "right")
    model(input_ids=ids, attention_mask=mask, labels=ids.clamp(min=0), images=IMAGES, texts=TEXTS).loss.backward()
    learnt = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert not any("vision_tower" in name for name in learnt)
    assert all(g is not None and g.isfinite().all() for g in learnt.values())
    assert learnt["model.mm_projector.weight"].abs().sum() > 0
    model.zero_grad()
    model(input_ids=ROWS[1][None], labels=ROWS[1][None]).loss.backward()  # a rank without images


def test_a_tower_without_text_is_refused(world: TinyWorld, tmp_path: Path) -> None:
    from transformers import CLIPVisionModel

    CLIPVisionModel.from_pretrained(world.clip).save_pretrained(tmp_path)
    model = LlavaLlamaForCausalLM.from_pretrained(str(world.llm))
    model.get_model().initialize_vision_modules(type("Args", (), {"vision_tower": str(tmp_path)}))
    with pytest.raises(ValueError, match="needs a whole CLIP, with its text tower"):
        model.set_reduction("trim")


@pytest.mark.parametrize("version", TEMPLATES)
def test_the_question_is_found_in_any_prompt(golden: Path, version: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(golden / "vicuna")
    tokenizer.add_tokens(
        ["<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"], special_tokens=True
    )
    question = "What is left of the clock?\nAnswer briefly."
    ids = build_prompt_ids(question, tokenizer, version, num_images=1)
    assert question_of_ids(ids, tokenizer) == question


def test_a_prompt_in_no_template() -> None:
    with pytest.raises(ValueError, match="is in no known template; pass texts="):
        question_of_prompt("What is this?")
