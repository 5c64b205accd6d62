"""llava-hf checkpoints: against transformers' own models on random weights, and the errors."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoProcessor,
    CLIPImageProcessorPil,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    PaliGemmaConfig,
)
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel, unpad_image

from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.model.image_layout import LayoutSpec, image_layout, unpadded_box
from llava.model.llava_hf.opening import to_hf_name
from tests.hf_folders import SIZES, hf_folder, hf_model, picture
from tests.tiny_models import PATCH, SIDE, vision_config

CLOSE = {"atol": 1e-4, "rtol": 0}
HF = {"llava": LlavaForConditionalGeneration, "llava_next": LlavaNextForConditionalGeneration}
QUESTIONS = ["<image> what is the red thing ?", "<image> where ?", "how many <image> small circle are there left ?"]
FULL = {"vision_feature_select_strategy": "full"}
MODELS: list[Any] = [
    pytest.param("llava", "llama", "clip", {}, id="llava-llama"),
    pytest.param("llava", "mistral", "clip", {"do_pad": False}, id="llava-mistral-square"),
    pytest.param("llava", "qwen2", "clip", {"tied": True}, id="llava-qwen2-tied"),
    pytest.param("llava", "llama", "siglip", FULL, id="llava-siglip"),
    pytest.param("llava", "llama", "clip", FULL | {"vision_feature_layer": -1}, id="llava-cls-last-layer"),
    pytest.param("llava_next", "llama", "clip", {}, id="next-llama"),
    pytest.param("llava_next", "mistral", "clip", {"vision_feature_layer": 2}, id="next-mistral"),
    pytest.param("llava_next", "qwen2", "clip", {}, id="next-qwen2"),
    pytest.param("llava_next", "llama", "siglip", FULL, id="next-siglip"),
]


@pytest.mark.parametrize(("kind", "backbone", "tower", "options"), MODELS)
@torch.no_grad()
def test_logits_and_tokens_are_those_of_transformers(
    kind: str, backbone: str, tower: str, options: dict[str, Any], tmp_path: Path
) -> None:
    folder = hf_folder(tmp_path / "hf", kind, backbone, tower, **options)
    theirs, processor = HF[kind].from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    tokenizer, ours, image_processor, _ = load_pretrained_model(folder, device="cpu")
    assert ours.dtype == torch.float32
    pictures = [picture(size, seed) for seed, size in enumerate(SIZES.values())]
    pixels = [process_images([image], image_processor, ours.config)[0] for image in pictures]
    ids = [tokenizer_image_token(question, tokenizer, return_tensors="pt") for question in QUESTIONS]
    greedy = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    rows = []
    for image, tiles, question, row in zip(pictures, pixels, QUESTIONS, ids, strict=True):
        inputs = processor(images=image, text=question, return_tensors="pt")
        torch.testing.assert_close(tiles, inputs["pixel_values"][0], atol=1e-6, rtol=0)
        mine: dict[str, Any] = {"input_ids": row.unsqueeze(0), "images": [tiles], "image_sizes": [image.size]}
        logits = ours(**mine).logits
        torch.testing.assert_close(logits, theirs(**inputs).logits, **CLOSE)
        assert ours.generate(**mine, **greedy).tolist() == new_tokens(theirs, inputs, greedy)
        rows.append(logits[0])
    assert_batch_equal(theirs, processor, ours, pictures, pixels, ids, rows)


def new_tokens(model: Any, inputs: Any, greedy: dict[str, Any]) -> list[list[int]]:
    return model.generate(**inputs, **greedy)[:, inputs["input_ids"].shape[1] :].tolist()


def assert_batch_equal(
    theirs: Any, processor: Any, ours: Any, pictures: list, pixels: list, ids: list, rows: list
) -> None:
    """The three questions as one batch, padded on the left."""
    greedy = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    inputs = processor(images=pictures, text=QUESTIONS, return_tensors="pt", padding=True)
    length = max(map(len, ids))
    batch = torch.stack([torch.cat([torch.zeros(length - len(row), dtype=torch.long), row]) for row in ids])
    mask = torch.stack([(torch.arange(length) >= length - len(row)).long() for row in ids])
    mine: dict[str, Any] = {"images": pixels, "image_sizes": [p.size for p in pictures], "attention_mask": mask}
    logits, expected = ours(input_ids=batch, **mine).logits, theirs(**inputs).logits
    real = inputs["attention_mask"].bool()
    assert logits.shape == expected.shape and not bool(real.all())
    torch.testing.assert_close(logits[real], expected[real], **CLOSE)
    for row, single in zip(logits, rows, strict=True):
        torch.testing.assert_close(row[-len(single) :], single, **CLOSE)
    assert ours.generate(batch, **mine, **greedy).tolist() == new_tokens(theirs, inputs, greedy)


@torch.no_grad()
def test_pictures_show_in_the_logits(tmp_path: Path) -> None:
    """Guards the comparisons above: they would also pass if neither side looked at the image."""
    tokenizer, model, processor, _ = load_pretrained_model(hf_folder(tmp_path, "llava_next"), device="cpu")
    ids = tokenizer_image_token(QUESTIONS[0], tokenizer, return_tensors="pt").unsqueeze(0)
    pictures = [picture((90, 90), seed) for seed in (1, 2)]
    logits = [
        model(ids, images=process_images([p], processor, model.config), image_sizes=[p.size]).logits for p in pictures
    ]
    assert (logits[0] - logits[1])[0, -1].abs().max() > 0.02


@torch.no_grad()
def test_clip_processor_means_padding(tmp_path: Path) -> None:
    """llava-hf's first checkpoints name CLIP's processor, which crops; LLaVA-1.5 was trained with padding.

    The preprocessings differ, so the model is compared on the same pixels.
    """
    folder = hf_folder(tmp_path, "llava")
    for name in ("processor_config.json", "preprocessor_config.json"):
        (folder / name).unlink(missing_ok=True)
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}).save_pretrained(
        folder
    )
    tokenizer, model, processor, _ = load_pretrained_model(folder, device="cpu")
    assert model.config.image_aspect_ratio == "pad" and isinstance(processor, CLIPImageProcessorPil)
    pixels = process_images([picture(SIZES["wide"])], processor, model.config)
    ids = tokenizer_image_token(QUESTIONS[0], tokenizer, return_tensors="pt").unsqueeze(0)
    theirs = LlavaForConditionalGeneration.from_pretrained(folder)
    image = torch.full((model.get_vision_tower().num_patches,), theirs.config.image_token_index)
    before, after = ids[0].tolist().index(-200), ids[0].tolist().index(-200) + 1
    expanded = torch.cat([ids[0, :before], image, ids[0, after:]]).unsqueeze(0)
    expected = theirs(input_ids=expanded, pixel_values=pixels).logits
    torch.testing.assert_close(model(ids, images=pixels).logits, expected, **CLOSE)


def old_names(model: Any) -> dict[str, torch.Tensor]:
    """As transformers 4 wrote them."""
    return {k.replace("vision_tower.", "vision_tower.vision_model."): v for k, v in present_names(model).items()}


def present_names(model: Any) -> dict[str, torch.Tensor]:
    """As transformers 5.23 writes them."""
    renamed = {}
    for name, value in model.state_dict().items():
        inner = name.removeprefix("model.")
        inner = inner.replace("language_model.", "language_model.model.", 1) if "language" in inner else inner
        renamed["language_model.lm_head.weight" if name == "lm_head.weight" else inner] = value.clone()
    return renamed


@pytest.mark.parametrize("names", ["old", "present", "in_memory"])
@pytest.mark.parametrize("files", ["bin", "sharded_bin", "safetensors", "sharded_safetensors"])
def test_every_key_style_and_file_format(names: str, files: str, tmp_path: Path) -> None:
    folder = hf_folder(tmp_path, "llava_next")
    model = HF["llava_next"].from_pretrained(folder)
    expected = load_pretrained_model(folder, device="cpu")[1].state_dict()
    weights = {"old": old_names, "present": present_names, "in_memory": lambda m: m.state_dict()}[names](model)
    if names == "present":
        assert set(weights) == set(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    write_weights(folder, weights, files)
    opened = load_pretrained_model(folder, device="cpu")[1].state_dict()
    assert opened.keys() == expected.keys()
    assert all(torch.equal(opened[name], expected[name]) for name in expected)


def write_weights(folder: Path, weights: dict[str, torch.Tensor], files: str) -> None:
    suffix, stem = ("bin", "pytorch_model") if "bin" in files else ("safetensors", "model")
    parts = [f"{stem}.{suffix}"]
    if files.startswith("sharded"):
        parts = [f"{stem}-0000{i}-of-00002.{suffix}" for i in (1, 2)]
        index = {name: parts[i % 2] for i, name in enumerate(weights)}
        content = {"metadata": {"total_size": 1}, "weight_map": index}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(content))
    for number, part in enumerate(parts):
        own = {name: value for i, (name, value) in enumerate(weights.items()) if i % len(parts) == number}
        if suffix == "bin":
            torch.save(own, folder / part)
        else:
            save_file(own, folder / part, metadata={"format": "pt"})


def test_saved_again_it_has_llava_names(tmp_path: Path) -> None:
    model = load_pretrained_model(hf_folder(tmp_path / "hf", "llava_next"), device="cpu")[1]
    model.save_pretrained(tmp_path / "llava")
    saved = load_file(tmp_path / "llava" / "model.safetensors")
    assert {
        "model.vision_tower.vision_tower.vision_model.pre_layrnorm.weight",
        "model.mm_projector.0.weight",
        "model.image_newline",
        "model.layers.0.mlp.up_proj.weight",
        "lm_head.weight",
    } <= set(saved)
    again = type(model).from_pretrained(tmp_path / "llava").state_dict()
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())


def test_dtype_and_attention_are_respected(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path, "llava")
    model = load_pretrained_model(folder, device="cpu", dtype=torch.bfloat16, attn_implementation="eager")[1]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == "eager"
    assert model.get_vision_tower().config._attn_implementation == "eager"


def test_names_there_and_ours() -> None:
    assert to_hf_name("model.layers.3.mlp.up_proj.weight") == "language_model.model.layers.3.mlp.up_proj.weight"
    tower = "model.vision_tower.vision_tower.encoder.layers.0.mlp.fc1.bias"
    assert to_hf_name(tower) == "vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias"
    with pytest.raises(ValueError, match=r"no place for the weight model\.mm_projector_crosslayer"):
        to_hf_name("model.mm_projector_crosslayer.0.weight")


# Errors


def change_weights(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def test_weights_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path, "llava")

    def change(weights: dict[str, torch.Tensor]) -> None:
        weights["image_newline"] = torch.zeros(48)
        weights["multi_modal_projector.linear_1.bias"] = torch.zeros(7)
        del weights["language_model.model.norm.weight"]

    change_weights(folder, change)
    with pytest.raises(ValueError) as error:
        load_pretrained_model(folder, device="cpu")
    for part in ("missing (1): model.norm.weight", "unexpected (1): ", "image_newline", "mm_projector.0.bias (7,)"):
        assert part in str(error.value)
    assert str(folder) in str(error.value)


def test_missing_tower_weights(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "hf", "llava")
    name = "vision_tower.encoder.layers.1.mlp.fc1.weight"
    change_weights(folder, lambda weights: weights.pop(name))
    with pytest.raises(ValueError, match=r"missing \(1\): model\.vision_tower.*layers\.1\.mlp\.fc1\.weight"):
        load_pretrained_model(folder, device="cpu")


def test_tower_from_another_folder(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "hf", "llava")
    tower = hf_model("llava").model.vision_tower
    tower.save_pretrained(tmp_path / "clip")

    def drop_tower(weights: dict[str, torch.Tensor]) -> None:
        for name in [name for name in weights if name.startswith("vision_tower")]:
            del weights[name]

    change_weights(folder, drop_tower)
    model = load_pretrained_model(folder, device="cpu", vision_tower=tmp_path / "clip")[1]
    opened = model.get_vision_tower().vision_tower.state_dict()
    assert all(torch.equal(opened[name], value) for name, value in tower.state_dict().items())


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("llava", {"vision_feature_layer": [-2, 1]}, r"vision_feature_layer=\[-2, 1\].*one layer"),
        ("llava", {"projector_hidden_act": "relu"}, "projector_hidden_act='relu'"),
        ("llava", {"multimodal_projector_bias": False}, "multimodal_projector_bias=False"),
        ("llava_next", FULL, "vision_feature_select_strategy='full' on a clip_vision_model does not work"),
        ("llava", {"vision_config": vision_config("siglip").to_dict()}, "'default' on a siglip_vision_model"),
        ("llava", {"vision_config": {"model_type": "pixtral"}}, "vision_config.model_type='pixtral'"),
        ("llava", {"text_config": {"model_type": "gemma"}}, "no LLaVA on a language model of model_type 'gemma'"),
    ],
)
def test_what_llava_does_not_have(kind: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = hf_folder(tmp_path, kind) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        load_pretrained_model(tmp_path, device="cpu")


def test_other_models_of_text_and_vision(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path, "llava")
    PaliGemmaConfig().save_pretrained(folder)
    assert AutoConfig.from_pretrained(folder).model_type == "paligemma"
    with pytest.raises(
        ValueError, match="model_type 'paligemma'; of the llava-hf layouts llava, llava_next, video_llava open"
    ):
        load_pretrained_model(folder, device="cpu")


# The order of tokens, against transformers'

sides = st.integers(1, 2500)


@settings(max_examples=400, deadline=None)
@given(columns=st.integers(1, 96), rows=st.integers(1, 96), width=sides, height=sides)
def test_unpadding_is_that_of_transformers(columns: int, rows: int, width: int, height: int) -> None:
    grid = torch.arange(rows * columns).view(1, rows, columns)
    top, bottom, left, right = unpadded_box(columns, rows, (width, height))
    assert torch.equal(grid[:, top:bottom, left:right], unpad_image(grid, (height, width)))


pinpoint_lists = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=6)


@settings(max_examples=200, deadline=None)
@example(pinpoints=[(1, 1)], side=2, width=1, height=3)  # thinner than a patch
@given(pinpoints=pinpoint_lists, side=st.sampled_from([2, 4, 7]), width=sides, height=sides)
def test_layout_is_that_of_transformers(pinpoints: list, side: int, width: int, height: int) -> None:
    tile = side * PATCH
    theirs = [[h * tile, w * tile] for w, h in pinpoints]
    config = SimpleNamespace(
        vision_config=SimpleNamespace(image_size=tile, patch_size=PATCH), image_grid_pinpoints=theirs
    )
    ours = LayoutSpec("spatial_unpad", (side, side), tile, [[w, h] for h, w in theirs])
    for count in sorted({1, *(1 + w * h for h, w in pinpoints)}):
        features = torch.arange(count * side * side, dtype=torch.float64).view(count, side * side, 1)
        try:
            packed, _ = LlavaNextModel.pack_image_features(
                SimpleNamespace(config=config), [features], [[height, width]], "default", torch.tensor([-1.0])
            )
        except RuntimeError:  # not the number of tiles that this picture is cut into
            with pytest.raises(ValueError, match="tiles under this model"):
                layout(count, side, (width, height), ours)
            continue
        assert layout(count, side, (width, height), ours).tolist() == packed[0][:, 0].long().tolist()


def layout(count: int, side: int, size: tuple[int, int], spec: LayoutSpec) -> torch.Tensor:
    source = torch.arange(side * side).expand(count, -1)
    return image_layout(source, torch.ones_like(source, dtype=torch.bool), size, spec)
