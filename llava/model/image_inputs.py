"""The images and clips of a batch, in the forms in which callers hand them over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from llava.data.stored_features import StoredFeatures
from llava.model.prompt_inputs import Markers, describe, is_dense


@dataclass(frozen=True, eq=False)
class Clip:
    """The frames of one clip, [F, 3, H, W], among the pictures of a batch."""

    frames: Tensor


Images = Tensor | Sequence[Tensor] | StoredFeatures | None
Videos = Tensor | Sequence[Tensor] | None
Picture = Tensor | Clip
Pictures = list[Picture] | StoredFeatures
ImageSizes = Sequence[tuple[int, int]] | Tensor | None


def match_pictures(
    markers: Markers, images: Images, image_sizes: ImageSizes, videos: Videos, *, trusted: bool = False
) -> tuple[Pictures, list[tuple[int, int]] | None]:
    """What the markers stand for, in their order, with the pictures' sizes; a clip's is that of its frames.

    Args:
        markers: of the batch.
        images, image_sizes, videos: as for `LlavaMetaForCausalLM.forward`.
        trusted: see `match_images`.

    Raises:
        ValueError: counts do not match.
    """
    pictures, sizes = match_images(markers.images, images, image_sizes, trusted=trusted)
    clips = clip_list(videos)
    if len(clips) != sum(markers.clips):
        per_sample = ", ".join(f"sample {i}: {count}" for i, count in enumerate(markers.clips))
        raise ValueError(
            f"the batch has {sum(markers.clips)} clip markers ({per_sample}) but {len(clips)} videos were given; each "
            "<video> in a prompt needs one clip"
        )
    if not clips:
        return pictures, sizes
    if isinstance(pictures, StoredFeatures):
        raise ValueError("stored features are of images alone, and the batch has clips: run it without a feature cache")
    image, clip = iter(pictures), iter(clips)
    placed = [next(clip) if is_clip else next(image) for is_clip in markers.is_clip]
    if sizes is None:
        return placed, None
    size = iter(sizes)
    return placed, [
        (one.frames.shape[3], one.frames.shape[2]) if isinstance(one, Clip) else next(size) for one in placed
    ]


def clip_list(videos: Videos) -> list[Clip]:
    """A batch's clips one by one.

    Raises:
        ValueError: another type or shape.
    """
    if videos is None:
        return []
    if isinstance(videos, Tensor) and videos.ndim != 5:
        raise ValueError(
            f"videos of shape {tuple(videos.shape)}: expected [N, F, 3, H, W], or a list of clips [F, 3, H, W]; "
            "[clip] for one"
        )
    if not isinstance(videos, Tensor | list | tuple):
        raise ValueError(f"videos are {describe(videos)}: expected a list of what llava.mm_utils.process_video returns")
    for i, clip in enumerate(videos):
        if not is_dense(clip) or not clip.is_floating_point() or clip.ndim != 4 or clip.shape[1] != 3 or not len(clip):
            raise ValueError(
                f"video {i} is {describe(clip)}: expected float pixels [F, 3, H, W], as "
                "llava.mm_utils.process_video returns"
            )
    return [Clip(clip) for clip in videos]


def match_images(
    markers: list[int], images: Images, image_sizes: ImageSizes, *, trusted: bool = False
) -> tuple[Pictures, list[tuple[int, int]] | None]:
    """The images that markers stand for, with their sizes. Stored features come for markers only, never for blanks.

    Args:
        markers: for each sample, how many image markers its ids hold.
        images: as for `LlavaMetaForCausalLM.forward`.
        image_sizes: one pair (width, height) for each of `images`, or None.
        trusted: in training, whose samples are made here, images without a marker are blank: their values are not read,
            which would wait for the device.

    Raises:
        ValueError: counts do not match, or an image that is not blank has no marker.
    """
    pictures: Any = images if isinstance(images, StoredFeatures) else image_list(images)
    real = [count > 0 for count in markers for _ in range(max(count, 1))]  # blank images of text-only samples: False
    if len(pictures) == sum(markers):
        real = [True] * len(pictures)
    elif isinstance(pictures, StoredFeatures) or len(pictures) != len(real):
        per_sample = ", ".join(f"sample {i}: {count}" for i, count in enumerate(markers))
        raise ValueError(
            f"the batch has {sum(markers)} image markers ({per_sample}) but {len(pictures)} images were given; "
            "each <image> in a prompt needs one image"
        )
    sizes = size_pairs(image_sizes, len(pictures))
    if isinstance(pictures, StoredFeatures):
        return pictures, sizes
    left_out = compress(pictures, [not is_real for is_real in real])
    if not trusted and any(bool(picture.any()) for picture in left_out):
        raise ValueError(
            f"{len(pictures)} images were given, but the ids hold {sum(markers)} image markers: an image without a "
            "marker would not be seen. Put <image> into the prompt and make ids with tokenizer_image_token"
        )
    return list(compress(pictures, real)), None if sizes is None else list(compress(sizes, real))


def image_list(images: Images) -> list[Tensor]:
    """A batch's images one by one, each [3, H, W] or [tiles, 3, H, W].

    Raises:
        ValueError: another type or shape.
    """
    if images is None:
        return []
    if isinstance(images, StoredFeatures):
        raise ValueError("images are stored features: this call needs their pixels")
    if isinstance(images, Tensor) and images.ndim not in (4, 5):
        raise ValueError(
            f"images of shape {tuple(images.shape)}: expected [N, 3, H, W] or [N, tiles, 3, H, W], or a list of images"
        )
    if not isinstance(images, Tensor | list | tuple):
        raise ValueError(f"images are {describe(images)}: expected what llava.mm_utils.process_images returns")
    pictures = list(images)
    for i, picture in enumerate(pictures):
        if not is_dense(picture) or not picture.is_floating_point():
            raise ValueError(
                f"image {i} is {describe(picture)}: expected float pixels, as llava.mm_utils.process_images returns"
            )
        if picture.ndim not in (3, 4) or picture.shape[-3] != 3 or not picture.numel():
            raise ValueError(f"image {i} has shape {tuple(picture.shape)}: expected [3, H, W] or [tiles, 3, H, W]")
    return pictures


def tile_counts(pictures: Pictures | Sequence[Picture]) -> list[int]:
    """How many pictures each image or clip is for the vision tower: 1, its tiles, or its frames."""
    if isinstance(pictures, StoredFeatures):
        return pictures.tiles
    return [pixels.shape[0] if pixels.ndim == 4 else 1 for pixels in map(pixels_of, pictures)]


def pixels_of(picture: Picture) -> Tensor:
    """[3, H, W], or [T, 3, H, W] of tiles or frames."""
    return picture.frames if isinstance(picture, Clip) else picture


def frame_counts(pictures: Sequence[Picture]) -> list[int] | None:
    """What `VisionFeatures.frames` is of these pictures; None where there is no clip."""
    if not any(isinstance(picture, Clip) for picture in pictures):
        return None
    each = zip(pictures, tile_counts(pictures), strict=True)
    return [entry for picture, count in each for entry in ([count] if isinstance(picture, Clip) else [0] * count)]


def check_side(pictures: Sequence[Picture], side: int) -> None:
    """Raise ValueError for an image that is not of the vision tower's height and width."""
    for i, picture in enumerate(map(pixels_of, pictures)):
        if tuple(picture.shape[-2:]) != (side, side):
            raise ValueError(
                f"{_name(pictures, i)} has shape {tuple(picture.shape)}: the vision tower reads {side} x {side} "
                "pixels; prepare images with the checkpoint's image processor, and check crop_size in its "
                "preprocessor_config.json"
            )


