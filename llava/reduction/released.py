"""What the config.json of the methods' releases says, in the keys that each of them made up."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

TRIM_KEY = "mm_vision_token_reduce_func"  # "TRIM:-1" (automatic) or "TRIM:0.25" (fixed ratio); its scripts say TextSim+
TYPE_KEY = "mm_projector_type"  # "tokenpacker", beside the types of LLaVA
MQT_KEY = "num_visual_tokens"  # a number; "first_stage", all of them; or "second_stage", drawn in training
MQT_TYPE_KEY = "mm_query_abstractor_type"  # "matry_query"
M3_KEY = "matryoshka_vis_token_scale"  # the numbers of tokens that were trained, or the one that is asked for


def methods_of_keys(config: object) -> dict[str, dict[str, Any]]:
    """Method of each site that a release's keys name.

    Args:
        config: whose attributes are the keys of a config.json.

    Raises:
        ValueError: a key with a value that its release does not know.
    """
    found = {}
    for key, (site, read) in {**KEYS, TYPE_KEY: ("projector", tokenpacker_method)}.items():
        method = read(getattr(config, key, None))
        if method is not None:
            found[site] = method
    return found


def without_methods(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a config.json without any method."""
    plain = {key: value for key, value in raw.items() if key not in ("reduction", *KEYS)}
    return {**plain, TYPE_KEY: "mlp2x_gelu"} if tokenpacker_method(raw.get(TYPE_KEY)) else plain


def trim_method(value: Any) -> dict[str, Any] | None:
    """Of the value of `TRIM_KEY`."""
    if not value:
        return None
    name, _, ratio = str(value).partition(":")
    try:
        fixed = float(ratio or -1)
    except ValueError as error:
        raise ValueError(f"{TRIM_KEY}={value!r}: expected 'TRIM:-1' or 'TRIM:RATIO'") from error
    name = {"textsim+": "trim"}.get(name.lower(), name.lower())
    return {"name": name, "ratio": fixed if fixed > 0 else None}


def m3_method(value: Any) -> dict[str, Any] | None:
    """Of the value of `M3_KEY`: a list, numbers with commas, or one number."""
    if value in (None, "", []):
        return None
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    try:
        numbers = [int(part) for part in parts]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{M3_KEY}={value!r}: expected numbers of tokens such as [1, 9, 36, 144, 576]") from error
    return {"name": "m3", "tokens": numbers[0]} if len(numbers) == 1 else {"name": "m3", "scales": numbers}


def tokenpacker_method(value: Any) -> dict[str, Any] | None:
    """Of the value of `TYPE_KEY`."""
    return {"name": "tokenpacker"} if value == "tokenpacker" else None


def mqt_method(value: Any) -> dict[str, Any] | None:
    """Of the value of `MQT_KEY`."""
    if value in (None, ""):
        return None
    if str(value) in ("first_stage", "second_stage"):
        return {"name": "mqt", **({"draws": True} if value == "second_stage" else {})}
    try:
        return {"name": "mqt", "tokens": int(value)}
    except (TypeError, ValueError) as error:
        raise ValueError(f"{MQT_KEY}={value!r}: expected a number, first_stage or second_stage") from error


KEYS: dict[str, tuple[str, Callable[[Any], dict[str, Any] | None]]] = {
    TRIM_KEY: ("encoder", trim_method),
    M3_KEY: ("projector", m3_method),
    MQT_TYPE_KEY: ("projector", lambda value: {"name": "mqt"} if value else None),
    MQT_KEY: ("projector", mqt_method),
}
"""Keys that mean nothing but a method; each with its site, and what reads its value."""
