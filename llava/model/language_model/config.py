"""What the configurations of all language models have in common."""

from __future__ import annotations

from typing import Any


class LlavaConfigMixin:
    """Writes config.json so that LLaVA's own code, on transformers 4.31 to 4.37, reads the same model from it.

    Those releases look for the settings of the rotary embedding under other keys, and take their defaults where they
    find none, without a word.
    """

    def to_diff_dict(self) -> dict[str, Any]:
        """The content of config.json."""
        written: dict[str, Any] = super().to_diff_dict()  # type: ignore[misc]
        rope = written.get("rope_parameters") or {}
        if "rope_theta" in rope:
            written["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type") in ("linear", "dynamic"):  # the kinds that they know
            written["rope_scaling"] = {"type": rope["rope_type"], "factor": rope["factor"]}
        return written
