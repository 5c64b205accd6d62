"""What this program writes, and what it leaves alone: one rule for all commands.

A folder that it writes into has a list of what it wrote, `files.json`: names and sizes in bytes. A size of null stands
for a file that grows or is written again and again, such as a log; its name may be a pattern. Everything else in the
folder, and a listed file whose size has changed, belongs to someone else. It is never replaced and never removed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from llava.lock import lock

logger = logging.getLogger(__name__)

LIST_FILE = "files.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
"""The names under which PEFT keeps an adapter's weights; the first is the one that it writes today."""
NON_LORA_FILE = "non_lora_trainables.bin"
PROJECTOR_FILE = "mm_projector.bin"
QUERY_FILE = "query_abstractor.bin"
"""MQT's name for the file of what stands in the projector's place."""
PROJECTOR_FILES = (PROJECTOR_FILE, QUERY_FILE)
CHECKPOINT_FILES = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*.bin",
    "pytorch_model.bin.index.json",
    ADAPTER_CONFIG,
    *ADAPTER_FILES,
    *PROJECTOR_FILES,
    NON_LORA_FILE,
    "training_args.bin",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
)
"""What a checkpoint can consist of: a stranger's file of such a name would be replaced, or be read as a part of it."""

Sizes = dict[str, int | None]


# The list of a folder's own files --------------------------------------------------------------------------------


def size_of(path: Path) -> int:
    """Bytes of a file."""
    with path.open("rb") as file:  # on network file systems only an open file's size is up to date
        return os.fstat(file.fileno()).st_size


def projector_file(folder: Path) -> Path:
    """The file of a folder that holds a projector alone; the usual one, if there is none."""
    return next((folder / name for name in PROJECTOR_FILES if (folder / name).is_file()), folder / PROJECTOR_FILE)


def projector_file_of(names: Iterable[str]) -> str:
    """The name of the file for a projector's weights of these names."""
    return QUERY_FILE if any("query_abstractor." in name for name in names) else PROJECTOR_FILE


def adapter_file(folder: Path) -> Path:
    """The file of an adapter's weights; the name that PEFT writes today where there is none."""
    return next((folder / name for name in ADAPTER_FILES if (folder / name).is_file()), folder / ADAPTER_FILES[0])


def write_file_list(folder: Path) -> None:
    """List all files below a folder, which are all this program's; the last thing that is written to it."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    sizes = {path.relative_to(folder).as_posix(): size_of(path) for path in files}
    sizes.pop(LIST_FILE, None)
    _write_list(folder, dict(sizes))


def read_file_list(folder: Path) -> Sizes | None:
    """The list of a folder; None where there is none.

    Raises:
        ValueError: its `files.json` is no such list.
    """
    try:
        sizes = json.loads((folder / LIST_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise ValueError(f"{folder / LIST_FILE} is not valid JSON") from error
    if not isinstance(sizes, dict) or not all(_is_entry(name, size) for name, size in sizes.items()):
        raise ValueError(f"{folder / LIST_FILE} is no list of files with their sizes, as this program writes it")
    return sizes


def _is_entry(name: str, size: Any) -> bool:
    """Whether a list may say this: names of files elsewhere would be removed with the folder's own."""
    path = Path(name)
    return (size is None or type(size) is int) and not path.is_absolute() and ".." not in path.parts


def note_files(folder: Path, sizes: Mapping[str, int | None]) -> None:
    """Add files to a folder's list, or change what it says of them."""
    _write_list(folder, {**(read_file_list(folder) or {}), **sizes})


def _write_list(folder: Path, sizes: Sizes) -> None:
    new = folder / f".{LIST_FILE}-{_unique()}"
    try:
        with new.open("w", encoding="utf-8") as file:
            file.write(json.dumps(sizes, indent=1))
            file.flush()
            os.fsync(file.fileno())  # without it a crashed machine can leave the new name with no content
        new.replace(folder / LIST_FILE)
    finally:
        new.unlink(missing_ok=True)


def _unique() -> str:
    return uuid.uuid4().hex[:8]  # process numbers repeat in containers


def _is_own(path: Path, name: str, sizes: Sizes) -> bool:
    if name == LIST_FILE:
        return True
    size = size_of(path)
    return size == 0 or any(fnmatchcase(name, own) and listed in (None, size) for own, listed in sizes.items())


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def foreign_files(folder: Path, patterns: Iterable[str], sizes: Sizes | None = None) -> list[Path]:
    """Files right in a folder that have such names and that this program did not write, sorted.

    Args:
        folder: need not exist.
        patterns: of names.
        sizes: the folder's list; default: as it is written there.
    """
    own = (read_file_list(folder) or {}) if sizes is None else sizes
    patterns = tuple(patterns)
    files = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    return [path for path in files if _matches(path.name, patterns) and not _is_own(path, path.name, own)]


# Places ----------------------------------------------------------------------------------------------------------


