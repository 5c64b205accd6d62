"""What lmms-eval asks, as prompts of this package: a text with images, or messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN, IGNORE_INDEX
from llava.conversation import Round, get_template
from llava.data.media.images import open_image
from llava.data.preprocessing import Preprocessed, encode_segments


@dataclass(frozen=True)
class Prompt:
    """One request.

    Attributes:
        rounds: questions and answers; the last answer is None, or what is to be scored.
        images: PIL pictures, in the order in which `<image>` stands in the rounds.
        system: in place of the template's system prompt; None keeps that.
    """

    rounds: Sequence[Round]
    images: Sequence[Image.Image] = ()
    system: str | None = None

    @property
    def text(self) -> str:
        """The last question without its images, for methods that read it."""
        return self.rounds[-1][0].replace(DEFAULT_IMAGE_TOKEN, "").strip()

    def encode(self, tokenizer: Any, conv_template: str, mm_use_im_start_end: bool = False) -> Preprocessed:
        """Ids [S], with every image at its place, and labels [S] of the answers.

        Raises:
            ValueError: not one `<image>` for each image.
        """
        rounds = list(self.rounds)
        marked = sum(question.count(DEFAULT_IMAGE_TOKEN) for question, _ in rounds)
        if self.images and marked != len(self.images):
            raise ValueError(
                f"the prompt has {marked} {DEFAULT_IMAGE_TOKEN} for {len(self.images)} image(s): expected one for "
                "each, or none at all"
            )
        if self.images and mm_use_im_start_end:
            mark = f"{DEFAULT_IM_START_TOKEN}{DEFAULT_IMAGE_TOKEN}{DEFAULT_IM_END_TOKEN}"
            rounds = [(question.replace(DEFAULT_IMAGE_TOKEN, mark), answer) for question, answer in rounds]
        segments = get_template(conv_template).render(rounds, self.system)
        ids, learned = encode_segments(segments, tokenizer, has_image=bool(self.images))
        labels = [token if learn else IGNORE_INDEX for token, learn in zip(ids, learned, strict=True)]
        return Preprocessed(torch.tensor(ids), torch.tensor(labels))


def read_context(context: str, visuals: Sequence[Any] | None, answer: str | None = None) -> Prompt:
    """The prompt of lmms-eval's simple form.

    Args:
        context: the question; its images stand where it has `<image>`, otherwise in front.
        visuals: PIL pictures or paths of pictures; None or empty for text only.
        answer: what is to be scored.

    Raises:
        ValueError: something other than pictures.
    """
    images = [_open(visual) for visual in visuals or []]
    if images and DEFAULT_IMAGE_TOKEN not in context:
        context = " ".join([DEFAULT_IMAGE_TOKEN] * len(images)) + f"\n{context}"
    return Prompt([(context, answer)], images)


def read_messages(messages: Sequence[Mapping[str, Any]]) -> Prompt:
    """The prompt of lmms-eval's chat form, with images where the messages have them.

    Args:
        messages: {"role": system, user or assistant, "content": a text, or a list of {"type": "text", "text": text} and
            {"type": "image", "url": picture}}. Where the texts have `<image>` for all images, those are their places.

    Raises:
        ValueError: other media or roles, or the last message is not the user's.
    """
    turns = [(message["role"], _parts(message["content"])) for message in messages]
    images = [_open(part) for _, parts in turns for part in parts if not isinstance(part, str)]
    marked = sum(part.count(DEFAULT_IMAGE_TOKEN) for _, parts in turns for part in parts if isinstance(part, str))
    if images and marked == len(images):
        turns = [(role, [part for part in parts if isinstance(part, str)]) for role, parts in turns]
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
    return Prompt(rounds, images, system)


def _parts(content: str | Sequence[Mapping[str, Any]]) -> list[Any]:
    """Texts, and whatever else a message shows, in their order."""
    if isinstance(content, str):
        return [content]
    other = sorted({part["type"] for part in content} - {"text", "image"})
    if other:
        raise ValueError(f"it has {', '.join(other)}: this model reads text and images only")
    return [part["text"] if part["type"] == "text" else _Visual(part["url"]) for part in content]


@dataclass(frozen=True)
class _Visual:
    """A picture of a message, which may be a path and still no text of it."""

    content: Any


def _open(visual: Any) -> Image.Image:
    content = visual.content if isinstance(visual, _Visual) else visual
    if isinstance(content, str):
        return open_image(content)
    if not isinstance(content, Image.Image):
        raise ValueError(
            f"it shows a {type(content).__name__}: this model reads PIL pictures and paths of pictures only"
        )
    return content


def _join(parts: Sequence[str | _Visual]) -> str:
    """One text, with `<image>` for each picture: those in front on a line of their own, others among the words."""
    joined, before, in_front = "", "", True
    for part in parts:
        piece = part if isinstance(part, str) else DEFAULT_IMAGE_TOKEN
        kind = "text" if isinstance(part, str) else "image"
        if not piece:
            continue
        if joined and not (joined[-1].isspace() or piece[0].isspace()):
            alike = kind == before == "text" or (kind == "text" and in_front)
            joined += "\n" if alike else " "
        joined, before, in_front = joined + piece, kind, in_front and kind == "image"
    return joined
