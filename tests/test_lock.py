"""Locks: who holds one, when a dead owner gives way, and when a living one does not."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from llava import lock as lock_module
from llava.lock import Owner, holder, lock
from llava.train.launching import extension

HOLD = """
import sys, time
from pathlib import Path
from llava.lock import lock
with lock(Path(sys.argv[1]), "x"):
    print(flush=True)
    time.sleep(60)
"""
NO_PROCESS = 2**22 + 1  # above the largest process number of Linux


def leave_lock(path: Path, **changes: object) -> None:
    """A lock as this process would write it, but for `changes`."""
    path.write_text(json.dumps(asdict(replace(Owner.here(), **changes))))


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(lock_module, "BEAT", 0.02)
    monkeypatch.setattr(lock_module, "PATIENCE", 0.4)
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "lock"


def test_a_living_owner_is_named(path: Path) -> None:
    with lock(path, "folder x"):
        with (
            pytest.raises(ValueError, match=rf"folder x is in use by process {os.getpid()} on .*, since 20"),
            lock(path, "folder x"),
        ):
            pass
        assert f"process {os.getpid()}" in (holder(path) or "")
    assert not path.exists() and holder(path) is None


@pytest.mark.parametrize("changes", [{"pid": NO_PROCESS}, {"started": "1"}])
def test_a_dead_owner_of_this_machine_gives_way_at_once(
    changes: dict, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where its number belongs to another process now."""
    monkeypatch.setattr(lock_module, "PATIENCE", 60)
    leave_lock(path, **changes)
    assert holder(path) is None
    with lock(path, "x"):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_a_killed_owner_gives_way_even_as_a_zombie(path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline()
    with pytest.raises(ValueError, match=f"process {process.pid}"), lock(path, "x"):
        pass
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, but not yet waited for
    with lock(path, "x"):
        pass
    process.communicate()


@pytest.mark.parametrize("text", [None, "", "{"])
def test_an_owner_elsewhere_gives_way_when_it_shows_no_life(text: str | None, path: Path) -> None:
    """So does one that was killed before its lock said anything."""
    leave_lock(path, machine="another") if text is None else path.write_text(text)
    assert holder(path) is not None
    start = time.monotonic()
    with lock(path, "x"):
        assert time.monotonic() - start > 0.3
    leave_lock(path, machine="another")
    os.utime(path, (0, 0))
    start = time.monotonic()
    with lock(path, "x"):
        assert time.monotonic() - start < 0.3


def test_an_owner_elsewhere_that_lives_is_seen(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with lock(path, "x"), pytest.raises(ValueError, match="in use by"):
        monkeypatch.setattr(lock_module, "_machine", lambda: "another")
        with lock(path, "x"):
            pass


def test_a_job_that_slurm_queued_again_takes_its_lock(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module, "PATIENCE", 60)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    leave_lock(path, machine="another")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with lock(path, "x"):
        pass
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    leave_lock(path, machine="another", job="7", restarts=0)
    assert holder(path) is not None  # another job


def test_of_two_that_find_a_dead_owner_one_wins(path: Path) -> None:
    """The slower one has judged the lock of the dead owner, and finds the faster one's in its place."""
    leave_lock(path, pid=NO_PROCESS)
    dead = path.read_text()
    leave_lock(path, since="now")
    lock_module._remove(path, dead)
    assert json.loads(path.read_text())["since"] == "now"
    assert [entry.name for entry in path.parent.iterdir()] == ["lock"]


def test_a_folder_that_was_made_for_a_lock_goes_with_it(path: Path) -> None:
    with lock(path.parent / "a" / "b" / "lock", "x"):
        pass
    assert not (path.parent / "a").exists()
    with lock(path.parent / "a" / "b" / "lock", "x"):
        (path.parent / "a" / "file").touch()
    assert [entry.name for entry in (path.parent / "a").iterdir()] == ["file"]


def test_a_lock_that_can_not_be_written_is_an_error(path: Path) -> None:
    path.touch()
    with pytest.raises(ValueError, match=r"folder x: .* can't be written"), lock(path / "lock", "folder x"):
        pass


def test_a_full_disk_leaves_no_lock(path: Path) -> None:
    """An empty one would hold up the next start for two minutes."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, limit[1]))
    try:
        with pytest.raises(ValueError, match=r"x: .*lock can't be written"), lock(path, "x"):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    assert not path.exists()


def test_a_lock_from_long_ago_is_nobodys(path: Path) -> None:
    """As for a start, which takes it without waiting."""
    leave_lock(path, machine="another")
    assert holder(path) is not None
    os.utime(path, (0, 0))
    assert holder(path) is None


def test_a_killed_compilation_holds_nobody_up(tmp_path: Path) -> None:
    """torch's own lock is a file, for which all wait as long as it is there."""
    file = tmp_path / "py311_cpu" / extension.NAME / "lock"
    file.parent.mkdir(parents=True)
    descriptor = os.open(file, os.O_CREAT | os.O_EXCL)
    extension.prepare_extension(tmp_path)
    assert file.exists()  # its owner lives
    os.close(descriptor)
    extension.prepare_extension(tmp_path)
    assert not file.exists()


def test_a_compilation_is_announced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / extension.NAME
    folder.mkdir()
    with caplog.at_level("INFO", "llava"):
        extension.prepare_extension(tmp_path)
        (folder / f"{extension.NAME}.so").touch()
        extension.prepare_extension(tmp_path)
    assert caplog.text.count("DeepSpeed compiles its extension") == 1
