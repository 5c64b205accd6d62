"""Conversations to `input_ids` and `labels`.

A template renders a conversation to segments that are learned or only read. The text between two images
is tokenized in one piece, and the tokenizer's character offsets say which segment a token came from. Where
offsets cannot tell (a token reaches over a boundary, or the tokenizer has none), the text is cut at the
boundary before it is tokenized. So ids and labels always come from the same pass, and no second
tokenization exists that could disagree with the first.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from llava.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_TOKEN,
    DEFAULT_VIDEO_TOKEN,
    IGNORE_INDEX,
    IMAGE_TOKEN_INDEX,
    VIDEO_TOKEN_INDEX,
)
from llava.conversation import Round, Segment, Template, get_template
from llava.mm_utils import leading_ids

HUMAN, MODEL = "human", "gpt"
"""The two values of a turn's `from`."""


class ConversationError(ValueError):
    """A conversation that cannot be trained on; the message names the sample and the turn."""


class NoTrainableTokensError(ConversationError):
    """A sample whose labels would all be ignored, so that it could teach nothing."""


class Preprocessed(NamedTuple):
    """One sample for the model.

    Attributes:
        input_ids: LongTensor [S], `IMAGE_TOKEN_INDEX` where an image goes, `VIDEO_TOKEN_INDEX` where a clip goes.
        labels: LongTensor [S], the id where it is learned, otherwise `IGNORE_INDEX`.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor


def marks_of(has_image: bool, has_video: bool) -> dict[str, int]:
    """What stands for something to see in a sample, with its id: `<image>` where it has images, `<video>` for clips."""
    marks = {DEFAULT_IMAGE_TOKEN: IMAGE_TOKEN_INDEX} if has_image else {}
    return marks | {DEFAULT_VIDEO_TOKEN: VIDEO_TOKEN_INDEX} if has_video else marks


def count_marks(text: str, marks: Iterable[str]) -> int:
    """How many of the marks a text holds."""
    return sum(text.count(mark) for mark in marks)


def without_marks(text: str, marks: Iterable[str]) -> str:
    """A text without them."""
    for mark in marks:
        text = text.replace(mark, "")
    return text


def place_images(
    question: str, mm_use_im_start_end: bool = False, has_image: bool = True, has_video: bool = False
) -> str:
    """A question with its image or clip in front on a line of its own, as LLaVA trains it.

    Several keep their places, since the text may refer to them one by one.
    """
    marks = marks_of(has_image, has_video)
    count = count_marks(question, marks)
    if count == 1:
        mark = next(mark for mark in marks if mark in question)
        question = f"{mark}\n{question.replace(mark, '').strip()}"
    if count:
        question = question.strip()
    if mm_use_im_start_end and has_image:
        marked = f"{DEFAULT_IM_START_TOKEN}{DEFAULT_IMAGE_TOKEN}{DEFAULT_IM_END_TOKEN}"
        question = question.replace(DEFAULT_IMAGE_TOKEN, marked)
    return question


def parse_rounds(
    conversation: Sequence[dict[str, str]],
    template: Template,
    has_image: bool,
    sample: str = "conversation",
    has_video: bool = False,
) -> list[Round]:
    """The (question, answer) pairs of a conversation, checked.

    Args:
        conversation: turns {"from": "human" | "gpt", "value": text}. A first turn that is not the human's is
            dropped, as LLaVA does. A last question without an answer is kept, with None. An empty answer trains
            the token that ends it.
        template: what the conversation will be written in.
        has_image: `<image>` stands for an image; otherwise it is text like any other.
        sample: what to call the sample in an error.
        has_video: the same for `<video>` and a clip.

    Raises:
        ConversationError: malformed or not alternating turns, no turn at all, `<image>` in an
            answer, or what a caption template (plain) has no place for.
        NoTrainableTokensError: no answer at all.
    """
    turns = _parse_turns(conversation, sample)
    values = [value for _, value in turns]
    offset = len(conversation) - len(turns)
    marks = marks_of(has_image, has_video)
    for index, value in enumerate(values[1::2]):
        for mark in marks:
            if mark in value:
                where = f"{sample}: turn {offset + 2 * index + 1} (gpt)"
                raise ConversationError(f"{where} holds {mark}; only human turns show images and clips")
    if len(values) < 2:
        raise NoTrainableTokensError(
            f"{sample}: it has no answer, so all of its labels would be masked; add one or remove the sample"
        )
    if not template.keeps_question:
        _check_caption(values, template, marks, sample)
    answers: list[str | None] = [*values[1::2], None]
    return list(zip(values[0::2], answers, strict=False))


def _parse_turns(conversation: Sequence[dict[str, str]], sample: str) -> list[tuple[str, str]]:
    """(from, value) of every turn from the first human one on, alternating."""
    if not isinstance(conversation, list | tuple) or not conversation:
        raise ConversationError(f"{sample}: expected a non-empty list of turns, got {conversation!r:.80}")
    turns = []
    for index, turn in enumerate(conversation):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str) or "from" not in turn:
            raise ConversationError(
                f'{sample}: turn {index} is not {{"from": "{HUMAN}" or "{MODEL}", "value": text}}: {turn!r:.80}'
            )
        if turn["from"] not in (HUMAN, MODEL):
            raise ConversationError(
                f"{sample}: turn {index} is from {turn['from']!r:.80}; known roles: {HUMAN!r}, {MODEL!r}"
            )
        if not is_unicode(turn["value"]):
            raise ConversationError(f"{sample}: turn {index} holds half a character (a lone surrogate); write it anew")
        turns.append((turn["from"], turn["value"]))
    dropped = int(turns[0][0] != HUMAN)
    for index, (role, _) in enumerate(turns[dropped:]):
        expected = MODEL if index % 2 else HUMAN
        if role != expected:
            raise ConversationError(
                f"{sample}: turn {index + dropped} is from {role!r}, expected {expected!r}; "
                "human and gpt must alternate"
            )
    return turns[dropped:]


def is_unicode(text: str) -> bool:
    """Whether a tokenizer can read a text: JSON may hold halves of characters, such as "\\ud800"."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_caption(values: list[str], template: Template, marks: Iterable[str], sample: str) -> None:
    if len(values) != 2:
        raise ConversationError(
            f"{sample}: template {template.name!r} takes one question and one caption, "
            f"got {len(values)} turns; use a chat template such as 'v1' for conversations"
        )
    if not count_marks(values[0], marks):
        raise ConversationError(
            f"{sample}: template {template.name!r} writes captions of images, and this sample shows none; "
            f"put {DEFAULT_IMAGE_TOKEN} into its question or use a chat template such as 'v1'"
        )


