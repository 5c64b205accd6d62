"""Fixtures shared by the tests."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

# Also for processes that a server forks, which keep the environment that it began with.
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs the hub, and asking for what is not there takes long

import pytest

from tests.golden.pack import unpack

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT.parent / "shared" / "golden"

# What DeepSpeed compiles depends on the environment's path, so checkouts that share it would compile by turns.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(ROOT / ".pytest_cache" / "torch_extensions"))


@pytest.fixture(scope="session")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the golden cases: the set beside the repository, or the same as `tests/golden` keeps it."""
    return GOLDEN if GOLDEN.is_dir() else unpack(tmp_path_factory.mktemp("golden"))


@pytest.fixture(scope="session", autouse=True)
def data_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder of converted data, for this session and the processes that it starts."""
    folder = tmp_path_factory.mktemp("data_cache")
    before = os.environ.get("HF_DATASETS_CACHE")
    os.environ["HF_DATASETS_CACHE"] = str(folder)
    with contextlib.suppress(ImportError):  # a machine that only checks its GPU goes without
        import datasets

        datasets.config.HF_DATASETS_CACHE = str(folder)
    yield folder
    del os.environ["HF_DATASETS_CACHE"]
    if before is not None:
        os.environ["HF_DATASETS_CACHE"] = before
