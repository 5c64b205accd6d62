"""The toy clips: answers follow from the pixels of all frames; those about time do not from the pixels of one."""

from __future__ import annotations

import json
import random
import re
import sys
from collections import Counter, defaultdict
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from transformers import AutoTokenizer, CLIPImageProcessor

from llava.constants import VIDEO_TOKEN_INDEX
from llava.data import LazySupervisedDataset
from llava.model.language_model.families import LlavaLlamaForCausalLM
from llava.video import Sampling

TOY = Path(__file__).resolve().parent.parent / "playground" / "toy"
sys.path.insert(0, str(TOY))

import clip_report  # noqa: E402
import clips  # noqa: E402
import world  # noqa: E402

SIZES = {"train": 30, "heldout": 12}
CENTER = clips.SIDE // 2
Mask = np.ndarray  # [H, W] bool


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips") / "toy"
    clips.generate(folder, seed=3, **SIZES)
    return folder


def asked(data: Path) -> list[tuple[str, str, str]]:
    """Clip, question and answer of all data."""
    found = []
    for sample in json.loads((data / "train.json").read_text()):
        said = [turn["value"].removeprefix("<video>\n") for turn in sample["conversations"]]
        found += [(sample["video"], *pair) for pair in zip(said[::2], said[1::2], strict=True)]
    for line in (data / "heldout.jsonl").read_text().splitlines():
        row = json.loads(line)
        found.append((row["video"], row["text"], row["answer"]))
    return found


