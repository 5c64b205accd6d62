"""What the docs show works, and their links lead somewhere."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from llava.reduction import VisionFeatures, available, build, registry
from tests.conftest import ROOT

PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("playground/**/*.md")]


def test_the_method_of_the_contributing_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    code = re.search(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.DOTALL)
    assert code is not None
    module = ModuleType("contributing_page")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    source = re.sub(r"^   ", "", code.group(1), flags=re.MULTILINE)
    exec(compile(source, "CONTRIBUTING.md", "exec"), module.__dict__)
    assert "brightest" in available()["encoder"]
    features = torch.arange(8.0).view(1, 8, 1)
    tokens = build("brightest", ratio=0.5)(VisionFeatures(features))
    assert tokens.source is not None
    assert tokens.source.tolist() == [[4, 5, 6, 7]]
    assert tokens.features.flatten().tolist() == [4, 5, 6, 7]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}, which does not exist"


def test_every_method_has_a_row_in_the_docs() -> None:
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    for names in available().values():
        for name in names:
            assert f"| `{name}` |" in text


def test_the_docs_have_each_table_of_differences() -> None:
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    for names in available().values():
        for name in names:
            about = inspect.getdoc(registry.method_class(name)) or ""
            missing = [line for line in about.splitlines() if line.startswith("|") and line not in text]
            assert missing == [], name
