"""Pictures: of which files they are read, and how those of any of Pillow's modes become RGB."""

from __future__ import annotations

import io
import math
import os
import stat
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

MAX_BYTES = 1 << 29
"""Size of the largest image file that is read."""

MAX_SIDE, MAX_RATIO = 20_000, 200
"""Longest side in pixels of an image that is read, and how many times the other side it may be.

Padding makes a square of the longer side, and CLIP's processor enlarges the shorter one to the tower's: a narrow line
of few pixels would become an image of gigabytes.
"""

_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262  # tags of TIFF


class UnfitImageError(ValueError):
    """A picture that Pillow reads and a model cannot use; the message goes on after the picture's name."""


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any of Pillow's modes as RGB, 8 bits a colour.

    As `convert("RGB")`, which LLaVA calls, wherever that is right: transparency is dropped, palettes are looked up. But
    it cuts off all values above 255, so that 16 bits become white, and floats black. So greys of 16 bits keep their
    upper 8, as Pillow does with colours of 16 bits; integers of 32 bits are taken for the 8 or 16 bits that hold them;
    and floats go from 0 (black) to 1 (white).

    Raises:
        UnfitImageError: integers or floats beyond those limits.
    """
    if image.mode == "F":
        image = _float_grey(np.asarray(image))
    elif image.mode.startswith("I"):
        image = _integer_grey(image)
    elif image.mode == "La":
        image = image.convert("LA")
    return image.convert("RGB")


def _float_grey(values: np.ndarray) -> Image.Image:
    if not ((values >= 0) & (values <= 1)).all():  # NaN is neither
        raise UnfitImageError(
            f"holds floats from {values.min():g} to {values.max():g}, expected 0 (black) to 1 (white); scale them, "
            "or save it with 8 or 16 bits"
        )
    return Image.fromarray((values * 255).round().astype(np.uint8))


def _integer_grey(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {})
    in_memory = image.mode == "I" and getattr(image, "format", None) is None  # an array, say; of 32 bits as in a TIFF
    bits = tags.get(_BITS_PER_SAMPLE, (32 if in_memory else 16,))[0]
    if bits > 16:  # they say nothing about what is white
        bits = 8 if values.max() < 256 else 16
    if values.min() < 0 or values.max() >= 1 << bits:
        raise UnfitImageError(
            f"holds integers from {values.min()} to {values.max()}, expected those of 16 bits, 0 to 65535; "
            "scale them, or save it with 8 bits"
        )
    grey = (values >> (bits - 8)).astype(np.uint8)
    return Image.fromarray(255 - grey if tags.get(_PHOTOMETRIC) == 0 else grey)


@cache
def image_formats() -> tuple[str, ...]:
    """Formats that are read: pictures, as far as this Pillow knows them; none that starts a program, as EPS does."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def load_image(path: str | Path | BinaryIO, name: str | None = None) -> Image.Image:
    """Read an image file completely, as RGB; see `llava.mm_utils.to_rgb`.

    The EXIF orientation is not applied, as in LLaVA.

    Args:
        path: of the file, or the opened file.
        name: what a message calls it; default: the path.

    Raises:
        ValueError: the file is missing, not a regular file, truncated, too large, of a format that is not read, or no
            image; the message names it.
    """
    name = name or str(path)
    if isinstance(path, str | Path):
        check_file(path, name)
    else:
        _check_bytes(path.seek(0, io.SEEK_END), name)
        path.seek(0)
    try:
        with Image.open(path, formats=image_formats()) as image:
            check_size(image.size)
            image.info.pop("transparency", None)  # is dropped; Pillow warns about kinds of it
            return to_rgb(image)
    except UnidentifiedImageError as error:
        raise ValueError(
            f"image {quoted(name)} is in no format that Pillow reads here ({', '.join(image_formats())}); replace it "
            "or remove its sample"
        ) from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"image {quoted(name)} has too many pixels ({error}); scale it down") from error
    except UnfitImageError as error:
        raise ValueError(f"image {quoted(name)} {error}") from error
    except Exception as error:  # a bad PNG chunk is a SyntaxError; each format has more of its own
        if isinstance(error, OSError) and error.errno:  # of the file system, not of the decoder
            raise unreadable(name, error) from error
        raise ValueError(
            f"image {quoted(name)} cannot be read ({reason(error)}); it may be truncated: copy or download it again, "
            "or remove its sample"
        ) from error


def check_file(path: str | Path, name: str, what: str = "image", *, limited: bool = True) -> None:
    """Refuse what opening would wait for without end (a pipe), what has no end (a device), and what is too large.

    Args:
        path: of the file.
        name: what a message calls it.
        what: it is to be, and of what folder: "image" or "video".
        limited: to `MAX_BYTES`.

    Raises:
        ValueError: it is no regular file, or too large.
    """
    try:
        status = os.stat(path)  # noqa: PTH116 (a slash at the end is an error, as it is for open)
    except FileNotFoundError as error:
        raise missing(name, what) from error
    except (OSError, ValueError) as error:  # no permission, too long, a NUL in it
        raise unreadable(name, error, what) from error
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, socket or device"
        raise ValueError(f"{what} {quoted(name)} cannot be read: it is {kind}, not a file; check the file name")
    if limited:
        _check_bytes(status.st_size, name)


def _check_bytes(size: int, name: str) -> None:
    if size > MAX_BYTES:
        raise ValueError(f"image {quoted(name)} has more than {MAX_BYTES >> 20} MiB; scale it down")


def check_size(size: tuple[int, int]) -> None:
    """Raise an `UnfitImageError` for a picture of too many pixels, or too narrow a one; (width, height)."""
    short, long = sorted(size)
    pixels = Image.MAX_IMAGE_PIXELS or math.inf  # beyond it Pillow itself warns only
    if short * long > pixels or long > min(MAX_SIDE, MAX_RATIO * short):
        raise UnfitImageError(
            f"is {size[0]} x {size[1]} pixels; what is read has at most {pixels:,} in all, {MAX_SIDE:,} on a side, and "
            f"{MAX_RATIO} times as many on one side as on the other: scale it down or cut it"
        )


def quoted(name: str) -> str:
    """A name as messages have it, of bounded length."""
    return f"{name!r:.300}"


def missing(name: str, what: str = "image") -> ValueError:
    """The error of a file that does not exist."""
    return ValueError(
        f"{what} {quoted(name)} does not exist; check the file name and the {what} folder it is looked up in"
    )


def unreadable(name: str, error: Exception, what: str = "image") -> ValueError:
    """The error of a file that the file system, or the store at its URL, does not give."""
    return ValueError(
        f"{what} {quoted(name)} cannot be read ({reason(error)}); check its name and "
        "whether it can be reached from here, or remove its sample"
    )


def reason(error: Exception) -> str:
    """What an error says, in one line of bounded length."""
    return " ".join(f"{error!s:.300}".split()) or type(error).__name__
