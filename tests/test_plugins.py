"""Methods of other packages: by entry point, and by `module:Class`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from llava.reduction import ReductionConfig, registry
from tests.tiny_models import SIDE, tiny_model

CODE = '''
from llava.reduction.base import EncoderReducer, VisualTokens
from llava.reduction.registry import register


class {name}(EncoderReducer):
    """Keep the first patches."""

    tokens: int = 3

    def forward(self, vision):
        return VisualTokens(vision.features[:, : self.tokens])
'''


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that packages are imported and found in; the registry forgets them afterwards."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    registry._load_installed.cache_clear()
    yield tmp_path
    registry._load_installed.cache_clear()
    for name in [name for name in sys.modules if name.startswith("outside_")]:
        del sys.modules[name]


def install(folder: Path, package: str, entry: str) -> None:
    """What an installer leaves: the package, and its entry points beside it."""
    (folder / f"{package}.py").write_text(CODE.format(name="First"))
    about = folder / f"{package}-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[llava.reducers]\nfirst_ones = {entry}\n")


def test_an_installed_package_registers_a_method(outside: Path) -> None:
    install(outside, "outside_installed", "outside_installed:First")
    assert "first_ones" in registry.available()["encoder"]
    model = tiny_model()
    model.set_reduction("{name: first_ones, tokens: 5}")
    assert model.count_visual_tokens(torch.randn(1, 3, SIDE, SIDE)) == [(16, 5)]
    assert model.config.reduction == {"encoder": {"name": "first_ones", "tokens": 5}}


@pytest.mark.parametrize("entry", ["outside_broken:Last", "outside_broken:register"])
def test_an_installed_package_that_is_broken_is_named(outside: Path, entry: str) -> None:
    install(outside, "outside_broken", entry)
    with pytest.raises(ValueError, match="installed package outside_broken"):
        registry.available()


def test_a_class_by_its_place(outside: Path) -> None:
    (outside / "outside_named.py").write_text(CODE.format(name="First"))
    name = "outside_named:First"
    model = tiny_model()
    model.set_reduction(name)
    assert model.config.reduction == {"encoder": {"name": name}}
    assert model.count_visual_tokens(torch.randn(1, 3, SIDE, SIDE)) == [(16, 3)]
    method = ReductionConfig.parse({"encoder": {"name": name, "tokens": 4}}).build_all().encoder
    assert (method.method, method.tokens) == (name, 4)


@pytest.mark.parametrize(
    "reduction",
    [{"encoder": {"name": "outside_evil:First"}}, "outside_evil:First", "{encoder: {name: outside_evil:First}}"],
)
def test_a_checkpoint_imports_nothing(outside: Path, reduction: Any) -> None:
    """Whatever form its config.json has; a user's own word does."""
    (outside / "outside_evil.py").write_text(CODE.format(name="First"))
    with pytest.raises(ValueError, match="import outside_evil first, or pass reduction='outside_evil:First'"):
        tiny_model(reduction=reduction)
    assert "outside_evil" not in sys.modules
    ReductionConfig.parse(reduction)
    assert tiny_model(reduction=reduction).get_model().encoder_reducer.tokens == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("outside_missing:First", "No module named 'outside_missing'"),
        ("json:First", "has no attribute 'First'"),
        ("json:JSONDecoder", "is no subclass of TowerReducer, EncoderReducer"),
    ],
)
def test_what_a_place_may_not_be(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReductionConfig.parse(name)