class Watched:
    """What the pixels of a clip say: in each frame one object, which is what differs from the ground."""

    def __init__(self, folder: Path, frames: slice = slice(None)) -> None:
        names = [folder / f"{number}.png" for number in range(clips.FRAMES)]
        self.pixels = [np.asarray(Image.open(name)).astype(int) for name in names[frames]]
        colors, counts = np.unique(self.pixels[0].reshape(-1, 3), axis=0, return_counts=True)
        self.shown = [(pixels != colors[counts.argmax()]).any(axis=2) for pixels in self.pixels]
        corners = [(_corner(mask)[::-1] * clips.GRID // clips.SIDE) for mask in self.shown]
        self.places = [(int(column), int(row)) for column, row in corners]

    def cell(self, frame: int) -> str:
        column, row = self.places[frame]
        return world.CELLS[row * clips.GRID + column]

    def colors(self) -> set[str]:
        found = set()
        for pixels, mask in zip(self.pixels, self.shown, strict=True):
            distances = {name: np.abs(pixels[mask] - value).sum() for name, value in world.COLORS.items()}
            found.add(min(distances, key=distances.__getitem__))
        return found

    def shapes(self) -> list[str]:
        """One after the other."""
        return list(dict.fromkeys(_shape(mask) for mask in self.shown))

    def direction(self) -> str:
        steps = {
            tuple((b - a + 1) % clips.GRID - 1 for a, b in zip(one, other, strict=True))
            for one, other in pairwise(self.places)
            if one != other
        }
        (step,) = steps  # always the same
        return next(way for way, known in clips.STEPS.items() if known == step)

    def answer(self, question: str) -> str | None:
        """The answer to a question of the clips' own; None for one of the world's about pictures."""
        if question == "How many objects are there in all?":
            return str(1 + sum(bool((one != other).any()) for one, other in pairwise(self.pixels)))
        if match := re.fullmatch(r"Which comes first, the (\w+) or the (\w+)\?", question):
            (first, *_), shapes = self.shapes(), self.shapes()
            assert set(match.groups()) < set(shapes) and first not in match.groups()
            return next(shape for shape in shapes if shape in match.groups())
        if match := re.fullmatch(r"Where is the (\w+) at (first|last)\?", question):
            assert self.shapes() == [match[1]]
            return self.cell(0 if match[2] == "first" else -1)
        if match := re.fullmatch(r"Which way does the (\w+) move\?", question):
            assert self.shapes() == [match[1]]
            return self.direction()
        return None


def _corner(mask: Mask) -> np.ndarray:
    """(row, column) of the middle of what a mask shows, in pixels."""
    places = np.nonzero(mask)
    return np.array([(axis.min() + axis.max()) // 2 for axis in places])


def _centered(mask: Mask) -> Mask:
    return np.roll(mask, CENTER - _corner(mask), axis=(0, 1))


@cache
def _outlines() -> list[tuple[str, Mask]]:
    """Each shape as the world draws it, in many sizes and angles."""
    found, rng = list[tuple[str, Mask]](), random.Random(0)
    for shape in world.SHAPES:
        for size in list(world.SIZES) * 12:
            image = Image.new("RGB", (clips.SIDE, clips.SIDE))
            world.draw_thing(ImageDraw.Draw(image), world.Thing("red", shape, size, 4), image.size, rng)
            found.append((shape, _centered(np.asarray(image).any(axis=2))))
    return found


def _shape(mask: Mask) -> str:
    """The shape whose outline a mask resembles most."""
    mask = _centered(mask)
    return max(_outlines(), key=lambda known: (mask & known[1]).sum() / (mask | known[1]).sum())[0]


def test_answers_follow_from_the_pixels(data: Path) -> None:
    wrong, told = [], Counter[str]()
    for clip, question, answer in asked(data):
        found = Watched(data / "videos" / clip).answer(question)
        if found is not None:
            told[answer] += 1
            wrong += [(clip, question, answer, found)] if found != answer else []
    assert not wrong
    assert told.total() == SIZES["train"] // 3 * 5 + SIZES["heldout"] * 3
    assert {*clips.STEPS, "1", "2", "3", "4", "circle", "square"} <= told.keys()


def test_the_control_needs_one_frame(data: Path) -> None:
    """Whichever it is."""
    rows = [json.loads(line) for line in (data / "heldout.jsonl").read_text().splitlines()]
    controls = [row for row in rows if row["category"] == clips.CONTROL]
    assert len(controls) == SIZES["heldout"]
    for row in controls:
        for frame in range(clips.FRAMES):
            assert Watched(data / "videos" / row["video"], slice(frame, frame + 1)).colors() == {row["answer"]}


Clue = tuple[object, ...]


def clues(kind: str, number: int, rng: random.Random) -> list[tuple[dict[str, Clue], str]]:
    """What single frames of clips show, and the answers: of shapes, which of those named."""
    rows = []
    for clip in (clips.sample_clip(kind, rng) for _ in range(number)):
        shown = {"of the first frame": clip.beats[0], "of a frame at some time": rng.choice(clip.beats)}
        named = re.findall(r"the (\w+)", clip.asked.text)
        answer = {name: f"named {place}" for place, name in enumerate(named)}.get(clip.asked.answer, clip.asked.answer)
        told: dict[str, Clue] = {}
        for when, thing in shown.items():
            is_named = tuple(thing.shape == name for name in named)
            told[f"place {when}"] = (thing.cell, *is_named)
            told[f"look {when}"] = (thing.color, thing.shape)
        rows.append((told, answer))
    return rows


@pytest.mark.parametrize(("kind", "chance"), [("direction", 1 / 4), ("order", 1 / 2), ("count", 1 / 4)])
def test_one_frame_does_not_tell_the_answer(kind: str, chance: float) -> None:
    """What most often goes with what a frame shows is right as often as a guess."""
    rng = random.Random(0)
    seen: dict[object, Counter[str]] = defaultdict(Counter)
    for told, answer in clues(kind, 4000, rng):
        for clue in told.items():
            seen[clue][answer] += 1
    right, tests = Counter[str](), clues(kind, 3000, rng)
    for told, answer in tests:
        for name, clue in told.items():
            right[name] += max(seen[name, clue], default="", key=seen[name, clue].__getitem__) == answer
    assert len(right) == 4
    assert max(right.values()) / len(tests) < chance + 0.04


def test_frames_evenly_taken_are_one_of_each_beat() -> None:
    taken = np.linspace(0, clips.FRAMES - 1, clips.BEATS).astype(int)
    assert (taken // clips.FRAMES_A_BEAT).tolist() == list(range(clips.BEATS))


def test_the_same_seed_gives_the_same_clips(data: Path, tmp_path: Path) -> None:
    clips.generate(tmp_path / "again", seed=3, train=SIZES["train"], heldout=1)
    for name in ("train.json", *(f"videos/train/000029/{number}.png" for number in range(clips.FRAMES))):
        assert (tmp_path / "again" / name).read_bytes() == (data / name).read_bytes()
    clips.generate(tmp_path / "other", seed=4, train=SIZES["train"], heldout=0)
    assert (tmp_path / "other" / "train.json").read_text() != (data / "train.json").read_text()


def test_heldout_clips_do_not_occur_in_training() -> None:
    rng = random.Random(0)
    trained, heldout = ([clips.sample_clip("count", rng, part) for _ in range(300)] for part in (False, True))
    assert not {clip.key for clip in trained} & {clip.key for clip in heldout}
    assert all(world.is_heldout(clip) for clip in heldout)


def test_training_reads_the_clips(data: Path) -> None:
    """The JSON through the training data's code: one marker a conversation, and the pixels of the beats."""
    processor = CLIPImageProcessor.from_pretrained(TOY / "models" / "clip")
    dataset = LazySupervisedDataset(
        data / "train.json",
        AutoTokenizer.from_pretrained(TOY / "models" / "vicuna"),
        processor,
        version="v1",
        video_folder=data / "videos",
        sampling=Sampling(clips.BEATS),
    )
    assert len(dataset) == SIZES["train"]
    for item in (dataset[0], dataset[len(dataset) - 1]):
        assert [video.shape for video in item["videos"]] == [(clips.BEATS, 3, clips.SIDE, clips.SIDE)]
        assert int((item["input_ids"] == VIDEO_TOKEN_INDEX).sum()) == 1
        assert int((item["labels"] >= 0).sum()) > 4
    name = json.loads((data / "train.json").read_text())[0]["video"]
    for beat, frame in enumerate(dataset[0]["videos"][0]):
        picture = Image.open(data / "videos" / name / f"{beat * clips.FRAMES_A_BEAT}.png")
        torch.testing.assert_close(frame, processor(picture, return_tensors="pt").pixel_values[0])


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy's models, with a projector of random weights."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = LlavaLlamaForCausalLM.from_pretrained(str(TOY / "models" / "vicuna"), dtype=torch.float32)
    tower = {"vision_tower": str(TOY / "models" / "clip"), "mm_vision_select_layer": -2}
    model.get_model().initialize_vision_modules(SimpleNamespace(**tower, mm_projector_type="mlp2x_gelu"))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TOY / "models" / "vicuna").save_pretrained(folder)
    return folder


def test_the_report(data: Path, untrained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A row for each way to ask and for each method that can be asked, with the tokens of a clip."""
    names = "divprune,prumerge,fastv,stf"
    clip_report.main(
        ["--frames", str(untrained), "--one-frame", str(untrained), "--data", str(data), "--methods", names]
    )
    told = capsys.readouterr().out
    assert "12 direction, 12 order, 12 count, 12 color" in told
    rows = [line.strip("| ").split(" | ") for line in told.splitlines() if line.startswith("|")]
    tokens = {row[0]: row[1:3] for row in rows}
    assert [row[1] for row in rows[2:6]] == ["256", "64", "0", "64"]
    assert tokens["all tokens"] == ["256", "256"]
    assert tokens["`divprune`"] == tokens["`divprune`, `frames: joint`"] == ["64", "64"]
    assert tokens["`fastv`"] == tokens["`fastv`, `pool: frame`"] == ["256", "112"]
    assert "`prumerge`, its own count" in tokens
    assert "- `stf`: " in told and not {"`stf`"} & tokens.keys()
