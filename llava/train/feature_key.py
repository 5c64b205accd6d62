"""What the features that the projector reads depend on besides the pictures, and whether a run's may be stored."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from torch import nn

from llava.data.dataset import LazySupervisedDataset
from llava.data.feature_cache import FeatureCache
from llava.model.weights import sampled_mark, tower_weights
from llava.reduction.options import values_of
from llava.train.settings.arguments import parse_pinpoints
from llava.train.settings.parsing import Arguments

FORMAT = 1
"""Raise it when what is stored changes its meaning."""
TOWER_SIZES = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
PROCESSOR_SETTINGS = (
    "do_convert_rgb",
    "do_resize",
    "size",
    "resample",
    "do_center_crop",
    "crop_size",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
)


def inner_model(model: Any) -> Any:
    """The model without its head, also inside PEFT's wrapper."""
    return (model.get_base_model() if hasattr(model, "get_base_model") else model).get_model()


def check_fixed(model: Any) -> None:
    """Refuse to store features that are not the same each time a picture is seen.

    Args:
        model: on any device, with `requires_grad` as in training.

    Raises:
        ValueError: says why they are not.
    """
    inner = inner_model(model)
    encoder, reason = inner.get_vision_tower().vision_tower, ""
    dropout = any(isinstance(module, nn.Dropout) and module.p > 0 for module in encoder.modules())
    needs, method = inner.reducers().needs, getattr(inner.encoder_reducer, "method", "")
    if needs.text is not None:
        reason = f"the method '{method}' reads the text, so a picture's depend on the question"
    elif needs.projected:
        reason = f"the method '{method}' reads what the projector makes, which is trained, so they change"
    elif any(weight.requires_grad for weight in encoder.parameters()):
        reason = "the vision tower is trained, so they change"
    elif dropout or getattr(encoder.config, "attention_dropout", 0) > 0:
        reason = "the vision tower drops some of its values at random (attention_dropout)"
    if reason:
        raise ValueError(f"--feature_cache needs features that stay the same, and {reason}: leave it out")


def feature_key(model: Any, arguments: Arguments, processor: Any) -> dict[str, Any]:
    """What a run's features depend on, as plain JSON data by name.

    Args:
        model: on any device; its tower's weights are read from the files that the run begins with.
        arguments: of the run, with settings filled in by `read_config`.
        processor: the image processor.
    """
    inner = inner_model(model)
    tower, data, reducer = inner.get_vision_tower(), arguments.data, inner.encoder_reducer
    names = [name for name, _ in tower.vision_tower.named_parameters()]
    place = str(arguments.model.model_name_or_path)
    weights = tower_weights(place, str(arguments.model.vision_tower), names, arguments.training.cache_dir)
    inside = inner.tower_reducer
    key = {
        "format": FORMAT,
        "vision_tower": {name: getattr(tower.config, name) for name in TOWER_SIZES},
        "vision_tower_weights": sampled_mark(weights),
        "blocks": list(dict.fromkeys(tower.blocks_read(inner.projector_reducer))),
        "mm_vision_select_feature": tower.select_feature,
        "image_aspect_ratio": data.image_aspect_ratio or "square",
        "image_grid_pinpoints": parse_pinpoints(data.image_grid_pinpoints)
        if data.image_aspect_ratio == "anyres"
        else None,
        "image_processor": {name: _plain(getattr(processor, name, None)) for name in PROCESSOR_SETTINGS},
        "reduction": None if reducer is None else {"name": reducer.method, **values_of(reducer)},
        "feature_cache_dtype": data.feature_cache_dtype,
    }
    if inside is not None:
        key["tower_reduction"] = {"name": inside.method, **values_of(inside)}
    plain: dict[str, Any] = json.loads(json.dumps(key))
    return plain


def _plain(value: Any) -> Any:
    """A setting without what is not set in it."""
    values = dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value
    return {k: v for k, v in values.items() if v is not None} if isinstance(values, Mapping) else values


def use_feature_cache(dataset: Any, arguments: Arguments) -> None:
    """Let a run's items hold stored features where `feature_cache` asks for it.

    Raises:
        ValueError: there is no cache, or the data has clips; or see `LazySupervisedDataset`.
    """
    if arguments.data.feature_cache:
        refuse_clips(dataset)
        dataset.maker.feature_cache = FeatureCache(arguments.data.feature_cache)


def refuse_clips(dataset: LazySupervisedDataset) -> None:
    """Raise ValueError where a sample shows a clip: a cache holds images alone."""
    count = int((dataset.column("clips") > 0).sum())
    if count:
        raise ValueError(
            f"--feature_cache holds the features of images alone, and {count} of {len(dataset)} samples show clips: "
            "leave it out, or train on them in a run of their own"
        )


def check_cache_fits(dataset: Any, model: Any, arguments: Arguments) -> None:
    """Refuse a run with features that its own tower would not have made.

    Args:
        dataset: of the run, after `use_feature_cache`.
        model: on any device, with `requires_grad` as in training.
        arguments: of the run, with settings filled in by `read_config`.

    Raises:
        ValueError: names what differs, or why no features may be stored.
    """
    if not isinstance(dataset, LazySupervisedDataset) or dataset.maker.feature_cache is None:
        return
    check_fixed(model)
    cache = dataset.maker.feature_cache
    cache.manifest.check(feature_key(model, arguments, dataset.maker.image_processor), cache.folder)
