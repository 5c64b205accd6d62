"""Which method works at which site. Kept in a model's config.json under the key `reduction`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import yaml

from llava.reduction.base import Reducers
from llava.reduction.budget import ModelShape, check_budget, resolve_budget
from llava.reduction.registry import SITES, build, is_loaded, method_class, site_of
from llava.reduction.released import methods_of_keys, trim_method
from llava.yaml_text import read_yaml

_CLASS = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")  # module:Class


@dataclass(frozen=True)
class ReductionConfig:
    """Method and options for each site; an empty mapping means none.

    Examples:
        >>> ReductionConfig.parse("prumerge").to_dict()
        {'encoder': {'name': 'prumerge'}}
        >>> bool(ReductionConfig.parse(None))
        False
    """

    tower: Mapping[str, Any] = field(default_factory=dict)
    encoder: Mapping[str, Any] = field(default_factory=dict)
    projector: Mapping[str, Any] = field(default_factory=dict)
    decoder: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for site in SITES:
            method = _method_mapping(site, getattr(self, site))
            object.__setattr__(self, site, method)
            if method:
                _check_method(site, method)
        if not self.projector:
            return
        for site in ("tower", "encoder"):
            method = getattr(self, site)
            if method and not getattr(method_class(method["name"]), "keeps_grid", False):
                raise ValueError(
                    f"reduction: the {site}'s method '{method['name']}' keeps patches here and there, and "
                    f"the projector's method '{self.projector['name']}' works on the whole grid; leave one out"
                )

    @classmethod
    def parse(cls, value: ReductionConfig | Mapping[str, Any] | str | None) -> ReductionConfig:
        """Read any of the forms in which a user may give it.

        Args:
            value: None or "none"; a method's name; a mapping from site to a name or to {name, **options}; a mapping
                {name, **options} of one method; or such a mapping as JSON or YAML text.

        Raises:
            ValueError: unknown site, method or option.
        """
        if isinstance(value, ReductionConfig):
            return value
        if isinstance(value, str):
            value = _parse_text(value)
        if value is None:
            return cls()
        if not isinstance(value, Mapping):
            raise ValueError(f"reduction={value!r}: expected a method's name or a mapping {{site: {{name: ...}}}}")
        if "name" in value:
            value = {site_of(method_class(str(value["name"]))): value}
        unknown = sorted(map(str, set(value) - set(SITES)))
        if unknown:
            raise ValueError(f"reduction: unknown site {', '.join(unknown)}; the sites are: {', '.join(SITES)}")
        return cls(**{site: method for site, method in value.items() if method is not None})

    @classmethod
    def of_model(cls, config: object) -> ReductionConfig:
        """What a model's config asks for: its key `reduction`, otherwise a key of the methods' releases."""
        own = getattr(config, "reduction", None)
        if own is not None:
            _check_loaded(own)
            return cls.parse(own)
        return cls.parse(methods_of_keys(config))

    def keeping_projector_of(self, other: ReductionConfig) -> ReductionConfig:
        """These methods with the other's of the site `projector`, whose weights are there, unless they name one.

        No reduction at all stays that.
        """
        return replace(self, projector=other.projector) if self and not self.projector else self

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """The sites in use, as plain JSON data; `parse` reads it back."""
        return {site: dict(getattr(self, site)) for site in SITES if getattr(self, site)}

    def __bool__(self) -> bool:
        return bool(self.to_dict())

    def build_all(self, shape: ModelShape | None = None) -> Reducers:
        """New reducers for all sites.

        Args:
            shape: of the model, for a method that is told a `budget`.

        Raises:
            ValueError: a budget that can't be met, or one without a model to meet it in.
        """
        reducers = Reducers()
        for site in SITES:  # in the order in which visual tokens go through them
            method = dict(getattr(self, site))
            if "budget" in method:
                if shape is None:
                    raise ValueError(
                        f"reduction.{site}: budget={method['budget']} is a number of tokens in a model's layers, and "
                        "there is no model with a vision tower here; give the method its own options"
                    )
                method = resolve_budget(method, reducers, shape)
            if method:
                reducers = replace(reducers, **{site: cast(Any, build(method.pop("name"), **method))})
        return reducers


def join_pyramiddrop_flags(reduction: Any, layer_list: str | None, image_token_ratio_list: str | None) -> Any:
    """A reduction together with what PyramidDrop's release gives as two flags of its own.

    Args:
        reduction: whatever `ReductionConfig.parse` reads.
        layer_list: e.g. "[8,16,24]"; read as data, never evaluated.
        image_token_ratio_list: e.g. "[0.5,0.25,0.125]"; its evaluation scripts have the 1.0 of the first stage too.

    Returns:
        `reduction` itself without the flags; with them a ReductionConfig.

    Raises:
        ValueError: one flag without the other, lists that do not fit, or a decoder method given twice.
    """
    if layer_list is None and image_token_ratio_list is None:
        return reduction
    if layer_list is None or image_token_ratio_list is None:
        raise ValueError("--layer_list and --image_token_ratio_list go together; give both")
    sites = ReductionConfig.parse(reduction).to_dict()
    if "decoder" in sites:
        raise ValueError(f"--layer_list asks for pyramiddrop, and --reduction for {sites['decoder']}; leave one out")
    layers, ratios = _load_yaml(layer_list), _load_yaml(image_token_ratio_list)
    if all(isinstance(values, list) for values in (layers, ratios)) and len(ratios) == len(layers) + 1:
        ratios = ratios[1:] if ratios[0] == 1 else ratios
    lists = {"layers": layers, "ratios": ratios}
    return ReductionConfig.parse({**sites, "decoder": {"name": "pyramiddrop", **lists}})


def _check_loaded(own: Any) -> None:
    """Refuse to import what a checkpoint's file names: it may come from anyone.

    Raises:
        ValueError: a method `module:Class` of a module that nobody has imported.
    """
    for name in _names(own):
        if not is_loaded(name):
            raise ValueError(
                f"this model's config.json reduces with {name}, code outside of llava, which is not imported because a "
                f"file names it: import {name.partition(':')[0]} first, or pass reduction={name!r} (--reduction)"
            )


def _names(value: Any) -> list[str]:
    """The names of the methods in any of the forms that `ReductionConfig.parse` reads."""
    value = _parse_text(value) if isinstance(value, str) else value
    if not isinstance(value, Mapping):
        return []
    return [str(value["name"])] if "name" in value else [name for part in value.values() for name in _names(part)]


def _parse_text(text: str) -> Any:
    text = text.strip()
    if text.lower() in ("", "none", "null"):
        return None
    if ("{" not in text and ":" not in text) or _CLASS.fullmatch(text):
        return {"name": text}
    return _load_yaml(text)


def _load_yaml(text: str) -> Any:
    try:
        return read_yaml(text)  # JSON is YAML
    except yaml.YAMLError as error:
        raise ValueError(f"reduction={text!r} is neither a method's name nor valid JSON or YAML: {error}") from error
    except RecursionError as error:
        raise ValueError(f"reduction={text[:40]!r}... is nested too deeply") from error


def _method_mapping(site: str, method: Any) -> dict[str, Any]:
    if isinstance(method, str):
        method = _parse_text(method)
    if not method:
        return {}
    if not isinstance(method, Mapping) or "name" not in method:
        raise ValueError(f"reduction.{site}={method!r}: expected a method's name or a mapping with the key 'name'")
    try:
        return json.loads(json.dumps(dict(method)))  # plain data only: it is written to config.json
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"reduction.{site}: {error}; options are plain numbers, texts and lists, for config.json keeps them"
        ) from error


def trim_flag(value: str) -> str | None:
    """What TRIM's flag `--mm_vision_token_reduce_func` asks for, as JSON for `parse`; None for nothing.

    Args:
        value: as in config.json, see `TRIM_KEY`. The release trains on the text of the whole conversation.

    Raises:
        ValueError: neither a method nor a ratio.
    """
    method = trim_method(value)
    return json.dumps({**method, "text": "conversation"}) if method else None


def _check_method(site: str, method: Mapping[str, Any]) -> None:
    try:
        method_class(method["name"], site)
        if "budget" in method:
            check_budget(method)
        else:
            build(**method)
    except ValueError as error:
        raise ValueError(f"reduction.{site}: {error}") from error
