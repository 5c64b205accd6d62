"""What turns a language model into LLaVA: two mixins, for the inner model and for the model with its head.

images -> vision tower -> [encoder reducer] -> projector, with a [projector reducer] in it -> layout -> splice into the
text -> language model, with a [decoder reducer] between its layers

Shapes: B samples, S tokens a row of ids, N images, T tiles of all images, P patches, M kept tokens a tile,
K visual tokens of all images together, C vision width, D language-model width.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping

from llava.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_PATCH_TOKEN,
)
from llava.data.prompt_text import question_of_ids
from llava.model.image_inputs import (
    Images,
    ImageSizes,
    check_finite,
    check_side,
    image_list,
    match_images,
    size_pairs,
)
from llava.model.image_layout import NEWLINE, LayoutSpec, image_layout
from llava.model.language_model.staged import StagedCache, StagedPass, forward_in_stages
from llava.model.multimodal_encoder.builder import add_text_tower, build_vision_tower
from llava.model.multimodal_encoder.vision_tower import VisionTower
from llava.model.multimodal_projector.builder import build_projector_modules
from llava.model.projector_method import add_projector_method, method_of_adapter
from llava.model.prompt_inputs import check_cache, check_device, check_prompt, check_texts, count_markers
from llava.model.splice import Spliced, plan_splice, splice
from llava.model.weights import (
    VISION_TOWER_PREFIX,
    check_files,
    check_loaded,
    load_into,
    raise_for_keys,
    raise_for_nonfinite,
    read_weights,
    strip_prefixes,
    without_load_report,
)
from llava.reduction.base import (
    DecoderReducer,
    EncoderReducer,
    ProjectorReducer,
    Reducers,
    VisionFeatures,
    VisualTokens,
)
from llava.reduction.config import ReductionConfig

logger = logging.getLogger(__name__)

Reduction = ReductionConfig | Mapping | str | Reducers | None
"""The method of one call: what `ReductionConfig.parse` reads, or reducers made of it; None: the model's own."""

# Where TRIM's release has what `ClipText` holds.
RELEASED_NAMES = {r"vision_tower\.vision_tower\.visual_projection": "vision_tower.text_tower.visual_projection"}


