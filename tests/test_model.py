"""The model tree: any batch, padding side, backbone, dtype and attention; generation; gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llava.mm_utils import get_anyres_image_grid_shape
from llava.model.image_inputs import tile_counts
from llava.reduction.base import Needs
from tests.tiny_models import BACKBONES, PINPOINTS, SIDE, pad, prompt, tiny_model

CLOSE = {"atol": 1e-4, "rtol": 0}
REDUCTIONS = (
    "none",
    "prumerge",
    {"name": "prumerge", "ratio": 0.25},
    {"name": "prumerge", "variant": "paper"},
    "prumerge_plus",
    {"name": "prumerge_plus", "tokens": 4},
    {"name": "prumerge_plus", "variant": "paper", "ratio": 0.25},
    {"name": "sequential", "ratio": 0.5},
    {"name": "spatial", "rows": 2, "columns": 3},
    {"name": "random", "tokens": 5},
    {"name": "stf", "mbtf": 2},
    {"name": "stf", "mbtf": [4, 1], "variant": "paper", "tokens_out": 2},
    {"name": "stf", "mbtf": 2, "kernel": 1},
    {"name": "avgpool", "kernel": 2},
    {"name": "token_concat", "kernel": 2},
    {"name": "m3", "tokens": 4},
    {"name": "tokenpacker"},
    {"name": "mqt", "tokens": 9},
    {
        "projector": {"name": "stf", "mbtf": 2, "tokens_out": 2},
        "decoder": {"name": "pyramiddrop", "layers": [1], "ratios": [0.5]},
    },
)
# Keeping everything, without merging.
EVERYTHING = (
    {"name": "prumerge", "ratio": 1.0, "neighbours": 0},
    {"name": "prumerge_plus", "ratio": 1.0, "neighbours": 0},
    {"name": "sequential", "ratio": 1.0},
    {"name": "spatial", "rows": 4, "columns": 4},
    {"name": "random", "ratio": 1.0},
    {"name": "stf", "mbtf": "off", "kernel": 1},
    {"name": "avgpool", "kernel": 1},
    {"name": "token_concat", "kernel": 1},
    {"name": "m3"},
)
# Two images, one image, text only, a tall image, a wide image.
ROWS = [
    prompt(4, "image", 3, "image", 5, seed=1),
    prompt("image", 9, seed=2),
    prompt(7, seed=3),
    prompt(2, "image", 4, seed=4),
    prompt(6, "image", 1, seed=5),
]
SIZES = [(60, 60), (56, 50), (100, 100), (40, 150), (200, 45)]  # (width, height) of the five images
FIRST = [0, 2, 3, 3, 4]  # number of the first image of each row
COUNTS = [2, 1, 0, 1, 1]


def pictures(anyres: bool) -> list[torch.Tensor]:
    """Random pixels for the five images: [3, H, W], or their tiles."""
    generator = torch.Generator().manual_seed(7)
    if not anyres:
        return [torch.randn(3, SIDE, SIDE, generator=generator) for _ in SIZES]
    shapes = [get_anyres_image_grid_shape(size, PINPOINTS, SIDE) for size in SIZES]
    return [torch.randn(1 + w * h, 3, SIDE, SIDE, generator=generator) for w, h in shapes]


def alone(images: list[torch.Tensor], i: int) -> dict[str, Any]:
    """Keyword arguments of row `i` by itself."""
    chosen = slice(FIRST[i], FIRST[i] + COUNTS[i])
    return {"input_ids": ROWS[i].unsqueeze(0), "images": images[chosen], "image_sizes": SIZES[chosen]}


@pytest.mark.parametrize("reduction", REDUCTIONS, ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("anyres", [False, True], ids=["flat", "anyres"])
@torch.no_grad()
def test_a_sample_does_not_depend_on_its_batch(anyres: bool, side: str, reduction: Any) -> None:
    model = tiny_model(anyres=anyres)
    model.set_reduction(reduction)
    images = pictures(anyres)
    ids, mask = pad(ROWS, side)
    batch = model(input_ids=ids, attention_mask=mask, images=images, image_sizes=SIZES).logits
    tokens = model.generate(
        ids, attention_mask=mask, images=images, image_sizes=SIZES, max_new_tokens=6, do_sample=False, eos_token_id=None
    )
    for i in range(len(ROWS)):
        single = alone(images, i)
        logits = model(**single).logits[0]
        row = batch[i, -len(logits) :] if side == "left" else batch[i, : len(logits)]
        torch.testing.assert_close(row, logits, **CLOSE)
        expected = model.generate(**single, max_new_tokens=6, do_sample=False, eos_token_id=None)
        assert tokens[i].tolist() == expected[0].tolist()


@pytest.mark.parametrize("reduction", EVERYTHING, ids=str)
@pytest.mark.parametrize("anyres", [False, True], ids=["flat", "anyres"])
@torch.no_grad()
def test_keeping_everything_is_the_baseline(anyres: bool, reduction: Any) -> None:
    model = tiny_model(anyres=anyres)
    ids, mask = pad(ROWS, "right")
    inputs = {"input_ids": ids, "attention_mask": mask, "images": pictures(anyres), "image_sizes": SIZES}
    expected = model(**inputs).logits
    model.set_reduction(reduction)
    assert torch.equal(model(**inputs).logits, expected)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("backbone", BACKBONES)
@torch.no_grad()
def test_backbones(backbone: str, attention: str) -> None:
    model = tiny_model(backbone)
    model.set_attn_implementation(attention)
    images = pictures(anyres=False)
    ids, mask = pad(ROWS, "right")
    batch = model(input_ids=ids, attention_mask=mask, images=images).logits
    for i in range(len(ROWS)):
        logits = model(**alone(images, i)).logits[0]
        torch.testing.assert_close(batch[i, : len(logits)], logits, **CLOSE)


@pytest.mark.parametrize("backbone", BACKBONES)
@torch.no_grad()
def test_cached_generation_equals_the_prefill(backbone: str) -> None:
    model = tiny_model(backbone)
    images = pictures(anyres=False)
    ids, mask = pad(ROWS, "left")
    tokens = model.generate(
        ids, attention_mask=mask, images=images, max_new_tokens=5, do_sample=False, eos_token_id=None
    )
    whole = torch.cat([ids, tokens], dim=1)
    mask = torch.cat([mask, torch.ones_like(tokens)], dim=1)
    logits = model(input_ids=whole, attention_mask=mask, images=images).logits
    assert logits[:, -6:-1].argmax(-1).tolist() == tokens.tolist()


@torch.no_grad()
def test_beams_and_sampling_in_a_batch() -> None:
    model = tiny_model()
    images = pictures(anyres=False)
    ids, mask = pad(ROWS, "right")
    beams = model.generate(ids, attention_mask=mask, images=images, num_beams=3, max_new_tokens=4, do_sample=False)
    for i in range(len(ROWS)):
        alone_beams = model.generate(**alone(images, i), num_beams=3, max_new_tokens=4, do_sample=False)
        length = alone_beams.shape[1]
        assert beams[i, :length].tolist() == alone_beams[0].tolist()
    torch.manual_seed(3)
    sampled = model.generate(ids, attention_mask=mask, images=images, do_sample=True, top_p=0.9, max_new_tokens=4)
    assert sampled.shape[0] == len(ROWS)
    assert sampled.shape[1] <= 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", REDUCTIONS, ids=str)
@torch.no_grad()
def test_half_precision(dtype: torch.dtype, reduction: Any) -> None:
    model = tiny_model().to(dtype)
    model.set_reduction(reduction)
    ids, mask = pad(ROWS, "right")
    out = model(input_ids=ids, attention_mask=mask, images=pictures(anyres=False))
    assert out.logits.dtype == dtype
    assert out.logits.isfinite().all()


@pytest.mark.parametrize("reduction", ["none", "prumerge"])
def test_checkpointing_leaves_the_gradients(reduction: str) -> None:
    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        model = tiny_model().train()
        model.set_reduction(reduction)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        ids, mask = pad(ROWS, "right")
        labels = ids.masked_fill((mask == 0) | (ids < 0), -100)
        model(input_ids=ids, attention_mask=mask, labels=labels, images=pictures(anyres=False)).loss.backward()
        assert all(p.grad is None for p in model.get_vision_tower().parameters())
        learnt = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        assert all(g is not None and g.isfinite().all() for g in learnt.values()), learnt
        assert learnt["model.mm_projector.0.weight"].abs().sum() > 0
        return list(learnt.values())

    for plain, checkpointed in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(checkpointed, plain)


def test_a_training_batch_without_images_still_reaches_the_projector() -> None:
    model = tiny_model(anyres=True).train()
    ids = prompt(6).unsqueeze(0)
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.get_model().mm_projector.parameters())
    assert model.get_model().image_newline.grad is not None


@torch.no_grad()
def test_rows_are_cut_at_the_models_length() -> None:
    model = tiny_model(tokenizer_model_max_length=12)
    ids, mask = pad(ROWS[:2], "right")
    images = pictures(anyres=False)[:3]
    labels = ids.masked_fill(mask == 0, -100)
    out = model(input_ids=ids, attention_mask=mask, labels=labels, images=images)
    full = tiny_model()(input_ids=ids, attention_mask=mask, images=images).logits
    torch.testing.assert_close(out.logits, full[:, :12], **CLOSE)
    assert out.loss.isfinite()
    # A prompt is never cut: its end is the question.
    assert model.generate(ids, attention_mask=mask, images=images, max_new_tokens=2, eos_token_id=None).shape == (2, 2)


@torch.no_grad()
def test_blank_images_of_text_only_samples_are_left_out() -> None:
    model = tiny_model()
    images = pictures(anyres=False)
    ids, mask = pad(ROWS, "right")
    with_blank = [*images[:3], torch.zeros(3, SIDE, SIDE), *images[3:]]
    expected = model(input_ids=ids, attention_mask=mask, images=images).logits
    torch.testing.assert_close(model(input_ids=ids, attention_mask=mask, images=with_blank).logits, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": pictures(False)[:3]}, r"5 image markers \(sample 0: 2, .*but 3 images"),
        ({"images": [torch.zeros(1, SIDE, SIDE)] * 5}, r"image 0 has shape \(1, 56, 56\)"),
        ({"images": torch.zeros(3, SIDE, SIDE)}, r"images of shape \(3, 56, 56\)"),
        ({"image_sizes": SIZES[:2]}, "5 images but 2 image_sizes"),
    ],
)
def test_images_that_do_not_fit_the_prompts(change: dict[str, Any], message: str) -> None:
    ids, mask = pad(ROWS, "right")
    inputs = {"images": pictures(False), "image_sizes": SIZES, **change}
    with pytest.raises(ValueError, match=message):
        tiny_model()(input_ids=ids, attention_mask=mask, **inputs)


def test_anyres_names_a_size_that_does_not_fit_its_tiles() -> None:
    model = tiny_model(anyres=True)
    with pytest.raises(ValueError, match=r"\(60, 60\).*makes 1 \+ 2 x 2 tiles"):
        model(input_ids=ROWS[1].unsqueeze(0), images=[torch.zeros(3, 3, SIDE, SIDE)], image_sizes=[(60, 60)])
    with pytest.raises(ValueError, match="needs image_sizes"):
        model(input_ids=ROWS[1].unsqueeze(0), images=[torch.zeros(3, 3, SIDE, SIDE)])


def test_a_language_model_without_tower_says_so() -> None:
    model = tiny_model(mm_vision_tower=None)
    with pytest.raises(ValueError, match="has no vision tower"):
        model(input_ids=ROWS[1].unsqueeze(0), images=pictures(False)[:1])


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("layer", [-1, -2, 1, 4])
@pytest.mark.parametrize("feature", ["patch", "cls_patch"])
@torch.no_grad()
def test_the_tower_hands_on_transformers_hidden_state(kind: str, layer: int, feature: str) -> None:
    model = tiny_model(tower=kind, mm_vision_select_layer=layer, mm_vision_select_feature=feature)
    tower = model.get_vision_tower()
    pixels = torch.randn(2, 3, SIDE, SIDE)
    hidden = tower.vision_tower(pixels, output_hidden_states=True).hidden_states[layer]
    if kind == "clip" and feature == "patch":
        hidden = hidden[:, 1:]
    torch.testing.assert_close(tower(pixels).features, hidden)


@torch.no_grad()
def test_the_tower_hands_on_the_last_blocks_keys_and_queries() -> None:
    tower = tiny_model().get_vision_tower()
    seen = {}
    attention = tower.vision_tower.encoder.layers[-1].self_attn
    for name in ("k_proj", "q_proj"):
        getattr(attention, name).register_forward_hook(lambda _m, _i, out, name=name: seen.__setitem__(name, out))
    pixels = torch.randn(2, 3, SIDE, SIDE)
    tower.vision_tower(pixels)
    keys, queries = seen["k_proj"], seen["q_proj"]
    vision = tower(pixels, Needs(keys="last", queries="last"))
    torch.testing.assert_close(vision.keys, keys)
    torch.testing.assert_close(vision.queries, queries)
    torch.testing.assert_close(tower(pixels, Needs(cls_query="last")).queries, queries[:, :1])


@pytest.mark.parametrize("layer", [-6, 5])
def test_a_layer_that_the_tower_lacks(layer: int) -> None:
    with pytest.raises(ValueError, match="has 4 blocks"):
        tiny_model(mm_vision_select_layer=layer)


@pytest.mark.parametrize(
    ("kind", "message"), [("mlp2x_relu", "unknown mm_projector_type"), ("identity", "needs equal widths")]
)
def test_unknown_projectors(kind: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_model(mm_projector_type=kind)


def test_cls_has_no_place_on_a_grid() -> None:
    model = tiny_model(anyres=True, mm_vision_select_feature="cls_patch")
    with pytest.raises(ValueError, match="keeps CLS among them"):
        model(input_ids=ROWS[1].unsqueeze(0), images=pictures(True)[:1], image_sizes=SIZES[:1])


@pytest.mark.parametrize("kind", ["linear", "mlp1x_gelu", "mlp3x_gelu"])
@torch.no_grad()
def test_projector_types(kind: str) -> None:
    model = tiny_model(mm_projector_type=kind)
    assert model(input_ids=ROWS[1].unsqueeze(0), images=pictures(False)[:1]).logits.isfinite().all()


def test_prumerge_needs_cls() -> None:
    model = tiny_model(tower="siglip")
    model.set_reduction("prumerge")
    with pytest.raises(ValueError, match=r"this vision tower has none: .*or the option attention=received"):
        model(input_ids=ROWS[1].unsqueeze(0), images=pictures(False)[:1])


@pytest.mark.parametrize("variant", ["release", "paper"])
@pytest.mark.parametrize("name", ["prumerge", "prumerge_plus"])
@pytest.mark.parametrize("tower", ["clip", "siglip"])
@torch.no_grad()
def test_attention_received_does_without_cls(tower: str, name: str, variant: str) -> None:
    model = tiny_model(tower=tower)
    full = model(input_ids=ROWS[1].unsqueeze(0), images=pictures(False)[:1]).logits
    model.set_reduction({"name": name, "variant": variant, "attention": "received"})
    ids, mask = pad(ROWS, "right")
    batch = model(input_ids=ids, attention_mask=mask, images=pictures(False)).logits
    single = model(**alone(pictures(False), 1)).logits[0]
    assert len(single) < full.shape[1]
    torch.testing.assert_close(batch[1, : len(single)], single, **CLOSE)


@torch.no_grad()
def test_visual_token_counts() -> None:
    model = tiny_model(anyres=True)
    images = pictures(anyres=True)
    before = [count for count, _ in model.count_visual_tokens(images, SIZES)]
    assert [after for _, after in model.count_visual_tokens(images, SIZES)] == before
    assert model.get_model().layout_lengths(None, tile_counts(images), SIZES) == before
    model.set_reduction({"name": "prumerge", "ratio": 0.25})
    reduced = model.count_visual_tokens(images, SIZES)
    assert [count for count, _ in reduced] == before
    assert all(after < count for count, after in reduced)


def test_a_batch_of_text_in_half_precision_stays_finite() -> None:
    model = tiny_model().half().train()
    projector = model.get_model().mm_projector
    with torch.no_grad():
        projector[2].bias.fill_(200.0)  # every visual token is finite, their sum is not
    embeds = model.splice_images(prompt(7).unsqueeze(0)).inputs_embeds
    assert embeds.isfinite().all()
    embeds.float().sum().backward()
    gradients = [weight.grad for weight in projector.parameters()]  # all there: DDP and ZeRO wait for each
    assert all(gradient is not None and not gradient.any() for gradient in gradients)
