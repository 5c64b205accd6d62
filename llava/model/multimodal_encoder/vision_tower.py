"""The vision tower: a CLIP or SigLIP image encoder from transformers, run up to the layer that LLaVA reads.

Shapes: N images, P patches, C vision width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from transformers import AutoConfig, AutoModel, CLIPTextConfig, CLIPVisionConfig, PreTrainedConfig

from llava.model.multimodal_encoder.clip_text import ClipText, resolve_text_config
from llava.model.multimodal_encoder.processor import load_image_processor
from llava.model.multimodal_encoder.regrouping import run_block
from llava.model.weights import check_files, check_json, raise_for_keys, raise_for_nonfinite, without_load_report
from llava.reduction.base import Needs, Place, ProjectorReducer, Reducers, TowerReducer, VisionFeatures
from llava.reduction.selection import mean_attention
from llava.reduction.tower.tokens import TowerTokens

logger = logging.getLogger(__name__)

SELECT_FEATURES = ("patch", "cls_patch")


def resolve_vision_config(name_or_path: str) -> PreTrainedConfig:
    """The image encoder's configuration, from a folder or hub name of a CLIP or SigLIP model or of its vision half.

    LanguageBind's towers are CLIP's under a type of their own, which transformers does not know.

    Raises:
        ValueError: nothing there, or no image encoder that this tower can run.
    """
    check_json(name_or_path, "config.json")
    try:
        raw, _ = PreTrainedConfig.get_config_dict(name_or_path)
        if str(raw.get("model_type", "")).startswith("LanguageBind"):
            return _languagebind_config(name_or_path, raw)
        config = AutoConfig.from_pretrained(name_or_path)
    except UnfitTowerError:
        raise
    except Exception as error:  # transformers raises its own types for values it can't take
        raise ValueError(
            f"the vision tower {name_or_path!r} is neither a folder with a config.json nor a model of the hub that can "
            "be reached from here. Pass the folder of a CLIP or SigLIP model as vision_tower= (--vision_tower)"
        ) from error
    return getattr(config, "vision_config", config)


class UnfitTowerError(ValueError):
    """A vision encoder that this tower can't run; the message says what it has."""


def _languagebind_config(name: str, raw: dict[str, Any]) -> PreTrainedConfig:
    vision = dict(raw.get("vision_config") or {})
    if vision.get("add_time_attn"):
        raise UnfitTowerError(
            f"the tower {name!r} has add_time_attn: its blocks attend over frames too, which neither transformers' "
            "Video-LLaVA nor this tower does; choose one without, as LanguageBind_Image"
        )
    return CLIPVisionConfig.from_dict({**vision, "model_type": CLIPVisionConfig.model_type})


