"""The text that the toy language model learns from, as batches of token ids.

Shapes: B samples, S positions, W words of a bag.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlamaTokenizer
from world import MAX_OBJECTS, Scene, ask, caption, describe, notes, sample_scene

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
IGNORE = -100
POOL = 8  # batches that are sorted by length together
SHARES = {"chat": 0.8, "scene": 0.95, "bags": 0.85}  # conversations, samples with a scene, and those in bags
MOST_REPEATS = 9  # of a note in bags: an object shows in about as many patches


@dataclass(frozen=True)
class Span:
    """Text that is learnt or only read, or notes that take one position each."""

    text: str = ""
    learnt: bool = False
    bags: tuple[str, ...] = ()


@dataclass
class Row:
    """One sample: the ids at each position, and what is to be predicted there."""

    ids: list[list[int]]
    labels: list[int]


@dataclass
class Batch:
    """Right-padded samples: ids [B, S, W] with -1 in empty slots, mask and labels [B, S]."""

    ids: Tensor
    mask: Tensor
    labels: Tensor


def _told(scene: Scene, rng: random.Random) -> Span:
    if rng.random() < SHARES["bags"]:
        return Span(bags=tuple(" ".join(words) for words in notes(scene, rng, most=MOST_REPEATS)))
    return Span(describe(scene, rng))


def _conversation(scene: Scene, rng: random.Random, progress: float) -> list[Span]:
    """Questions about a scene. The system prompt, always the same, comes late: it takes time."""
    opening = f"{SYSTEM} USER: " if rng.random() < progress**2 else "USER: "
    spans, lead = [], ""
    if rng.random() < SHARES["scene"]:
        spans, opening, lead = [Span(opening), _told(scene, rng)], "", "\n"
    for question in ask(scene, rng):
        spans += [Span(f"{opening}{lead}{question.text} ASSISTANT:"), Span(question.answer + "</s>", learnt=True)]
        opening, lead = "USER: ", ""
    return spans


def _captioned(scene: Scene, rng: random.Random) -> list[Span]:
    """A caption after what it puts into a sentence."""
    told = [_told(scene, rng)] if rng.random() < SHARES["scene"] else []
    return [*told, Span(caption(scene) + "\n", learnt=True)]


def sample(rng: random.Random, progress: float) -> list[Span]:
    """A new sample. Looking things up is learnt on scenes of one object, then applied to fuller ones.

    Args:
        progress: part of the training that is over, 0 to 1.
    """
    scene = sample_scene(rng, most=min(MAX_OBJECTS, 1 + int(progress * 3 * MAX_OBJECTS)))
    return _conversation(scene, rng, progress) if rng.random() < SHARES["chat"] else _captioned(scene, rng)


def encode(tokenizer: LlamaTokenizer, spans: list[Span]) -> Row:
    """Ids and labels of a sample, begun with <s>."""
    row = Row([[tokenizer.bos_token_id]], [IGNORE])
    for span in spans:
        pieces = tokenizer(span.text, add_special_tokens=False).input_ids if span.text else []
        row.ids += [[piece] for piece in pieces]
        row.labels += pieces if span.learnt else [IGNORE] * len(pieces)
        row.ids += [tokenizer(bag, add_special_tokens=False).input_ids for bag in span.bags]
        row.labels += [IGNORE] * len(span.bags)
    return row


def collate(rows: list[Row]) -> Batch:
    """Pad samples to a batch."""
    length = max(len(row.ids) for row in rows)
    width = max(len(bag) for row in rows for bag in row.ids)
    blank = [-1] * width
    bags = [[bag + blank[len(bag) :] for bag in row.ids] + [blank] * (length - len(row.ids)) for row in rows]
    labels = [row.labels + [IGNORE] * (length - len(row.labels)) for row in rows]
    ids = torch.tensor(bags)
    return Batch(ids, (ids[..., 0] >= 0).long(), torch.tensor(labels))


def batches(tokenizer: LlamaTokenizer, rng: random.Random, size: int, steps: int) -> Iterator[Batch]:
    """`steps` batches of new samples, those of like length together."""
    for step in range(0, steps, POOL):
        rows = [encode(tokenizer, sample(rng, step / steps)) for _ in range(POOL * size)]
        rows.sort(key=lambda row: len(row.ids))
        chunks = [rows[i : i + size] for i in range(0, len(rows), size)]
        rng.shuffle(chunks)
        yield from map(collate, chunks)
