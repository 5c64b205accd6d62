"""Image files, which nobody vouches for: which may be opened, from where, how large, and how they become RGB."""

from __future__ import annotations

import io
import math
import os
import stat
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image, UnidentifiedImageError

from llava.data.sources import is_url
from llava.mm_utils import UnfitImageError, to_rgb

IMAGE_ACCESS = ("folder", "disk", "remote")
"""Where the image names of data may lead: below the image folder, to any file of this machine, or to any URL too."""

MAX_BYTES = 1 << 29
"""Size of the largest image file that is read."""

MAX_SIDE, MAX_RATIO = 20_000, 200
"""Longest side in pixels of an image that is read, and how many times the other side it may be.

Padding makes a square of the longer side, and CLIP's processor enlarges the shorter one to the tower's: a narrow line
of few pixels would become an image of gigabytes.
"""

_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")


@cache
def image_formats() -> tuple[str, ...]:
    """Formats that are read: pictures, as far as this Pillow knows them; none that starts a program, as EPS does."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def locate_image(folder: str, name: str, access: str = IMAGE_ACCESS[0]) -> str:
    """Path or URL of an image that data names.

    Args:
        folder: path or URL that names start from; empty: the working directory, and any file may be named.
        name: as the data has it.
        access: one of `IMAGE_ACCESS`. Below a folder that is a URL itself, names need no "remote".

    Raises:
        ValueError: the name leads where `access` does not allow.
    """
    if is_url(name):
        if access != "remote":
            raise ValueError(
                f"image {_quoted(name)} is a URL; if its source is to be trusted, allow URLs with --image_access remote"
            )
        if "::" in name:  # fsspec would open one place through another, a local one for instance
            raise ValueError(f"image {_quoted(name)} is a chain of URLs; name a single one")
        return name
    if is_url(folder):
        if "::" in name or _leaves("/folder", name.lstrip("/")):
            raise ValueError(f"image {_quoted(name)} leaves the image folder {folder!r}; name a file below it")
        return f"{folder.rstrip('/')}/{name}"
    if folder and access == "folder" and _leaves(folder, name):
        raise ValueError(
            f"image {_quoted(name)} leaves the image folder {folder!r}; name a file below it, or, if its source is to "
            "be trusted, allow any with --image_access disk"
        )
    path = str(Path(folder) / name)
    return os.path.normpath(path) if folder and access == "folder" and ".." in name else path


def _leaves(folder: str, name: str) -> bool:
    """Whether a name leads out of a folder; where links inside the folder point is their owner's wish."""
    root = os.path.normpath(Path(folder).absolute())
    return not Path(os.path.normpath(Path(root) / name)).is_relative_to(root)


def check_image_exists(location: str) -> None:
    """Look for an image file without opening it.

    Args:
        location: of `locate_image`.

    Raises:
        ValueError: it does not exist, is no regular file, is too large or cannot be asked for; the message names it.
    """
    system, path = _file_system(location)
    if system is None:
        _check_file(path, location)
        return
    try:
        found = system.exists(path)
    except Exception as error:  # of the kinds that each object store has
        raise _unreadable(location, error) from error
    if not found:
        raise _missing(location)


def open_image(location: str) -> Image.Image:
    """Read an image from a path or URL completely, as RGB.

    Args:
        location: of `locate_image`.

    Raises:
        ValueError: see `load_image`; the message names the place.
    """
    system, path = _file_system(location)
    if system is None:
        return load_image(path, location)
    try:
        with system.open(path, "rb") as file:
            content = _read(file)
    except FileNotFoundError as error:
        raise _missing(location) from error
    except Exception as error:  # of the kinds that each object store has
        raise _unreadable(location, error) from error
    return load_image(io.BytesIO(content), location)


def _read(file: BinaryIO) -> bytes:
    """A file up to a byte beyond the limit, so that an endless one is noticed. Web servers may send it in parts."""
    content = bytearray()
    while len(content) <= MAX_BYTES and (part := file.read(MAX_BYTES + 1 - len(content))):
        content += part
    return bytes(content)


def _file_system(location: str) -> tuple[Any, str]:
    """fsspec's file system of a URL and the path in it; None for a path of this machine, file:// or not."""
    if not is_url(location):
        return None, location
    from fsspec.core import url_to_fs
    from fsspec.implementations.local import LocalFileSystem

    try:
        system, path = url_to_fs(location)
    except Exception as error:  # an unknown protocol, a package that is missing, a wrong setting of the store's
        raise _unreadable(location, error) from error
    return (None, path) if isinstance(system, LocalFileSystem) else (system, path)


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
        _check_file(path, name)
    else:
        _check_bytes(path.seek(0, io.SEEK_END), name)
        path.seek(0)
    try:
        with Image.open(path, formats=image_formats()) as image:
            _check_size(image.size)
            image.info.pop("transparency", None)  # is dropped; Pillow warns about kinds of it
            return to_rgb(image)
    except UnidentifiedImageError as error:
        raise ValueError(
            f"image {_quoted(name)} is in no format that Pillow reads here ({', '.join(image_formats())}); replace it "
            "or remove its sample"
        ) from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"image {_quoted(name)} has too many pixels ({error}); scale it down") from error
    except UnfitImageError as error:
        raise ValueError(f"image {_quoted(name)} {error}") from error
    except Exception as error:  # a bad PNG chunk is a SyntaxError; each format has more of its own
        if isinstance(error, OSError) and error.errno:  # of the file system, not of the decoder
            raise _unreadable(name, error) from error
        raise ValueError(
            f"image {_quoted(name)} cannot be read ({_reason(error)}); it may be truncated: copy or download it again, "
            "or remove its sample"
        ) from error


def _check_file(path: str | Path, name: str) -> None:
    """Refuse what opening would wait for without end (a pipe), what has no end (a device), and what is too large."""
    try:
        status = os.stat(path)  # noqa: PTH116 (a slash at the end is an error, as it is for open)
    except FileNotFoundError as error:
        raise _missing(name) from error
    except (OSError, ValueError) as error:  # no permission, too long, a NUL in it
        raise _unreadable(name, error) from error
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, socket or device"
        raise ValueError(f"image {_quoted(name)} cannot be read: it is {kind}, not a file; check the file name")
    _check_bytes(status.st_size, name)


def _check_bytes(size: int, name: str) -> None:
    if size > MAX_BYTES:
        raise ValueError(f"image {_quoted(name)} has more than {MAX_BYTES >> 20} MiB; scale it down")


def _check_size(size: tuple[int, int]) -> None:
    short, long = sorted(size)
    pixels = Image.MAX_IMAGE_PIXELS or math.inf  # beyond it Pillow itself warns only
    if short * long > pixels or long > min(MAX_SIDE, MAX_RATIO * short):
        raise UnfitImageError(
            f"is {size[0]} x {size[1]} pixels; what is read has at most {pixels:,} in all, {MAX_SIDE:,} on a side, and "
            f"{MAX_RATIO} times as many on one side as on the other: scale it down or cut it"
        )


def _quoted(name: str) -> str:
    return f"{name!r:.300}"


def _missing(name: str) -> ValueError:
    return ValueError(
        f"image {_quoted(name)} does not exist; check the file name and the image folder it is looked up in"
    )


def _unreadable(name: str, error: Exception) -> ValueError:
    return ValueError(
        f"image {_quoted(name)} cannot be read ({_reason(error)}); check its name and "
        "whether it can be reached from here, or remove its sample"
    )


def _reason(error: Exception) -> str:
    return " ".join(f"{error!s:.300}".split()) or type(error).__name__
