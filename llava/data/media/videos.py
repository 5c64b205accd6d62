"""Clips that data names: where they may lead, and their pixels, in a data worker.

The rules are those of images (`llava/data/media/images.py`): the same access, formats and limits.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from llava.data.media.images import IMAGE_ACCESS, check_image_exists, file_system, locate_image, open_image
from llava.data.samples import VIDEO, BadSampleError
from llava.mm_utils import process_video
from llava.pictures import check_file, missing, unreadable
from llava.video import Clip, Sampling
from llava.video.clips import frames_of_folder, pictures_among

_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".gif")


def locate_video(
    folder: str, clip: str | list[str], access: str = IMAGE_ACCESS[0], image_folder: str = ""
) -> str | list[str]:
    """Path or URL of a clip that data names; of each of its frames, where it is a list of them.

    A name without a suffix that no file or folder has, as Video-ChatGPT's data has it, is that of the first file with
    one of the usual suffixes.

    Args:
        folder: path or URL that names of clips start from: `video_folder`. Empty: `image_folder`.
        clip: of `llava.data.samples.video_files`.
        access: one of `IMAGE_ACCESS`.
        image_folder: what images start from.

    Raises:
        ValueError: a name leads where `access` does not allow.
    """
    start = folder or image_folder
    if isinstance(clip, str):
        return _with_suffix(locate_image(start, clip, access, "video"))
    return [locate_image(start, frame, access, "video") for frame in clip]


def _with_suffix(location: str) -> str:
    system, path = file_system(location)
    if system is not None or os.path.lexists(path):
        return location
    # Names such as v_abc.def have a dot of their own.
    return next((location + suffix for suffix in _SUFFIXES if os.path.isfile(path + suffix)), location)  # noqa: PTH113


def check_video_exists(location: str | list[str]) -> None:
    """Look for a clip without opening it: a file, a folder with a picture, or all frames of a list.

    Args:
        location: of `locate_video`.

    Raises:
        ValueError: it does not exist, is neither file nor folder, or cannot be asked for; the message names it.
    """
    if isinstance(location, list):
        for frame in location:
            check_image_exists(frame)
        return
    system, path = file_system(location)
    if system is not None:
        with _asking(location):
            found = system.exists(path)
        if not found:
            raise missing(location, "video")
    elif os.path.isdir(path):  # noqa: PTH112 (no error for a name too long)
        frames_of_folder(path)
    else:
        check_file(path, location, "video", limited=False)


def is_video_file(location: str | list[str]) -> bool:
    """Whether a clip of `locate_video` is a file to decode, and no folder or list of pictures."""
    if isinstance(location, list):
        return False
    system, path = file_system(location)
    if system is None:
        return not os.path.isdir(path)  # noqa: PTH112 (no error for a name too long)
    with _asking(location):
        return not system.isdir(path)


def read_video(
    location: str | list[str], sample: str, image_processor: Any, image_config: Any, sampling: Sampling
) -> torch.Tensor:
    """The pixels of a clip of a sample, read in a data worker: one frame at a time, by one thread.

    Args:
        location: of `locate_video`.
        sample: what a message calls the sample, see `sample_name`.
        image_processor: of the vision tower.
        image_config: has `image_aspect_ratio`; see `process_video`.
        sampling: which frames: `num_frames`, or `fps`, and `max_frames`.

    Returns:
        Float [F, 3, H, W].

    Raises:
        BadSampleError: the clip cannot be read; its kind is `VIDEO`. A rejects entry where bad samples are skipped.
        ImportError: PyAV is not installed, which is no fault of the sample's.
    """
    try:
        with _opened(location) as video:
            return process_video(
                video,
                image_processor,
                image_config,
                sampling.num_frames,
                fps=sampling.fps,
                max_frames=sampling.max_frames,
                name=location if isinstance(location, str) else None,
                open_picture=open_image,
            )
    except ValueError as error:
        raise BadSampleError(f"{sample}: {error}", VIDEO) from error


@contextmanager
def _opened(location: str | list[str]) -> Iterator[Clip]:
    """What `process_video` takes for a clip: its path; of one at a URL the opened file, or the frames in the folder."""
    if isinstance(location, list):
        yield location
        return
    system, path = file_system(location)
    if system is None:
        yield path
        return
    with _asking(location):
        is_folder = system.isdir(path)
        names = [posixpath.basename(file.rstrip("/")) for file in system.ls(path, detail=False)] if is_folder else []
        file = None if is_folder else system.open(path, "rb")
    if file is None:
        yield [f"{location.rstrip('/')}/{name}" for name in pictures_among(names, location)]
        return
    with file:
        try:
            yield file
        except (ValueError, ImportError):
            raise
        except Exception as error:  # of the kinds that each object store has, while it is read
            raise unreadable(location, error, "video") from error


@contextmanager
def _asking(location: str) -> Iterator[None]:
    """Give the errors of a store, of which each has its own kinds, as a ValueError that names the clip."""
    try:
        yield
    except FileNotFoundError as error:
        raise missing(location, "video") from error
    except Exception as error:
        raise unreadable(location, error, "video") from error
