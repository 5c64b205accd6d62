"""Samples that a run skipped: each process writes its own file, and the first joins them at the end.

Processes on several machines must not append to one file of a network file system, so `rejects.rankR.jsonl` is
written during the run, and `rejects.jsonl` when it ends.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from llava.data.samples import BadSampleError

REJECTS_FILE = "rejects.jsonl"
REJECTS_PARTS = "rejects.rank*.jsonl"


class Rejects:
    """The file of one process of a run, and of its workers.

    Args:
        output_dir: of the run.
        rank: of the process.
    """

    def __init__(self, output_dir: str | Path, rank: int = 0) -> None:
        self.path = Path(output_dir) / f"rejects.rank{rank}.jsonl"
        self._written: set[tuple[str, int]] = set()

    def add(self, sample_id: object, file: str, index: int, error: BadSampleError) -> None:
        """Write a line about a sample, once a process."""
        if (file, index) in self._written:
            return
        self._written.add((file, index))
        entry = {"id": sample_id, "file": file, "index": index, "kind": error.kind, "reason": str(error)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # One write to a file that is opened for appending: the workers' lines do not mix.
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, (json.dumps(entry) + "\n").encode())
        finally:
            os.close(handle)


def read_rejects(path: Path) -> list[dict]:
    """Entries of one file; a last line that was cut off by a crash is left out."""
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return entries


def join_rejects(output_dir: str | Path) -> list[dict]:
    """Write what all processes skipped, and what the run skipped before it was interrupted, as `rejects.jsonl`.

    Call it on one process, when all are done.

    Returns:
        The entries, each sample once, in the order of the data; no file is written without any.
    """
    folder = Path(output_dir)
    parts = sorted(folder.glob(REJECTS_PARTS))
    target = folder / REJECTS_FILE
    entries = {(e["file"], e["index"]): e for path in [target, *parts] for e in read_rejects(path)}
    ordered = [entries[key] for key in sorted(entries)]
    if parts:
        staging = folder / f".{REJECTS_FILE}.{os.getpid()}"
        staging.write_text("".join(json.dumps(entry) + "\n" for entry in ordered), encoding="utf-8")
        staging.replace(target)
    for part in parts:
        part.unlink()
    return ordered


def forget_rejects(output_dir: str | Path) -> None:
    """Remove what an earlier run in the same folder left."""
    for path in [Path(output_dir) / REJECTS_FILE, *Path(output_dir).glob(REJECTS_PARTS)]:
        path.unlink(missing_ok=True)
