"""Checks of the model without its weights: it is built on the meta device, and files are asked for their shapes.

Only what is small is read: the projector to start from, and an adapter.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from transformers.integrations import deepspeed as hf_deepspeed

from llava.mm_utils import get_anyres_image_grid_shape
from llava.model.language_model.families import llava_class_for
from llava.model.projector_method import add_projector_method
from llava.model.weights import WEIGHT_FILES, checkpoint_heads, raise_for_keys
from llava.reduction.base import PROJECTOR_MODULES, VisualTokens
from llava.reduction.config import ReductionConfig
from llava.reduction.stand_in import StandIn, TowerShape
from llava.train.checkpoints.saving import part_of
from llava.train.modeling import add_lora, select_trainable
from llava.train.preflight.findings import NOTE, WARNING, Report
from llava.train.settings.parsing import Arguments

SETTINGS = ("mm_vision_select_layer", "mm_vision_select_feature", "mm_projector_type", "mm_patch_merge_type")


def build_without_weights(arguments: Arguments, config: Any) -> Any:
    """The model that `load_model` will make, on the meta device; `requires_grad` and adapters as in training.

    Args:
        arguments: of the run, with settings filled in by `read_config`.
        config: from `read_config`.

    Raises:
        ValueError: a method, projector or adapter that does not fit the model; what does not is named.
    """
    model_args = arguments.model
    config = copy.deepcopy(config)
    if getattr(config, "mm_vision_tower", None) is None:
        config.mm_vision_tower = model_args.vision_tower
        for name in SETTINGS:
            setattr(config, name, getattr(model_args, name))
    config.mm_video_tower = model_args.video_tower or getattr(config, "mm_video_tower", None)
    config.image_grid_pinpoints = arguments.data.image_grid_pinpoints
    own = checkpoint_reduction(arguments, config)
    asked = own if model_args.reduction is None else ReductionConfig.parse(model_args.reduction)
    config.reduction = asked.keeping_projector_of(own).to_dict()
    with torch.device("meta"), _without_zero3():
        model = llava_class_for(config.model_type)(config)
        model.get_model().initialize_vision_modules(model_args)
        select_trainable(model, arguments)
        return add_lora(model, arguments.training) if arguments.training.lora_enable else model


def checkpoint_reduction(arguments: Arguments, config: Any) -> ReductionConfig:
    """The methods of the checkpoint that the run starts from, by its config or by its projector's weights."""
    config = copy.deepcopy(config)
    add_projector_method(config, arguments.model.model_name_or_path or "", cache_dir=arguments.training.cache_dir)
    return ReductionConfig.of_model(config)


@contextlib.contextmanager
def _without_zero3() -> Iterator[None]:
    """Under ZeRO-3 transformers would split the weights of new modules over all ranks, which are not all here."""
    before = hf_deepspeed._hf_deepspeed_config_weak_ref
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        hf_deepspeed._hf_deepspeed_config_weak_ref = before


# Files -----------------------------------------------------------------------------------------------------------


def check_weight_files(model: Any, arguments: Arguments, config: Any, report: Report) -> None:
    """Compare the shapes in the files of checkpoint and vision tower with the model's.

    Args:
        model: from `build_without_weights`.
        arguments: of the run.
        config: from `read_config`.
        report: gets the findings.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    own = {name.replace(".base_layer.", "."): tuple(weight.shape) for name, weight in base.named_parameters()}
    keeps_projector = (
        getattr(config, "mm_vision_tower", None) is not None
        and arguments.model.mm_projector_type == getattr(config, "mm_projector_type", None)
        and ReductionConfig.of_model(base.config).projector == checkpoint_reduction(arguments, config).projector
    )
    checkpoint, found = Path(arguments.model.model_name_or_path or ""), set[str]()
    with report.catch("checkpoint"):
        wanted = {k: v for k, v in own.items() if _is_in_checkpoint(k, keeps_projector)}
        if compare_files(checkpoint, wanted, complete=True):
            found = {module for name in checkpoint_shapes(checkpoint) for module in name.split(".")}
        else:
            report.add("checkpoint", "it is on the hub: its files were not looked at", NOTE)
    held = {"vision": bool(found & {"vision_tower", "image_tower"}), "video": "video_tower" in found}
    for kind, folder in (("vision", arguments.model.vision_tower), ("video", arguments.model.video_tower)):
        prefix = f"model.{kind}_tower.vision_tower."
        tower = {name.removeprefix(prefix): shape for name, shape in own.items() if name.startswith(prefix)}
        with report.catch(f"{kind} tower"):
            if tower and not held[kind] and not compare_files(Path(folder or ""), tower, complete=False):
                report.add(f"{kind} tower", "it is on the hub: its files were not looked at", NOTE)


def _is_in_checkpoint(name: str, keeps_projector: bool) -> bool:
    """Whether a weight of this name is read from `model_name_or_path`."""
    if "lora_" in name:
        return False
    return part_of(name) == "language_model" or (keeps_projector and any(part in name for part in PROJECTOR_MODULES))


def compare_files(folder: Path, wanted: Mapping[str, tuple[int, ...]], complete: bool) -> bool:
    """Compare the weights in a folder with those that a model has.

    Args:
        folder: of a checkpoint.
        wanted: shapes by name.
        complete: every name must be there; otherwise any one.

    Returns:
        False where there is no such folder, so that nothing was compared.

    Raises:
        ValueError: no weights, a missing or torn file, missing names or wrong shapes.
    """
    if not folder.is_dir():
        return False
    # Towers come as a whole CLIP or as its vision half, and older releases had one module more.
    found = {name.removeprefix("vision_model."): shape for name, shape in checkpoint_shapes(folder).items()}
    wrong = [f"{k} {found[k]}, the model has {v}" for k, v in wanted.items() if k in found and found[k] != v]
    missing = [name for name in wanted if name not in found]
    raise_for_keys(folder, misshapen=wrong, missing=missing if complete or len(missing) == len(wanted) else None)
    return True


def checkpoint_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of all weights of a checkpoint, by name, read from the heads of its files.

    Raises:
        ValueError: there is none, a file is missing, or one is torn.
    """
    heads = checkpoint_heads(folder)
    if not heads:
        raise ValueError(f"{folder} holds no weights: expected one of {', '.join(WEIGHT_FILES)}")
    return {name: head.shape for name, head in heads.items()}


