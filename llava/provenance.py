"""What made a result: versions of packages, the commit, and the weights of a checkpoint."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from llava.files import ADAPTER_CONFIG

PACKAGES = (
    "llava",
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "deepspeed",
    "datasets",
    "safetensors",
    "tokenizers",
    "numpy",
    "pillow",
    "flash-attn",
    "bitsandbytes",
)
WEIGHT_SUFFIXES = (".safetensors", ".bin")
_PIECES, _PIECE = 16, 1 << 16  # of a file of weights: so many pieces of so many bytes are read


def versions() -> dict[str, str | None]:
    """Of Python, CUDA and the packages that shape a result."""
    return {"python": platform.python_version(), "cuda": torch.version.cuda, **package_versions()}


def package_versions() -> dict[str, str]:
    """Versions of the packages that shape a run, of those that are installed."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of the repository that `folder` lies in, and whether files in it differ; None outside of one."""
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    return {"commit": commit, "changed": bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))}


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(folder), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def weights_hash(folder: Path) -> str:
    """A hash of a checkpoint: of its JSON files and, of each file of weights, its size, index and samples of the rest.

    Two trainings of one model differ in it; a file of 10 GB takes milliseconds.
    """
    digest = hashlib.sha256()
    for file in sorted(file for file in folder.iterdir() if file.is_file()):
        if file.suffix == ".json" and file.name in ("config.json", ADAPTER_CONFIG):
            digest.update(file.name.encode() + file.read_bytes())
        elif file.suffix in WEIGHT_SUFFIXES:
            digest.update(f"{file.name} {file.stat().st_size}".encode())
            for piece in _samples(file):
                digest.update(piece)
    return digest.hexdigest()


def _samples(file: Path) -> Iterator[bytes]:
    """The start of a file, where safetensors have their index, and pieces spread over it."""
    step = max(_PIECE, file.stat().st_size // _PIECES)
    with file.open("rb") as stream:
        for place in range(0, file.stat().st_size, step):
            stream.seek(place)
            yield stream.read(_PIECE)
