"""Areas `signals` and `together`: commands that are stopped or killed at any call, and two that meet."""

from __future__ import annotations

import signal
from typing import Any

from tests.fuzz import judge
from tests.fuzz.case import KINDS_OF_RUN, Case, settings_of
from tests.fuzz.processes import Trap

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGKILL, signal.SIGKILL)
STOPPED = 75
LONG = 6
EVAL = ["eval", "runs/full", "--question-file", "questions.jsonl", "--image-folder", "images", "--answers-file"]
EVAL += ["answers.jsonl", "--max-new-tokens", "2", "--conv-mode", "v1", "--batch-size", "1"]
WRITERS: dict[str, tuple[list[str], str]] = {
    "convert": (["convert", "runs/full", "new", "--to", "hf"], "new"),
    "merge": (["merge", "runs/lora", "new", "--model-base", "llm"], "new"),
    "eval": (EVAL, "answers.jsonl"),
}


def fuzz(case: Case) -> None:
    """A signal once or twice at any call, then the same command again: the result is that of an uninterrupted one."""
    kind = case.random.choice([*KINDS_OF_RUN, *KINDS_OF_RUN, *WRITERS])
    arguments, output, check = _command(case, kind)
    calls = _uninterrupted(case, kind, arguments, output)
    for _ in range(case.random.choice((1, 1, 2))):
        # Half of them in the last fifth, where results are written.
        least = 1 if case.random.random() < 0.5 else int(0.8 * calls)
        trap = Trap(case.random.randint(least, calls), case.random.choice(SIGNALS))
        _interrupt(case, arguments, trap, output)
    # What is written already is not written again.
    expect = "either" if kind in WRITERS and 0 in case.outcomes else "works"
    case.run(arguments, outputs=[output], own=[output], names={output}, expect=expect, check=check)
    if kind in KINDS_OF_RUN and not case.problems:
        _compare(case, kind, output)
    for path in judge.staging_left(case.folder):
        case.blame(f"left {path}")


def _command(case: Case, kind: str) -> tuple[list[str], str, Any]:
    """Arguments, what they write, and the check of it."""
    if kind in WRITERS:
        arguments, output = WRITERS[kind]
        if kind == "eval":
            return arguments, output, case.check_answers("questions.jsonl", output)
        base = "llm" if kind == "merge" else None
        return arguments, output, case.check_copy(arguments[1], base, output)
    config = case.write_config(settings_of(kind, "out", max_steps=LONG))
    return ["train", config], "out", case.check_run("out", kind, LONG)


def _uninterrupted(case: Case, kind: str, arguments: list[str], output: str) -> int:
    """How many calls the command has when nothing happens, found once; the folder is as before afterwards."""
    world = case.world
    if kind not in world.calls:
        counted = world.folder.parent / "counted"
        command = case.start(arguments, Trap(counted=str(counted)))
        if command.wait(case.timeout * 2) != 0:
            raise RuntimeError(f"without a signal it fails: {command.printed()[-2000:]}")
        world.calls[kind] = int(counted.read_text())
        if kind in KINDS_OF_RUN:
            world.losses[kind] = judge.losses_of(str(case.folder / output))
        config = case.folder / "run.yaml"
        kept = config.read_text() if config.exists() else None
        world.restore()
        if kept is not None:
            config.write_text(kept)
    return world.calls[kind]


def _interrupt(case: Case, arguments: list[str], trap: Trap, output: str) -> None:
    before = judge.snapshot(case.folder)
    command = case.start(arguments, trap)
    code = command.wait(case.timeout)
    name = signal.Signals(trap.number).name
    case.outcomes.append(code)
    case.say(f"{name} at call {trap.call}: ended with {code}")
    printed = command.printed()
    if code is None:
        case.blame(f"{name}: hangs")
    elif code not in (0, STOPPED, -trap.number, 128 + trap.number) and 0 not in case.outcomes:
        case.blame(f"{name}: ends with {code}")
    if trap.number != signal.SIGKILL and judge.UGLY[0] in printed:
        case.blame(f"{name}: traceback")
    if code == -trap.number and trap.number != signal.SIGKILL and "'loss'" in printed:
        case.blame(f"{name}: dies although the training had begun")
    if case.problems:
        case.tail = printed[-1500:]
    for change in judge.changes(before, judge.snapshot(case.folder), ["*"], [output]):
        case.blame(change)


def _compare(case: Case, kind: str, output: str) -> None:
    """The losses are those of the uninterrupted run, each step once."""
    try:
        losses = judge.losses_of(str(case.folder / output))
    except ValueError as error:
        case.blame(str(error))
        return
    expected = case.world.losses[kind]
    if losses.keys() != expected.keys():
        case.blame(f"metrics.jsonl has steps {sorted(losses)} instead of {sorted(expected)}")
    elif any(abs(losses[step] - loss) > 1e-4 * max(1, abs(loss)) for step, loss in expected.items()):
        case.blame(f"losses {losses} are not those of the uninterrupted run, {expected}")


def fuzz_together(case: Case) -> None:
    """The same command twice at once: one does it, the other too or says why not; afterwards the result is right."""
    kind = case.random.choice([*KINDS_OF_RUN, *WRITERS])
    arguments, output, check = _command(case, kind)
    before = judge.snapshot(case.folder)
    logs = [case.world.log.with_name(f"log{i}") for i in range(2)]
    first = case.start(arguments, log=logs[0])
    first.process.join(case.random.choice((0.0, 0.1, 0.5, 1.0)))
    commands = [first, case.start(arguments, log=logs[1])]
    codes = [command.wait(case.timeout) for command in commands]
    for command, code in zip(commands, codes, strict=True):
        case.judge(command, code, names={output, "another", "other"})
    if 0 not in codes:
        case.blame(f"neither works: {codes}")
    for change in judge.changes(before, judge.snapshot(case.folder), [output], [output]):
        case.blame(change)
    if not case.problems and (flaw := check()) is not None:
        case.blame(flaw)
    for path in judge.staging_left(case.folder):
        case.blame(f"left {path}")
