"""`llava methods`: what the registry knows of every method, and of one.

Where a method can be told a budget, its cost is that at `BUDGET` visual tokens a layer, so that costs compare;
otherwise that of its defaults.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

import llava
from llava.cost.question import Scenario, methods, question_cost
from llava.cost.sizes import open_model
from llava.reduction.base import Reducer
from llava.reduction.budget import ModelShape, without_notes
from llava.reduction.options import option_name
from llava.reduction.registry import available, method_class, site_of
from llava.reduction.stand_in import TowerShape

BUDGET = 64
DOCS = Path(llava.__file__).resolve().parent.parent / "docs" / "methods.md"


def table(model: str = "7b") -> str:
    """All methods by site, in Markdown; costs are of one question to `model` (see `open_model`)."""
    opened = open_model(model)
    lines = [
        f"| method | site | options | visual tokens a layer | TFLOPs a question, {model} | trained |",
        "|---|---|---|---|---|---|",
    ]
    with without_notes():
        for site, names in available().items():
            lines += [_row(opened, site, name) for name in names]
    return "\n".join(lines) + "\n"


def _row(model: Any, site: str, name: str) -> str:
    cls = method_class(name)
    tokens, cost = _cost(model, name)
    trained = "yes" if cls.is_trained else "no"
    return f"| `{name}` | {site} | {', '.join(_options(cls))} | {tokens} | {cost} | {trained} |"


def _cost(model: Any, name: str) -> tuple[str, str]:
    """Mean visual tokens of a layer, and 10^12 operations of a question; empty for what needs options of its own."""
    for asked in ({"name": name, "budget": BUDGET}, {"name": name}):
        try:
            reducers, _ = methods(asked, model=model)
            cost = question_cost(model, asked, Scenario())
        except ValueError:
            continue
        shape = ModelShape(TowerShape.of(model.get_model().get_vision_tower()), model.config.num_hidden_layers)
        return f"{shape.mean_tokens(reducers):.4g}", f"{sum(cost.flops().values()) / 1e12:.3g}"
    return "", ""


def _fields(cls: type[Reducer]) -> list[Field]:
    """A method's own options, then those that it shares with others of its site."""
    own = inspect.get_annotations(cls)
    return sorted(fields(cls), key=lambda option: option.name not in own)  # type: ignore[arg-type]


def _options(cls: type[Reducer]) -> list[str]:
    """Each option with its default."""
    return [
        option_name(option.name) + ("" if option.default is MISSING else f"={option.default}")
        for option in _fields(cls)
    ]


def describe(name: str) -> str:
    """What a method does, its options, and where paper and release differ.

    Raises:
        ValueError: no such method; the known ones are listed.
    """
    cls = method_class(name)
    about = inspect.getdoc(inspect.getmodule(cls)) or ""
    parts = [f"{name} (site: {site_of(cls)})", about, inspect.getdoc(cls) or "", _option_lines(cls)]
    if "|---" not in parts[2]:
        parts.append(_table_in_docs(name))
    return "\n\n".join(part for part in parts if part) + "\n"


def _option_lines(cls: type[Reducer]) -> str:
    comments = _comments(cls)
    lines = []
    for option, shown in zip(_fields(cls), _options(cls), strict=True):
        comment = comments.get(option.name, "")
        lines.append(f"  {shown}" + (f"  # {comment}" if comment else ""))
    return "\n".join(["Options:", *lines]) if lines else "No options."


def _comments(cls: type[Reducer]) -> dict[str, str]:
    """The comment that stands behind each field, in the sources of the class and its bases."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if issubclass(base, Reducer):
            found |= dict(re.findall(r"^    (\w+): [^\n#]*  # ([^\n]+)$", inspect.getsource(base), re.MULTILINE))
    return found


def _table_in_docs(name: str) -> str:
    """The tables of a method's section in docs/methods.md, where the repository is there."""
    if not DOCS.is_file():
        return ""
    for section in re.split(r"^## ", DOCS.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        heading = section.partition("\n")[0].lower().replace("+", "_plus").replace(" ", "_")
        if heading == name or heading.startswith(f"{name}_and_"):
            return "\n".join(line for line in section.splitlines() if line.startswith("|"))
    return ""