def preprocess(
    conversation: Sequence[dict[str, str]],
    tokenizer: Any,
    version: str,
    has_image: bool,
    *,
    mm_use_im_start_end: bool = False,
    sample: str = "conversation",
    has_video: bool = False,
) -> Preprocessed:
    """Ids and labels of one conversation.

    The answers and their end-of-turn tokens are learned. Nothing is truncated here, since the length is
    known only once images have been expanded.

    Args:
        conversation: turns {"from": "human" | "gpt", "value": text}, see `parse_rounds`.
        tokenizer: of the language model.
        version: name of a template, see `llava.conversation.conv_templates`.
        has_image: `<image>` stands for an image, otherwise it is text like any other.
        mm_use_im_start_end: surround every image by `<im_start>` and `<im_end>`.
        sample: what to call the sample in an error.
        has_video: `<video>` stands for a clip.

    Raises:
        ValueError: unknown template.
        ConversationError: malformed conversation.
        NoTrainableTokensError: every label would be masked.
    """
    template = get_template(version)
    rounds = parse_rounds(conversation, template, has_image, sample, has_video)
    placing = (mm_use_im_start_end, has_image, has_video)
    rounds = [(place_images(question, *placing), answer) for question, answer in rounds]
    ids, trained = encode_segments(template.render(rounds), tokenizer, has_image, has_video)
    if not any(trained):
        raise NoTrainableTokensError(
            f"{sample}: the tokenizer gives no token for its answers, so all of its labels would be masked"
        )
    labels = [token if learn else IGNORE_INDEX for token, learn in zip(ids, trained, strict=True)]
    return Preprocessed(torch.tensor(ids, dtype=torch.long), torch.tensor(labels, dtype=torch.long))


def build_rounds(
    question: str, num_images: int = 1, mm_use_im_start_end: bool = False, num_videos: int = 0
) -> list[Round]:
    """The open round of a question about images and clips, each on a line in front where it names none of its kind.

    Raises:
        ValueError: the question has `<image>` or `<video>` some other number of times.
    """
    for mark, number, kind in ((DEFAULT_VIDEO_TOKEN, num_videos, "clip"), (DEFAULT_IMAGE_TOKEN, num_images, "image")):
        count = question.count(mark)
        if number and count not in (0, number):
            raise ValueError(f"the question has {count} {mark} for {number} {kind}(s); write one for each, or none")
        if number and not count:
            question = f"{mark}\n" * number + question
    if num_images or num_videos:
        question = place_images(question, mm_use_im_start_end, num_images > 0, num_videos > 0)
    return [(question, None)]


def build_prompt(
    question: str,
    version: str,
    num_images: int = 1,
    *,
    mm_use_im_start_end: bool = False,
    system: str | None = None,
    num_videos: int = 0,
) -> str:
    """The text of a question for inference, the same as training has it up to the answer.

    Args:
        question: with or without `<image>`; without, the images come first.
        version: name of a template.
        num_images: how many images the question is about.
        mm_use_im_start_end: as the model was trained.
        system: replaces the template's system prompt.
        num_videos: how many clips the question is about.

    Raises:
        ValueError: unknown template, or a wrong number of `<image>` or `<video>`.
    """
    rounds = build_rounds(question, num_images, mm_use_im_start_end, num_videos)
    return "".join(segment.text for segment in get_template(version).render(rounds, system))


