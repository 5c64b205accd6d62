"""The toy world: scenes of coloured shapes, how they are drawn, described and asked about.

Everything is a function of a `random.Random`, so one seed gives one world. A scene belongs to the held-out
part by a hash of its content (`is_heldout`), whatever the seed: nothing that is trained, the tower and the
language model included, has seen a held-out scene.
"""

from __future__ import annotations

import math
import random
import zlib
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image, ImageDraw

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 40),
    "orange": (250, 140, 25),
    "yellow": (245, 220, 40),
    "green": (40, 160, 60),
    "cyan": (50, 205, 215),
    "blue": (35, 70, 205),
    "purple": (135, 50, 165),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = {"small": 0.19, "large": 0.31}  # diameter as a fraction of the image's shorter side
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (238, 238, 236),
    "gray": (150, 150, 152),
    "black": (22, 22, 24),
    "brown": (112, 82, 58),
}
ROWS = ("top", "", "bottom")
COLUMNS = ("left", "", "right")
CELLS = tuple(" ".join(w for w in (r, c) if w) or "center" for r in ROWS for c in COLUMNS)
FRAMES = ((144, 144), (168, 132), (132, 168), (176, 176), (192, 144), (144, 192))  # width, height in pixels
HELDOUT_SHARE = 8  # one scene in this many is held out
MAX_OBJECTS = 4
CATEGORIES = ("color", "shape", "position", "size", "object", "count", "exists", "background")


@dataclass(frozen=True)
class Thing:
    """One object. `cell` indexes CELLS, reading order."""

    color: str
    shape: str
    size: str
    cell: int

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"

    @property
    def phrase(self) -> str:
        return f"a {self.size} {self.name} at the {CELLS[self.cell]}"

    @property
    def tags(self) -> list[str]:
        return [self.size, self.color, self.shape, CELLS[self.cell]]


@dataclass(frozen=True)
class Scene:
    """Objects in reading order of their cells, and the background. No two objects share colour and shape."""

    things: tuple[Thing, ...]
    background: str

    @property
    def key(self) -> str:
        return f"{self.background}|" + "|".join(t.phrase for t in self.things)


@dataclass(frozen=True)
class Question:
    """One question with its answer and its type."""

    text: str
    answer: str
    category: str


class Keyed(Protocol):
    """Something whose content a text tells."""

    @property
    def key(self) -> str: ...


def is_heldout(scene: Keyed) -> bool:
    """Whether the scene may only be used to test."""
    return zlib.crc32(scene.key.encode()) % HELDOUT_SHARE == 0


def sample_scene(rng: random.Random, heldout: bool = False, most: int = MAX_OBJECTS) -> Scene:
    """A random scene of 1 to `most` objects, of the held-out part or of the rest."""
    while True:
        number = rng.randint(1, most)
        names = rng.sample([(c, s) for c in COLORS for s in SHAPES], number)
        cells = sorted(rng.sample(range(len(CELLS)), number))
        things = (
            Thing(color, shape, rng.choice(list(SIZES)), cell)
            for (color, shape), cell in zip(names, cells, strict=True)
        )
        scene = Scene(tuple(things), rng.choice(list(BACKGROUNDS)))
        if is_heldout(scene) == heldout:
            return scene


# Pictures


def _polygon(shape: str, radius: float, angle: float) -> list[tuple[float, float]]:
    """Corners of a straight-edged shape around the origin."""
    if shape == "square":
        polar = [(radius * 1.1, math.pi / 4 + k * math.pi / 2) for k in range(4)]
    elif shape == "triangle":
        polar = [(radius * 1.15, -math.pi / 2 + k * 2 * math.pi / 3) for k in range(3)]
    elif shape == "star":
        polar = [(radius * (1.2 if k % 2 == 0 else 0.48), -math.pi / 2 + k * math.pi / 5) for k in range(10)]
    else:  # cross
        a, b = radius * 1.05, radius * 0.36
        corners = [(-b, -a), (b, -a), (b, -b), (a, -b), (a, b), (b, b)]
        corners += [(-x, -y) for x, y in corners]
        polar = [(math.hypot(x, y), math.atan2(y, x)) for x, y in corners]
    return [(r * math.cos(t + angle), r * math.sin(t + angle)) for r, t in polar]


def jitter(rng: random.Random, color: tuple[int, int, int], spread: int) -> tuple[int, int, int]:
    """A colour near `color`, each channel at most `spread` away."""
    r, g, b = (min(255, max(0, c + rng.randint(-spread, spread))) for c in color)
    return r, g, b


def draw_thing(draw: ImageDraw.ImageDraw, thing: Thing, frame: tuple[int, int], rng: random.Random) -> None:
    """Draw one object inside its cell, with a little freedom of place, size, colour and angle."""
    width, height = frame
    radius = SIZES[thing.size] * min(frame) / 2 * rng.uniform(0.93, 1.07)
    row, column = divmod(thing.cell, 3)
    x = (column + 0.5 + rng.uniform(-0.1, 0.1)) * width / 3
    y = (row + 0.5 + rng.uniform(-0.1, 0.1)) * height / 3
    x = min(max(x, radius * 1.1), width - radius * 1.1)
    y = min(max(y, radius * 1.1), height - radius * 1.1)
    fill = jitter(rng, COLORS[thing.color], 10)
    box = (x - radius, y - radius, x + radius, y + radius)
    if thing.shape == "circle":
        draw.ellipse(box, fill=fill)
    elif thing.shape == "ring":
        draw.ellipse(box, outline=fill, width=max(2, round(radius * 0.42)))
    else:
        corners = _polygon(thing.shape, radius, rng.uniform(-0.12, 0.12))
        draw.polygon([(x + dx, y + dy) for dx, dy in corners], fill=fill)


