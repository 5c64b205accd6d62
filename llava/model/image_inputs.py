"""The images of a batch, in the forms in which callers hand them over."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress

import torch
from torch import Tensor

from llava.data.stored_features import StoredFeatures
from llava.model.prompt_inputs import describe, is_dense

Images = Tensor | Sequence[Tensor] | StoredFeatures | None
Pictures = list[Tensor] | StoredFeatures
ImageSizes = Sequence[tuple[int, int]] | Tensor | None


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
    pictures: Pictures = images if isinstance(images, StoredFeatures) else image_list(images)
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


def tile_counts(pictures: Pictures) -> list[int]:
    """How many pictures each image is for the vision tower: 1, or its tiles."""
    if isinstance(pictures, StoredFeatures):
        return pictures.tiles
    return [picture.shape[0] if picture.ndim == 4 else 1 for picture in pictures]


def check_side(pictures: Sequence[Tensor], side: int) -> None:
    """Raise ValueError for an image that is not of the vision tower's height and width."""
    for i, picture in enumerate(pictures):
        if tuple(picture.shape[-2:]) != (side, side):
            raise ValueError(
                f"image {i} has shape {tuple(picture.shape)}: the vision tower reads {side} x {side} pixels; prepare "
                "images with the checkpoint's image processor, and check crop_size in its preprocessor_config.json"
            )


def check_finite(pictures: Sequence[Tensor]) -> None:
    """Raise ValueError for NaN or infinity in an image of `image_list`; waits for the device that they are on."""
    finite = torch.stack([picture.isfinite().all().to(pictures[0].device) for picture in pictures]).tolist()
    bad = [str(i) for i, is_finite in enumerate(finite) if not is_finite]
    if bad:
        raise ValueError(f"images {', '.join(bad)} hold NaN or infinity: check how their pixels were prepared")


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
