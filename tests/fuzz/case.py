"""One case: a fresh copy of the user's folder, commands in it, and what was wrong with them."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.fuzz import judge
from tests.fuzz.processes import Command, Trap, call_in_fork
from tests.results import KINDS
from tests.tiny_world import make_tiny_world

# How a command may end, by its name: right, a mistake, a place that can't be written to, stopped with a checkpoint.
CODES = {"train": (0, 2, 74, 75), "doctor": (0, 1, 2)}
OTHER_CODES = (0, 2, 74)
KINDS_OF_RUN = ("full", "lora", "projector")
BASES = {"full": None, "lora": "llm", "projector": "llm"}
STEPS = 3
RUN: dict[str, Any] = {
    "model_name_or_path": "llm",
    "vision_tower": "clip",
    "version": "v1",
    "data_path": "data.json",
    "image_folder": "images",
    "image_aspect_ratio": "pad",
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "per_device_train_batch_size": 2,
    "dataloader_num_workers": 0,
    "max_steps": STEPS,
    "learning_rate": 1e-2,
    "save_strategy": "steps",
    "save_steps": 2,
    "logging_steps": 1,
    "disable_tqdm": True,
    "report_to": "none",
}


def settings_of(kind: str, output: str, **changes: Any) -> dict[str, Any]:
    """A short run's settings; a change to None leaves a setting out."""
    data = {"data_path": "captions.json"} if kind == "projector" else {}
    values = {**RUN, **KINDS[kind], **data, "output_dir": output, **changes}
    return {name: value for name, value in values.items() if value is not None}


@dataclass
class World:
    """The user's folder: `folder` is where a case runs, `template` what it begins with.

    The folder holds a base (`llm`), a tower (`clip`), data, questions, runs of each kind (`runs/KIND`), a llava-hf
    checkpoint (`hf`), and notes of the user's own in all of them.
    """

    folder: Path
    template: Path
    log: Path
    calls: dict[str, int] = field(default_factory=dict)  # of uninterrupted commands, for traps
    losses: dict[str, dict[int, float]] = field(default_factory=dict)  # of uninterrupted runs

    @staticmethod
    def make(root: Path) -> World:
        """Build everything once.

        Raises:
            RuntimeError: a command that should work failed.
        """
        world = World(root / "case", root / "template", root / "log")
        make_tiny_world(world.folder)
        rows = [
            {"question_id": i, "image": f"{color}.png", "text": "What color is it?", "answer": color}
            for i, color in enumerate(("red", "green", "blue"))
        ]
        (world.folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for kind in KINDS_OF_RUN:
            config = world.folder / f"{kind}.yaml"
            config.write_text(yaml.safe_dump(settings_of(kind, f"runs/{kind}")))
            world._must(["train", config.name])
        world._must(["convert", "runs/full", "hf"])
        for place in (".", "llm", "runs/full", "runs/lora", "runs/projector", "hf"):
            (world.folder / place / "my_notes.txt").write_text("mine")
        shutil.copytree(world.folder, world.template, symlinks=True)
        return world

    def _must(self, arguments: list[str]) -> None:
        command = Command(arguments, self.folder, self.log)
        code = command.wait(300)
        if code != 0:
            raise RuntimeError(f"llava {' '.join(arguments)} ended with {code}:\n{command.printed()[-3000:]}")

    def restore(self) -> None:
        """Make the folder what it was."""
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.template, self.folder, symlinks=True)


class Case:
    """A case of an area; its random numbers depend on seed, area and number only.

    Attributes:
        said: what was done, in words, for the report.
        problems: what was wrong.
        outcomes: exit codes.
    """

    def __init__(self, world: World, seed: int, area: str, number: int, timeout: float = 90) -> None:
        self.world, self.area, self.number, self.timeout = world, area, number, timeout
        self.random = random.Random(f"{seed}/{area}/{number}")
        self.said: list[str] = []
        self.problems: list[str] = []
        self.outcomes: list[int | None] = []
        self.tail = ""
        world.restore()

    @property
    def folder(self) -> Path:
        return self.world.folder

    def say(self, text: str) -> None:
        self.said.append(text)

    def blame(self, problem: str) -> None:
        self.problems.append(problem)

    def write_config(self, values: dict[str, Any], name: str = "run.yaml") -> str:
        """A YAML file of a run's settings, which belongs to the user from then on."""
        (self.folder / name).write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
        return name

    def start(self, arguments: list[str], trap: Trap | None = None, log: Path | None = None) -> Command:
        self.say("llava " + " ".join(arguments))
        return Command(arguments, self.folder, log or self.world.log, trap)

    def run(
        self,
        arguments: list[str],
        *,
        outputs: Collection[str] = (),
        own: Collection[str] = (),
        names: Collection[str] = (),
        expect: str = "either",
        check: Callable[[], str | None] | None = None,
    ) -> int | None:
        """Run a command and judge it.

        Args:
            arguments: after `llava`.
            outputs: places where it may put new files.
            own: folders of the program's own that it may change.
            names: an error must have one of these words.
            expect: "works", "refused" or "either".
            check: what is wrong with the result, called where it ended well.

        Returns:
            The exit code.
        """
        before = judge.snapshot(self.folder)
        command = self.start(arguments)
        code = command.wait(self.timeout)
        self.judge(command, code, names=names, expect=expect, check=check)
        for change in judge.changes(before, judge.snapshot(self.folder), outputs, own):
            self.blame(change)
        return code

    def judge(
        self,
        command: Command,
        code: int | None,
        *,
        names: Collection[str] = (),
        expect: str = "either",
        check: Callable[[], str | None] | None = None,
    ) -> None:
        """Blame a command for how it ended."""
        self.outcomes.append(code)
        found = len(self.problems)
        printed, name = command.printed(), command.arguments[0]
        allowed = CODES.get(name, OTHER_CODES)
        if code is None:
            self.blame(f"{name} hangs")
        elif code == 0:
            if expect == "refused":
                self.blame(f"{name} accepts it")
            elif check is not None and (flaw := check()) is not None:
                self.blame(f"{name}: {flaw}")
            elif judge.UGLY[0] in printed:
                self.blame(f"{name}: traceback")
        else:
            if expect == "works":
                self.blame(f"{name} refuses it")
            if code not in allowed:
                self.blame(f"{name} ends with {code}")
            flaw = None if name == "doctor" and code == 1 else judge.flaw_of_message(printed, names)
            if flaw or (code == 1 and judge.UGLY[0] in printed):
                self.blame(f"{name}: {flaw or 'traceback'}")
        if len(self.problems) > found or not self.tail:
            self.tail = printed[-1500:]

    # Checks of results

    def check_run(self, output: str, kind: str, steps: int | None = STEPS) -> Callable[[], str | None]:
        return lambda: self._in_fork(judge.flaw_of_run, output, BASES[kind], steps)

    def check_model(self, folder: str, base: str | None = None) -> Callable[[], str | None]:
        return lambda: self._in_fork(judge.flaw_of_model, folder, base)

    def check_copy(self, source: str, base: str | None, target: str) -> Callable[[], str | None]:
        return lambda: self._in_fork(judge.flaw_of_copy, source, base, target)

    def check_answers(self, questions: str, answers: str) -> Callable[[], str | None]:
        return lambda: self._in_fork(judge.flaw_of_answers, questions, answers)

    def _in_fork(self, function: Callable[..., str | None], *arguments: Any) -> str | None:
        try:
            return call_in_fork(function, *arguments, folder=self.folder)
        except RuntimeError as error:
            return f"the result is not right: {str(error)[:300]}"