def draw_scene(scene: Scene, rng: random.Random) -> tuple[Image.Image, Image.Image]:
    """Draw a scene.

    Returns the RGB picture and, of the same size, a mode "L" map that says which object each pixel shows: 0
    for the background, otherwise 1 + its index in `scene.things`. One picture in two has a noisy background.
    """
    frame = rng.choice(FRAMES)
    ground = jitter(rng, BACKGROUNDS[scene.background], 8)
    if rng.random() < 0.5:
        noise = np.random.default_rng(rng.getrandbits(32)).normal(0, 9, (frame[1] // 4, frame[0] // 4, 1))
        pixels = np.clip(np.asarray(ground) + noise, 0, 255).astype(np.uint8)
        image = Image.fromarray(pixels).resize(frame, Image.Resampling.BILINEAR)
    else:
        image = Image.new("RGB", frame, ground)
    owner = Image.new("L", frame, 0)
    for index, thing in enumerate(scene.things):
        state = rng.getstate()
        draw_thing(ImageDraw.Draw(image), thing, frame, rng)
        rng.setstate(state)  # the same strokes once more, on the map
        _draw_on_map(owner, thing, frame, rng, 1 + index)
    return image, owner


def _draw_on_map(owner: Image.Image, thing: Thing, frame: tuple[int, int], rng: random.Random, mark: int) -> None:
    stencil = Image.new("RGB", frame, (0, 0, 0))
    draw_thing(ImageDraw.Draw(stencil), thing, frame, rng)
    owner.paste(mark, mask=stencil.convert("L").point(lambda v: 255 if v else 0))


# Words


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def caption(scene: Scene) -> str:
    """One sentence that says everything about the scene, objects in reading order."""
    phrases = [t.phrase for t in scene.things]
    listed = phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]
    return f"{listed}, on a {scene.background} background."


def notes(scene: Scene, rng: random.Random, most: int = 3) -> list[list[str]]:
    """The scene in shuffled notes, each the words about one object or the background.

    Every one is said 1 to `most` times, once more likely than often, and in full at least once.
    """
    listed = []
    for words in [thing.tags for thing in scene.things] + [[scene.background, "background"]]:
        times = min(rng.randint(1, most), rng.randint(1, most))
        listed.append(words)
        listed += [[w for w in words if rng.random() < 0.9] or words for _ in range(times - 1)]
    rng.shuffle(listed)
    return listed


def describe(scene: Scene, rng: random.Random) -> str:
    """The scene in words: as its caption, or as notes."""
    if rng.random() < 0.3:
        return caption(scene)
    return ", ".join(" ".join(words) for words in notes(scene, rng)) + "."


def _about(scene: Scene, thing: Thing, rng: random.Random) -> Question:
    """A question about one object, of a random type among those that have one answer in this scene."""
    same_shape = sum(t.shape == thing.shape for t in scene.things)
    same_color = sum(t.color == thing.color for t in scene.things)
    options = [
        Question(f"Where is the {thing.name}?", CELLS[thing.cell], "position"),
        Question(f"How big is the {thing.name}?", thing.size, "size"),
        Question(f"Is there {_a(thing.name)}?", "yes", "exists"),
        Question(f"What is at the {CELLS[thing.cell]}?", _a(thing.name), "object"),
    ]
    if same_shape == 1:
        options.append(Question(f"What color is the {thing.shape}?", thing.color, "color"))
    if same_color == 1:
        options.append(Question(f"What shape is the {thing.color} object?", thing.shape, "shape"))
    return rng.choice(options)


def _absent(scene: Scene, rng: random.Random) -> Question:
    """Ask for an object that is not there but resembles one that is: its colour or its shape is another."""
    names = {t.name for t in scene.things}
    while True:
        thing = rng.choice(scene.things)
        color, shape = thing.color, thing.shape
        if rng.random() < 0.5:
            color = rng.choice(list(COLORS))
        else:
            shape = rng.choice(SHAPES)
        if f"{color} {shape}" not in names:
            return Question(f"Is there {_a(f'{color} {shape}')}?", "no", "exists")


def ask(scene: Scene, rng: random.Random) -> list[Question]:
    """Questions in random order, at most one an object: an earlier one does not tell a later answer."""
    questions = [_about(scene, thing, rng) for thing in scene.things]
    questions.append(Question("How many objects are there?", str(len(scene.things)), "count"))
    if rng.random() < 0.5:
        questions.append(_absent(scene, rng))
    if rng.random() < 0.5:
        questions.append(Question("What color is the background?", scene.background, "background"))
    rng.shuffle(questions)
    return questions
