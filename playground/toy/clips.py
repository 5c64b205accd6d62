"""Toy clips: shapes of the toy world that move, change and come and go, with questions that one frame does not answer.

    python playground/toy/clips.py [--output playground/data/toy_clips] [--seed 0] [--train 2400] [--heldout 100]

    videos/{train,heldout}/NAME/0.png ...   clips as folders of frames
    train.json       conversations about a clip each (Video-LLaVA's videochatgpt_tune_.json, LLaVA-Video-178K)
    heldout.jsonl    questions about clips that occur nowhere else, answers added

The same arguments give the same files. A clip has so many beats, of two frames each:

    direction   one object goes two cells, with one rest; what leaves on one side comes in on the other
    order       one object at a time: a bystander, then the two that are asked about
    count       one object at a time: one to four

The first frame, and any frame of which one is not told when it was, is as likely whatever the answer is, so that it
helps no more than a guess. A control question, the colour of what moves, is answered by any frame. Training also asks
what the toy's pictures are asked, of all that a clip shows, and where something is at first and at last.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from generate import Sample, note_own, write_data
from PIL import Image, ImageDraw
from tqdm import tqdm
from world import (
    BACKGROUNDS,
    CELLS,
    COLORS,
    SHAPES,
    SIZES,
    Question,
    Scene,
    Thing,
    ask,
    draw_thing,
    is_heldout,
    jitter,
)

OUTPUT = Path(__file__).resolve().parent.parent / "data" / "toy_clips"
WRITTEN = ("videos", "train.json", "heldout.jsonl")
SIDE = 112  # pixels, as the toy's CLIP reads
GRID = 3  # cells in a row and in a column
BEATS = 4
FRAMES_A_BEAT = 2
FRAMES = FRAMES_A_BEAT * BEATS
STEPS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
CONTROL = "color"


@dataclass(frozen=True)
class ToyClip:
    """What each beat shows, the background, the question about time, and what else can be asked."""

    kind: str
    beats: tuple[Thing, ...]
    background: str
    asked: Question
    control: Question | None = None
    others: tuple[Question, ...] = ()

    @property
    def key(self) -> str:
        return f"{self.background}|" + "|".join(thing.phrase for thing in self.beats)

    @property
    def questions(self) -> list[Question]:
        """Those that are held out."""
        return [self.asked, *([self.control] if self.control else [])]


def _spread(things: list[Thing], rng: random.Random) -> tuple[Thing, ...]:
    """Things one after the other, each for one beat or several."""
    ends = sorted(rng.sample(range(1, BEATS), len(things) - 1))
    return tuple(things[sum(beat >= end for end in ends)] for beat in range(BEATS))


def _things(number: int, rng: random.Random) -> list[Thing]:
    """Objects of different colours, shapes and cells."""
    traits = (rng.sample(list(COLORS), number), rng.sample(SHAPES, number), rng.sample(range(len(CELLS)), number))
    return [Thing(color, shape, rng.choice(list(SIZES)), cell) for color, shape, cell in zip(*traits, strict=True)]


def _still_questions(things: list[Thing], background: str, rng: random.Random) -> tuple[Question, ...]:
    """What a picture of all objects would be asked, but for their number."""
    scene = Scene(tuple(sorted(things, key=lambda thing: thing.cell)), background)
    return tuple(question for question in ask(scene, rng) if question.category != "count")


def direction_clip(rng: random.Random) -> ToyClip:
    """One object that moves."""
    (thing,), way, background = _things(1, rng), rng.choice(list(STEPS)), rng.choice(list(BACKGROUNDS))
    right, down = STEPS[way]
    row, column = divmod(thing.cell, GRID)
    places = [(row + down * step) % GRID * GRID + (column + right * step) % GRID for step in range(GRID)]
    track = _spread([replace(thing, cell=place) for place in places], rng)
    return ToyClip(
        "direction",
        track,
        background,
        Question(f"Which way does the {thing.shape} move?", way, "direction"),
        Question(f"What color is the {thing.shape}?", thing.color, CONTROL),
        (
            Question(f"Where is the {thing.shape} at first?", CELLS[places[0]], "position"),
            Question(f"Where is the {thing.shape} at last?", CELLS[places[-1]], "position"),
        ),
    )


def order_clip(rng: random.Random) -> ToyClip:
    """A bystander, then two objects one after the other."""
    things, background = _things(3, rng), rng.choice(list(BACKGROUNDS))
    first, second = (things[place].shape for place in rng.sample((1, 2), 2))
    asked = Question(f"Which comes first, the {first} or the {second}?", things[1].shape, "order")
    others = _still_questions(things, background, rng)
    return ToyClip("order", _spread(things, rng), background, asked, others=others)


def count_clip(rng: random.Random) -> ToyClip:
    """1 to `BEATS` objects, one after the other."""
    things, background = _things(rng.randint(1, BEATS), rng), rng.choice(list(BACKGROUNDS))
    asked = Question("How many objects are there in all?", str(len(things)), "count")
    return ToyClip("count", _spread(things, rng), background, asked, others=_still_questions(things, background, rng))


KINDS: dict[str, Callable[[random.Random], ToyClip]] = {
    "direction": direction_clip,
    "order": order_clip,
    "count": count_clip,
}
CATEGORIES = (*KINDS, CONTROL)


def sample_clip(kind: str, rng: random.Random, heldout: bool = False) -> ToyClip:
    """A random clip of a kind, of the held-out part or of the rest."""
    while True:
        clip = KINDS[kind](rng)
        if is_heldout(clip) == heldout:
            return clip


def draw_clip(clip: ToyClip, rng: random.Random) -> list[Image.Image]:
    """The frames, RGB. What the world leaves open (exact place, size, colour, angle) is the same in all."""
    state = rng.getstate()
    images = []
    for thing in clip.beats:
        rng.setstate(state)
        image = Image.new("RGB", (SIDE, SIDE), jitter(rng, BACKGROUNDS[clip.background], 8))
        draw_thing(ImageDraw.Draw(image), thing, image.size, rng)
        images += [image] * FRAMES_A_BEAT
    return images


def _save(clip: ToyClip, rng: random.Random, folder: Path, name: str) -> str:
    """Write a clip's frames. Returns its folder's path below the videos folder."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(draw_clip(clip, rng)):
        image.save(folder / name / f"{number}.png")
    return f"{folder.name}/{name}"