def check_writable(place: str | Path, what: str) -> None:
    """Raise a ValueError unless files can be made in a folder, which need not exist yet; nothing is left there.

    Args:
        place: the folder.
        what: it is for, or the flag that names it; the message begins with it.
    """
    existing = Path(place).absolute()
    try:
        while not existing.exists():
            existing = existing.parent
        if existing.is_dir():
            with tempfile.TemporaryFile(dir=existing):
                return
        reason = f"{existing} is a file"
    except OSError as error:
        reason = f"{error.strerror or error} in {existing}"
    raise ValueError(f"{what} {place}: nothing can be written there ({reason}); choose another place, or mend that one")


def check_apart(target: str | Path, what: str, inputs: Mapping[str, str | os.PathLike | None]) -> None:
    """Refuse a folder to write that is one of the places that are read, lies in it, or has it inside.

    Links and `..` are followed. A name of the hub counts as the folder that it would name here: once that existed, it
    would be read in the hub's place.

    Args:
        target: the folder, or a file.
        what: the message calls it.
        inputs: folders, files and hub names by what the message calls them; None is left out. Only what lies in the
            target is refused of a file.

    Raises:
        ValueError: they are not apart.
    """
    own = Path(target).resolve()
    for name, place in inputs.items():
        if not place:
            continue
        other = Path(place).expanduser().resolve()
        if _same(own, other):
            raise ValueError(f"{what} {target} is the {name}, which is never replaced; choose another place")
        if not other.is_file() and _contains(other, own):
            raise ValueError(f"{what} {target} lies in the {name} {place}; choose a folder outside of it")
        if other.exists() and _contains(own, other):
            raise ValueError(f"the {name} {place} lies in the {what} {target}; choose a folder that does not hold it")


def _contains(folder: Path, path: Path) -> bool:
    return any(_same(folder, parent) for parent in path.parents)


def _same(first: Path, second: Path) -> bool:
    with contextlib.suppress(OSError):
        return first.samefile(second)
    return first == second


def places_read(
    source: str | os.PathLike,
    model_base: str | os.PathLike | None = None,
    vision_tower: str | os.PathLike | None = None,
    video_tower: str | os.PathLike | None = None,
) -> dict[str, str | os.PathLike | None]:
    """What is read where a checkpoint is opened: itself, its base and their towers.

    Args:
        source: the checkpoint.
        model_base: in place of the base that an adapter or projector-only folder names.
        vision_tower, video_tower: used besides those that the config.json files name.
    """
    folder = Path(source)
    adapter, config = _json(folder / ADAPTER_CONFIG), _json(folder / "config.json")
    base = model_base or adapter.get("base_model_name_or_path")
    if base is None and projector_file(folder).is_file():
        base = config.get("_name_or_path")
    theirs = {} if base is None else _json(Path(base) / "config.json")
    named = {
        "base": base,
        "vision tower": vision_tower,
        "vision tower of the source": config.get("mm_vision_tower"),
        "vision tower of the base": theirs.get("mm_vision_tower"),
        "video tower": video_tower,
        "video tower of the source": config.get("mm_video_tower"),
        "video tower of the base": theirs.get("mm_video_tower"),
    }
    return {"source": source, **{name: place for name, place in named.items() if isinstance(place, str | os.PathLike)}}


def _json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # whoever opens the checkpoint says what is wrong with it
    return content if isinstance(content, dict) else {}


# Folders that are written file by file ---------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into; what is in it at the end is moved to `folder` file by file, each in one step."""
    folder.mkdir(parents=True, exist_ok=True)
    staging = folder / f".writing-{_unique()}"
    staging.mkdir()
    try:
        yield staging
        for path in sorted(p for p in staging.rglob("*") if p.is_file()):
            target = folder / path.relative_to(staging)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
    finally:
        shutil.rmtree(staging)


@contextlib.contextmanager
def checkpoint_folder(folder: Path) -> Iterator[Path]:
    """As `atomic_folder`, for a checkpoint that takes the place of an earlier one of this program.

    What is left of the earlier one is removed. A stranger's file that would be replaced, or be read as a part of the
    checkpoint, gets another name.
    """
    with atomic_folder(folder) as staging:
        yield staging
        written = {path.name for path in staging.iterdir()}
        for path in foreign_files(folder, (*CHECKPOINT_FILES, *written)):
            set_aside(path)
        note_files(
            folder, dict.fromkeys(written)
        )  # this program's, even if it is killed before their sizes stand there
    for path in _checkpoint_files(folder):
        if path.name not in written:
            path.unlink()
    adopt_checkpoint(folder)


def _checkpoint_files(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_file() and _matches(path.name, CHECKPOINT_FILES)]


def adopt_checkpoint(folder: Path) -> None:
    """List the files of the checkpoint that lies in a folder as this program's own, in place of an earlier one's."""
    others = {k: v for k, v in (read_file_list(folder) or {}).items() if not _matches(k, CHECKPOINT_FILES)}
    _write_list(folder, {**others, **{path.name: size_of(path) for path in _checkpoint_files(folder)}})


