"""Images and text on their way into a model: padding, tiling (anyres), processors, `<image>` in token ids.

Sizes are (width, height) in pixels, as in PIL, unless a name says otherwise.

Shape letters: N images, T tiles of one image (the whole image first), H and W the processor's height, width.
"""

from __future__ import annotations

import ast
import base64
import binascii
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from transformers import StoppingCriteria

from llava.constants import DEFAULT_IMAGE_TOKEN, DEFAULT_VIDEO_TOKEN, IMAGE_TOKEN_INDEX, VIDEO_TOKEN_INDEX
from llava.pictures import UnfitImageError, to_rgb
from llava.video import Clip, Sampling, read_clip

Size = tuple[int, int]

ASPECT_RATIOS = ("square", "pad", "anyres")
"""Allowed values of `image_aspect_ratio`; None means square."""


def load_image_from_base64(image: str | bytes) -> Image.Image:
    """The image that a table holds as base64 text, as MMBench's do.

    Raises:
        ValueError: the text is no base64, or no image.
    """
    try:
        return Image.open(io.BytesIO(base64.b64decode(image)))
    except (binascii.Error, UnidentifiedImageError) as error:
        raise ValueError(f"{image[:40]!r}... is no image in base64 ({error}); write the table again") from error


def expand2square(pil_img: Image.Image, background_color: int | tuple[int, ...]) -> Image.Image:
    """Centre an image on a square of its longer side, filled with `background_color`."""
    width, height = pil_img.size
    if width == height:
        return pil_img
    side = max(width, height)
    square = Image.new(pil_img.mode, (side, side), background_color)
    square.paste(pil_img, ((side - width) // 2, (side - height) // 2))
    return square


def select_best_resolution(original_size: Size, possible_resolutions: Iterable[Sequence[int]]) -> Size:
    """The resolution that keeps most of an image's pixels and, among those, wastes fewest on padding.

    Raises:
        ValueError: `possible_resolutions` is empty.
    """
    width, height = original_size

    def merit(resolution: Size) -> tuple[int, int]:
        scale = min(resolution[0] / width, resolution[1] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - resolution[0] * resolution[1]

    resolutions = [(int(w), int(h)) for w, h in possible_resolutions]
    if not resolutions:
        raise ValueError("no resolutions to choose from; set image_grid_pinpoints to a list of (width, height)")
    return max(resolutions, key=merit)


def resize_and_pad_image(image: Image.Image, target_resolution: Size) -> Image.Image:
    """Scale an image to fit `target_resolution`, keeping its proportions, and centre it on black."""
    width, height = image.size
    target_width, target_height = target_resolution
    scale_width, scale_height = target_width / width, target_height / height
    if scale_width < scale_height:
        size = (target_width, min(math.ceil(height * scale_width), target_height))
    else:
        size = (min(math.ceil(width * scale_height), target_width), target_height)
    canvas = Image.new("RGB", (target_width, target_height), (0, 0, 0))
    canvas.paste(image.resize(size), ((target_width - size[0]) // 2, (target_height - size[1]) // 2))
    return canvas


def divide_to_patches(image: Image.Image, patch_size: int) -> list[Image.Image]:
    """Cut an image into squares of side `patch_size` pixels, row by row."""
    width, height = image.size
    return [
        image.crop((left, top, left + patch_size, top + patch_size))
        for top in range(0, height, patch_size)
        for left in range(0, width, patch_size)
    ]


def parse_grid_pinpoints(grid_pinpoints: str | Sequence[Sequence[int]]) -> list[Size]:
    """`image_grid_pinpoints` as (width, height) pairs, from a list or its text (LLaVA's configs have both).

    Raises:
        ValueError: not a non-empty list of pairs of positive integers.
    """
    parsed: Any = grid_pinpoints
    if isinstance(grid_pinpoints, str):
        try:
            parsed = json.loads(grid_pinpoints)
        except json.JSONDecodeError:
            try:
                parsed = ast.literal_eval(grid_pinpoints.strip())
            except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
                parsed = None
    try:
        pairs = [(int(width), int(height)) for width, height in parsed]
    except (TypeError, ValueError, OverflowError):
        pairs = []
    if not pairs or min(min(pair) for pair in pairs) < 1:
        raise ValueError(
            f"image_grid_pinpoints {str(grid_pinpoints)[:200]}: expected pairs (width, height) in pixels, such as "
            "[[336, 672], [672, 336], [672, 672]]"
        )
    return pairs


def get_anyres_image_grid_shape(
    image_size: Size, grid_pinpoints: str | Sequence[Sequence[int]], patch_size: int
) -> Size:
    """How many tiles of side `patch_size` pixels an image of `image_size` is cut into: (across, down)."""
    width, height = select_best_resolution(image_size, parse_grid_pinpoints(grid_pinpoints))
    return width // patch_size, height // patch_size


def _lookup(sizes: Any, *keys: str) -> int | None:
    """First of `keys` that a processor's size (a dict or an object, by transformers' version) holds."""
    for key in keys:
        value = sizes.get(key) if isinstance(sizes, dict) else getattr(sizes, key, None)
        if value is not None:
            return int(value)
    return None


def get_image_side(processor: Any) -> int:
    """Height in pixels of the images that a processor makes: CLIP's crop, or SigLIP's size.

    Raises:
        ValueError: the processor has neither.
    """
    side = _lookup(getattr(processor, "crop_size", None), "height")
    if side is None:
        side = _lookup(getattr(processor, "size", None), "height", "shortest_edge")
    if side is None:
        raise ValueError(
            f"{type(processor).__name__} has neither crop_size nor size, so the side of a tile is unknown; "
            "check preprocessor_config.json of the vision tower"
        )
    return side


def _pixels(images: Image.Image | list[Image.Image], processor: Any) -> torch.Tensor:
    """Pixel values [N, 3, H, W]; a single image is N = 1."""
    pixels: torch.Tensor = processor.preprocess(images, return_tensors="pt")["pixel_values"]
    return pixels


def process_anyres_image(
    image: Image.Image, processor: Any, grid_pinpoints: str | Sequence[Sequence[int]]
) -> torch.Tensor:
    """LLaVA-NeXT's tiles of one image.

    Args:
        image: RGB.
        processor: image processor of the vision tower.
        grid_pinpoints: resolutions that the image may be tiled at, (width, height) in pixels.

    Returns:
        [T, 3, H, W]: the whole image squeezed into one tile, then the best resolution's tiles row by row.

    Raises:
        ValueError: `grid_pinpoints` are malformed, or no multiples of the tile's side.
    """
    side = get_image_side(processor)
    resolution = select_best_resolution(image.size, parse_grid_pinpoints(grid_pinpoints))
    if resolution[0] % side or resolution[1] % side:
        raise ValueError(
            f"image_grid_pinpoints has {resolution}, no multiple of the vision tower's {side} pixels; "
            f"use multiples of {side}"
        )
    # As LLaVA, which squeezes the overview to the shortest edge: the side before the processor's centre crop.
    overview_side = _lookup(processor.size, "shortest_edge", "height") or side
    overview = image.resize((overview_side, overview_side))
    tiles = divide_to_patches(resize_and_pad_image(image, resolution), side)
    return torch.cat([_pixels(tile, processor) for tile in [overview, *tiles]])


def _process_image(image: Image.Image, processor: Any, aspect_ratio: str | None, model_cfg: Any) -> torch.Tensor:
    if aspect_ratio == "pad":
        mean = tuple(int(value * 255) for value in processor.image_mean)
        return _pixels(expand2square(image, mean), processor)[0]
    if aspect_ratio == "anyres":
        pinpoints = getattr(model_cfg, "image_grid_pinpoints", None)
        if pinpoints is None:
            raise ValueError("image_aspect_ratio 'anyres' needs image_grid_pinpoints in the model's config")
        return process_anyres_image(image, processor, pinpoints)
    if aspect_ratio in (None, "square"):
        return _pixels(image, processor)[0]
    raise ValueError(f"unknown image_aspect_ratio {aspect_ratio!r}; known: {', '.join(ASPECT_RATIOS)}")


def _rgb_pictures(images: Any) -> list[Image.Image]:
    """Pictures as RGB.

    Raises:
        ValueError: no list of pictures, or one that `to_rgb` refuses.
    """
    if not isinstance(images, list | tuple):
        raise ValueError(f"images are {type(images).__name__}: expected a list of PIL pictures, [picture] for one")
    pictures = []
    for i, image in enumerate(images):
        if not isinstance(image, Image.Image):
            raise ValueError(f"image {i} is {type(image).__name__}: expected a PIL picture, Image.open(path)")
        if min(image.size) < 1:
            raise ValueError(f"image {i} has {image.size[0]} x {image.size[1]} pixels: there is nothing to see")
        try:
            pictures.append(image if image.mode == "RGB" else to_rgb(image))
        except UnfitImageError as error:
            raise ValueError(f"image {i} {error}") from error
    return pictures


def process_images(
    images: Sequence[Image.Image], image_processor: Any, model_cfg: Any
) -> torch.Tensor | list[torch.Tensor]:
    """Pixel values of images, prepared as `model_cfg.image_aspect_ratio` says.

    Args:
        images: PIL pictures; those that are not RGB are converted, see `to_rgb`.
        image_processor: image processor of the vision tower (CLIP, SigLIP).
        model_cfg: has `image_aspect_ratio` (None and "square": the processor alone, "pad": on a square of the
            mean colour, "anyres": tiles) and, for anyres, `image_grid_pinpoints`.

    Returns:
        One tensor [3, H, W] an image, or [T, 3, H, W] with anyres: stacked, with N in front, where all
        shapes agree, otherwise as a list.

    Raises:
        ValueError: no list of pictures, unknown `image_aspect_ratio`, malformed `image_grid_pinpoints`, or settings of
            the processor that give NaN or infinity.
    """
    if not callable(getattr(image_processor, "preprocess", None)):
        raise ValueError(
            f"image_processor is {type(image_processor).__name__}: expected the one that load_pretrained_model returns"
        )
    aspect_ratio = getattr(model_cfg, "image_aspect_ratio", None)
    pictures = _rgb_pictures(images)
    pixels = [_process_image(picture, image_processor, aspect_ratio, model_cfg) for picture in pictures]
    if not all(bool(one.isfinite().all()) for one in pixels):
        raise ValueError(
            "the image processor makes NaN or infinity: check image_mean, image_std and rescale_factor in its "
            "preprocessor_config.json"
        )
    if pixels and all(one.shape == pixels[0].shape for one in pixels):
        return torch.stack(pixels)
    return pixels


def process_video(
    video: Clip,
    image_processor: Any,
    model_cfg: Any,
    num_frames: int = 8,
    *,
    fps: float | None = None,
    max_frames: int | None = None,
    name: str | None = None,
    open_picture: Callable[[str], Image.Image] | None = None,
) -> torch.Tensor:
    """Pixel values of a clip's frames, each prepared as one picture, one after the other.

    Args:
        video: the path of a video file or of a folder of frames, a list of pictures or their paths, or an array; see
            `llava.video.clips`.
        image_processor: image processor of the vision tower (CLIP, SigLIP).
        model_cfg: has `image_aspect_ratio`. "pad" puts every frame on a square of the mean colour; all others leave it
            to the processor alone. So does "anyres": a frame is never tiled, as in LLaVA-NeXT, which hands frames to
            the processor whatever the ratio says. With a video tower (`mm_video_tower`) "pad" is for pictures only:
            Video-LLaVA crops frames.
        num_frames: so many, evenly; a shorter clip's frames come more than once.
        fps: in place of `num_frames`, frames a second.
        max_frames: F at most.
        name: what messages call the clip; default: its path.
        open_picture: see `llava.video.read_clip`.

    Returns:
        Float [F, 3, H, W].

    Raises:
        ValueError: the clip cannot be read (a `VideoError`), an option is out of range, or `process_images` refuses.
        ImportError: it is a video file, and PyAV is not installed.
    """
    aspect_ratio = getattr(model_cfg, "image_aspect_ratio", None)
    is_cropped = aspect_ratio == "anyres" or getattr(model_cfg, "mm_video_tower", None)
    frame_cfg = SimpleNamespace(image_aspect_ratio="square" if is_cropped else aspect_ratio)
    sampling = Sampling(num_frames, fps, max_frames)
    pixels: list[torch.Tensor] = []
    before = -1
    for frame in read_clip(video, sampling, name=name, open_picture=open_picture):
        again = frame.number == before
        pixels.append(pixels[-1] if again else process_images([frame.picture], image_processor, frame_cfg)[0])
        before = frame.number
    return torch.stack(pixels)


def leading_ids(tokenizer: Any) -> list[int]:
    """The begin-of-sequence id that a tokenizer puts in front of a text: one id, or none."""
    ids = tokenizer("").input_ids
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []


def tokenizer_image_token(
    prompt: str,
    tokenizer: Any,
    image_token_index: int = IMAGE_TOKEN_INDEX,
    return_tensors: str | None = None,
) -> list[int] | torch.Tensor:
    """Token ids of a prompt, with `image_token_index` in the place of every `<image>`, and -201 in that of `<video>`.

    Args:
        prompt: text; the pieces between images and clips are tokenized on their own.
        tokenizer: of the language model; its begin-of-sequence token comes once, in front.
        image_token_index: the id that marks an image.
        return_tensors: None for a list, "pt" for a LongTensor [S].

    Raises:
        ValueError: `return_tensors` is neither, or the prompt is no text.
    """
    if not callable(tokenizer) or type(image_token_index) is not int:
        raise ValueError(
            f"tokenizer={type(tokenizer).__name__}, image_token_index={image_token_index!r}: expected the tokenizer "
            "that load_pretrained_model returns, and a whole number"
        )
    if not isinstance(prompt, str):
        raise ValueError(f"prompt={prompt!r}: expected one prompt as a text; call this for each prompt of a list")
    if return_tensors not in (None, "pt"):
        raise ValueError(f"return_tensors={return_tensors!r} is not supported; use None or 'pt'")
    ids: list[int] = []
    markers = {DEFAULT_IMAGE_TOKEN: image_token_index, DEFAULT_VIDEO_TOKEN: VIDEO_TOKEN_INDEX}
    for chunk in re.split(f"({'|'.join(markers)})", prompt):
        if chunk in markers:
            ids.append(markers[chunk])
        elif chunk:
            ids.extend(tokenizer(chunk, add_special_tokens=False).input_ids)
    start = leading_ids(tokenizer)
    if ids[: len(start)] != start:
        ids = start + ids
    return torch.tensor(ids, dtype=torch.long) if return_tensors == "pt" else ids


def get_model_name_from_path(model_path: str) -> str:
    """A display name for a checkpoint: its folder, with the run's name in front for `checkpoint-N`."""
    parts = model_path.strip("/").split("/")
    return "_".join(parts[-2:]) if parts[-1].startswith("checkpoint-") else parts[-1]


class KeywordsStoppingCriteria(StoppingCriteria):
    """Ends a row where its answer has come to one of several texts: `generate(stopping_criteria=[this])`.

    Args:
        keywords: texts such as "</s>" or "###", special tokens included.
        tokenizer: of the language model.
        input_ids: [B, S], the prompt; not looked at, whether or not `generate` hands it on.
    """

    def __init__(self, keywords: Sequence[str], tokenizer: Any, input_ids: torch.Tensor) -> None:
        self.keywords, self.tokenizer = list(keywords), tokenizer
        self._prompt = input_ids[0]
        self._longest = max((len(keyword.encode()) for keyword in keywords), default=0)  # a token is a byte or more

    def __call__(self, output_ids: torch.Tensor, scores: Any = None, **kwargs: Any) -> torch.Tensor:
        """Which rows are done, bool [B]; `output_ids` [B, new] or [B, S + new]."""
        start = len(self._prompt)
        begins = output_ids.shape[1] >= start and torch.equal(output_ids[0, :start].cpu(), self._prompt.cpu())
        new = output_ids[:, start:] if begins else output_ids
        tails = self.tokenizer.batch_decode(new[:, max(0, new.shape[1] - self._longest) :])
        done = [any(keyword in tail for keyword in self.keywords) for tail in tails]
        return torch.tensor(done, device=output_ids.device)
