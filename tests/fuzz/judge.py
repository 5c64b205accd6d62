"""What is right: nothing of the user's changed, one clear line for a mistake, a result that opens and has learned."""

from __future__ import annotations

import hashlib
import json
import math
import re
import stat
from collections.abc import Collection
from pathlib import Path

import torch

from llava.model.builder import load_pretrained_model
from tests.tiny_world import SIDE

# The log's line of an error, with the findings of the checks before a run below it; or the command's own.
LOGGED = re.compile(r"^[\d:]+ ERROR:? .*(?:\n(?:error: |- ).*)*", re.MULTILINE)
TOLD = re.compile(r"^error: .*(?:\n- .*)*", re.MULTILINE)
# Left by libraries that were not told what to do, or by a process that did not end well.
UGLY = ("Traceback (most recent call last)", "Exception ignored", "core dumped", "Segmentation fault", "Aborted")
MISLEADING = ("will likely succeed", "install tiktoken", "_internal assert")
LONGEST_ERROR = 900
NOTES = "my_notes.txt"  # the user's, in every folder
ANSWERS = "answers.jsonl"  # beside it, answers wait for the others in a file with more to its name
STAGING = re.compile(r"(^|/)\.(incomplete|lock$|[^/]*\.lock$|[^/]*writing-)")


def snapshot(folder: Path) -> dict[str, str]:
    """What each path below a folder is: its kind, and a hash of what it holds."""
    found = {}
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            content = f"link to {path.readlink()}"
        elif stat.S_ISREG(mode):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            content = "folder" if stat.S_ISDIR(mode) else "special"
        found[path.relative_to(folder).as_posix()] = content
    return found


def changes(before: dict[str, str], after: dict[str, str], outputs: Collection[str], own: Collection[str]) -> list[str]:
    """What a command did to the user's files.

    Args:
        before: snapshot.
        after: snapshot.
        outputs: places where new files may be; `*` stands for all.
        own: folders of the program's own whose files may change too, all but the user's notes in them.
    """
    said = [
        f"{'deleted' if path not in after else 'changed'} {path}"
        for path, content in before.items()
        if after.get(path) != content and (path.endswith(NOTES) or not _within(path, own)) and not _unfinished(path)
    ]
    new = [path for path in after if path not in before and "*" not in outputs]
    left = [path for path in new if not _within(path, [*outputs, *own]) and not _above(path, outputs)]
    left = [path for path in left if not any(path.startswith(f"{folder}.") for folder in outputs if ANSWERS in folder)]
    return said + [f"left {path}" for path in left if str(Path(path).parent) not in left]


def _unfinished(path: str) -> bool:
    return f"{ANSWERS}." in path or STAGING.search(path) is not None


def _within(path: str, folders: Collection[str]) -> bool:
    return any(path == folder or path.startswith(f"{folder}/") for folder in folders)


def _above(path: str, folders: Collection[str]) -> bool:
    return any(folder.startswith(f"{path}/") for folder in folders)


def flaw_of_message(printed: str, names: Collection[str]) -> str | None:
    """What is wrong with how a mistake is told; None where one line tells it and has one of `names`."""
    for words in (*UGLY, *MISLEADING):
        if words in printed:
            return "traceback" if words == UGLY[0] else f"prints {words!r}"
    lines = LOGGED.findall(printed) or TOLD.findall(printed)
    if "Usage: llava" in printed and not lines:
        return None
    if len(lines) != 1:
        return f"{len(lines)} error lines"
    if max(map(len, lines[0].splitlines())) > LONGEST_ERROR:
        return f"an error of {len(lines[0])} characters"
    if names and not any(name in lines[0] for name in names):
        return "the error names nothing of " + ", ".join(sorted(names)[:4])
    return None


def staging_left(folder: Path) -> list[str]:
    """Half-written folders that nobody will finish."""
    paths = [path.relative_to(folder).as_posix() for path in folder.rglob("*")]
    return [path for path in paths if STAGING.search(path)]


def flaw_of_run(output: str, base: str | None, steps: int | None) -> str | None:
    """What is wrong with the result of a training run; None where it opens, is finite and has learned."""
    state = json.loads(Path(output, "trainer_state.json").read_text(encoding="utf-8"))
    history = [entry for entry in state["log_history"] if "loss" in entry]
    if not history:
        return "no loss is logged"
    if steps is not None and state["global_step"] != steps:
        return f"ended after step {state['global_step']} of {steps}"
    if not all(math.isfinite(entry["loss"]) for entry in history):
        return "a loss is not finite"
    if not any(entry["loss"] > 0 and entry.get("grad_norm", 1) > 0 for entry in history):
        return "nothing was learned: every loss or gradient is 0"
    return flaw_of_model(output, base)


def flaw_of_model(folder: str, base: str | None = None) -> str | None:
    """What is wrong with a checkpoint; None where it opens and answers with finite numbers."""
    logits = logits_of(folder, base)
    return None if logits.isfinite().all() else "logits are not finite"


def flaw_of_copy(source: str, base: str | None, target: str) -> str | None:
    """What is wrong with a merged or converted checkpoint; None where it answers as its source."""
    ours, theirs = logits_of(target, None), logits_of(source, base)
    rows = min(len(ours), len(theirs))
    return (
        None if torch.allclose(ours[:rows], theirs[:rows], atol=1e-2, rtol=1e-2) else "answers differ from its source's"
    )


def flaw_of_answers(questions: str, answers: str) -> str | None:
    """What is wrong with a file of answers; None where each question has one."""
    rows = [
        [json.loads(line) for line in Path(f).read_text().splitlines() if line.strip()] for f in (questions, answers)
    ]
    asked, given = ([row.get("question_id") for row in file] for file in rows)
    return None if asked == given else f"{len(given)} answers to {len(asked)} questions"


def losses_of(output: str) -> dict[int, float]:
    """Losses by step as `metrics.jsonl` has them; a step that stands there twice counts as an error.

    Raises:
        ValueError: a step has two lines.
    """
    found: dict[int, float] = {}
    for line in Path(output, "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        if "loss" in entry:
            if entry["step"] in found:
                raise ValueError(f"metrics.jsonl has two lines of step {entry['step']}")
            found[entry["step"]] = entry["loss"]
    return found


@torch.no_grad()
def logits_of(folder: str, base: str | None) -> torch.Tensor:
    """Logits after a prompt with a picture, [vocabulary]."""
    model = load_pretrained_model(folder, base, device="cpu", dtype=torch.float32)[1]
    pixels = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    return model(input_ids=torch.tensor([[1, 50, -200, 60, 61]]), images=pixels).logits[0, -1]