def _conversation(questions: list[Question]) -> list[dict[str, str]]:
    turns = []
    for question in questions:
        opening = "" if turns else "<video>\n"
        turns += [{"from": "human", "value": opening + question.text}, {"from": "gpt", "value": question.answer}]
    return turns


def train_samples(number: int, rng: random.Random, videos: Path) -> list[Sample]:
    """Conversations, `number` of them, with their clips; every kind equally often."""
    samples: list[Sample] = []
    for index in tqdm(range(number), desc="training clips", leave=False, disable=None):
        clip = sample_clip(list(KINDS)[index % len(KINDS)], rng)
        questions = clip.questions + list(clip.others)
        rng.shuffle(questions)
        video = _save(clip, rng, videos, f"{index:06d}")
        samples.append({"id": f"clip-{index:06d}", "video": video, "conversations": _conversation(questions)})
    return samples


def heldout_questions(number: int, rng: random.Random, videos: Path) -> list[Sample]:
    """`number` questions of each type."""
    rows: list[Sample] = []
    for index in tqdm(range(number * len(KINDS)), desc="held-out clips", leave=False, disable=None):
        clip = sample_clip(list(KINDS)[index % len(KINDS)], rng, heldout=True)
        video = _save(clip, rng, videos, f"{index:06d}")
        for question in clip.questions:
            row = {"question_id": len(rows), "video": video, "text": question.text}
            rows.append(row | {"answer": question.answer, "category": question.category})
    return rows


def generate(output: Path, seed: int = 0, train: int = 2400, heldout: int = 100) -> None:
    """Write all clips below `output`.

    Args:
        output: the folder.
        seed: of all that is drawn.
        train: conversations to train on.
        heldout: held-out questions of each type.

    Raises:
        ValueError: `output` holds data that this script did not write.
    """
    note_own(output, WRITTEN)
    videos = output / "videos"
    # One random stream each: asking for more of one part leaves the other as it is.
    talks = train_samples(train, random.Random(f"{seed}-train"), videos / "train")
    questions = heldout_questions(heldout, random.Random(f"{seed}-heldout"), videos / "heldout")
    write_data(output, {"train": talks}, questions)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the toy clips, their conversations and questions.")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=int, default=2400, help="conversations, a clip each")
    parser.add_argument("--heldout", type=int, default=100, help="held-out questions of each type")
    try:
        generate(**vars(parser.parse_args()))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