def check_finite(pictures: Sequence[Picture]) -> None:
    """Raise ValueError for NaN or infinity in an image or clip; waits for the device that they are on."""
    pixels = [pixels_of(picture) for picture in pictures]
    finite = torch.stack([each.isfinite().all().to(pixels[0].device) for each in pixels]).tolist()
    bad = [_name(pictures, i) for i, is_finite in enumerate(finite) if not is_finite]
    if bad:
        raise ValueError(f"{', '.join(bad)}: NaN or infinity among the pixels; check how they were prepared")


def _name(pictures: Sequence[Picture], place: int) -> str:
    """What a caller calls the picture at a place: images and videos are counted apart."""
    kind = type(pictures[place])
    number = sum(isinstance(picture, Clip) == (kind is Clip) for picture in pictures[:place])
    return f"{'video' if kind is Clip else 'image'} {number}"


def size_pairs(sizes: ImageSizes, count: int) -> list[tuple[int, int]] | None:
    """(width, height) in pixels of each of `count` images; None where none were given.

    Raises:
        ValueError: not one pair for each image.
    """
    if sizes is None:
        return None
    try:
        pairs = [(int(width), int(height)) for width, height in sizes]
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"image_sizes are {describe(sizes)}: expected one pair (width, height) for each image, [image.size] for one"
        ) from error
    if len(pairs) != count:
        raise ValueError(f"{count} images but {len(pairs)} image_sizes; give one (width, height) an image")
    if any(side < 1 for pair in pairs for side in pair):
        raise ValueError(f"image_sizes {pairs}: a picture is at least 1 pixel wide and high")
    return pairs
