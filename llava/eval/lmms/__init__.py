"""The plugin for lmms-eval 0.7: `lmms-eval --model llava_reduced` evaluates a checkpoint of this package."""

from __future__ import annotations

from typing import Any

MODEL_ID = "llava_reduced"  # lmms-eval itself has the names llava, llava_hf, llava_vid, llava_onevision, ...


def manifest() -> Any:
    """What lmms-eval's entry-point group `lmms_eval.models` asks for: a `ModelManifest`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    models = f"{__name__}.models"
    return ModelManifest(
        model_id=MODEL_ID,
        simple_class_path=f"{models}.LlavaReduced",
        chat_class_path=f"{models}.LlavaReducedChat",
    )
