"""YAML files of a run's settings: flat keys named as the flags, `extends`, and `key=value` overrides."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from llava.reduction import ReductionConfig
from llava.reduction.options import Within
from llava.reduction.registry import SITES
from llava.train.settings.parsing import flag_names, to_flags, unknown_names_message
from llava.train.settings.problems import Problems
from llava.train.settings.values import read_path

EXTENDS = "extends"
LAUNCH_KEYS = ("num_gpus", "hostfile", "master_port")


@dataclass(frozen=True, kw_only=True)
class LaunchOptions:
    """How many processes run, and where.

    Attributes:
        num_gpus: processes on this machine; None: one for each GPU, or one on the CPU.
        hostfile: DeepSpeed's list of machines, for more than one.
        master_port: TCP port at which the processes meet.
    """

    num_gpus: int | None = None
    hostfile: str | None = None
    master_port: int | None = None

    def __post_init__(self) -> None:
        problems = Problems()
        problems.check(_check_whole, "num_gpus", self.num_gpus, Within(1))
        problems.check(_check_whole, "master_port", self.master_port, Within(1, 65535))
        problems.raise_all()


def _check_whole(key: str, value: Any, allowed: Within) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value not in allowed):
        raise ValueError(f"{key}={value}: expected a whole number {allowed}")


def _read_hostfile(value: Any) -> str | None:
    """The file's path; DeepSpeed's launcher would take a missing one for a run on this machine alone."""
    if value is None or value is False:
        return None
    path = read_path("hostfile", str(value))
    if not Path(path).is_file():
        raise ValueError(f"hostfile={path}: no such file (seen from {Path.cwd()})")
    return path


def load_config(
    path: str | Path, overrides: list[str] | None = None, problems: Problems | None = None
) -> tuple[list[str], LaunchOptions]:
    """Read a YAML file, what it extends, and overrides.

    Args:
        path: the YAML file. `extends: other.yaml`, or a list of such, is read first, relative to this file.
        overrides: `key=value`, the last word on each key; `reduction.encoder.ratio=0.25` reaches into a
            mapping, and `key=null` gives a flag's default back.
        problems: gets what is wrong with single keys, which are left out, so that all can be told at once.

    Returns:
        The flags of the run, as `llava.train.settings.parsing.parse_args` reads them, and how to launch it.

    Raises:
        ValueError: a missing file, a cycle of `extends`, broken YAML; without `problems` also an unknown key or a
            wrong value. The file is named.
    """
    found = Problems() if problems is None else problems
    values = _read(Path(path), (), found)
    for override in overrides or []:
        with found.catch():
            values = _merge(values, _override(override), f"{path} {override}", found)
    launch = {key: values.pop(key, None) for key in LAUNCH_KEYS}
    launch["hostfile"] = found.check(_read_hostfile, launch["hostfile"])
    flags: dict[str, Any] = {}
    for key, value in values.items():
        with found.catch():
            flags[key] = _flag_value(key, value)
    options = found.check(LaunchOptions, **launch) or LaunchOptions()
    if problems is None:
        found.raise_all()
    return to_flags(flags), options


def own_flags(path: str | Path) -> list[str]:
    """The flags that a YAML file states itself, without what it extends: what a method changes of its base."""
    own = _load_yaml(Path(path).resolve(), ())
    own.pop(EXTENDS, None)
    problems = Problems()
    values = _merge({}, own, str(path), problems)
    problems.raise_all()
    return to_flags({key: _flag_value(key, value) for key, value in values.items() if key not in LAUNCH_KEYS})


def _read(path: Path, children: tuple[Path, ...], problems: Problems) -> dict[str, Any]:
    path = path.resolve()
    if path in children:
        chain = " -> ".join(str(p) for p in (*children, path))
        raise ValueError(f"{path}: extends itself: {chain}")
    own = _load_yaml(path, children)
    parents = own.pop(EXTENDS, None) or []
    values: dict[str, Any] = {}
    for parent in [parents] if isinstance(parents, str) else parents:
        values = _merge(values, _read(path.parent / parent, (*children, path), problems), str(path), problems)
    return _merge(values, own, str(path), problems)


def _load_yaml(path: Path, children: tuple[Path, ...]) -> dict[str, Any]:
    if not path.is_file():
        named_by = f", named by `extends` in {children[-1]}" if children else ""
        raise ValueError(f"{path}: no such file{named_by}")
    try:
        config = OmegaConf.load(path)
        if not isinstance(config, DictConfig):
            raise ValueError(f"{path}: expected settings `key: value`, got {type(config).__name__}")
        return _plain(config)
    except (OmegaConfBaseException, OSError, _yaml_error()) as error:
        raise ValueError(f"{path}: {error}") from error


def _yaml_error() -> type[Exception]:
    import yaml

    return yaml.YAMLError


def _override(text: str) -> dict[str, Any]:
    key, equals, _ = text.partition("=")
    if not equals or not key or key.startswith("-"):
        raise ValueError(f"{text!r}: expected key=value, such as learning_rate=2e-5")
    try:
        return _plain(OmegaConf.from_dotlist([text]))
    except (OmegaConfBaseException, _yaml_error()) as error:
        raise ValueError(f"{text!r}: {error}") from error


def _plain(config: DictConfig) -> dict[str, Any]:
    values = OmegaConf.to_container(config, resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _merge(base: dict[str, Any], new: dict[str, Any], source: str, problems: Problems) -> dict[str, Any]:
    """Settings with newer ones over them; unknown keys are noted and left out."""
    known = [*flag_names(), *LAUNCH_KEYS]
    unknown = [key for key in new if key not in known]
    if unknown:
        problems.add(f"{source}: {unknown_names_message('key', unknown, known)}")
    merged = {**base, **{key: value for key, value in new.items() if key not in unknown}}
    if "reduction" in new:
        merged["reduction"] = _merge_reduction(base.get("reduction"), new["reduction"])
    return merged


def _merge_reduction(base: Any, new: Any) -> Any:
    """Options join those of the same method; a new method, or a name alone, takes the place of the old."""
    if not isinstance(new, dict) or "name" in new or not set(new) <= set(SITES):
        return new
    merged: dict[str, Any] = ReductionConfig.parse(base).to_dict()
    for site, method in new.items():
        old = merged.get(site)
        joins = isinstance(method, dict) and old is not None and method.get("name", old["name"]) == old["name"]
        merged[site] = {**old, **method} if joins and old is not None else method
    return merged


def _flag_value(key: str, value: Any) -> Any:
    if key == "reduction" and value is False:  # YAML's `no`
        return "none"
    if key == "reduction" and value is not None:
        reduction = ReductionConfig.parse(value)
        if not isinstance(value, str):
            return json.dumps(reduction.to_dict()) if reduction else "none"
    return json.dumps(value) if isinstance(value, (dict, list)) else value


if __name__ == "__main__":  # for scripts/launch.sh: a flag a line
    import sys

    sys.stdout.writelines(f"{flag}\n" for flag in own_flags(sys.argv[1]))
