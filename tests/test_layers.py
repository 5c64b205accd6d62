"""The layout is the architecture: no import runs upwards or in a circle, and no folder is too full to read."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.conftest import ROOT

# From the bottom: a room imports from its own and from those before it.
LAYERS = (
    {"constants", "lock", "pictures", "transfer", "utils", "yaml_text"},
    {"video"},
    {"conversation", "files", "messages", "mm_utils", "provenance"},
    {"data", "reduction"},
    {"model"},
    {"cost"},
    {"train", "eval"},
    {"cli"},
    {"reproduce"},
)
ROOMS_OF_TRAINING = ("settings", "checkpoints", "logs", "preflight", "launching")
MOST_MODULES = 14
# Names that several rooms need, each with the one file that spells them.
SPELT_IN = {
    "adapter_config.json": "llava/files.py",
    "adapter_model.bin": "llava/files.py",
    "adapter_model.safetensors": "llava/files.py",
    "mm_projector.bin": "llava/files.py",
    "non_lora_trainables.bin": "llava/files.py",
    ("flat", "spatial", "spatial_unpad"): "llava/model/image_layout.py",
    ("square", "pad", "anyres"): "llava/mm_utils.py",
}

Graph = dict[str, set[str]]


def modules() -> dict[str, Path]:
    """All modules of the package by their dotted names."""
    files = sorted((ROOT / "llava").rglob("*.py"))
    names = (".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files)
    return {name.removesuffix(".__init__"): file for name, file in zip(names, files, strict=True)}


def imports_of(file: Path, known: dict[str, Path]) -> set[str]:
    """Modules of the package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in names if name in known} or {node.module}
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{file}: relative import"
    return found & known.keys()


@pytest.fixture(scope="module")
def graph() -> Graph:
    known = modules()
    return {name: imports_of(file, known) - {name} for name, file in known.items()}


def room(module: str) -> str:
    """`llava.model.splice` is in the room `model`."""
    return module.split(".")[1]


def circle(graph: Graph) -> list[str]:
    """Modules that import one another in a circle; empty where there is none."""
    done: set[str] = set()

    def follow(module: str, path: list[str]) -> list[str]:
        if module in path:
            return path[path.index(module) :]
        if module in done:
            return []
        for imported in sorted(graph[module]):
            found = follow(imported, [*path, module])
            if found:
                return found
        done.add(module)
        return []

    return next((found for module in sorted(graph) if (found := follow(module, []))), [])


def test_no_import_runs_in_a_circle(graph: Graph) -> None:
    assert circle(graph) == []


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["b", "c"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_no_import_runs_upwards(graph: Graph) -> None:
    level = {name: number for number, names in enumerate(LAYERS) for name in names}
    arrows = [(a, b) for a, imported in graph.items() for b in imported if a != "llava" and b != "llava"]
    assert {room(a) for a, _ in arrows} <= level.keys(), "a new room: give it a place in LAYERS"
    upwards = [f"{a} imports {b}" for a, b in arrows if level[room(a)] < level[room(b)]]
    assert upwards == []


def test_rooms_of_one_level_do_not_import_each_other(graph: Graph) -> None:
    level = {name: number for number, names in enumerate(LAYERS) for name in names}
    arrows = [(a, b) for a, imported in graph.items() for b in imported if a != "llava" and b != "llava"]
    folders = {"data", "reduction", "train", "eval"}
    sideways = [
        f"{a} imports {b}"
        for a, b in arrows
        if room(a) != room(b) and level[room(a)] == level[room(b)] and room(a) in folders
    ]
    assert sideways == []


def test_no_folder_is_too_full() -> None:
    folders = [folder for folder in (ROOT / "llava").rglob("*") if (folder / "__init__.py").is_file()]
    full = {
        folder.relative_to(ROOT).as_posix(): count
        for folder in [ROOT / "llava", *folders]
        if (count := len([file for file in folder.glob("*.py") if file.name != "__init__.py"])) > MOST_MODULES
    }
    assert full == {}


def test_the_docs_show_every_room() -> None:
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    rooms = {
        folder.relative_to(ROOT).as_posix()
        for folder in (ROOT / "llava").iterdir()
        if (folder / "__init__.py").is_file()
    }
    rooms |= {f"llava/train/{name}" for name in ROOMS_OF_TRAINING}
    assert [name for name in sorted(rooms) if f"`{name}/`" not in text] == []


def test_no_two_functions_of_the_methods_share_a_name() -> None:
    names = [
        node.name
        for file in (ROOT / "llava" / "reduction").rglob("*.py")
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    ]
    assert sorted(names) == sorted(set(names))


def test_shared_names_are_spelt_once() -> None:
    found: dict[str, set[str]] = {str(name): set() for name in SPELT_IN}
    for file in modules().values():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            text = ast.unparse(node) if isinstance(node, ast.Tuple) else str(getattr(node, "value", ""))
            if text in found:
                found[text].add(file.relative_to(ROOT).as_posix())
    assert found == {str(name): {file} for name, file in SPELT_IN.items()}