class LlavaMetaModel:
    """Mixin for the inner model: adds vision tower, reducers, projector and newline token to a transformer's layers.

    A config without `mm_vision_tower` gives the language model alone; `initialize_vision_modules` adds the rest.
    """

    vision_tower: VisionTower | None
    mm_projector: nn.Module
    mm_projector_crosslayer: nn.Module | None
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
        self.encoder_reducer = None
        self.mm_projector_crosslayer = None
        self.projector_reducer = None
        self.decoder_reducer = None
        if getattr(config, "mm_vision_tower", None):
            self._add_vision_modules()
            self.post_init()  # type: ignore[attr-defined]

    def _add_vision_modules(self) -> None:
        config = self.config
        reducers = self._build_reducers(ReductionConfig.of_model(config))
        self.vision_tower = build_vision_tower(config, with_text=reducers.read_text)
        self.vision_tower.requires_grad_(False)
        config.mm_hidden_size = self.vision_tower.hidden_size
        self._set_projector(build_projector_modules(config, self.vision_tower, reducers.projector))
        self._add_newline()
        self._set_reducers(reducers)

    def _build_reducers(self, reduction: ReductionConfig) -> Reducers:
        reducers = reduction.build_all()
        if reducers.decoder is not None:
            reducers.decoder.drops(self.config.num_hidden_layers)  # raises for layers that are not there
        return reducers

    def _set_reducers(self, reducers: Reducers) -> None:
        self.encoder_reducer, self.projector_reducer = reducers.encoder, reducers.projector
        self.decoder_reducer = reducers.decoder

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
            return Reducers(self.encoder_reducer, self.projector_reducer, self.decoder_reducer)
        own = ReductionConfig.of_model(self.config)
        wanted = ReductionConfig.parse(reduction).keeping_projector_of(own)
        reducers = self._build_reducers(wanted)
        if self.vision_tower is None:
            return reducers
        misfit = None if wanted.projector == own.projector else self._projector_misfit(reducers.projector, wanted)
        if misfit:
            raise ValueError(misfit)
        if reducers.read_text and self.vision_tower.text_tower is None:
            raise ValueError(
                f"the method '{wanted.encoder['name']}' reads the prompt's text, and this model was opened without "
                f"CLIP's text tower: open it with load_pretrained_model(..., reduction={wanted.encoder['name']!r}), or "
                "call set_reduction with that method once"
            )
        return reducers

    def _set_projector(self, modules: dict[str, nn.Module]) -> None:
        self.mm_projector = modules["mm_projector"]
        self.mm_projector_crosslayer = modules.get("mm_projector_crosslayer")

    def _projector_modules(self) -> dict[str, nn.Module]:
        """What lies between vision tower and language model, by name."""
        modules = {"mm_projector": self.mm_projector, "mm_projector_crosslayer": self.mm_projector_crosslayer}
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

    def _tower(self) -> VisionTower:
        if self.vision_tower is None:
            raise ValueError(
                "this model has no vision tower: load a LLaVA checkpoint, or call initialize_vision_modules first"
            )
        return self.vision_tower

    def initialize_vision_modules(self, model_args: Any) -> None:
        """Give a language model its vision tower and projector, or new settings to the ones it has.

        Args:
            model_args: with `vision_tower`, `mm_vision_select_layer`, `mm_vision_select_feature`,
                `mm_projector_type`, `mm_patch_merge_type`, `pretrain_mm_mlp_adapter` (a file of projector
                weights, or None) and `reduction` (what `ReductionConfig.parse` reads; None for the model's own, or
                what the projector's file shows).

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
            tower = self._tower()
            self._to_language_model(tower, *self._projector_modules().values())
            tower.load_weights()
        else:
            self._change_vision_modules(changes)
            self.set_reduction(reduction)
        if adapter is not None:
            self.load_projector(weights, adapter)

    def _reduction_of(self, model_args: Any, projector_weights: Mapping[str, Tensor]) -> ReductionConfig:
        """What the run asks for, else the model's own; with the method of its projector, or of one about to be read."""
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
        config, tower = self.config, self._tower()
        if "mm_vision_tower" in changes:
            tower.rename(config.mm_vision_tower)
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
        needed = {k for k, _ in self.named_parameters() if k.startswith("mm_projector")}
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
        if reducers.read_text and tower is not None and tower.text_tower is None:
            add_text_tower(tower, self.config)
            cast(nn.Module, tower.text_tower).to(device=tower.device, dtype=tower.dtype)
            tower.load_weights({name for name, _ in tower.named_parameters() if name.startswith("text_tower.")})
        self.config.reduction = reduction.to_dict()
        self._set_reducers(reducers)

    def _projector_misfit(self, reducer: ProjectorReducer | None, reduction: ReductionConfig) -> str | None:
        """What is wrong where the projector is not of the layers that the method and the config ask for."""
        with torch.device("meta"):
            wanted = _layers(build_projector_modules(self.config, self._tower(), reducer))
        present = _layers(self._projector_modules())
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
        self._to_language_model(*self._projector_modules().values())

    def forward(self, *args: Any, past_key_values: Any = None, staged: StagedPass | None = None, **kwargs: Any) -> Any:
        """The language model's own forward, or the staged one where a decoder reducer has something to do.

        Args:
            staged: what a decoder reducer needs to know of a batch that enters.
            Others as for transformers' models.
        """
        if staged is None and not getattr(past_key_values, "stages", None):
            return super().forward(*args, past_key_values=past_key_values, **kwargs)  # type: ignore[misc]
        return forward_in_stages(self, *args, past_key_values=past_key_values, staged=staged, **kwargs)

    def encode_tiles(
        self, pixels: Tensor, text: Tensor | None = None, reduction: Reduction = None
    ) -> tuple[Tensor, VisualTokens]:
        """Tower, reducers and projector.

        Args:
            pixels: [T, 3, H, W].
            text: [T, E], embedding of the text that goes with each tile, for a reducer that reads it.
            reduction: see `Reduction`.

        Returns:
            The projected tokens of all tiles [T * M, D] or, where counts differ, those that `mask` marks as real;
            and the reducer's output, for what came from where.
        """
        methods, tower = self.reducers(reduction), self._tower()
        reducer, fuser = methods.encoder, methods.projector
        needs = () if reducer is None else reducer.needs
        blocks = () if fuser is None else fuser.blocks(tower.depth, tower.num_blocks)
        vision: VisionFeatures = tower(pixels, needs=needs, blocks=blocks)
        vision.text = text
        if fuser is not None:
            tokens = fuser(vision, self.mm_projector, self.mm_projector_crosslayer)
            return tokens.features.flatten(0, 1), tokens
        tokens = VisualTokens(vision.features) if reducer is None else reducer(vision)
        flat = tokens.features.flatten(0, 1) if tokens.mask is None else tokens.features[tokens.mask]
        return self.mm_projector(flat.to(self._projector_dtype())), tokens

    def _projector_dtype(self) -> torch.dtype:
        weight = next(self.mm_projector.parameters(), None)
        return self._tower().dtype if weight is None else weight.dtype

    def encode_images(
        self,
        images: Sequence[Tensor],
        image_sizes: ImageSizes = None,
        texts: Sequence[str] | None = None,
        reduction: Reduction = None,
    ) -> tuple[Tensor, Tensor]:
        """Visual tokens of all images in the order in which they enter the language model.

        Args:
            images: N tensors [3, H, W] or [tiles, 3, H, W].
            image_sizes: N pairs (width, height) of the original pictures in pixels; needed for anyres.
            texts: N texts, one for each image, for a reducer that reads them.
            reduction: see `Reduction`.

        Returns:
            Tokens [K, D], and how many of them each image has, [N] int64 on the CPU.
        """
        tower, reducers = self._tower(), self.reducers(reduction)
        pictures = image_list(images)
        check_side(pictures, tower.image_size)
        tiles = [picture if picture.ndim == 4 else picture.unsqueeze(0) for picture in pictures]
        counts = [len(t) for t in tiles]
        pixels = torch.cat([t.to(tower.device) for t in tiles])
        if not self.training:  # there the loss shows it, without waiting for the device
            check_finite(pixels, counts)
        text = self._embed_texts(texts, counts) if reducers.read_text else None
        projected, tokens = self.encode_tiles(pixels, text, reducers)
        layouts = self._layouts(tokens, counts, image_sizes)
        index = torch.cat(layouts)
        if hasattr(self, "image_newline"):
            projected = torch.cat([projected, self.image_newline.to(projected).unsqueeze(0)])
        index = index.masked_fill(index == NEWLINE, len(projected) - 1).to(projected.device)
        return projected[index], torch.tensor([len(layout) for layout in layouts])

    def _embed_texts(self, texts: Sequence[str] | None, counts: list[int]) -> Tensor:
        """Embedding of the text of each tile, [T, E]; `counts` tiles an image."""
        tower = self._tower()
        if texts is None:
            raise ValueError(
                "this model's reduction reads the prompt's text: pass texts=[...], one for each sample of the batch"
            )
        check_texts(texts, len(counts), "image")
        assert tower.text_tower is not None
        distinct = list(dict.fromkeys(texts))  # images of one sample share its text
        embeds = tower.text_tower.embed_texts(distinct, tower.name)
        rows = torch.tensor([distinct.index(text) for text in texts]).repeat_interleave(torch.tensor(counts))
        return embeds[rows.to(embeds.device)]

    def _layouts(self, tokens: VisualTokens, counts: list[int], image_sizes: ImageSizes) -> list[Tensor]:
        """For each image, indices into the projected tokens, or NEWLINE."""
        spec, sizes = self._layout_spec(tokens.grid), size_pairs(image_sizes, len(counts))
        t, m = tokens.features.shape[:2]
        # The one copy to the host: lengths and places of the tokens become shapes and indices.
        mask = torch.ones(t, m, dtype=torch.bool) if tokens.mask is None else tokens.mask.cpu()
        source = torch.arange(m).expand(t, m) if tokens.source is None else tokens.source.cpu()
        packed = mask.flatten().cumsum(0) - 1
        layouts, start = [], 0
        for i, count in enumerate(counts):
            rows = slice(start, start + count)
            local = image_layout(source[rows], mask[rows], None if sizes is None else sizes[i], spec)
            layouts.append(torch.where(local == NEWLINE, NEWLINE, packed[local + start * m]))
            start += count
        return layouts

    def _layout_spec(self, grid: tuple[int, int] | None) -> LayoutSpec:
        config, tower = self.config, self._tower()
        merge_type = getattr(config, "mm_patch_merge_type", "flat")
        if merge_type != "flat" and tower.has_cls and tower.select_feature == "cls_patch":
            raise ValueError(
                f"mm_patch_merge_type={merge_type} puts patches on a grid, and mm_vision_select_feature=cls_patch "
                "keeps CLS among them; set it to patch"
            )
        return LayoutSpec(
            merge_type=merge_type,
            grid=grid or tower.grid,
            tile_size=tower.image_size,
            pinpoints=getattr(config, "image_grid_pinpoints", None),
        )


