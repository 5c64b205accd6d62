"""The images of a batch, in the forms in which callers hand them over."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from typing import Any

from torch import Tensor

Images = Tensor | Sequence[Tensor] | None
ImageSizes = Sequence[tuple[int, int]] | Tensor | None


def match_images(
    markers: list[int], images: Images, image_sizes: ImageSizes
) -> tuple[list[Tensor], list[tuple[int, int]] | None]:
    """The images that markers stand for, with their sizes.

    Args:
        markers: for each sample, how many image markers its ids hold.
        images: as for `LlavaMetaForCausalLM.forward`.
        image_sizes: one pair (width, height) for each of `images`, or None.

    Raises:
        ValueError: counts do not match.
    """
    pictures = image_list(images)
    sizes = None if image_sizes is None else [size_pair(size) for size in image_sizes]
    real = [count > 0 for count in markers for _ in range(max(count, 1))]  # blank images of text-only samples: False
    if len(pictures) == sum(markers):
        real = [True] * len(pictures)
    elif len(pictures) != len(real):
        per_sample = ", ".join(f"sample {i}: {count}" for i, count in enumerate(markers))
        raise ValueError(
            f"the batch has {sum(markers)} image markers ({per_sample}) but {len(pictures)} images were given; "
            "each <image> in a prompt needs one image"
        )
    if sizes is not None and len(sizes) != len(pictures):
        raise ValueError(f"{len(pictures)} images but {len(sizes)} image_sizes; give one (width, height) an image")
    return list(compress(pictures, real)), None if sizes is None else list(compress(sizes, real))


def image_list(images: Images) -> list[Tensor]:
    """A batch's images one by one, each [3, H, W] or [tiles, 3, H, W].

    Raises:
        ValueError: another shape.
    """
    if images is None:
        return []
    if isinstance(images, Tensor) and images.ndim not in (4, 5):
        raise ValueError(
            f"images of shape {tuple(images.shape)}: expected [N, 3, H, W] or [N, tiles, 3, H, W], or a list of images"
        )
    pictures = list(images)
    for i, picture in enumerate(pictures):
        if picture.ndim not in (3, 4) or picture.shape[-3] != 3:
            raise ValueError(f"image {i} has shape {tuple(picture.shape)}: expected [3, H, W] or [tiles, 3, H, W]")
    return pictures


def size_pair(size: Any) -> tuple[int, int]:
    """(width, height) in pixels, from a pair or a tensor."""
    width, height = (int(side) for side in size)
    return width, height
