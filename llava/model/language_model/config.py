"""What the configurations of all language models have in common."""

from __future__ import annotations

from typing import Any, Self


class LlavaConfigMixin:
    """Writes config.json so that LLaVA's own code, on transformers 4.31 to 4.37, reads the same model from it.

    Those releases look for the settings of the rotary embedding under other keys, and take their defaults where they
    find none, without a word. Video-LLaVA calls its towers `mm_image_tower` and `mm_video_tower`; the first of them is
    `mm_vision_tower` here.
    """

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Self:
        """The configuration of a config.json's content."""
        tower = config_dict.get("mm_image_tower")
        if tower and not config_dict.get("mm_vision_tower"):
            config_dict = {**config_dict, "mm_vision_tower": tower}
        return super().from_dict(config_dict, **kwargs)  # type: ignore[misc]

    def to_diff_dict(self) -> dict[str, Any]:
        """The content of config.json."""
        written: dict[str, Any] = super().to_diff_dict()  # type: ignore[misc]
        rope = written.get("rope_parameters") or {}
        if "rope_theta" in rope:
            written["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type") in ("linear", "dynamic"):  # the kinds that they know
            written["rope_scaling"] = {"type": rope["rope_type"], "factor": rope["factor"]}
        if getattr(self, "mm_video_tower", None):
            written["mm_image_tower"] = self.mm_vision_tower  # type: ignore[attr-defined]
        return written
