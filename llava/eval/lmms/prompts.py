"""What lmms-eval asks, as prompts of this package: a text with images, or messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from llava.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_TOKEN,
    DEFAULT_VIDEO_TOKEN,
    IGNORE_INDEX,
)
from llava.conversation import Round, get_template
from llava.data.media.images import open_image
from llava.data.preprocessing import Preprocessed, encode_segments
from llava.video.clips import PICTURE_SUFFIXES


@dataclass(frozen=True)
class Prompt:
    """One request.

    Attributes:
        rounds: questions and answers; the last answer is None, or what is to be scored.
        images: PIL pictures, in the order in which `<image>` stands in the rounds.
        system: in place of the template's system prompt; None keeps that.
        videos: clips, as `llava.mm_utils.process_video` takes them, in the order of `<video>`.
    """

    rounds: Sequence[Round]
    images: Sequence[Image.Image] = ()
    system: str | None = None
    videos: Sequence[Any] = ()

    @property
    def text(self) -> str:
        """The last question without its images and clips, for methods that read it."""
        return self.rounds[-1][0].replace(DEFAULT_IMAGE_TOKEN, "").replace(DEFAULT_VIDEO_TOKEN, "").strip()

    def encode(self, tokenizer: Any, conv_template: str, mm_use_im_start_end: bool = False) -> Preprocessed:
        """Ids [S], with every image and clip at its place, and labels [S] of the answers.

        Raises:
            ValueError: not one `<image>` for each image, or `<video>` for each clip.
        """
        rounds = list(self.rounds)
        for mark, kind, shown in (
            (DEFAULT_IMAGE_TOKEN, "image", self.images),
            (DEFAULT_VIDEO_TOKEN, "clip", self.videos),
        ):
            marked = sum(question.count(mark) for question, _ in rounds)
            if shown and marked != len(shown):
                raise ValueError(
                    f"the prompt has {marked} {mark} for {len(shown)} {kind}(s): expected one for each, or none at all"
                )
        if self.images and mm_use_im_start_end:
            mark = f"{DEFAULT_IM_START_TOKEN}{DEFAULT_IMAGE_TOKEN}{DEFAULT_IM_END_TOKEN}"
            rounds = [(question.replace(DEFAULT_IMAGE_TOKEN, mark), answer) for question, answer in rounds]
        segments = get_template(conv_template).render(rounds, self.system)
        ids, learned = encode_segments(segments, tokenizer, bool(self.images), bool(self.videos))
        labels = [token if learn else IGNORE_INDEX for token, learn in zip(ids, learned, strict=True)]
        return Preprocessed(torch.tensor(ids), torch.tensor(labels))


def read_context(context: str, visuals: Sequence[Any] | None, answer: str | None = None) -> Prompt:
    """The prompt of lmms-eval's simple form.

    Args:
        context: the question; its images stand where it has `<image>` and its clips where it has `<video>`, otherwise
            in front.
        visuals: PIL pictures, paths of pictures, and clips: paths of files and folders, or lists of frames; None or
            empty for text only.
        answer: what is to be scored.

    Raises:
        ValueError: something other than pictures and clips.
    """
    shown = [_visual(visual) for visual in visuals or []]
    in_front = [visual.mark for visual in shown if visual.mark not in context]
    if in_front:
        context = " ".join(in_front) + f"\n{context}"
    images, videos = _media(shown)
    return Prompt([(context, answer)], images, videos=videos)


def read_messages(messages: Sequence[Mapping[str, Any]]) -> Prompt:
    """The prompt of lmms-eval's chat form, with images and clips where the messages have them.

    Args:
        messages: {"role": system, user or assistant, "content": a text, or a list of {"type": "text", "text": text} and
            {"type": "image", "url": picture} or {"type": "video", "url": clip}}. Where the texts have `<image>` for all
            images, or `<video>` for all clips, those are their places.

    Raises:
        ValueError: other media or roles, or the last message is not the user's.
    """
    turns = [(message["role"], _parts(message["content"])) for message in messages]
    shown = [part for _, parts in turns for part in parts if isinstance(part, _Visual)]
    for mark in (DEFAULT_IMAGE_TOKEN, DEFAULT_VIDEO_TOKEN):
        marked = sum(part.count(mark) for _, parts in turns for part in parts if isinstance(part, str))
        if marked == sum(visual.mark == mark for visual in shown):
            turns = [(role, [part for part in parts if _mark(part) != mark]) for role, parts in turns]
    system: str | None = None
    rounds: list[Round] = []
    for role, parts in turns:
        text = _join(parts)
        asked = bool(rounds) and rounds[-1][1] is None
        if role == "system":
            system = text if system is None else f"{system}\n{text}"
        elif role == "user" and asked:
            rounds[-1] = (f"{rounds[-1][0]}\n{text}", None)
        elif role == "user":
            rounds.append((text, None))
        elif role == "assistant" and asked:
            rounds[-1] = (rounds[-1][0], text)
        else:
            raise ValueError(f"a message of {role!r} in an unexpected place: expected user and assistant by turns")
    if not rounds or rounds[-1][1] is not None:
        raise ValueError("the last message is not the user's: there is nothing to answer")
    images, videos = _media(shown)
    return Prompt(rounds, images, system, videos)


def _parts(content: str | Sequence[Mapping[str, Any]]) -> list[Any]:
    """Texts, and whatever else a message shows, in their order."""
    if isinstance(content, str):
        return [content]
    other = sorted({part["type"] for part in content} - {"text", *_MARKS})
    if other:
        raise ValueError(f"it has {', '.join(other)}: this model reads text, images and videos only")
    return [part["text"] if part["type"] == "text" else _Visual(_MARKS[part["type"]], part["url"]) for part in content]


_MARKS = {"image": DEFAULT_IMAGE_TOKEN, "video": DEFAULT_VIDEO_TOKEN}


@dataclass(frozen=True)
class _Visual:
    """A picture or clip, which may be a path and still no text of a message; `mark` says which."""

    mark: str
    content: Any


def _mark(part: Any) -> str | None:
    return part.mark if isinstance(part, _Visual) else None


def _visual(content: Any) -> _Visual:
    """A picture by its type, or the suffix of its path, as lmms-eval's chat form tells them apart; otherwise a clip."""
    is_picture = isinstance(content, Image.Image) or (
        isinstance(content, str) and content.lower().endswith(PICTURE_SUFFIXES)
    )
    return _Visual(_MARKS["image" if is_picture else "video"], content)


