"""Image files that data names, which nobody vouches for: which may be opened, and from where."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from llava import pictures
from llava.data.sources import is_url
from llava.pictures import check_file, load_image, missing, quoted, unreadable

IMAGE_ACCESS = ("folder", "disk", "remote")
"""Where the image names of data may lead: below the image folder, to any file of this machine, or to any URL too."""


def locate_image(folder: str, name: str, access: str = IMAGE_ACCESS[0], what: str = "image") -> str:
    """Path or URL of an image, or of another file, that data names.

    Args:
        folder: path or URL that names start from; empty: the working directory, and any file may be named.
        name: as the data has it.
        access: one of `IMAGE_ACCESS`. Below a folder that is a URL itself, names need no "remote".
        what: a message calls it: "image" or "video".

    Raises:
        ValueError: the name leads where `access` does not allow.
    """
    if is_url(name):
        if access != "remote":
            raise ValueError(
                f"{what} {quoted(name)} is a URL; if its source is to be trusted, allow URLs with --image_access remote"
            )
        if "::" in name:  # fsspec would open one place through another, a local one for instance
            raise ValueError(f"{what} {quoted(name)} is a chain of URLs; name a single one")
        return name
    if is_url(folder):
        if "::" in name or _leaves("/folder", name.lstrip("/")):
            raise ValueError(f"{what} {quoted(name)} leaves the {what} folder {folder!r}; name a file below it")
        return f"{folder.rstrip('/')}/{name}"
    if folder and access == "folder" and _leaves(folder, name):
        raise ValueError(
            f"{what} {quoted(name)} leaves the {what} folder {folder!r}; name a file below it, or, if its source is to "
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
    system, path = file_system(location)
    if system is None:
        check_file(path, location)
        return
    try:
        found = system.exists(path)
    except Exception as error:  # of the kinds that each object store has
        raise unreadable(location, error) from error
    if not found:
        raise missing(location)


def open_image(location: str) -> Image.Image:
    """Read an image from a path or URL completely, as RGB.

    Args:
        location: of `locate_image`.

    Raises:
        ValueError: see `load_image`; the message names the place.
    """
    system, path = file_system(location)
    if system is None:
        return load_image(path, location)
    try:
        with system.open(path, "rb") as file:
            content = _read(file)
    except FileNotFoundError as error:
        raise missing(location) from error
    except Exception as error:  # of the kinds that each object store has
        raise unreadable(location, error) from error
    return load_image(io.BytesIO(content), location)


def _read(file: BinaryIO) -> bytes:
    """A file up to a byte beyond the limit, so that an endless one is noticed. Web servers may send it in parts."""
    content = bytearray()
    while len(content) <= pictures.MAX_BYTES and (part := file.read(pictures.MAX_BYTES + 1 - len(content))):
        content += part
    return bytes(content)


def file_system(location: str) -> tuple[Any, str]:
    """fsspec's file system of a URL and the path in it; None for a path of this machine, file:// or not."""
    if not is_url(location):
        return None, location
    from fsspec.core import url_to_fs
    from fsspec.implementations.local import LocalFileSystem

    try:
        system, path = url_to_fs(location)
    except Exception as error:  # an unknown protocol, a package that is missing, a wrong setting of the store's
        raise unreadable(location, error) from error
    return (None, path) if isinstance(system, LocalFileSystem) else (system, path)
