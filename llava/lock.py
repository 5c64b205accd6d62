"""One writer at a time: a lock file that says who holds it, and that a dead owner does not hold for long.

No file system's own locks are used, since network file systems do not always have them. Whether the owner lives is
known at once where it ran on this machine, by its process number and start, and where Slurm has queued its job again.
Of an owner elsewhere it shows by the file's time of change, which a living owner renews every few seconds.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil

logger = logging.getLogger(__name__)

BEAT = 10.0
"""Seconds after which an owner renews the file's time of change."""
PATIENCE = 120.0
"""Seconds without a change after which an owner on another machine is taken for dead."""
LONG_AGO = 3600.0
"""Seconds since the last change that need no waiting, whatever the clocks of two machines say."""


@dataclass(frozen=True)
class Owner:
    """Who holds a lock.

    Attributes:
        host: name of the machine, for people.
        machine: within it, and until it is started again, a process number belongs to one process at a time. A
            container with process numbers of its own counts as a machine.
        pid: process number.
        started: of the process, as the machine counts it: process numbers are used again.
        job: Slurm's number of the job, None outside of one.
        restarts: how often Slurm has queued the job again.
        since: when the lock was taken.
    """

    host: str
    machine: str
    pid: int
    started: str | None
    job: str | None
    restarts: int
    since: str

    @classmethod
    def here(cls) -> Owner:
        """This process."""
        return cls(
            socket.gethostname(),
            _machine(),
            os.getpid(),
            _start_of(os.getpid()),
            os.environ.get("SLURM_JOB_ID"),
            int(os.environ.get("SLURM_RESTART_COUNT", "0")),
            datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def lives(self) -> bool | None:
        """Whether this owner's process runs; None where that can't be known from here."""
        here = Owner.here()
        if self.machine == here.machine:
            return self.started == _start_of(self.pid)
        if self.job is not None and self.job == here.job and self.restarts < here.restarts:
            return False  # Slurm ends a job on all machines before it queues it again
        return None


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return socket.gethostname()


def _start_of(pid: int) -> str | None:
    """When a process began, in a form that does not depend on the clock; None where it has ended."""
    try:
        process = psutil.Process(pid)
        if process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            return None
        if not psutil.LINUX:
            return str(process.create_time())
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[19]
    except (psutil.Error, OSError):
        return None


@contextlib.contextmanager
def lock(path: Path, what: str) -> Iterator[None]:
    """Hold a lock file as long as the block runs. Its folder is made, and removed again where it stays empty.

    Args:
        path: of the file.
        what: is locked; a message begins with it.

    Raises:
        ValueError: another process holds it, or it can't be written.
    """
    made = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = _take(path, what)
    except OSError as error:
        raise ValueError(f"{what}: {path} can't be written: {error.strerror or error}") from error
    done = threading.Event()
    beat = threading.Thread(target=_renew, args=(path, text, done), name="lock", daemon=True)
    beat.start()
    try:
        yield
    finally:
        done.set()
        beat.join()
        _give_back(path, text)
        with contextlib.suppress(OSError):  # not empty
            for folder in made:
                folder.rmdir()


def holder(path: Path) -> str | None:
    """Who holds a lock file, in words; None where nobody does, or the next start would take it without waiting."""
    text = _read(path)
    owner = _owner(text)
    lives = None if owner is None else owner.lives()
    if text is None or lives is False or (lives is None and _is_long_ago(_changed(path))):
        return None
    return _words(owner)


def _words(owner: Owner | None) -> str:
    return "an unknown process" if owner is None else f"process {owner.pid} on {owner.host}, since {owner.since}"


def _take(path: Path, what: str) -> str:
    """Make the file; returns what it says."""
    text = json.dumps(asdict(Owner.here())) + "\n"
    while True:
        try:
            file = path.open("x", encoding="utf-8")
        except FileExistsError:
            _wait_for_end(path, what)
            continue
        try:
            with file:
                file.write(text)
        except OSError:  # the disk is full
            path.unlink(missing_ok=True)  # nobody could say whose it is
            raise
        return text


def _wait_for_end(path: Path, what: str) -> None:
    """Remove the lock of a dead owner.

    Raises:
        ValueError: the owner lives.
    """
    text = _read(path)
    owner = _owner(text)
    if text is None:
        return
    lives = None if owner is None else owner.lives()
    if lives is None:
        lives = _shows_life(path, what, owner)
    if lives:
        raise ValueError(
            f"{what} is in use by {_words(owner)}: wait for its end, stop it, or choose another place ({path} says so)"
        )
    logger.info("%s: its last user (%s) has ended without giving it back", what, _words(owner))
    _remove(path, text)


def _shows_life(path: Path, what: str, owner: Owner | None) -> bool:
    """Watch whether an owner elsewhere renews its lock."""
    before = _changed(path)
    if _is_long_ago(before):
        return False
    logger.info(
        "%s was last used by %s: waiting up to %g s to see whether that is still running; "
        "if you know that it is not, remove %s",
        what,
        _words(owner),
        PATIENCE,
        path,
    )
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        time.sleep(min(1.0, BEAT))
        now = _changed(path)
        if now != before:
            return now is not None
    return False


def _is_long_ago(change: float | None) -> bool:
    return change is None or time.time() - change > LONG_AGO


def _remove(path: Path, text: str) -> None:
    """Remove a lock that says `text`; of two processes that do so, the slower must not remove the faster one's."""
    aside = path.with_name(f"{path.name}-{uuid.uuid4().hex[:8]}")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return
    if _read(aside) == text:
        aside.unlink()
    else:
        aside.rename(path)


def _give_back(path: Path, text: str) -> None:
    """Remove the file of this process; a start that looks for a dead owner's may have moved it for a moment."""
    for _ in range(10):
        if _read(path) == text:
            path.unlink(missing_ok=True)
            return
        time.sleep(0.02)


def _renew(path: Path, text: str, done: threading.Event) -> None:
    while not done.wait(BEAT):
        with contextlib.suppress(OSError):
            if _read(path) == text:
                os.utime(path)


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return None


def _owner(text: str | None) -> Owner | None:
    try:
        return Owner(**json.loads(text or ""))
    except (ValueError, TypeError):
        return None  # it is just being written, or torn


def _changed(path: Path) -> float | None:
    try:
        with path.open("rb") as file:  # on network file systems only an open file's time is up to date
            return os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return None
