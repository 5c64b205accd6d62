"""The vision tower: a CLIP or SigLIP image encoder from transformers, run up to the layer that LLaVA reads.

Shapes: N images, P patches, C vision width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, CLIPTextConfig, PreTrainedConfig

from llava.model.multimodal_encoder.clip_text import ClipText, resolve_text_config
from llava.model.multimodal_encoder.processor import load_image_processor
from llava.model.weights import check_files, check_json, raise_for_keys, raise_for_nonfinite, without_load_report
from llava.reduction.base import ProjectorReducer, VisionFeatures

logger = logging.getLogger(__name__)

SELECT_FEATURES = ("patch", "cls_patch")
_ATTENTION = frozenset({"keys", "queries", "cls_query"})  # needs that are read off the last block


def resolve_vision_config(name_or_path: str) -> PreTrainedConfig:
    """The image encoder's configuration, from a folder or hub name of a CLIP or SigLIP model or of its vision half.

    Raises:
        ValueError: nothing there, or no image encoder that this tower can run.
    """
    check_json(name_or_path, "config.json")
    try:
        config = AutoConfig.from_pretrained(name_or_path)
    except Exception as error:  # transformers raises its own types for values it can't take
        raise ValueError(
            f"the vision tower {name_or_path!r} is neither a folder with a config.json nor a model of the hub that can "
            "be reached from here. Pass the folder of a CLIP or SigLIP model as vision_tower= (--vision_tower)"
        ) from error
    return getattr(config, "vision_config", config)


class VisionTower(nn.Module):
    """Wraps transformers' encoder under the attribute `vision_tower`, so that weight names are LLaVA's.

    Blocks after the selected layer are not run, unless a reducer reads their outputs, or the last one's keys and
    queries; then only those projections are computed of it.

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

    def depth_run(self, needs: Collection[str], read: Sequence[int]) -> int:
        """How many blocks run for what a reducer `needs` and for the blocks that are `read`."""
        attends = bool(_ATTENTION & set(needs))
        return max(*(read or self.blocks_read()), self.depth - 1 if attends else 0)

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

    def forward(self, pixels: Tensor, needs: Collection[str] = (), blocks: Sequence[int] = ()) -> VisionFeatures:
        """Encode images.

        Args:
            pixels: [N, 3, H, W], normalised by the image processor.
            needs: names of further `VisionFeatures` to compute, as a reducer declares them.
            blocks: those whose outputs become `hidden_states`, in this order. The first of them is then `features`
                too, in place of the selected one, which nobody reads.

        Returns:
            Features in the dtype of the tower's weights.
        """
        learns = torch.is_grad_enabled() and any(p.requires_grad for p in self.vision_tower.parameters())
        with torch.set_grad_enabled(learns):
            pixels = pixels.to(device=self.device, dtype=self.dtype)
            return self._encode(pixels, frozenset(needs), blocks)

    def _encode(self, pixels: Tensor, needs: frozenset[str], read: Sequence[int]) -> VisionFeatures:
        encoder = self.vision_tower
        blocks = encoder.encoder.layers
        last = len(blocks) - 1
        attends = bool(needs & _ATTENTION)
        selected = (read or self.blocks_read())[0]
        wanted = {selected, *read, *([last] if attends else [])}
        hidden = encoder.embeddings(pixels)
        if hasattr(encoder, "pre_layrnorm"):  # CLIP has one, spelt so; SigLIP has none
            hidden = encoder.pre_layrnorm(hidden)
        states = {0: hidden} if 0 in wanted else {}
        for i in range(self.depth_run(needs, read)):
            hidden = blocks[i](hidden, None)
            if i + 1 in wanted:
                states[i + 1] = hidden
        result = VisionFeatures(self._select(states[selected]), grid=self.grid)
        result.hidden_states = {block: self._select(states[block]) for block in read}
        if attends:
            self.project_attention(blocks[last], states[last], needs, result)
        if "patch_embeds" in needs:
            if self.text_tower is None:
                raise ValueError("the vision tower was built without CLIP's text tower; see add_text_tower")
            result.patch_embeds = self.text_tower.embed_patches(result.features, encoder.post_layernorm)
        return result

    def _select(self, hidden: Tensor) -> Tensor:
        drop_cls = self.has_cls and self.select_feature == "patch"
        return hidden[:, 1:] if drop_cls else hidden

    def project_attention(self, block: Any, hidden: Tensor, needs: frozenset[str], result: VisionFeatures) -> None:
        """Keys and queries of one block for its input `hidden`, [N, 1 + P, C]; the CLS query alone where it will do."""
        normed = block.layer_norm1(hidden)
        result.num_heads = self.config.num_attention_heads
        if "keys" in needs:
            result.keys = block.self_attn.k_proj(normed)
        if "queries" in needs:
            result.queries = block.self_attn.q_proj(normed)
        elif "cls_query" in needs:
            result.queries = block.self_attn.q_proj(normed[:, :1])