def _media(shown: Sequence[_Visual]) -> tuple[list[Image.Image], list[Any]]:
    """The pictures, opened, and the clips.

    Raises:
        ValueError: something that is neither.
    """
    images, videos = [], []
    for visual in shown:
        content = visual.content
        if visual.mark == DEFAULT_VIDEO_TOKEN and isinstance(content, str | Path | list | tuple | np.ndarray | Tensor):
            videos.append(content)
        elif visual.mark == DEFAULT_IMAGE_TOKEN and isinstance(content, str | Image.Image):
            images.append(open_image(content) if isinstance(content, str) else content)
        else:
            raise ValueError(
                f"it shows a {type(content).__name__}: this model reads PIL pictures, paths of pictures and videos, "
                "and lists and arrays of frames"
            )
    return images, videos


def _join(parts: Sequence[str | _Visual]) -> str:
    """One text, with marks of pictures and clips: those in front on a line of their own, others among the words."""
    joined, before, in_front = "", "", True
    for part in parts:
        piece = part if isinstance(part, str) else part.mark
        kind = "text" if isinstance(part, str) else "image"
        if not piece:
            continue
        if joined and not (joined[-1].isspace() or piece[0].isspace()):
            alike = kind == before == "text" or (kind == "text" and in_front)
            joined += "\n" if alike else " "
        joined, before, in_front = joined + piece, kind, in_front and kind == "image"
    return joined