def build_prompt_ids(
    question: str,
    tokenizer: Any,
    version: str,
    num_images: int = 1,
    *,
    mm_use_im_start_end: bool = False,
    system: str | None = None,
    num_videos: int = 0,
) -> torch.Tensor:
    """`build_prompt` as ids: LongTensor [S], the start of what `preprocess` gives for that question."""
    rounds = build_rounds(question, num_images, mm_use_im_start_end, num_videos)
    ids, _ = encode_segments(get_template(version).render(rounds, system), tokenizer, num_images > 0, num_videos > 0)
    return torch.tensor(ids, dtype=torch.long)


def encode_segments(
    segments: Sequence[Segment], tokenizer: Any, has_image: bool, has_video: bool = False
) -> tuple[list[int], list[bool]]:
    """Ids of a rendered conversation, and for each whether it is learned.

    Args:
        segments: pieces of text in order.
        tokenizer: of the language model; its begin-of-sequence token comes once, in front.
        has_image: put `IMAGE_TOKEN_INDEX` where `<image>` stands.
        has_video: put `VIDEO_TOKEN_INDEX` where `<video>` stands.
    """
    ids: list[int] = []
    trained: list[bool] = []
    for marker, chunk in _split_at_marks(segments, marks_of(has_image, has_video)):
        if marker is not None:
            ids.append(marker)
            trained.append(False)
        chunk_ids, chunk_trained = _encode_chunk(_merge(chunk), tokenizer)
        ids += chunk_ids
        trained += chunk_trained
    start = leading_ids(tokenizer)
    if ids[: len(start)] == start:
        return ids, trained
    return start + ids, [False] * len(start) + trained


def _split_at_marks(segments: Sequence[Segment], marks: dict[str, int]) -> list[tuple[int | None, list[Segment]]]:
    """The text between the marks, with the id of the mark before it."""
    chunks: list[tuple[int | None, list[Segment]]] = [(None, [])]
    pattern = re.compile(f"({'|'.join(marks)})") if marks else None
    for text, trained in segments:
        for part in [text] if pattern is None else pattern.split(text):
            if part in marks:
                chunks.append((marks[part], []))
            else:
                chunks[-1][1].append(Segment(part, trained))
    return chunks


def _merge(segments: Sequence[Segment]) -> list[Segment]:
    """Neighbours of one kind joined and empty ones dropped, so that what is left alternates."""
    merged: list[Segment] = []
    for segment in segments:
        if not segment.text:
            continue
        if merged and merged[-1].trained == segment.trained:
            merged[-1] = Segment(merged[-1].text + segment.text, segment.trained)
        else:
            merged.append(segment)
    return merged


def _encode_chunk(segments: list[Segment], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Ids of alternating segments without images, and for each whether it is learned."""
    if not segments:
        return [], []
    if len(segments) == 1:
        tokens = list(tokenizer(segments[0].text, add_special_tokens=False, verbose=False)["input_ids"])
        return tokens, [segments[0].trained] * len(tokens)
    if not tokenizer.is_fast:
        return _encode_parts([[segment] for segment in segments], tokenizer)
    text = "".join(segment.text for segment in segments)
    # verbose=False: the tokenizer's warning about long texts is not for us, the model truncates later.
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = encoding["offset_mapping"]
    if not _cover(offsets, text):
        return _encode_parts([[segment] for segment in segments], tokenizer)
    owner = [index for index, segment in enumerate(segments) for _ in segment.text]
    crossed = {owner[stop - 1] for start, stop in offsets if start < stop and owner[start] != owner[stop - 1]}
    if crossed:
        # At inference a prompt ends at such a boundary, so no token of training may reach over it.
        cuts = [0, *sorted(crossed), len(segments)]
        return _encode_parts([segments[one:other] for one, other in pairwise(cuts)], tokenizer)
    trained = [segments[owner[min(start, len(text) - 1)]].trained for start, _ in offsets]
    return list(encoding["input_ids"]), trained


def _encode_parts(parts: Sequence[list[Segment]], tokenizer: Any) -> tuple[list[int], list[bool]]:
    ids: list[int] = []
    trained: list[bool] = []
    for part in parts:
        part_ids, part_trained = _encode_chunk(part, tokenizer)
        ids += part_ids
        trained += part_trained
    return ids, trained


def _cover(offsets: Sequence[tuple[int, int]], text: str) -> bool:
    """Whether offsets run through the text in order and leave out nothing but white space.

    Some releases of tokenizers report empty or jumping offsets for some vocabularies; those are not to be
    trusted. Left-out white space is normal: byte-level tokenizers trim it off.
    """
    ordered = all(one[0] <= other[0] for one, other in pairwise(offsets))
    reached = 0
    for start, stop in offsets:
        if text[reached:start].strip():
            return False
        reached = max(reached, stop)
    return ordered and not text[reached:].strip()
