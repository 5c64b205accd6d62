"""Image preparation and `<image>` in token ids."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPImageProcessor, SiglipImageProcessor

from llava.mm_utils import (
    divide_to_patches,
    expand2square,
    get_anyres_image_grid_shape,
    get_image_side,
    get_model_name_from_path,
    parse_grid_pinpoints,
    process_anyres_image,
    process_images,
    resize_and_pad_image,
    select_best_resolution,
    tokenizer_image_token,
)
from llava.pictures import load_image

PINPOINTS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]


def clip() -> Any:
    return CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})


def siglip() -> Any:
    return SiglipImageProcessor(size={"height": 56, "width": 56})


def config(aspect_ratio: str | None, pinpoints: Any = None) -> SimpleNamespace:
    return SimpleNamespace(image_aspect_ratio=aspect_ratio, image_grid_pinpoints=pinpoints)


@pytest.fixture
def golden_images(golden: Path) -> list[Image.Image]:
    return [load_image(golden / "images" / f"{index}.png") for index in range(3)]


def test_pad_equals_the_release(golden: Path, golden_images: list[Image.Image]) -> None:
    processor = CLIPImageProcessor.from_pretrained(golden / "clip")
    expected = load_file(golden / "cases" / "pixels_pad.safetensors")["pixel_values"].float()
    # The expected pixels went through float16, which is off by at most 1e-3 at their size (below 2.7).
    torch.testing.assert_close(process_images(golden_images, processor, config("pad")), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("written", [list, str, json.dumps])
def test_anyres_equals_the_release(golden: Path, golden_images: list[Image.Image], index: int, written: Any) -> None:
    processor = CLIPImageProcessor.from_pretrained(golden / "clip")
    checkpoint = golden / "checkpoints" / "llava-v1.6-vicuna-7b" / "config.json"
    pinpoints = written(json.loads(checkpoint.read_text())["image_grid_pinpoints"])
    expected = load_file(golden / "cases" / f"pixels_anyres_{index}.safetensors")["pixel_values"].float()
    pixels = process_images(golden_images[index : index + 1], processor, config("anyres", pinpoints))
    torch.testing.assert_close(pixels[0], expected.reshape(pixels[0].shape), atol=1e-3, rtol=0)
    across, down = get_anyres_image_grid_shape(golden_images[index].size, pinpoints, get_image_side(processor))
    assert pixels[0].shape[0] == 1 + across * down


@pytest.mark.parametrize("processor", [clip(), siglip()], ids=["clip", "siglip"])
@pytest.mark.parametrize("aspect_ratio", [None, "square", "pad", "anyres"])
def test_processors_and_aspect_ratios(processor: Any, aspect_ratio: str | None) -> None:
    images = [Image.new("RGB", size, (200, 10, 30)) for size in [(64, 64), (90, 40), (30, 80)]]
    pixels = process_images(images, processor, config(aspect_ratio, PINPOINTS))
    assert get_image_side(processor) == 56
    if aspect_ratio == "anyres":
        assert isinstance(pixels, list)
        assert [tuple(one.shape) for one in pixels] == [(5, 3, 56, 56), (3, 3, 56, 56), (3, 3, 56, 56)]
        alike = process_images(images[1:], processor, config(aspect_ratio, PINPOINTS))
        assert isinstance(alike, torch.Tensor)
        assert alike.shape == (2, 3, 3, 56, 56)
    else:
        assert isinstance(pixels, torch.Tensor)
        assert pixels.shape == (3, 3, 56, 56)


def test_no_images_is_an_empty_list() -> None:
    assert process_images([], clip(), config("pad")) == []


def test_unknown_options_name_the_known() -> None:
    image = Image.new("RGB", (8, 8))
    with pytest.raises(ValueError, match=r"unknown image_aspect_ratio 'padded'; known: square, pad, anyres"):
        process_images([image], clip(), config("padded"))
    with pytest.raises(ValueError, match="needs image_grid_pinpoints"):
        process_images([image], clip(), config("anyres"))
    with pytest.raises(ValueError, match=r"\(100, 56\), no multiple of the vision tower's 56"):
        process_images([image], clip(), config("anyres", [[100, 56]]))
    with pytest.raises(ValueError, match="neither crop_size nor size"):
        process_anyres_image(image, SimpleNamespace(), PINPOINTS)


@pytest.mark.parametrize(
    "pinpoints",
    ["", "[]", "[[1]]", "[[0, 3]]", "__import__('os').getcwd()", "(1x1),...,(6x6)", [], [[1, 2, 3]], 7, "7"],
)
def test_malformed_pinpoints(pinpoints: Any) -> None:
    with pytest.raises(ValueError, match="expected pairs"):
        parse_grid_pinpoints(pinpoints)


def test_pinpoints_from_text() -> None:
    expected = [(336, 672), (672, 336)]
    for written in ([[336, 672], [672, 336]], "[[336, 672], [672, 336]]", " [(336, 672), (672, 336)]"):
        assert parse_grid_pinpoints(written) == expected


def test_best_resolution_keeps_pixels_then_wastes_least() -> None:
    assert select_best_resolution((1000, 500), [(336, 672), (672, 336), (672, 672)]) == (672, 336)
    assert select_best_resolution((50, 50), [(336, 336), (100, 100), (672, 672)]) == (100, 100)
    with pytest.raises(ValueError, match="no resolutions"):
        select_best_resolution((1, 1), [])


def test_squares_tiles_and_padding() -> None:
    wide = Image.new("RGB", (4, 2), (255, 0, 0))
    square = expand2square(wide, (0, 0, 255))
    assert square.size == (4, 4)
    assert [square.getpixel((0, row)) for row in range(4)] == [
        (0, 0, 255),
        (255, 0, 0),
        (255, 0, 0),
        (0, 0, 255),
    ]
    assert expand2square(wide.transpose(Image.Transpose.ROTATE_90), (0, 0, 255)).size == (4, 4)
    assert expand2square(square, (0, 0, 0)) is square
    fitted = resize_and_pad_image(wide, (6, 6))
    assert fitted.size == (6, 6)
    assert fitted.getpixel((0, 0)) == (0, 0, 0)
    assert fitted.getpixel((3, 3)) == (255, 0, 0)
    numbered = Image.new("L", (4, 2))
    numbered.putdata([0, 0, 1, 1, 0, 0, 1, 1])
    assert [tile.getpixel((0, 0)) for tile in divide_to_patches(numbered, 2)] == [0, 1]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (None, "images are NoneType: expected a list of PIL pictures"),
        (Image.new("RGB", (4, 4)), r"images are Image: expected a list of PIL pictures, \[picture\] for one"),
        (["a.png"], r"image 0 is str: expected a PIL picture, Image.open\(path\)"),
        ([Image.new("RGB", (4, 4)), torch.zeros(3, 4, 4)], "image 1 is Tensor: expected a PIL picture"),
        ([Image.new("I", (4, 4), 1 << 16)], "image 0 holds integers from 65536 to 65536, expected those of 16 bits"),
        ([Image.new("F", (4, 4), 255)], r"image 0 holds floats from 255 to 255, expected 0 \(black\) to 1 \(white\)"),
        ([Image.new("RGB", (0, 4))], "image 0 has 0 x 4 pixels"),
    ],
)
@pytest.mark.parametrize("aspect_ratio", ["square", "pad"])
def test_what_is_no_list_of_pictures(aspect_ratio: str, images: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        process_images(images, clip(), config(aspect_ratio))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "1", "RGBA", "CMYK"])
def test_pictures_of_other_modes_become_rgb(mode: str) -> None:
    image = Image.new("RGB", (40, 30), "white").convert(mode)
    expected = process_images([image.convert("RGB")], clip(), config("pad"))
    assert torch.equal(process_images([image], clip(), config("pad")), expected)


def test_pictures_of_more_than_8_bits_keep_their_shades() -> None:
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    expected = process_images([Image.fromarray(grey).convert("RGB")], clip(), config("pad"))
    wide = (grey.astype(np.uint16) * 257, grey.astype(np.int32), grey.astype(np.int32) * 257)
    for values in (*wide, grey.astype(np.float32) / 255):
        assert torch.equal(process_images([Image.fromarray(values)], clip(), config("pad")), expected)


def test_a_processor_that_makes_no_numbers() -> None:
    broken = CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, image_std=[0, 0, 0])
    with pytest.raises(ValueError, match="the image processor makes NaN or infinity: check image_mean, image_std"):
        process_images([Image.new("RGB", (40, 30))], broken, config("square"))
    with pytest.raises(ValueError, match="image_processor is NoneType: expected the one that load_pretrained_model"):
        process_images([Image.new("RGB", (40, 30))], None, config("square"))


class Letters:
    """A tokenizer of characters that puts a 1 in front."""

    bos_token_id = 1

    def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
        return SimpleNamespace(input_ids=[1] * add_special_tokens + [ord(letter) for letter in text])


def test_tokenizer_image_token() -> None:
    tokenizer = Letters()
    assert tokenizer_image_token("a<image>b<image><image>", tokenizer) == [1, 97, -200, 98, -200, -200]
    assert tokenizer_image_token("<image>", tokenizer, image_token_index=-7) == [1, -7]
    assert tokenizer_image_token("", tokenizer) == [1]
    tensor = tokenizer_image_token("a", tokenizer, return_tensors="pt")
    assert isinstance(tensor, torch.Tensor)
    assert tensor.tolist() == [1, 97]
    with pytest.raises(ValueError, match="expected one prompt as a text"):
        tokenizer_image_token(["a"], tokenizer)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tokenizer=NoneType, image_token_index=-200: expected the tokenizer"):
        tokenizer_image_token("a", None)
    with pytest.raises(ValueError, match="return_tensors='np'"):
        tokenizer_image_token("a", tokenizer, return_tensors="np")


def test_model_name() -> None:
    assert get_model_name_from_path("liuhaotian/llava-v1.5-7b/") == "llava-v1.5-7b"
    assert get_model_name_from_path("runs/mine/checkpoint-100") == "mine_checkpoint-100"
