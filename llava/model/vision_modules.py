"""What a language model gains to see: vision tower, reducers, projector and newline token, with their settings."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from llava.model.multimodal_encoder.builder import add_text_tower, build_vision_tower
from llava.model.multimodal_encoder.vision_tower import VisionTower
from llava.model.multimodal_projector.builder import build_projector_modules
from llava.model.projector_method import method_of_adapter
from llava.model.weights import load_into, raise_for_keys, read_weights, strip_prefixes
from llava.reduction.base import (
    PROJECTOR_MODULES,
    DecoderReducer,
    EncoderReducer,
    ProjectorReducer,
    Reducers,
    TowerReducer,
)
from llava.reduction.budget import ModelShape
from llava.reduction.config import ReductionConfig
from llava.reduction.stand_in import TowerShape

logger = logging.getLogger(__name__)

Reduction = ReductionConfig | Mapping | str | Reducers | None
"""The method of one call: what `ReductionConfig.parse` reads, or reducers made of it; None: the model's own."""


class VisionModules:
    """Mixin for the inner model: adds vision tower, reducers, projector and newline token to a transformer's layers.

    A config without `mm_vision_tower` gives the language model alone; `initialize_vision_modules` adds the rest.
    """

    vision_tower: VisionTower | None
    video_tower: VisionTower | None
    mm_projector: nn.Module
    mm_projector_crosslayer: nn.Module | None
    query_abstractor: nn.Module | None
    tokenizer: Any
    tower_reducer: TowerReducer | None
    encoder_reducer: EncoderReducer | None
    projector_reducer: ProjectorReducer | None
    decoder_reducer: DecoderReducer | None
    config: Any
    embed_tokens: nn.Embedding
    named_parameters: Any
    training: bool

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        self.vision_tower = None
        self.video_tower = None  # where frames have one of their own, as in Video-LLaVA
        self.tokenizer = None  # the language model's, for a reducer that reads words
        self.tower_reducer = None
        self.encoder_reducer = None
        self.projector_reducer = None
        self.decoder_reducer = None
        if getattr(config, "mm_vision_tower", None):
            self._add_vision_modules()
            self.post_init()  # type: ignore[attr-defined]

    def _add_vision_modules(self) -> None:
        config = self.config
        self.vision_tower = build_vision_tower(config)
        self.vision_tower.requires_grad_(False)
        if getattr(config, "mm_video_tower", None):
            self.video_tower = self._build_video_tower()
        reducers = self._build_reducers(ReductionConfig.of_model(config))
        if reducers.needs.clip_text:
            add_text_tower(self.vision_tower, config)
        config.mm_hidden_size = self.vision_tower.hidden_size
        self._set_projector(build_projector_modules(config, self.vision_tower, reducers.projector))
        self._add_newline()
        self._set_reducers(reducers)

    def _build_video_tower(self) -> VisionTower:
        """The tower of the frames, in which a frame's class token counts.

        Raises:
            ValueError: its tokens are not those of the other tower, so that no projector could read both.
        """
        tower = build_vision_tower(self.config, "video")
        tower.requires_grad_(False)
        pictures = self._tower()
        ours, theirs = ((each.hidden_size, each.image_size, each.grid) for each in (pictures, tower))
        if ours != theirs or not tower.has_cls or pictures.select_feature != "patch":
            raise ValueError(
                f"the video tower {tower.name!r} has width, side and grid {theirs}, the image tower {pictures.name!r} "
                f"{ours}: Video-LLaVA has one projector for two towers of one shape, with a class token, and "
                "mm_vision_select_feature=patch"
            )
        return tower

    def _towers(self) -> list[VisionTower]:
        return [self._tower()] if self.video_tower is None else [self._tower(), self.video_tower]

    def _build_reducers(self, reduction: ReductionConfig) -> Reducers:
        tower = self.vision_tower
        shape = None if tower is None else ModelShape(TowerShape.of(tower), self.config.num_hidden_layers)
        reducers = reduction.build_all(shape)
        if reducers.decoder is not None:
            reducers.decoder.drops(self.config.num_hidden_layers)  # raises for layers that are not there
        if tower is not None:
            tower.check_methods(reducers)
        if self.video_tower is not None and reducers.needs.clip_text:
            assert reducers.encoder is not None
            raise reducers.encoder.mistake(
                "it compares patches with CLIP's embedding of the question, and a tower of frames has no text tower "
                "beside it: choose a method that reads no text, or the words alone"
            )
        return reducers

    def _set_reducers(self, reducers: Reducers) -> None:
        self.tower_reducer, self.encoder_reducer = reducers.tower, reducers.encoder
        self.projector_reducer, self.decoder_reducer = reducers.projector, reducers.decoder

    def reducers(self, reduction: Reduction = None) -> Reducers:
        """The methods of one call. The model stays as it is, so that calls in several threads do not meet.

        Args:
            reduction: see `Reduction`. Methods that leave the site `projector` open keep this model's method there.

        Raises:
            ValueError: an unknown method or option; or one that needs weights that this model does not have: another
                projector, or CLIP's text tower.
        """
        if isinstance(reduction, Reducers):
            return reduction
        if reduction is None:
            return Reducers(self.tower_reducer, self.encoder_reducer, self.projector_reducer, self.decoder_reducer)
        own = ReductionConfig.of_model(self.config)
        wanted = ReductionConfig.parse(reduction).keeping_projector_of(own)
        reducers = self._build_reducers(wanted)
        if self.vision_tower is None:
            return reducers
        misfit = None if wanted.projector == own.projector else self._projector_misfit(reducers.projector, wanted)
        if misfit:
            raise ValueError(misfit)
        if reducers.needs.clip_text and self.vision_tower.text_tower is None:
            raise ValueError(
                f"the method '{wanted.encoder['name']}' reads the prompt's text, and this model was opened without "
                f"CLIP's text tower: open it with load_pretrained_model(..., reduction={wanted.encoder['name']!r}), or "
                "call set_reduction with that method once"
            )
        return reducers

    def _set_projector(self, modules: dict[str, nn.Module]) -> None:
        for name in PROJECTOR_MODULES:
            setattr(self, name, modules.get(name))

    def projector_modules(self) -> dict[str, nn.Module]:
        """What lies between vision tower and language model, by name."""
        modules = {name: getattr(self, name, None) for name in PROJECTOR_MODULES}
        return {name: module for name, module in modules.items() if module is not None}

    def _add_newline(self) -> None:
        """Learned token that ends the rows of an unpadded picture."""
        if "unpad" in getattr(self.config, "mm_patch_merge_type", "flat") and not hasattr(self, "image_newline"):
            like = self.embed_tokens.weight
            newline = torch.randn(self.config.hidden_size) * self.config.hidden_size**-0.5
            self.image_newline = nn.Parameter(newline.to(device=like.device, dtype=like.dtype))

    def get_vision_tower(self) -> VisionTower | None:
        """The vision tower, or None for a bare language model."""
        return self.vision_tower

    @property
    def tower_depth_read(self) -> int:
        """How many blocks of the vision tower the projector's input goes through."""
        return max(self._tower().blocks_read(self.projector_reducer))

    def tile_grid(self, reduction: Reduction = None) -> tuple[int, int]:
        """Rows and columns of patches of a tile, as it enters the vision tower."""
        return self.reducers(reduction).input_grid(self._tower().grid)

    def _tower(self) -> VisionTower:
        if self.vision_tower is None:
            raise ValueError(
                "this model has no vision tower: load a LLaVA checkpoint, or call initialize_vision_modules first"
            )
        return self.vision_tower

    def initialize_vision_modules(self, model_args: Any) -> None:
        """Give a language model its vision tower and projector, or new settings to the ones it has.

        Args:
            model_args: with `vision_tower`, `video_tower` (of frames, as in Video-LLaVA), `mm_vision_select_layer`,
                `mm_vision_select_feature`, `mm_projector_type`, `mm_patch_merge_type`, `pretrain_mm_mlp_adapter` (a
                file of projector weights, or None) and `reduction` (what `ReductionConfig.parse` reads; None for the
                model's own, or what the projector's file shows).

        Raises:
            ValueError: the tower or the projector's weights do not fit; the keys or shapes are named.
        """
        config = self.config
        changes = _vision_settings(model_args, config)
        for name, value in changes.items():
            setattr(config, name, value)
        config.use_mm_proj = True
        adapter = getattr(model_args, "pretrain_mm_mlp_adapter", None)
        weights = {} if adapter is None else read_weights(adapter)
        reduction = self._reduction_of(model_args, weights)
        if self.vision_tower is None:
            config.reduction = reduction.to_dict()
            self._add_vision_modules()
            self._to_language_model(*self._towers(), *self.projector_modules().values())
            for each in self._towers():
                each.load_weights()
        else:
            self._change_vision_modules(changes)
            self.set_reduction(reduction)
        if adapter is not None:
            self.load_projector(weights, adapter)

    def _reduction_of(self, model_args: Any, projector_weights: Mapping[str, Tensor]) -> ReductionConfig:
        """What the run asks for, otherwise the model's own; with the method of its projector, or of one to be read."""
        given, own = getattr(model_args, "reduction", None), ReductionConfig.of_model(self.config)
        reduction = own if given is None else ReductionConfig.parse(given)
        adapter = getattr(model_args, "pretrain_mm_mlp_adapter", None)
        leaves_open = not reduction.projector and (given is None or bool(reduction))
        if leaves_open and not own.projector and adapter is not None:
            method = method_of_adapter(adapter, projector_weights)
            if method is not None:
                logger.info("%s was trained with %s: the run takes that method", adapter, method)
                return replace(reduction, projector=method)
        return reduction.keeping_projector_of(own)

    def _change_vision_modules(self, changes: dict[str, Any]) -> None:
        config = self.config
        if getattr(config, "mm_video_tower", None) and self.video_tower is None:
            self.video_tower = self._build_video_tower()
            self._to_language_model(self.video_tower)
            self.video_tower.load_weights()
        for kind, tower in zip(("vision", "video"), self._towers(), strict=False):
            if f"mm_{kind}_tower" in changes:
                tower.rename(getattr(config, f"mm_{kind}_tower"))
            tower.select(config.mm_vision_select_layer, config.mm_vision_select_feature)
        self._add_newline()

    def _to_language_model(self, *modules: nn.Module) -> None:
        """Move modules to where the language model is, in its dtype."""
        like = self.embed_tokens.weight  # the layers' own may be quantized
        for module in modules:
            module.to(device=like.device, dtype=like.dtype)

    def load_projector(self, weights: Mapping[str, Tensor], origin: object) -> None:
        """Fill the projector, and the newline token if it is there, from the weights of a `mm_projector.bin`.

        Raises:
            ValueError: a projector weight is missing, unknown or of another shape.
        """
        named = strip_prefixes(weights, ["base_model.model.", "model."])
        # LLaVA writes the embeddings of new marker tokens into the same file; initialize_vision_tokenizer reads them.
        own = {k: v for k, v in named.items() if not k.endswith("embed_tokens.weight")}
        needed = {k for k, _ in self.named_parameters() if k.startswith(PROJECTOR_MODULES)}
        known = {*needed, "image_newline"}
        raise_for_keys(origin, missing=sorted(needed - set(own)), unexpected=sorted(set(own) - known))
        load_into(cast(nn.Module, self), own, origin)

    def set_reduction(self, value: ReductionConfig | dict | str | None, *, keep_projector: bool = False) -> None:
        """Reduce visual tokens with this method from now on, and keep it in the config.

        Args:
            value: whatever `ReductionConfig.parse` reads; None or "none" for no reduction. Methods that leave the
                site `projector` open keep this model's method there, whose weights are the projector's.
            keep_projector: refuse a method whose projector has other weights than this model's, in place of
                starting it anew.

        Raises:
            ValueError: an unknown method or option, or one that does not suit the vision tower; or see above.
        """
        reduction = ReductionConfig.parse(value).keeping_projector_of(ReductionConfig.of_model(self.config))
        reducers = self._build_reducers(reduction)
        if self.vision_tower is not None:
            self._fit_projector(reducers.projector, reduction, keep_projector)
        tower = self.vision_tower
        if reducers.needs.clip_text and tower is not None and tower.text_tower is None:
            add_text_tower(tower, self.config)
            cast(nn.Module, tower.text_tower).to(device=tower.device, dtype=tower.dtype)
            tower.load_weights({name for name, _ in tower.named_parameters() if name.startswith("text_tower.")})
        self.config.reduction = reduction.to_dict()
        self._set_reducers(reducers)

    def _projector_misfit(self, reducer: ProjectorReducer | None, reduction: ReductionConfig) -> str | None:
        """What is wrong where the projector is not of the layers that the method and the config ask for."""
        with torch.device("meta"):
            wanted = _layers(build_projector_modules(self.config, self._tower(), reducer))
        present = _layers(self.projector_modules())
        if wanted == present:
            return None
        own = ReductionConfig.of_model(self.config).to_dict() or "none"
        return (
            f"reduction={reduction.to_dict() or 'none'} with mm_projector_type={self.config.mm_projector_type} needs "
            f"another projector than this checkpoint has, which was trained with reduction={own}. Needed: {wanted}; "
            f"there is: {present}. Keep its method of the site projector, or train a projector"
        )

    def _fit_projector(self, reducer: ProjectorReducer | None, reduction: ReductionConfig, keep: bool) -> None:
        """Start the projector anew where it is not of the layers that the method and the config ask for.

        Raises:
            ValueError: it is not, and `keep` forbids to start it anew.
        """
        misfit = self._projector_misfit(reducer, reduction)
        if misfit is None:
            return
        if keep:
            raise ValueError(misfit)
        logger.warning("reduction=%s is new to this model: its projector starts anew", reduction.to_dict() or "none")
        self._set_projector(build_projector_modules(self.config, self._tower(), reducer))
        self._to_language_model(*self.projector_modules().values())


def _layers(modules: dict[str, nn.Module]) -> dict[str, str]:
    """The layers of each module with their widths: what they are, also where ZeRO-3 leaves empty tensors in them."""
    return {
        name: ", ".join(f"{key} {part}".strip() for key, part in module.named_modules() if not list(part.children()))
        for name, module in modules.items()
    }


def _vision_settings(model_args: Any, config: Any) -> dict[str, Any]:
    """The settings in `model_args` that differ from the config's, by their names there."""
    names = ("mm_vision_select_layer", "mm_vision_select_feature", "mm_projector_type", "mm_patch_merge_type")
    wanted = {name: getattr(model_args, name, None) for name in names}
    wanted["mm_vision_tower"] = getattr(model_args, "vision_tower", None)
    wanted["mm_video_tower"] = getattr(model_args, "video_tower", None)
    return {k: v for k, v in wanted.items() if v is not None and v != getattr(config, k, None)}
