"""Toy clips: shapes of the toy world that move, change and come and go, with questions that one frame does not answer.

    python playground/toy/clips.py [--output playground/data/toy_clips] [--seed 0] [--train 2400] [--heldout 100]

    videos/{train,heldout}/NAME/0.png ...   clips as folders of frames
    train.json       conversations about a clip each (Video-LLaVA's videochatgpt_tune_.json, LLaVA-Video-178K)
    heldout.jsonl    questions about clips that occur nowhere else, answers added

The same arguments give the same files. In each kind of clip every single frame is as likely whatever the answer is, so
that no frame, however chosen, says more than chance:

    direction   one object goes a cell a beat; what leaves on one side comes in on the other; it starts anywhere
    order       two objects change from any colour to any other, at different beats
    count       each beat shows one object, the one from before or another in another place

A control question, the colour of what moves, is answered by any frame.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from generate import Sample, note_own
from PIL import Image, ImageDraw
from tqdm import tqdm
from world import BACKGROUNDS, COLORS, ROUND, SHAPES, SIZES, Question, draw_shape, is_heldout, jitter

OUTPUT = Path(__file__).resolve().parent.parent / "data" / "toy_clips"
WRITTEN = ("videos", "train.json", "heldout.jsonl")
SIDE = 112  # pixels, as the toy's CLIP reads
GRID = 3  # cells in a row and in a column
BEATS = 4
FRAMES = 2 * BEATS - 1  # so that `BEATS` frames, evenly taken, show the beats
STEPS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
CONTROL = "color"


@dataclass(frozen=True)
class Sprite:
    """An object in one frame; `x` and `y` are its centre in cells, on a ground whose sides meet."""

    color: str
    shape: str
    size: str
    x: float
    y: float


@dataclass(frozen=True)
class ToyClip:
    """What each frame shows, and what can be asked."""

    kind: str
    frames: tuple[tuple[Sprite, ...], ...]
    background: str
    questions: tuple[Question, ...]

    @property
    def key(self) -> str:
        return f"{self.background}|{self.frames}"


def _sprite(rng: random.Random, color: str, shape: str, cell: int) -> Sprite:
    row, column = divmod(cell, GRID)
    return Sprite(color, shape, rng.choice(list(SIZES)), column + 0.5, row + 0.5)


def _beat(frame: int) -> int:
    """The beat that a frame belongs to: what changes is new on the way to the next beat."""
    return (frame + 1) // 2


def direction_clip(rng: random.Random) -> ToyClip:
    """One object that moves."""
    shape = rng.choice(SHAPES)
    start = _sprite(rng, rng.choice(list(COLORS)), shape, rng.randrange(GRID**2))
    way = rng.choice(list(STEPS))
    right, down = STEPS[way]
    frames = tuple(
        (replace(start, x=(start.x + right * t / 2) % GRID, y=(start.y + down * t / 2) % GRID),) for t in range(FRAMES)
    )
    questions = (
        Question(f"Which way does the {shape} move?", way, "direction"),
        Question(f"What color is the {shape}?", start.color, CONTROL),
    )
    return ToyClip("direction", frames, _background(rng), questions)


def order_clip(rng: random.Random) -> ToyClip:
    """Two objects that change their colours, one after the other."""
    shapes = rng.sample(SHAPES, 2)
    cells, beats = rng.sample(range(GRID**2), 2), rng.sample(range(1, BEATS), 2)
    tracks = []
    for shape, cell, beat in zip(shapes, cells, beats, strict=True):
        before, after = rng.sample(list(COLORS), 2)
        sprite = _sprite(rng, before, shape, cell)
        tracks.append([replace(sprite, color=after if _beat(t) >= beat else before) for t in range(FRAMES)])
    first = shapes[beats.index(min(beats))]
    asked = Question(f"Which changes color first, the {shapes[0]} or the {shapes[1]}?", first, "order")
    return ToyClip("order", tuple(zip(*tracks, strict=True)), _background(rng), (asked,))


def count_clip(rng: random.Random) -> ToyClip:
    """One object at a time: 1 to `BEATS` of them, each for one beat or several."""
    number = rng.randint(1, BEATS)
    names = rng.sample([(color, shape) for color in COLORS for shape in SHAPES], number)
    cells = rng.sample(range(GRID**2), number)
    shown = [_sprite(rng, *name, cell) for name, cell in zip(names, cells, strict=True)]
    changes = rng.sample(range(1, BEATS), number - 1)
    frames = tuple((shown[sum(_beat(t) >= beat for beat in changes)],) for t in range(FRAMES))
    asked = Question("How many objects appear?", str(number), "count")
    return ToyClip("count", frames, _background(rng), (asked,))


KINDS: dict[str, Callable[[random.Random], ToyClip]] = {
    "direction": direction_clip,
    "order": order_clip,
    "count": count_clip,
}
CATEGORIES = (*KINDS, CONTROL)


def _background(rng: random.Random) -> str:
    return rng.choice(list(BACKGROUNDS))


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
    for sprites in clip.frames:
        rng.setstate(state)
        image = Image.new("RGB", (SIDE, SIDE), jitter(rng, BACKGROUNDS[clip.background], 8))
        draw = ImageDraw.Draw(image)
        for sprite in sprites:
            _draw_sprite(draw, sprite, rng)
        images.append(image)
    return images


def _draw_sprite(draw: ImageDraw.ImageDraw, sprite: Sprite, rng: random.Random) -> None:
    radius = SIZES[sprite.size] * SIDE / 2 * rng.uniform(0.93, 1.07)
    x, y = (place + rng.uniform(-0.1, 0.1) for place in (sprite.x, sprite.y))
    fill, angle = jitter(rng, COLORS[sprite.color], 10), rng.uniform(-0.12, 0.12)
    for across in (x - GRID, x, x + GRID):  # what sticks out on one side shows on the other
        for along in (y - GRID, y, y + GRID):
            center = (across * SIDE / GRID, along * SIDE / GRID)
            draw_shape(draw, sprite.shape, center, radius, fill, 0.0 if sprite.shape in ROUND else angle)


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
        questions = rng.sample(clip.questions, len(clip.questions))
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
    (output / "train.json").write_text(json.dumps(talks, indent=1) + "\n", encoding="utf-8")
    lines = "".join(json.dumps(row) + "\n" for row in questions)
    (output / "heldout.jsonl").write_text(lines, encoding="utf-8")


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