class VisionTower(nn.Module):
    """Wraps transformers' encoder under the attribute `vision_tower`, so that weight names are LLaVA's.

    Blocks after the selected layer are not run, unless a reducer reads their outputs, or their attention, keys or
    queries; then only those projections are computed of the last of them.

    Args:
        config: the encoder's configuration.
        name: folder or hub name, for the image processor and for weights that a checkpoint leaves out.
        select_layer: index into the hidden states, embeddings first; -2 is the output of the last block but one.
        select_feature: "patch" drops CLS, "cls_patch" keeps it (unknown to towers without CLS).
    """

    # transformers' post_init gathers these from children; a tower in two places would add up tensors of two devices.
    _no_split_modules = ("VisionTower",)

    def __init__(
        self, config: PreTrainedConfig, name: str, select_layer: int = -2, select_feature: str = "patch"
    ) -> None:
        super().__init__()
        self.name = name
        self.processor_path = name  # a checkpoint may bring an image processor of its own
        self.vision_tower = AutoModel.from_config(config)
        self.text_tower: ClipText | None = None  # only for reducers that read a text
        self.select(select_layer, select_feature)
        self._image_processor: Any = None

    def select(self, layer: int, feature: str) -> None:
        """Choose the hidden state that is handed on; see the arguments of the class.

        Raises:
            ValueError: the tower has no such layer, or no such choice of feature exists.
        """
        if feature not in SELECT_FEATURES:
            raise ValueError(f"mm_vision_select_feature={feature!r}: choose one of {', '.join(SELECT_FEATURES)}")
        depth = self.depth
        if not -depth - 1 <= layer <= depth:
            raise ValueError(
                f"mm_vision_select_layer={layer}: the tower {self.name!r} has {depth} blocks, so it must lie in "
                f"[{-depth - 1}, {depth}]"
            )
        self.select_feature = feature
        self.num_blocks = layer % (depth + 1)

    def rename(self, name: str) -> None:
        """Take image processor and missing weights from another place; the weights that are here stay.

        Raises:
            ValueError: the encoder there is of another size, so that the projector would not fit it.
        """
        other = resolve_vision_config(name)
        for key in ("model_type", "hidden_size", "num_hidden_layers", "image_size", "patch_size"):
            if getattr(other, key) != getattr(self.config, key):
                raise ValueError(
                    f"the vision tower {name!r} has {key}={getattr(other, key)}, this checkpoint was made with "
                    f"{getattr(self.config, key)}. Another tower needs a new projector: pretrain one on the bare "
                    "language model"
                )
        self.name = self.processor_path = name
        self._image_processor = None

    def add_text_tower(self, config: CLIPTextConfig | None = None) -> None:
        """Build CLIP's text tower, without its weights, by default that of the folder or hub name of this tower."""
        self.text_tower = ClipText(config or resolve_text_config(self.name), self.hidden_size)
        self.text_tower.requires_grad_(False)

    @property
    def config(self) -> PreTrainedConfig:
        return self.vision_tower.config

    @property
    def hidden_size(self) -> int:
        """Vision width C."""
        return self.config.hidden_size

    @property
    def image_size(self) -> int:
        """Side of the square input, in pixels."""
        return self.config.image_size

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        side = self.config.image_size // self.config.patch_size
        return side, side

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return self.config.num_hidden_layers

    def blocks_read(self, reducer: ProjectorReducer | None = None) -> tuple[int, ...]:
        """Numbers of the blocks whose outputs the projector reads (0: the embeddings); no later one needs to run.

        Args:
            reducer: the method in the projector. Those that it names, in its order; by default the selected one.

        Raises:
            ValueError: the tower does not have the blocks that the method names.
        """
        named = () if reducer is None else reducer.blocks(self.depth, self.num_blocks)
        return named or (self.num_blocks,)

    def block_number(self, place: Place) -> int:
        """The number (from 0) of the block that a reducer names.

        Raises:
            ValueError: the tower has no such block.
        """
        named = {"early": self.depth * 5 // 24, "selected": self.num_blocks - 1, "last": self.depth - 1}
        number = named.get(place) if isinstance(place, str) else place
        lowest = 0 if isinstance(place, str) else -self.depth
        if number is None or not lowest <= number < self.depth:
            raise ValueError(
                f"the reduction reads block {place!r} of the vision tower {self.name!r}, which has the blocks 0 to "
                f"{self.depth - 1} and selects the output of "
                f"{f'block {self.num_blocks - 1}' if self.num_blocks else 'its embeddings'}"
            )
        return number % self.depth

    def depth_run(self, needs: Needs, read: Sequence[int]) -> int:
        """How many blocks run for what a reducer `needs` and for the blocks that are `read`."""
        blocks = [self.block_number(place) for place in needs.places]
        lacking = [block for block in needs.hidden if not 0 <= block <= self.depth]
        if lacking:
            raise ValueError(
                f"the reduction reads the hidden states after {lacking} blocks of the vision tower {self.name!r}, "
                f"which has {self.depth}"
            )
        return max(*(read or self.blocks_read()), *blocks, *needs.hidden, 0)

    def check_methods(self, reducers: Reducers) -> None:
        """Look for what the methods ask of this tower and cannot have together.

        Raises:
            ValueError: says which method, and what to do.
        """
        blocks, needs = self.blocks_read(reducers.projector), reducers.needs
        first_read = min((*needs.hidden, *(self.block_number(place) for place in needs.places)), default=None)
        if self.has_cls and self.select_feature == "cls_patch" and (reducers.tower or needs != Needs()):
            method = reducers.tower or reducers.encoder
            assert method is not None
            raise method.mistake(
                "mm_vision_select_feature=cls_patch keeps CLS among the patches, where the method has no place for it; "
                "set it to patch"
            )
        if reducers.tower is None:
            return
        if reducers.tower.is_adaptive and reducers.encoder is not None:
            raise reducers.encoder.mistake(
                f"'{reducers.tower.method}' leaves a different number of tokens of each picture, which a method after "
                "the tower does not take; leave one of them out"
            )
        reducers.tower.input_grid(self.grid)
        acts = reducers.tower.blocks(self.depth, blocks[0])
        if acts and first_read is not None and first_read <= max(acts):
            assert reducers.encoder is not None
            raise reducers.encoder.mistake(
                f"it reads block {first_read} of the vision tower, in which or after which '{reducers.tower.method}' "
                "still takes tokens away, so that what it reads is not of the tokens that are left; let that method "
                "end earlier, or choose one that reads a later block or none"
            )
        if needs.grid and not reducers.tower.keeps_grid:
            assert reducers.encoder is not None
            raise reducers.encoder.mistake(
                f"it works on the grid of patches, of which '{reducers.tower.method}' takes some away; leave one out"
            )

    @property
    def num_patches(self) -> int:
        """Patches an image, P."""
        return self.grid[0] * self.grid[1]

    @property
    def has_cls(self) -> bool:
        """Whether the encoder puts a class token before the patches."""
        return hasattr(self.vision_tower.embeddings, "class_embedding")

    @property
    def device(self) -> torch.device:
        """Where pixels go: to the weights, or where accelerate brings offloaded weights for a moment."""
        hooks = (getattr(module, "_hf_hook", None) for module in self.modules())
        places = (getattr(hook, "execution_device", None) for hook in hooks)
        place = next((place for place in places if place is not None), None)
        return self.vision_tower.device if place is None else torch.device(place)

    @property
    def dtype(self) -> torch.dtype:
        return self.vision_tower.dtype

    @property
    def image_processor(self) -> Any:
        """transformers' image processor of this tower, loaded at first use.

        Raises:
            ValueError: no preprocessor_config.json at `processor_path`, or one whose settings don't work.
        """
        if self._image_processor is None:
            self._image_processor = load_image_processor(self.processor_path)
        return self._image_processor

    def load_weights(self, missing: Collection[str] | None = None) -> None:
        """Read weights from the folder or hub name of this tower, and freeze them.

        Args:
            missing: names of the weights that a checkpoint lacked; None: all of them.

        Raises:
            ValueError: the folder's models have other shapes than these, or a checkpoint holds part of one.
        """
        parts: dict[str, Callable[[], None]] = {"vision_tower": self._load_encoder}
        if self.text_tower is not None:
            parts["text_tower"] = partial(self.text_tower.load_weights, self.name)
        for part, load in parts.items():
            own = {name for name, _ in self.named_parameters() if name.startswith(f"{part}.")}
            lacking = own if missing is None else own & set(missing)
            raise_for_keys("the checkpoint", missing=sorted(lacking) if lacking != own else [])
            if lacking:
                load()

    def _load_encoder(self) -> None:
        name, old = self.name, self.vision_tower
        check_files(name)
        with without_load_report():
            encoder, info = type(old).from_pretrained(
                name,
                config=old.config,
                dtype=old.dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
        wrong = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
        if wrong:
            raise ValueError(
                f"the vision tower {name!r} does not fit the configuration of this model; missing or wrongly shaped: "
                f"{', '.join(wrong[:8])}{', ...' if len(wrong) > 8 else ''}"
            )
        raise_for_nonfinite(name, encoder.named_parameters())
        encoder.requires_grad_(False)
        self.vision_tower = encoder if old.device.type == "meta" else encoder.to(old.device)
        logger.info("vision tower: weights from %s", name)

    def forward(
        self,
        pixels: Tensor,
        needs: Needs | None = None,
        blocks: Sequence[int] = (),
        reducer: TowerReducer | None = None,
    ) -> VisionFeatures:
        """Encode images.

        Args:
            pixels: [N, 3, H, W], normalised by the image processor.
            needs: what to compute besides, as a reducer declares it.
            blocks: those whose outputs become `hidden_states`, in this order. The first of them is then `features`
                too, in place of the selected one, which nobody reads.
            reducer: the method that acts inside.

        Returns:
            Features in the dtype of the tower's weights.
        """
        learns = torch.is_grad_enabled() and any(p.requires_grad for p in self.vision_tower.parameters())
        with torch.set_grad_enabled(learns):
            pixels = pixels.to(device=self.device, dtype=self.dtype)
            return self._encode(pixels, needs or Needs(), blocks, reducer)

    def _encode(
        self, pixels: Tensor, needs: Needs, read: Sequence[int], reducer: TowerReducer | None
    ) -> VisionFeatures:
        places = {place: self.block_number(place) for place in needs.places}
        selected = (read or self.blocks_read())[0]
        grid = self.grid if reducer is None else reducer.input_grid(self.grid)
        tokens = TowerTokens.of(self._embed(pixels, grid), int(self.has_cls))
        wanted = {selected, *read, *needs.hidden, *places.values()}
        states = {0: tokens} if 0 in wanted else {}
        for number in range(self.depth_run(needs, read)):
            tokens = self._run_block(number, tokens, selected, reducer)
            if number + 1 in wanted:
                states[number + 1] = tokens
        result = self._features(states[selected], grid, reducer)
        read_states = dict.fromkeys((*read, *needs.hidden))
        result.hidden_states = {block: self._select(states[block].features) for block in read_states}
        self.read_attention({number: states[number].features for number in places.values()}, needs, result)
        if needs.cls and self.has_cls:
            result.cls = states[selected].features[:, 0]
        if needs.patch_embeds:
            if self.text_tower is None:
                raise ValueError("the vision tower was built without CLIP's text tower; see add_text_tower")
            result.patch_embeds = self.text_tower.embed_patches(result.features, self.vision_tower.post_layernorm)
        return result

    def _embed(self, pixels: Tensor, grid: tuple[int, int]) -> Tensor:
        """[N, T, C], what enters the first block, for a picture that is resized to `grid` patches where it differs."""
        encoder, patch = self.vision_tower, self.config.patch_size
        if grid == self.grid:
            hidden = encoder.embeddings(pixels)
        else:
            side = (grid[0] * patch, grid[1] * patch)
            smaller = interpolate(pixels.float(), side, mode="bicubic", antialias=True, align_corners=False)
            hidden = encoder.embeddings(smaller.to(pixels.dtype), interpolate_pos_encoding=True)
        # CLIP has a norm here, spelt so; SigLIP has none.
        return encoder.pre_layrnorm(hidden) if hasattr(encoder, "pre_layrnorm") else hidden

    def _run_block(self, number: int, tokens: TowerTokens, selected: int, reducer: TowerReducer | None) -> TowerTokens:
        block = self.vision_tower.encoder.layers[number]
        if reducer is None:
            return replace(tokens, features=block(tokens.features, None))
        acts = number in reducer.blocks(self.depth, selected)
        return run_block(block, tokens, reducer, number, selected, acts)

    def _features(self, tokens: TowerTokens, grid: tuple[int, int], reducer: TowerReducer | None) -> VisionFeatures:
        """The selected hidden state, with what a method in the tower says of its tokens."""
        features = self._select(tokens.features)
        if reducer is None or reducer.keeps_grid:
            return VisionFeatures(features, grid=grid)
        first = tokens.first
        return VisionFeatures(
            features,
            mask=None if tokens.mask is None else tokens.mask[:, first:],
            source=tokens.source[:, first:],
            assignment=(tokens.assignment - first).clamp(min=-1),
        )

    def _select(self, hidden: Tensor) -> Tensor:
        drop_cls = self.has_cls and self.select_feature == "patch"
        return hidden[:, 1:] if drop_cls else hidden

    def read_attention(self, hidden: Mapping[int, Tensor], needs: Needs, result: VisionFeatures) -> None:
        """Fill in attention, keys and queries.

        Args:
            hidden: by number of a block, what enters it, [N, 1 + P, C].
            needs: what is read.
            result: where it goes.
        """
        result.num_heads = self.config.num_attention_heads if needs.places else result.num_heads
        projected: dict[tuple[int, str, bool], Tensor] = {}

        def project(place: Place, name: str, cls_only: bool = False) -> Tensor:
            number = self.block_number(place)
            if (number, name, cls_only) not in projected:
                block, states = self.vision_tower.encoder.layers[number], hidden[number]
                normed = block.layer_norm1(states[:, :1] if cls_only else states)
                projected[number, name, cls_only] = getattr(block.self_attn, f"{name}_proj")(normed)
            return projected[number, name, cls_only]

        if needs.keys is not None:
            result.keys = project(needs.keys, "k")
        if needs.queries is not None:
            result.queries = project(needs.queries, "q")
        elif needs.cls_query is not None:
            result.queries = project(needs.cls_query, "q", cls_only=True)
        first = int(self.has_cls)
        result.attention = {
            place: mean_attention(project(place, "q", self.has_cls), project(place, "k"), result.num_heads)[..., first:]
            for place in needs.attention
        }