def set_aside(path: Path) -> None:
    """Give what this program did not write another name, where it needs the place."""
    kept = path.with_name(f"{path.name}.kept-{_unique()}")
    path.rename(kept)
    logger.warning("%s was not written by this program: it is kept as %s", path, kept.name)


def remove_leftovers(folder: Path) -> None:
    """Remove what a process that was killed had begun to write into a folder; call it with the folder's lock held."""
    for path in folder.glob(".writing-*") if folder.is_dir() else ():
        shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(f".{LIST_FILE}-*"):
        path.unlink(missing_ok=True)


# Folders that are written as a whole -----------------------------------------------------------------------------


@contextlib.contextmanager
def new_folder(target: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write into, which takes the target's name at the end; after an error it is removed.

    Args:
        target: must not exist, or be empty, unless `overwrite`.
        overwrite: replace it where this program wrote it as a whole; files that someone else put there stay.

    Raises:
        ValueError: the target may not be replaced, can't be written, or another process is writing it.
    """
    check_target(target, overwrite)
    folder = Path(target).resolve()
    with lock(folder.with_name(f".{folder.name}.lock"), f"target {target}"):
        _clean_up(folder)
        check_target(target, overwrite)
        staging = _sibling(folder, "writing")
        staging.mkdir()
        try:
            yield staging
            write_file_list(staging)
            check_target(target, overwrite)  # which someone may have made meanwhile
            _replace(folder, staging)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def check_target(target: str | Path, overwrite: bool) -> None:
    """Raise a ValueError where `new_folder` may not write a target."""
    folder = Path(target).resolve()
    check_writable(folder.parent, f"the folder of target {target}:")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"target {target} is a file; choose another name")
    if folder.is_mount():
        raise ValueError(f"target {target} is where a disk is mounted, and can't be renamed; choose a folder in it")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    strange = _why_not_replaced(folder)
    if strange:
        raise ValueError(f"target {target} exists and is not empty, and is never replaced: {strange}; choose another")
    if not overwrite:
        raise ValueError(
            f"target {target} exists and is not empty; choose another, or pass overwrite=True (--overwrite)"
        )


def _why_not_replaced(folder: Path) -> str | None:
    """What keeps a folder from being replaced as a whole; None: this program wrote it so."""
    try:
        sizes = read_file_list(folder)
    except ValueError as error:
        return str(error)
    if sizes is None:
        return f"it has no {LIST_FILE}, so this program did not write it as it is"
    if None in sizes.values():
        return "it is the output_dir of a training run"
    foreign = foreign_files(folder, CHECKPOINT_FILES, sizes)
    if foreign:
        return f"{foreign[0].name} was not written by this program, or was changed since"
    return None


def _sibling(folder: Path, purpose: str) -> Path:
    return folder.with_name(f".{folder.name}.{purpose}-{_unique()}")


def _siblings(folder: Path, purpose: str) -> list[Path]:
    start = f".{folder.name}.{purpose}-"
    return [path for path in folder.parent.iterdir() if path.name.startswith(start)]


def _clean_up(folder: Path) -> None:
    """Bring to an end what a process that was killed left beside a folder; its lock must be held."""
    for path in _siblings(folder, "writing"):
        shutil.rmtree(path, ignore_errors=True)
    for old in _siblings(folder, "replaced"):
        if folder.exists():
            _remove_own(old, folder)
        else:
            old.rename(folder)


def _replace(folder: Path, staging: Path) -> None:
    if not folder.is_dir() or not any(folder.iterdir()):
        staging.rename(folder)
        return
    old = _sibling(folder, "replaced")
    shutil.copymode(folder, staging)
    folder.rename(old)
    try:
        staging.rename(folder)
    except OSError:
        old.rename(folder)
        raise
    _remove_own(old, folder)


def _remove_own(old: Path, new: Path) -> None:
    """Remove a folder that `new` has taken the place of; what this program did not write there moves to `new`."""
    sizes = read_file_list(old)
    if sizes is not None:
        for name in [*sizes, LIST_FILE]:
            path = old / name
            if path.is_file() and _is_own(path, name, sizes):
                path.unlink()
    _remove_empty_folders(old)
    for path in old.iterdir():
        if not (new / path.name).exists():
            path.rename(new / path.name)
    try:
        old.rmdir()
    except OSError:
        logger.warning("%s keeps what this program did not write and %s has files of the same names for", old, new)


def _remove_empty_folders(folder: Path) -> None:
    for path in sorted((p for p in folder.rglob("*") if p.is_dir() and not p.is_symlink()), reverse=True):
        with contextlib.suppress(OSError):  # not empty
            path.rmdir()


def remove_listed(folder: Path) -> None:
    """Remove the files that a folder lists, also torn ones, last the list, and the folder if nothing else is in it.

    Raises:
        ValueError: its list can't be read.
    """
    for name in read_file_list(folder) or {}:
        (folder / name).unlink(missing_ok=True)
    (folder / LIST_FILE).unlink(missing_ok=True)
    _remove_empty_folders(folder)
    with contextlib.suppress(OSError):  # not empty
        folder.rmdir()
