"""All steps of a reproduction: what they need is shown or looked for, then they run in order."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from llava.files import atomic_folder
from llava.reproduce.downloads import Download
from llava.reproduce.steps import KINDS, Model, Step, resolve
from llava.train.launching.supervise import supervise

Print = Callable[[str], None]


class Plan:
    """Steps in their order.

    Args:
        steps: those that are asked for.
        marks: folder in which each finished step leaves its command.
        left_out: the others.

    A step is done when its mark holds this very command, and what it makes is there. A step that reads what was made
    anew since is done again.
    """

    def __init__(self, steps: Sequence[Step], marks: Path, left_out: Sequence[Step] = ()) -> None:
        self.steps, self._marks, self._left_out = list(steps), marks, left_out

    @classmethod
    def read(cls, lines: Iterable[str], marks: Path, device: str, only: Sequence[str] = KINDS) -> Plan:
        """The steps of lines that hold one each: kind, row and the command's words, between tabs.

        Args:
            lines: of the steps; empty ones are passed over.
            marks: see `Plan`.
            device: that hours are counted for.
            only: kinds of steps that are asked for.

        Raises:
            ValueError: a command is wrong.
        """
        made: dict[str, Model] = {}
        steps = []
        for line in lines:
            if not line.strip():
                continue
            kind, row, *words = line.rstrip("\n").split("\t")
            step = resolve(kind, row, words, made, device)
            if step.model is not None:
                made[str(step.makes.parent)] = step.model
            steps.append(step)
        chosen = [step for step in steps if step.kind in only]
        return cls(chosen, marks, [step for step in steps if step not in chosen])

    def is_done(self, step: Step) -> bool:
        """Whether a step need not run."""
        mark = self._marks / step.name
        return mark.is_file() and mark.read_text(encoding="utf-8") == step.command and step.makes.exists()

    def todo(self) -> list[Step]:
        """The steps that are to run."""
        open_ones: list[Step] = []
        for step in self.steps:
            if not self.is_done(step) or any(makes(other, path) for other in open_ones for path in step.reads):
                open_ones.append(step)
        return open_ones

    def outside(self, steps: Sequence[Step]) -> dict[str, Download | None]:
        """What these steps read that none of them makes, by path or name."""
        found: dict[str, Download | None] = {}
        for number, step in enumerate(steps):
            for path, download in step.reads.items():
                if not any(makes(other, path) for other in steps[:number]):
                    found.setdefault(path, download or self._maker(path))
        return found

    def _maker(self, path: str) -> Download | None:
        """The step that makes a file, where it is not asked for."""
        maker = next((step for step in [*self._left_out, *self.steps] if makes(step, path)), None)
        return Download(f"the step {maker.kind} of row {maker.row} makes it") if maker else None

    def check(self) -> None:
        """Raise a ValueError that names all that is missing, with its source, or what a step lacks, or a full disk."""
        open_ones = self.todo()
        missing = {path: download for path, download in self.outside(open_ones).items() if not is_there(path)}
        if missing:
            lines = [f"  {path}  ({_origin(download)})" for path, download in missing.items()]
            raise ValueError("\n".join(["nothing was started, because these are missing:", *lines]))
        for step in open_ones:
            step.check()
        need = sum(step.disk for step in open_ones)
        free = shutil.disk_usage(_existing(self._marks)).free / 1e9
        if need > free:
            raise ValueError(f"nothing was started: the results need {need:.0f} GB, {free:.0f} GB are free")

    def show(self, write: Print, device: str) -> None:
        """Write each step with what it needs, and the totals."""
        open_ones = self.todo()
        for step in self.steps:
            done = step not in open_ones
            write(f"\n# {step.kind}, {step.row}: {'done' if done else _costs(step, device)}")
            write(step.command)
        outside = self.outside(open_ones)
        write("\n# Needed from outside, never downloaded from here:")
        for path, download in outside.items():
            size = f"{download.size:g} GB" if download and download.size is not None else "size not known"
            write(f"#   {'there  ' if is_there(path) else 'missing'}  {path}  ({size}; {_origin(download)})")
        known = [download.size for download in _distinct(outside) if download.size is not None]
        hours, disk = sum(step.hours for step in open_ones), sum(step.disk for step in open_ones)
        write(
            f"\n# In all: {len(open_ones)} of {len(self.steps)} steps to do; {hours:.0f} GPU hours ({device}); "
            f"{disk:.0f} GB of results; {sum(known):.0f} GB of downloads whose size is known, unpacked more"
        )

    def run(self, write: Print) -> int:
        """Run what is to do, after `check`; the exit code is that of the first step that fails, otherwise 0."""
        self.check()
        open_ones = self.todo()
        if not open_ones:
            write("all steps are done")
        for step in open_ones:  # whatever ends this run, one that reads what is made anew now is not done
            (self._marks / step.name).unlink(missing_ok=True)
        for number, step in enumerate(open_ones, start=1):
            write(f"\n[{number}/{len(open_ones)}] {step.kind}, {step.row}\n{step.command}")
            code = supervise([_program(step.words[0]), *step.words[1:]])
            if code:
                write(f"{step.name} ended with exit code {code}; the same command goes on from here")
                return code
            with atomic_folder(self._marks) as staging:
                (staging / step.name).write_text(step.command, encoding="utf-8")
        return 0


def makes(step: Step, path: str) -> bool:
    """Whether a step makes this file, a file of this checkpoint, or a result of this run."""
    return Path(path) in (step.makes, *list(step.makes.parents)[:2])


def is_there(path: str) -> bool:
    """Whether a file or folder exists, or the hub's copy of a model of this name is on this machine."""
    if Path(path).exists():
        return True
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(path, "config.json"), str)
    except HFValidationError:
        return False


def _origin(download: Download | None) -> str:
    return "your own, or of another row: see ROWS" if download is None else download.source


def _distinct(outside: Mapping[str, Download | None]) -> list[Download]:
    return list(dict.fromkeys(download for download in outside.values() if download is not None))


def _costs(step: Step, device: str) -> str:
    parts = [f"{step.hours:.1f} GPU hours ({device})"] if step.hours else []
    parts += [f"{step.disk:.2g} GB on disk"] if step.disk else []
    return ", ".join(parts) or "a few seconds"


def _program(name: str) -> str:
    """The command of this environment, where it has one."""
    own = Path(sys.executable).with_name(name)
    return str(own) if own.exists() else name


def _existing(path: Path) -> Path:
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
