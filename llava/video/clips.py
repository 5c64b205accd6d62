"""What a clip may be: a video file, a folder of frames, a list of pictures, or an array; and its frames."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image

from llava.pictures import UnfitImageError, check_file, check_size, load_image, quoted, to_rgb
from llava.video.decoding import read_file
from llava.video.errors import VideoError
from llava.video.sampling import Sampling

Clip = str | Path | BinaryIO | Sequence[str | Path | Image.Image] | np.ndarray | torch.Tensor
"""A path of a video file or of a folder of frames, an opened video file, pictures or their paths in order, or frames
[T, H, W, 3] or [T, 3, H, W]: uint8, or floats from 0 to 1."""

PICTURE_SUFFIXES = (
    ".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"
)  # fmt: skip
"""Ends of the names of a folder's frames, in any case; other files in it are not looked at."""


@dataclass(frozen=True)
class Frame:
    """One frame of a clip.

    Attributes:
        picture: RGB.
        number: of it in the clip, from 0.
        time: seconds since the clip's first frame; None where no file says (pictures, arrays).
    """

    picture: Image.Image
    number: int
    time: float | None


def read_clip(
    video: Clip,
    sampling: Sampling | None = None,
    *,
    name: str | None = None,
    threads: int = 1,
    open_picture: Callable[[str], Image.Image] | None = None,
) -> Iterator[Frame]:
    """The chosen frames of a clip, one after the other; those before and between them are not kept.

    Args:
        video: see `Clip`. A folder's frames come in the natural order of their names: 9.jpg before 10.jpg.
        sampling: which frames; default: 8, evenly.
        name: what messages call the clip; default: its path.
        threads: of the decoder. One, as there are many data workers.
        open_picture: reads a picture of a list or folder by its path, as RGB; default: `llava.pictures.load_image`.

    Yields:
        The frames in order; one that is chosen twice comes twice.

    Raises:
        VideoError: the clip can't be read or holds no frame.
        MissingReaderError: it is a video file, and PyAV is not installed.
    """
    sampling = sampling or Sampling()
    if isinstance(video, np.ndarray | torch.Tensor):
        yield from _of_array(video, sampling, name or "array")
    elif isinstance(video, list | tuple):
        yield from _of_pictures(video, sampling, name or "of pictures", open_picture)
    elif isinstance(video, str | Path) and os.path.isdir(video):  # noqa: PTH112 (no error for a name too long)
        yield from _of_pictures(frames_of_folder(video), sampling, name or str(video), open_picture)
    elif isinstance(video, str | Path) or callable(getattr(video, "read", None)):
        file: Any = video
        if isinstance(video, str | Path):
            file, name = str(video), name or str(video)
            _check_video_file(file, name)
        for picture, number, time in read_file(file, name or "opened file", sampling, threads):
            yield Frame(picture, number, time)
    else:
        raise VideoError(
            f"a video is {type(video).__name__}: expected the path of a file or folder, a list of pictures or paths, "
            "or an array [T, H, W, 3]"
        )


def natural_order(name: str) -> list[tuple[int, int, str]]:
    """A key that sorts names as people count: frame9 before frame10."""
    return [(0, int(part), part) if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]


def pictures_among(names: Sequence[str], folder: str) -> list[str]:
    """The names of pictures among those of a folder's files, in natural order.

    Raises:
        VideoError: there are none.
    """
    found = [name for name in names if name.lower().endswith(PICTURE_SUFFIXES) and not Path(name).name.startswith(".")]
    if not found:
        raise VideoError(
            f"video {quoted(folder)} is a folder without a picture ({len(names)} other files); expected frames "
            f"({', '.join(PICTURE_SUFFIXES)}), or name a video file"
        )
    return sorted(found, key=natural_order)


def frames_of_folder(folder: str | Path) -> list[str]:
    """Paths of the pictures in a folder, in the natural order of their names.

    Raises:
        VideoError: it has none, or cannot be read.
    """
    try:
        names = [path.name for path in Path(folder).iterdir()]
    except OSError as error:
        raise VideoError(f"video {quoted(str(folder))} is a folder that cannot be read ({error.strerror})") from error
    return [str(Path(folder) / name) for name in pictures_among(names, str(folder))]


def _check_video_file(path: str, name: str) -> None:
    try:
        check_file(path, name, "video", limited=False)
    except ValueError as error:
        raise VideoError(str(error)) from error


def _of_pictures(
    pictures: Sequence[Any], sampling: Sampling, name: str, open_picture: Callable[[str], Image.Image] | None
) -> Iterator[Frame]:
    if not pictures:
        raise VideoError(f"video {quoted(name)} is an empty list; expected one picture or more")
    picture, before = None, -1
    for number in _chosen(len(pictures), sampling, name):
        if picture is None or number != before:
            try:
                picture, before = _rgb(pictures[number], open_picture), number
            except UnfitImageError as error:
                raise VideoError(f"frame {number} of video {quoted(name)} {error}") from error
            except ValueError as error:
                raise VideoError(f"frame {number} of video {quoted(name)}: {error}") from error
        yield Frame(picture, number, None)


def _rgb(picture: Any, open_picture: Callable[[str], Image.Image] | None) -> Image.Image:
    if isinstance(picture, str | Path):
        return (open_picture or load_image)(str(picture))
    if not isinstance(picture, Image.Image):
        raise UnfitImageError(f"is {type(picture).__name__}: expected a PIL picture or a path")
    check_size(picture.size)
    return picture if picture.mode == "RGB" else to_rgb(picture)


def _of_array(array: Any, sampling: Sampling, name: str) -> Iterator[Frame]:
    shape = tuple(array.shape)
    if len(shape) != 4 or 0 in shape or 3 not in (shape[3], shape[1]):
        raise VideoError(f"video {quoted(name)} has the shape {shape}: expected frames [T, H, W, 3] or [T, 3, H, W]")
    for number in _chosen(shape[0], sampling, name):
        frame = array[number]
        values = frame.detach().cpu().float().numpy() if _is_float(frame) else np.asarray(frame)
        if shape[3] != 3:
            values = np.moveaxis(values, 0, 2)
        yield Frame(Image.fromarray(_bytes(values, name)), number, None)


def _is_float(frame: Any) -> bool:
    return isinstance(frame, torch.Tensor) and frame.is_floating_point()


def _bytes(values: np.ndarray, name: str) -> np.ndarray:
    """Values of a frame, [H, W, 3], as uint8."""
    if values.dtype == np.uint8:
        return np.ascontiguousarray(values)
    if not np.issubdtype(values.dtype, np.floating) or not ((values >= 0) & (values <= 1)).all():
        raise VideoError(
            f"video {quoted(name)} holds {values.dtype} from {values.min():g} to {values.max():g}: expected uint8, or "
            "floats from 0 (black) to 1 (white)"
        )
    return (values * 255).round().astype(np.uint8)


def _chosen(total: int, sampling: Sampling, name: str) -> list[int]:
    try:
        numbers: list[int] = sampling.indices(total, None).tolist()
    except ValueError as error:
        raise VideoError(f"video {quoted(name)}: {error}") from error
    return numbers
