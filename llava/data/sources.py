"""Which files `data_path` means: local ones, folders, globs, hub datasets and object stores, with their weights.

Every form becomes a list of `DataSource`. What is local is looked at when it is parsed, so that a wrong name is found
before anything is started; what is remote is asked for only when the data is read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from llava.yaml_text import read_yaml

DataPath = str | Path | Mapping[str, Any] | Sequence[Any]

SUFFIXES = (".json", ".jsonl", ".parquet")
"""Ends of the names of data files, by which those in a folder are found."""

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_METADATA = ("dataset_infos.json", "dataset_info.json", "state.json")


@dataclass(frozen=True)
class DataSource:
    """One entry of `data_path`.

    Attributes:
        path: a file, a folder, a glob, a URL (`s3://...`, `hf://...`) of one of them, or a hub dataset's name.
        weight: how often its samples are seen in an epoch: 0.5 half of them, 2 each of them twice.
        image_folder: where its images are; None: the run's `image_folder`.
        subset: configuration of a hub dataset.
        split: of a hub dataset.
    """

    path: str
    weight: float = 1.0
    image_folder: str | None = None
    subset: str | None = None
    split: str = "train"

    def __post_init__(self) -> None:
        if isinstance(self.weight, bool) or not isinstance(self.weight, int | float) or not self.weight > 0:
            raise ValueError(f"data_path {self.path!r}: weight={self.weight!r}, expected a number above 0")
        for name in ("image_folder", "subset", "split"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise ValueError(f"data_path {self.path!r}: {name}={value!r}, expected text")
        if self.is_local:
            self.files()

    @property
    def is_local(self) -> bool:
        """Whether the path is of this machine's file system."""
        return not is_url(self.path) and not self._is_hub_name

    @property
    def _is_hub_name(self) -> bool:
        named = _HUB_NAME.fullmatch(self.path) is not None and not self.path.endswith(SUFFIXES)
        return named and not os.path.exists(self.path)  # noqa: PTH110 (False for any text)

    def files(self) -> list[str]:
        """Paths or URLs of the files, sorted where they are found in a folder or by a glob.

        Raises:
            ValueError: there is none.
        """
        if self._is_hub_name:
            return _hub_files(self)
        try:
            found = _url_files(self.path) if is_url(self.path) else _local_files(self.path)
        except OSError as error:  # too long a name, no permission
            raise ValueError(f"data_path {self.path!r:.300} cannot be looked up: {error.strerror}") from error
        if not found:
            raise ValueError(
                f"data_path {self.path!r}: nothing there that ends in {', '.join(SUFFIXES)}; name a file, a folder or "
                "a glob of such files"
            )
        return found


def is_url(path: str | Path) -> bool:
    """Whether a path names a file system of its own, such as s3://."""
    return "://" in str(path)


def parse_data_path(data_path: DataPath) -> list[DataSource]:
    """The sources that `data_path` names.

    Args:
        data_path: a path; several, separated by commas; a mapping {path, weight, image_folder, subset, split}; a list
            of paths and mappings; or such a list or mapping as JSON or YAML text.

    Raises:
        ValueError: none is named, a local one does not exist, or a mapping has an unknown key or a wrong value.
    """
    if isinstance(data_path, str) and not os.path.isfile(data_path):  # noqa: PTH113 (False for any text)
        data_path = _parse_text(data_path)
    entries = [data_path] if isinstance(data_path, str | Path | Mapping) else list(data_path)
    if not entries:
        raise ValueError("data_path is empty; name a JSON, JSON-lines or Parquet file of conversations")
    return [_source(entry) for entry in entries]


def _parse_text(text: str) -> Any:
    if not text.lstrip().startswith(("[", "{")):
        return [part.strip() for part in text.split(",") if part.strip()]
    try:
        return read_yaml(text)  # JSON is YAML
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"data_path {text!r} is neither a file nor valid JSON or YAML: {error}") from error


def _source(entry: Any) -> DataSource:
    if isinstance(entry, str | Path):
        return DataSource(str(entry))
    known = [field.name for field in fields(DataSource)]
    if not isinstance(entry, Mapping) or not isinstance(entry.get("path"), str | Path):
        raise ValueError(f"data_path: {entry!r:.200} is neither a path nor a mapping with the key 'path'")
    unknown = sorted(map(str, set(entry) - set(known)))
    if unknown:
        raise ValueError(f"data_path {entry['path']!r}: unknown key {', '.join(unknown)}; known: {', '.join(known)}")
    return DataSource(**{**entry, "path": str(entry["path"])})


def _local_files(path: str) -> list[str]:
    given = Path(path)
    if given.is_file():
        return [path]
    if given.is_dir():
        return _data_files(str(file) for file in given.rglob("*") if file.is_file())
    if any(letter in path for letter in "*?["):
        root = Path(given.anchor) if given.is_absolute() else Path()
        return _data_files(str(file) for file in root.glob(str(given.relative_to(given.anchor))) if file.is_file())
    raise ValueError(f"data file {path!r} does not exist; check data_path")


def _url_files(url: str) -> list[str]:
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(url)
        if any(letter in path for letter in "*?["):
            found = system.glob(path)
        elif system.isdir(path):
            found = system.find(path)
        else:
            return [url]
        return _data_files(system.unstrip_protocol(file) for file in found)
    except Exception as error:  # of the kinds that each object store has; a package that is missing is named
        raise ValueError(f"data_path {url!r} cannot be looked up: {error!s:.300}") from error


def _data_files(paths: Any) -> list[str]:
    return sorted(path for path in paths if path.endswith(SUFFIXES) and not path.endswith(_METADATA))


def _hub_files(source: DataSource) -> list[str]:
    """Files of a split of a hub dataset, as its own README and `datasets` tell the splits apart."""
    from llava.data.table import import_datasets

    datasets = import_datasets()
    try:
        builder = datasets.load_dataset_builder(source.path, source.subset)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"data_path {source.path!r} is neither a file here nor a hub dataset that can be read: {error}"
        ) from error
    splits = builder.config.data_files or {}
    if source.split not in splits:
        raise ValueError(
            f"data_path {source.path!r}: it has no split {source.split!r} of data files; it has: "
            f"{', '.join(map(str, splits)) or 'none'}"
        )
    return [str(file) for file in splits[source.split]]