class LlavaMetaForCausalLM:
    """Mixin for the model with its head: splices images into the text, before the language model's own forward."""

    config: Any
    training: bool
    device: torch.device
    tokenizer: Any = None  # set by load_pretrained_model; finds the question in a prompt where no texts are given

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        *args: Any,
        vision_tower: str | None = None,
        projector_weights: Mapping[str, Tensor] | None = None,
        projector_origin: object = None,
        **kwargs: Any,
    ) -> Any:
        """Open a checkpoint, or a bare language model, as transformers does, but leave no weight at random.

        Args:
            path: folder or hub name.
            vision_tower: folder or hub name of the tower, in place of `mm_vision_tower` of the config.
            projector_weights: projector (and newline, and embeddings) that the checkpoint lacks, by name.
            projector_origin: the file that those come from, for messages.
            args: see transformers' `PreTrainedModel.from_pretrained`, `kwargs` too.

        Raises:
            ValueError: a weight is missing, unexpected, of another shape or type, or not finite; the keys are listed.
        """
        config = kwargs.pop("config", None)
        if config is None:
            config = cls._read_config(path)
        if vision_tower is not None and getattr(config, "mm_vision_tower", None):
            config.mm_vision_tower, config.mm_vision_config = vision_tower, None
        add_projector_method(config, path, projector_weights, kwargs.get("cache_dir"))
        quantized = getattr(config, "quantization_config", None) is not None
        check_files(path, kwargs.get("cache_dir"), quantized=quantized)
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs.setdefault("key_mapping", RELEASED_NAMES)
        with without_load_report():
            model, info = super().from_pretrained(  # type: ignore[misc]
                path, *args, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
        filled = load_into(model, projector_weights or {}, projector_origin or path)
        if projector_weights is not None:
            lacking = {
                key for key in info["missing_keys"] if "mm_projector" in key or key.endswith("image_newline")
            } - filled
            raise_for_keys(projector_origin or path, missing=sorted(lacking))
        missing = check_loaded(info, path, filled)
        read = ((name, weight) for name, weight in model.named_parameters() if name not in info["missing_keys"])
        raise_for_nonfinite(path, read)
        if missing:
            model.get_vision_tower().load_weights({key.removeprefix(VISION_TOWER_PREFIX) for key in missing})
        return (model, info) if wants_info else model

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Write the model as transformers does, under LLaVA's names, whatever names it was read under.

        Raises:
            ValueError: a LoRA adapter lies in the model, whose weights would be written under names that nothing reads.
        """
        if any(".base_layer." in name for name, _ in self.named_parameters()):  # type: ignore[attr-defined]
            raise ValueError(
                "the model holds a LoRA adapter that is not merged: open it with merge_lora=True and write that, or "
                "run llava merge; the LoRA folder itself can be copied"
            )
        # What transformers undoes in writing: left alone, the renamings that this model's reading needed.
        self._weight_conversions = get_model_conversion_mapping(
            self, hf_quantizer=getattr(self, "hf_quantizer", None), add_legacy=False
        )
        super().save_pretrained(*args, **kwargs)  # type: ignore[misc]

    @classmethod
    def _read_config(cls, path: str) -> Any:
        """The config of a checkpoint of this class, or of its bare language model."""
        from llava.model.language_model import llava_class_for

        raw, _ = PreTrainedConfig.get_config_dict(path)
        if llava_class_for(raw.get("model_type", "")) is not cls:
            raise ValueError(f"{path} is a {raw.get('model_type')!r} model, {cls.__name__} can't open it")
        own = {key: value for key, value in raw.items() if key != "model_type"}
        return cls.config_class.from_dict(own)

    def get_model(self) -> Any:
        """The inner model, as LLaVA calls it."""
        return self.model  # type: ignore[attr-defined]

    def get_vision_tower(self) -> VisionTower | None:
        """The vision tower, or None for a bare language model."""
        return self.get_model().get_vision_tower()

    def set_reduction(self, value: ReductionConfig | dict | str | None, *, keep_projector: bool = False) -> None:
        """Reduce visual tokens with this method from now on; see `LlavaMetaModel.set_reduction`."""
        self.get_model().set_reduction(value, keep_projector=keep_projector)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        images: Images = None,
        image_sizes: ImageSizes = None,
        texts: Sequence[str] | None = None,
        image_index: Tensor | None = None,
        packed: bool = False,
        reduction: Reduction = None,
        **kwargs: Any,
    ) -> Any:
        """Logits, and the loss where labels are given.

        Args:
            input_ids: [B, S] int64 with IMAGE_TOKEN_INDEX (-200) where an image goes.
            attention_mask: [B, S], 1 at real tokens; padding on either side. Default: all real.
            labels: [B, S] int64, -100 where nothing is learnt.
            images: N images of the batch in order of their markers: [N, 3, H, W], [N, tiles, 3, H, W], or a list of
                [3, H, W] or [tiles, 3, H, W]. LLaVA's own collator sends a blank image for a text-only sample; one
                for every such sample is understood, and left out.
            image_sizes: N pairs (width, height) in pixels, for anyres.
            texts: B texts for a reducer that reads them (trim). Without them the question is read off the prompt,
                where the model was opened with its tokenizer.
            position_ids: [B, L] for `inputs_embeds`; those of `input_ids` follow from the mask, whatever is given.
            image_index: [B, L] for `inputs_embeds`, as `splice_images` returns it (-1 for text); a decoder reducer and
                packing need it.
            packed: run the batch as one row without padding, in which the samples do not see each other.
            reduction: method for this call alone, in any form that `set_reduction` takes, "none" for all tokens; None:
                the model's own. It is for a prompt; what goes on from a cache keeps to what the cache holds.

        Returns:
            transformers' output; logits [B, L, V] for the spliced rows, padded on the left where the input or
            `config.tokenizer_padding_side` is, else on the right. With a decoder reducer, of the tokens that reach
            the last layer. Packed, [1, T, V] for the real tokens of all rows.

        Raises:
            ValueError: markers and images do not match (the sample is named), or arguments that exclude each other.
        """
        check_cache(past_key_values)
        cached = past_key_values is not None and past_key_values.get_seq_length() > 0
        if cached and images is not None:
            raise ValueError(
                "images enter with the prompt: pass the whole prompt, without a cache that holds it already"
            )
        if inputs_embeds is not None and images is not None:
            raise ValueError("images enter with input_ids, where their markers stand: pass those, not inputs_embeds")
        if packed and past_key_values is not None:
            raise ValueError("packed=True runs a batch for its loss and logits, without past_key_values")
        reducers = self.get_model().reducers(reduction)
        left = None
        if inputs_embeds is None and input_ids is not None and not cached:
            spliced = self.splice_images(
                input_ids,
                attention_mask,
                labels,
                images,
                image_sizes,
                texts,
                left=False if packed else None,
                max_length=getattr(self.config, "tokenizer_model_max_length", None),
                reduction=reducers,
            )
            input_ids, inputs_embeds, attention_mask = None, spliced.inputs_embeds, spliced.attention_mask
            position_ids, labels = spliced.position_ids, spliced.labels
            image_index, left = spliced.image_index, spliced.left
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            **kwargs,
        }
        if cached or not (packed or reducers.decoder is not None):
            return super().forward(**inputs, labels=labels)  # type: ignore[misc]
        return self._forward_staged(inputs, image_index, reducers.decoder, labels, packed, left)

    def _forward_staged(
        self,
        inputs: dict[str, Any],
        image_index: Tensor | None,
        reducer: DecoderReducer | None,
        labels: Tensor | None,
        packed: bool,
        left: bool | None,
    ) -> Any:
        """Forward through a decoder reducer, or packed: the loss is that of the labels whose tokens reach the end."""
        if image_index is None:
            raise ValueError(
                "inputs_embeds do not tell which tokens are an image's: pass image_index [batch, tokens] with them, as "
                "splice_images returns it, or all -1 for text only"
            )
        staged = StagedPass(image_index, labels, packed, left, reducer)
        as_tuple = inputs.pop("return_dict", None) is False
        output = super().forward(**inputs, staged=staged, return_dict=True)  # type: ignore[misc]
        if staged.labels is not None:
            output.loss = self.loss_function(  # type: ignore[attr-defined]
                logits=output.logits,
                labels=staged.kept_labels(),
                vocab_size=self.config.vocab_size,
                num_items_in_batch=inputs.get("num_items_in_batch"),
            )
        return output.to_tuple() if as_tuple else output

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        images: Images = None,
        image_sizes: ImageSizes = None,
        texts: Sequence[str] | None = None,
        attention_mask: Tensor | None = None,
        reduction: Reduction = None,
        **kwargs: Any,
    ) -> Any:
        """Continue prompts. Arguments as for `forward`; `kwargs` are those of transformers' generate.

        Args:
            inputs: [B, S] prompt ids (also as `input_ids=`), padded on either side where `attention_mask` says so.

        Returns:
            [B, new] ids of the new tokens only.
        """
        if inputs is None:
            inputs = kwargs.pop("input_ids", None)
        check_cache(kwargs.get("past_key_values"))
        reducers = kwargs["reduction"] = self.get_model().reducers(reduction)
        if reducers.decoder is not None:
            self._choose_cache(kwargs)
        if inputs is None and images is None:
            return super().generate(attention_mask=attention_mask, **kwargs)  # type: ignore[misc]
        if "inputs_embeds" in kwargs:
            raise ValueError("pass input_ids, with images and their markers, or inputs_embeds; not both")
        kwargs.pop("position_ids", None)  # they follow from the mask
        spliced = self.splice_images(
            inputs, attention_mask, None, images, image_sizes, texts, left=True, reduction=reducers
        )
        if reducers.decoder is not None:
            kwargs["image_index"] = spliced.image_index
        return super().generate(  # type: ignore[misc]
            inputs_embeds=spliced.inputs_embeds, attention_mask=spliced.attention_mask, **kwargs
        )

    def _choose_cache(self, kwargs: dict[str, Any]) -> None:
        """Put the cache that a decoder reducer needs into the arguments of `generate`.

        Raises:
            ValueError: they ask for one that has one length for all layers.
        """
        if kwargs.get("past_key_values") is not None:
            return
        kind = kwargs.pop("cache_implementation", None)
        kind = kind or getattr(kwargs.get("generation_config"), "cache_implementation", None)
        if kind not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation={kind!r} can't hold the stages of a decoder reduction, whose layers keep "
                "different numbers of tokens: leave it out"
            )
        if kind is not None and "generation_config" in kwargs:
            kwargs["generation_config"] = copy.deepcopy(kwargs["generation_config"])
            kwargs["generation_config"].cache_implementation = None
        kwargs["past_key_values"] = StagedCache(config=self.config)

    def splice_images(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        images: Images = None,
        image_sizes: ImageSizes = None,
        texts: Sequence[str] | None = None,
        *,
        left: bool | None = None,
        max_length: int | None = None,
        reduction: Reduction = None,
    ) -> Spliced:
        """Encode the images of a batch and put their tokens where the markers stand.

        Args:
            left: pad on the left; None: where the input is padded so, or `config.tokenizer_padding_side` says so.
            max_length: rows are cut behind this many tokens.
            Others as for `forward`.
        """
        check_prompt(input_ids, attention_mask, labels)
        if not (self.training or hasattr(self, "hf_device_map") or self.device.type == "meta"):
            check_device(input_ids, self.device)
        mask = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        vocabulary = self.config.vocab_size
        markers = count_markers(input_ids, mask, labels, vocabulary)
        if texts is not None:
            check_texts(texts, len(markers), "sample")
        pictures, sizes = match_images(markers, images, image_sizes, trusted=self.training)
        reducers = self.get_model().reducers(reduction)
        reads = bool(pictures) and reducers.read_text
        texts = self._texts_of_images(texts, input_ids, mask, markers) if reads else None
        visual, lengths = self._visual_tokens(pictures, sizes, texts, reducers)
        if left is None:
            side = getattr(self.config, "tokenizer_padding_side", "right")
            left = side == "left" or not bool(mask[:, 0].all())
        text_embeds = self.get_model().embed_tokens(input_ids.clamp(0, vocabulary - 1))
        here = text_embeds.device  # where the model is spread over several, perhaps not that of the ids
        plan = plan_splice(input_ids.to(here), mask.to(here), lengths, max_length, left)
        if visual is not None and not pictures:
            # The sum of none of them is zero, and so are its gradients; 0 * sum would be NaN where the sum overflows.
            text_embeds = text_embeds + visual.flatten()[:0].sum().to(text_embeds.device)
            visual = None
        return splice(text_embeds, visual, None if labels is None else labels.to(here).long(), plan)

    def _texts_of_images(
        self, texts: Sequence[str] | None, input_ids: Tensor, mask: Tensor, markers: list[int]
    ) -> list[str] | None:
        """For each image the text of its sample; by default the prompt's question."""
        if texts is None:
            if self.tokenizer is None:
                return None
            texts = [question_of_ids(ids[real], self.tokenizer) for ids, real in zip(input_ids, mask, strict=True)]
        return [text for text, count in zip(texts, markers, strict=True) for _ in range(count)]

    def _visual_tokens(
        self, pictures: list[Tensor], sizes: ImageSizes, texts: list[str] | None, reducers: Reducers
    ) -> tuple[Tensor | None, Tensor]:
        if pictures:
            return self.get_model().encode_images(pictures, sizes, texts, reducers)
        none = torch.zeros(0, dtype=torch.int64)
        tower = self.get_vision_tower()
        if not self.training or tower is None:
            return None, none
        # Every rank must run the same modules and have a gradient for the same weights, or ZeRO and DDP wait for
        # ever: a batch without images encodes a blank one, whose tokens are multiplied by zero.
        blank = torch.zeros(3, tower.image_size, tower.image_size, device=self.device)
        return self.get_model().encode_images([blank], texts=[""], reduction=reducers)[0], none

    @torch.no_grad()
    def count_visual_tokens(
        self,
        images: Images,
        image_sizes: ImageSizes = None,
        texts: Sequence[str] | None = None,
        reduction: Reduction = None,
    ) -> list[tuple[int, int]]:
        """For each image, its visual tokens without and with the reduction; `texts` has one for each image."""
        pictures = image_list(images)
        model = self.get_model()
        tower = model._tower()
        tiles = [image.shape[0] if image.ndim == 4 else 1 for image in pictures]
        full = VisualTokens(torch.empty(sum(tiles), tower.num_patches, 0))
        before = [len(layout) for layout in model._layouts(full, tiles, image_sizes)]
        after = model.encode_images(pictures, image_sizes, texts, reduction)[1].tolist()
        return list(zip(before, after, strict=True))

    def initialize_vision_tokenizer(self, model_args: Any, tokenizer: Any) -> None:
        """Add the marker tokens that `mm_use_im_patch_token` and `mm_use_im_start_end` ask for.

        New rows of the embeddings start at the mean of the old ones.

        Args:
            model_args: with those two flags, and `pretrain_mm_mlp_adapter`, which may hold trained embeddings.
            tokenizer: gets the tokens too.
        """
        tokens = [DEFAULT_IMAGE_PATCH_TOKEN] if model_args.mm_use_im_patch_token else []
        if model_args.mm_use_im_start_end:
            tokens += [DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN]
        if tokens and tokenizer.add_tokens(tokens, special_tokens=True):
            self.resize_token_embeddings(len(tokenizer), mean_resizing=True)  # type: ignore[attr-defined]
        adapter = getattr(model_args, "pretrain_mm_mlp_adapter", None)
        if model_args.mm_use_im_start_end and adapter is not None:
            trained = {k: v for k, v in read_weights(adapter).items() if k.endswith("embed_tokens.weight")}
            load_into(self.get_model(), trained, adapter, prefix="model.")


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
    return {k: v for k, v in wanted.items() if v is not None and v != getattr(config, k, None)}
