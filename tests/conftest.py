"""Fixtures shared by the tests."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT.parent / "shared" / "golden"


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of the golden cases; the tests that read it are skipped where it does not exist."""
    if not GOLDEN.is_dir():
        pytest.skip("the golden cases (../shared/golden) are not on this machine")
    return GOLDEN