# Visual tokens ---------------------------------------------------------------------------------------------------


class VisualCount:
    """Tokens that an image will have in the language model: a method's fixed number, or all where it is adaptive.

    Args:
        model: from `build_without_weights`.
        arguments: of the run.

    Raises:
        ValueError: the method does not work with the vision tower.
    """

    def __init__(self, model: Any, arguments: Arguments) -> None:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._inner = base.get_model()
        self._tower = self._inner.get_vision_tower()
        data = arguments.data
        self._pinpoints = data.image_grid_pinpoints if data.image_aspect_ratio == "anyres" else None
        self.is_adaptive = self._inner.reducers().are_adaptive
        self._tile = self._tokens_of_a_tile()
        self.count = lru_cache(maxsize=4096)(self._count)

    def _tokens_of_a_tile(self) -> VisualTokens:
        reducers = self._inner.reducers()
        if reducers.encoder is None and (reducers.tower is None or reducers.projector is not None):
            pixels = torch.empty(1, 3, self._tower.image_size, self._tower.image_size, device="meta")
            with torch.no_grad():
                tokens = cast(VisualTokens, self._inner.encode_tiles(pixels)[1])
            return without_meta(tokens, getattr(tokens, "grid", None) or self._tower.grid)
        tokens = stand_in(self._tower).reduced(reducers)  # raises where they do not work with this tower
        return VisualTokens(torch.empty(1, self._tower.num_patches, 0)) if self.is_adaptive else tokens

    def _count(self, size: tuple[int, int] | None) -> int:
        """Tokens of an image of a size, or None: of a frame."""
        if size is None:
            tile = dataclasses.replace(self._tile)
            return self._inner.layout_lengths(tile, [1], None, [True])[0] + self._inner.keeps_frame_cls()
        tiles = 1
        if self._pinpoints:
            columns, rows = get_anyres_image_grid_shape(size, self._pinpoints, self._tower.image_size)
            tiles = 1 + columns * rows
        changes = {
            name: value.expand(tiles, *value.shape[1:])
            for name in ("features", "mask", "source")
            if (value := getattr(self._tile, name)) is not None
        }
        lengths = None if self._tile.lengths is None else self._tile.lengths * tiles
        tile = dataclasses.replace(self._tile, **changes, lengths=lengths)
        return self._inner.layout_lengths(tile, [tiles], [size])[0]


def without_meta(tokens: VisualTokens, grid: tuple[int, int]) -> VisualTokens:
    """Tokens of which only shapes are known, as they stand without an encoder reducer: cell by cell of the grid.

    Args:
        tokens: of one tile, on the meta device.
        grid: rows and columns of the cells, each of which is as many tokens.
    """
    if tokens.source is None:
        return tokens
    cells = grid[0] * grid[1]
    source = torch.arange(cells).repeat_interleave(tokens.features.shape[1] // cells)
    return dataclasses.replace(tokens, source=source.unsqueeze(0))


def stand_in(tower: Any) -> StandIn:
    """Features of one tile as the tower gives them, for methods to be tried on."""
    text = tower.text_tower
    shared = text.config.projection_dim if text is not None else 1
    return StandIn(TowerShape.of(tower), 1, tower.hidden_size, tower.config.num_attention_heads, shared)


def check_model(arguments: Arguments, config: Any, report: Report) -> tuple[Any, VisualCount | None]:
    """Build the model without weights and check all that shows so.

    Returns:
        The model and the count of its visual tokens; None for what could not be built.
    """
    model = count = None
    with report.catch("model"):
        model = build_without_weights(arguments, config)
    if model is None:
        return None, None
    check_weight_files(model, arguments, config, report)
    with report.catch("method"):
        count = VisualCount(model, arguments)
        if count.is_adaptive:
            report.add("method", "the reduction is adaptive: lengths count all visual tokens", NOTE)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        report.add("model", "nothing is trained: the flags freeze the language model and the projector")
    if arguments.model.pretrain_mm_mlp_adapter is None and _starts_anew(arguments, config):
        report.add("projector", "it starts at random values and the language model is trained with it", WARNING)
    return model, count


def _starts_anew(arguments: Arguments, config: Any) -> bool:
    return getattr(config, "mm_vision_tower", None) is None and not arguments.model.tune_mm_mlp_adapter
