"""Image processors: where a folder keeps its settings, and one that makes a single tile of an image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image
from transformers import AutoImageProcessor, CLIPImageProcessorPil, SiglipImageProcessorPil

from llava.model.weights import check_json, read_json

_SETTINGS = (
    "do_resize",
    "size",
    "resample",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
    "do_convert_rgb",
)
_OF_LLAVA_HF = ("LlavaImageProcessor", "LlavaNextImageProcessor", "VideoLlavaImageProcessor")


def processor_settings(folder: str | Path) -> dict[str, Any]:
    """The image processor's settings that a folder holds, as plain JSON data; empty if it holds none.

    They lie in preprocessor_config.json, or within processor_config.json, as transformers 5 writes them.

    Raises:
        ValueError: not valid JSON, or no object.
    """
    for name, key in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        path = Path(folder) / name
        if not path.is_file():
            continue
        content = read_json(path)
        settings = content if key is None else content.get(key, {})
        if not isinstance(settings, dict):
            raise ValueError(f"{path}: {key} is {settings!r}, expected the settings of the image processor")
        if settings:
            return settings
    return {}


def load_image_processor(name_or_path: str, cache_dir: str | None = None, side: int | None = None) -> Any:
    """The image processor of a folder or hub name.

    Args:
        name_or_path: the folder or hub name.
        cache_dir: where files from the hub are kept.
        side: height and width in pixels that the vision tower reads; None: not looked at.

    Raises:
        ValueError: there is none, its settings don't work, or they give pixels of another height and width.
    """
    for name in ("preprocessor_config.json", "processor_config.json", "config.json"):
        check_json(name_or_path, name, cache_dir)
    try:
        processor = _open_processor(name_or_path, cache_dir)
    except Exception as error:  # transformers raises its own types for settings it can't take
        raise ValueError(
            f"no image processor (preprocessor_config.json) at {name_or_path!r}; pass the folder of the CLIP or SigLIP "
            f"model as vision_tower= (--vision_tower) ({error})"
        ) from error
    try:
        shape = processor.preprocess(Image.new("RGB", (8, 8)), return_tensors="pt")["pixel_values"].shape
    except Exception as error:  # settings are used unchecked
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"settings of preprocessor_config.json in {name_or_path!r} don't work ({reason})") from error
    if side is not None and tuple(shape) != (1, 3, side, side):
        raise ValueError(
            f"preprocessor_config.json in {name_or_path!r} makes pixels of shape {list(shape)[1:]}, the vision tower "
            f"reads {[3, side, side]}: set size and crop_size to {side}"
        )
    return processor


def _open_processor(name_or_path: str, cache_dir: str | None) -> Any:
    """transformers' image processor of a folder or hub name, as one that makes one tile of one image.

    llava-hf's processors pad and cut into tiles themselves; here `llava.mm_utils` does that, with a tower's own
    processor for each tile, so theirs become CLIP's or SigLIP's with the same settings.
    """
    # PIL's resizing is what LLaVA was trained with; torchvision's, which transformers prefers where it is installed,
    # gives slightly other pixels.
    processor = AutoImageProcessor.from_pretrained(name_or_path, backend="pil", cache_dir=cache_dir)
    if not type(processor).__name__.startswith(_OF_LLAVA_HF):
        return processor
    settings = {name: getattr(processor, name) for name in _SETTINGS}
    if processor.do_center_crop:
        return CLIPImageProcessorPil(do_center_crop=True, crop_size=processor.crop_size, **settings)
    return SiglipImageProcessorPil(**settings)
