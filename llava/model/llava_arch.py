"""What turns a language model into LLaVA: two mixins, for the inner model and for the model with its head.

images -> `VisualEncoding` -> splice into the text -> language model, with a [decoder reducer] between its layers

Shapes: B samples, S tokens a row of ids, L tokens a row with its visual tokens, N images, V words of the vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast

from llava.constants import VIDEO_TOKEN_INDEX
from llava.data.prompt_text import question_of_ids
from llava.data.stored_features import StoredFeatures
from llava.model.image_inputs import (
    Clip,
    Images,
    ImageSizes,
    Picture,
    Pictures,
    Videos,
    clip_list,
    image_list,
    match_pictures,
    size_pairs,
    tile_counts,
)
from llava.model.language_model.batch_counts import LlavaOutput, count_batch, mean_output
from llava.model.language_model.head_loss import head_loss
from llava.model.language_model.staged import StagedCache, StagedPass, forward_in_stages
from llava.model.marker_tokens import add_marker_tokens
from llava.model.multimodal_encoder.vision_tower import VisionTower
from llava.model.projector_method import add_projector_method
from llava.model.prompt_inputs import (
    check_cache,
    check_call,
    check_device,
    check_host_batch,
    check_prompt,
    check_texts,
    find_markers,
    join_frame_markers,
)
from llava.model.splice import Spliced, SplicePlan, plan_splice, splice
from llava.model.vision_modules import Reduction
from llava.model.visual_encoding import EncodedPictures, TowerOnce, VisualEncoding
from llava.model.weights import (
    VIDEO_TOWER_PREFIX,
    VISION_TOWER_PREFIX,
    check_files,
    check_loaded,
    load_into,
    raise_for_keys,
    raise_for_nonfinite,
    without_load_report,
)
from llava.reduction.base import PROJECTOR_MODULES, DecoderReducer, Reducers
from llava.reduction.config import ReductionConfig
from llava.transfer import HostBatch

# Where TRIM's release has what `ClipText` holds.
RELEASED_NAMES = {r"vision_tower\.vision_tower\.visual_projection": "vision_tower.text_tower.visual_projection"}
# Where Video-LLaVA's releases have the two towers.
VIDEO_LLAVA_NAMES = {
    r"model\.image_tower\.image_tower\.": "model.vision_tower.vision_tower.",
    r"model\.video_tower\.video_tower\.": "model.video_tower.vision_tower.",
}


class LlavaMetaModel(VisualEncoding):
    """Mixin for the inner model: a transformer's layers with vision modules, run in stages where a method drops tokens.

    A config without `mm_vision_tower` gives the language model alone; `initialize_vision_modules` adds the rest.
    """

    def forward(self, *args: Any, past_key_values: Any = None, staged: StagedPass | None = None, **kwargs: Any) -> Any:
        """The language model's own forward, or the staged one where a decoder reducer has something to do.

        Args:
            staged: what a decoder reducer needs to know of a batch that enters.
            Others as for transformers' models.
        """
        if staged is None and not getattr(past_key_values, "stages", None):
            return super().forward(*args, past_key_values=past_key_values, **kwargs)  # type: ignore[misc]
        return forward_in_stages(self, *args, past_key_values=past_key_values, staged=staged, **kwargs)


class LlavaMetaForCausalLM:
    """Mixin for the model with its head: splices images into the text, before the language model's own forward."""

    config: Any
    config_class: Any
    older_model_types: ClassVar[tuple[str, ...]] = ()
    # Whether the language model's own forward is layers, head and loss: logits are neither scaled nor capped.
    has_plain_head: ClassVar[bool] = False
    training: bool
    device: torch.device

    @property
    def tokenizer(self) -> Any:
        """The language model's, as load_pretrained_model sets it; finds the question where no texts are given."""
        return self.get_model().tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        self.get_model().tokenizer = tokenizer

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
        kwargs.setdefault("key_mapping", {**RELEASED_NAMES, **VIDEO_LLAVA_NAMES})
        with without_load_report():
            model, info = super().from_pretrained(  # type: ignore[misc]
                path, *args, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
        filled = load_into(model, projector_weights or {}, projector_origin or path)
        if projector_weights is not None:
            lacking = {
                key
                for key in info["missing_keys"]
                if any(name in key for name in PROJECTOR_MODULES) or key.endswith("image_newline")
            } - filled
            raise_for_keys(projector_origin or path, missing=sorted(lacking))
        missing = check_loaded(info, path, filled)
        read = ((name, weight) for name, weight in model.named_parameters() if name not in info["missing_keys"])
        raise_for_nonfinite(path, read)
        inner = model.get_model()
        towers = {VISION_TOWER_PREFIX: inner.vision_tower, VIDEO_TOWER_PREFIX: inner.video_tower}
        for prefix, tower in towers.items():
            lacking = {key.removeprefix(prefix) for key in missing if key.startswith(prefix)}
            if lacking:
                tower.load_weights(lacking)
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
        # What transformers undoes in writing: left alone, the renamings that this model's reading needed. Video-LLaVA
        # has its towers under names of its own, and without the `vision_model` that transformers puts into them.
        has_two_towers = self.get_model().video_tower is not None
        conversions = get_model_conversion_mapping(
            self,
            key_mapping=VIDEO_LLAVA_NAMES if has_two_towers else None,
            hf_quantizer=getattr(self, "hf_quantizer", None),
            add_legacy=False,
        )
        towers = ("vision_tower", "video_tower") if has_two_towers else ()
        self._weight_conversions = [
            each for each in conversions if (each.scope_prefix or "").partition(".")[0] not in towers
        ]
        super().save_pretrained(*args, **kwargs)  # type: ignore[misc]

    @classmethod
    def model_types(cls) -> set[str]:
        """Values of `model_type` in config.json that mean this class, or its language model alone."""
        own, language_model, *_ = (base.model_type for base in cls.config_class.__mro__ if "model_type" in vars(base))
        return {own, language_model, *cls.older_model_types}

    @classmethod
    def _read_config(cls, path: str) -> Any:
        """The config of a checkpoint of this class, or of its bare language model."""
        raw, _ = PreTrainedConfig.get_config_dict(path)
        if raw.get("model_type", "") not in cls.model_types():
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
        videos: Videos = None,
        image_index: Tensor | None = None,
        packed: bool = False,
        reduction: Reduction = None,
        logits_to_keep: int | Tensor = 0,
        skip_logits: bool | None = None,
        host: HostBatch | None = None,
        plan: SplicePlan | None = None,
        draw: int = 0,
        **kwargs: Any,
    ) -> Any:
        """Logits, and the loss where labels are given; in training the loss alone.

        Args:
            input_ids: [B, S] int64 with IMAGE_TOKEN_INDEX (-200) where an image goes, VIDEO_TOKEN_INDEX (-201) where a
                clip goes.
            attention_mask: [B, S], 1 at real tokens; padding on either side. Default: all real.
            labels: [B, S] int64, -100 where nothing is learnt.
            images: N images of the batch in order of their markers: [N, 3, H, W], [N, tiles, 3, H, W], or a list of
                [3, H, W] or [tiles, 3, H, W]; or what is stored of them (`StoredFeatures`), made with the method of
                this call. LLaVA's own collator sends a blank image for a text-only sample; one
                for every such sample is understood, and left out.
            image_sizes: N pairs (width, height) in pixels, for anyres.
            texts: B texts for a reducer that reads them (trim). Without them the question is read off the prompt,
                where the model was opened with its tokenizer.
            videos: clips of the batch in order of their markers, [F, 3, H, W] each, as `process_video` gives them.
            position_ids: [B, L] for `inputs_embeds`; those of `input_ids` follow from the mask, whatever is given.
            image_index: [B, L] for `inputs_embeds`, as `splice_images` returns it (-1 for text); a decoder reducer and
                packing need it.
            packed: run the batch as one row without padding, in which the samples do not see each other.
            reduction: method for this call alone, in any form that `set_reduction` takes, "none" for all tokens; None:
                the model's own. It is for a prompt; what goes on from a cache keeps to what the cache holds.
            logits_to_keep: logits of so many last tokens; 0: of all. `generate` asks for those that it reads.
            skip_logits: whether the loss is all that is wanted: logits then are None, and the head runs on the tokens
                that predict an answer alone, in chunks. None: in training, which is in train mode, with gradients and
                labels. Tuples (`return_dict=False`) and losses of another kind need the logits, and keep them.
            host: what `input_ids`, `attention_mask` and `labels` hold, as the collator hands it on; None: they are
                copied to the host, which waits for the device.
            plan: for `inputs_embeds`, as `splice_images` returns it: then nothing is copied to the host.
            draw: a whole number of this step of training, for a method that draws its tokens by chance.

        Returns:
            transformers' output, in training with labels a `LlavaOutput`; logits [B, L, V] for the spliced rows, padded
            on the left where the input or `config.tokenizer_padding_side` is, otherwise on the right. With a decoder
            reducer, of the tokens that reach the last layer. Packed, [1, T, V] for the real tokens of all rows.

        Raises:
            ValueError: markers and images do not match (the sample is named), or arguments that exclude each other.
        """
        reducers = self.get_model().reducers(reduction)
        trains = self.training and torch.is_grad_enabled() and labels is not None
        batch = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "labels": labels,
            "images": images,
            "videos": videos,
            "image_sizes": image_sizes,
            "texts": texts,
            "image_index": image_index,
            "packed": packed,
            "logits_to_keep": logits_to_keep,
            "skip_logits": skip_logits,
            "host": host,
            "plan": plan,
            **kwargs,
        }
        if not trains or input_ids is None or reducers.projector is None:
            return self._forward_with(reducers, **batch)
        methods = reducers.projector.in_training(self._tile_grid(reducers), draw)
        once = TowerOnce()
        outputs = [self._forward_with(replace(reducers, projector=each), once=once, **batch) for each in methods]
        return outputs[0] if len(outputs) == 1 else mean_output(outputs)

    def _tile_grid(self, reducers: Reducers) -> tuple[int, int]:
        tower = self.get_vision_tower()
        assert tower is not None
        return reducers.input_grid(tower.grid)

    def _forward_with(
        self,
        reducers: Reducers,
        *,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past_key_values: Any,
        inputs_embeds: Tensor | None,
        labels: Tensor | None,
        images: Images,
        videos: Videos,
        image_sizes: ImageSizes,
        texts: Sequence[str] | None,
        image_index: Tensor | None,
        packed: bool,
        logits_to_keep: int | Tensor,
        skip_logits: bool | None,
        host: HostBatch | None,
        plan: SplicePlan | None,
        once: TowerOnce | None = None,
        **kwargs: Any,
    ) -> Any:
        """`forward` with these methods."""
        cached = check_call(past_key_values, images, videos, inputs_embeds, packed)
        spliced = left = None
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
                host=host,
                once=once,
                videos=videos,
            )
            input_ids, inputs_embeds, attention_mask = None, spliced.inputs_embeds, spliced.attention_mask
            position_ids, labels = spliced.position_ids, spliced.labels
            image_index, plan, left = spliced.pool_index, spliced.plan, spliced.left
        if plan is not None and (inputs_embeds is None or plan.image_index.shape != inputs_embeds.shape[:2]):
            plan = None  # of another batch: beams have been added, say, or the prompt is cut into chunks
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "logits_to_keep": logits_to_keep,
            **kwargs,
        }
        trains = self.training and torch.is_grad_enabled() and labels is not None
        skips = (trains if skip_logits is None else skip_logits) and self._can_skip_logits(inputs, labels)
        staged = None
        # Where the host knows the padding, the staged runner runs the plain model too: transformers would wait for the
        # device to see whether there is any.
        is_planned = plan is not None and type(past_key_values) in (type(None), DynamicCache)
        if not cached and (packed or reducers.decoder is not None or is_planned):
            staged = _staged_pass(image_index, labels, packed, left, reducers.decoder, plan)
        if skips:
            output = self._forward_to_loss(inputs, labels, staged)
        elif staged is None:
            output = super().forward(**inputs, labels=labels)  # type: ignore[misc]
        else:
            output = self._forward_staged(inputs, staged)
        if spliced is None or not trains or isinstance(output, tuple):
            return output
        return LlavaOutput(**output, counts=count_batch(spliced, staged))

    def _can_skip_logits(self, inputs: dict[str, Any], labels: Tensor | None) -> bool:
        """Whether the loss follows from the head and the labels alone, and nothing else asks for logits."""
        returns_dict = inputs.get("return_dict")
        return (
            labels is not None
            and self.has_plain_head
            and self.loss_function is ForCausalLMLoss  # type: ignore[attr-defined]
            and (self.config.return_dict if returns_dict is None else returns_dict)
            and isinstance(inputs["logits_to_keep"], int)
            and not inputs["logits_to_keep"]
            and not inputs.keys() & {"ignore_index", "shift_labels"}
        )

    def _forward_to_loss(self, inputs: dict[str, Any], labels: Tensor | None, staged: StagedPass | None) -> Any:
        """Forward for the loss, without logits; arguments as of the language model's own forward."""
        passed = {key: value for key, value in inputs.items() if key != "logits_to_keep"}
        output = self.get_model()(**{**passed, "return_dict": True}, staged=staged)
        kept = labels if staged is None else staged.kept_labels()
        assert kept is not None
        loss = head_loss(
            self.get_output_embeddings(),  # type: ignore[attr-defined]
            output.last_hidden_state,
            kept,
            self.loss_function,  # type: ignore[attr-defined]
            inputs.get("num_items_in_batch"),
            None if staged is None else staged.answers,
        )
        return CausalLMOutputWithPast(
            loss=loss,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )

    def _forward_staged(self, inputs: dict[str, Any], staged: StagedPass) -> Any:
        """Forward through a decoder reducer, or packed: the loss is that of the labels whose tokens reach the end."""
        as_tuple = inputs.pop("return_dict", None) is False
        output = super().forward(**inputs, staged=staged, return_dict=True)  # type: ignore[misc]
        if staged.labels is not None:
            loss = self.loss_function(  # type: ignore[attr-defined]
                logits=output.logits,
                labels=staged.kept_labels(),
                vocab_size=self.config.vocab_size,
                num_items_in_batch=inputs.get("num_items_in_batch"),
            )
            output = type(output)(**{**output, "loss": loss})  # made anew, so that the loss comes first in a tuple
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
        videos: Videos = None,
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
        if inputs is None and images is None and videos is None:
            return super().generate(attention_mask=attention_mask, **kwargs)  # type: ignore[misc]
        if "inputs_embeds" in kwargs:
            raise ValueError("pass input_ids, with images or videos and their markers, or inputs_embeds; not both")
        kwargs.pop("position_ids", None)  # they follow from the mask
        spliced = self.splice_images(
            inputs, attention_mask, None, images, image_sizes, texts, left=True, reduction=reducers, videos=videos
        )
        if reducers.decoder is not None:
            kwargs["image_index"] = spliced.pool_index
        return super().generate(  # type: ignore[misc]
            inputs_embeds=spliced.inputs_embeds, attention_mask=spliced.attention_mask, plan=spliced.plan, **kwargs
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
        host: HostBatch | None = None,
        once: TowerOnce | None = None,
        videos: Videos = None,
    ) -> Spliced:
        """Encode the images and clips of a batch and put their tokens where the markers stand.

        Args:
            left: pad on the left; None: where the input is padded so, or `config.tokenizer_padding_side` says so.
            max_length: rows are cut after this many tokens.
            once: see `encode_pictures`.
            Others as for `forward`.
        """
        check_prompt(input_ids, attention_mask, labels)
        if not (self.training or hasattr(self, "hf_device_map") or self.device.type == "meta"):
            check_device(input_ids, self.device)
        if host is None:
            host = HostBatch.read(input_ids, attention_mask, labels)
        else:
            check_host_batch(host, input_ids, attention_mask, labels)
        if left is None:
            side = getattr(self.config, "tokenizer_padding_side", "right")
            left = side == "left" or not bool(host.mask[:, 0].all())
        if self.get_model().video_tower is not None and not bool((host.input_ids == VIDEO_TOKEN_INDEX).any()):
            host = join_frame_markers(host, tile_counts(clip_list(videos)))
        vocabulary = self.config.vocab_size
        markers = find_markers(host, vocabulary)
        if texts is not None:
            check_texts(texts, len(input_ids), "sample")
        pictures, sizes = match_pictures(markers, images, image_sizes, videos, trusted=self.training)
        reducers = self.get_model().reducers(reduction)
        reads = bool(pictures) and reducers.read_text
        texts = self._texts_of_images(texts, host, markers.of_samples) if reads else None
        encoded = self._visual_tokens(pictures, sizes, texts, reducers, once)
        visual = None if encoded is None else encoded.tokens
        text_embeds = self.get_model().embed_tokens(input_ids.clamp(0, vocabulary - 1))
        none = torch.zeros(0, dtype=torch.int64)
        lengths, frames = (none, None) if encoded is None or not pictures else (encoded.lengths, encoded.frames)
        plan = plan_splice(host.input_ids, host.mask, lengths, max_length, left, frames)
        if visual is not None and not pictures:
            # The sum of none of them is zero, and so are its gradients; 0 * sum would be NaN where the sum overflows.
            text_embeds = text_embeds + visual.flatten()[:0].sum().to(text_embeds.device)
            visual = None
        spliced = splice(text_embeds, visual, host.labels, plan)
        spliced.images = len(pictures)
        spliced.tiles = 0 if isinstance(pictures, StoredFeatures) else sum(tile_counts(pictures))
        return spliced

    def _texts_of_images(self, texts: Sequence[str] | None, host: HostBatch, markers: list[int]) -> list[str] | None:
        """For each image the text of its sample; by default the prompt's question."""
        if texts is None:
            if self.tokenizer is None:
                return None
            rows = zip(host.input_ids, host.mask, strict=True)
            texts = [question_of_ids(ids[real], self.tokenizer) for ids, real in rows]
        return [text for text, count in zip(texts, markers, strict=True) for _ in range(count)]

    def _visual_tokens(
        self,
        pictures: Pictures,
        sizes: ImageSizes,
        texts: list[str] | None,
        reducers: Reducers,
        once: TowerOnce | None = None,
    ) -> EncodedPictures | None:
        """The tokens of a batch's pictures; in training of a blank one, where there are none."""
        if pictures:
            return self.get_model().encode_pictures(pictures, sizes, texts, reducers, once)
        tower = self.get_vision_tower()
        if not self.training or tower is None:
            return None
        # Every rank must run the same modules and have a gradient for the same weights, or ZeRO and DDP wait for
        # ever: a batch without images encodes a blank one, whose tokens are multiplied by zero.
        if isinstance(pictures, StoredFeatures):
            blank: Pictures = pictures.blank(tower.num_patches)
        else:
            blank = [torch.zeros(3, tower.image_size, tower.image_size, device=self.device)]
        return self.get_model().encode_pictures(blank, texts=[""], reduction=reducers, once=once)

    @torch.no_grad()
    def count_visual_tokens(
        self,
        images: Images,
        image_sizes: ImageSizes = None,
        texts: Sequence[str] | None = None,
        reduction: Reduction = None,
        videos: Videos = None,
    ) -> list[tuple[int, int]]:
        """For each image, then for each clip, its visual tokens without and with the reduction.

        `texts` has one for each of them.
        """
        stills, clips = image_list(images), clip_list(videos)
        sizes, side = size_pairs(image_sizes, len(stills)), self.get_model().get_vision_tower().image_size
        if sizes is not None:
            sizes += [(side, side)] * len(clips)
        pictures: list[Picture] = [*stills, *clips]
        model = self.get_model()
        is_clip = [isinstance(picture, Clip) for picture in pictures]
        before = model.layout_lengths(None, tile_counts(pictures), sizes, is_clip)
        after = model.encode_pictures(pictures, sizes, texts, reduction).lengths.tolist()
        return list(zip(before, after, strict=True))

    def initialize_vision_tokenizer(self, model_args: Any, tokenizer: Any) -> None:
        """Add the marker tokens that the flags ask for; see `llava.model.marker_tokens`."""
        add_marker_tokens(self, model_args, tokenizer)


def _staged_pass(
    image_index: Tensor | None,
    labels: Tensor | None,
    packed: bool,
    left: bool | None,
    reducer: DecoderReducer | None,
    plan: SplicePlan | None,
) -> StagedPass:
    if image_index is None and plan is not None:
        image_index = plan.pool_index
    if image_index is None:
        raise ValueError(
            "inputs_embeds do not tell which tokens are an image's: pass image_index [batch, tokens] with them, as "
            "splice_images returns it, or all -1 for text only"
        )
    return StagedPass(image_index, labels, packed, left, reducer, plan)
