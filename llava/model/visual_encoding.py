"""From pixels to the tokens that enter the language model.

images, clips -> vision tower -> [encoder reducer] -> projector, with a [projector reducer] in it -> layout

What enters the projector may be stored (`store_features`) and given in place of the images.

Shapes: N images and clips, T tiles and frames of all of them, M kept tokens a tile, K visual tokens of all images
together, E width of CLIP's shared space, D language-model width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llava.data.stored_features import StoredFeatures
from llava.model.image_inputs import (
    Clip,
    ImageSizes,
    Picture,
    check_finite,
    check_side,
    frame_counts,
    pixels_of,
    size_pairs,
    tile_counts,
)
from llava.model.image_layout import NEWLINE, LayoutSpec, image_layout, padded_patches
from llava.model.prompt_inputs import check_texts
from llava.model.vision_modules import Reduction, VisionModules
from llava.reduction.base import Reducers, VisionFeatures, VisualTokens
from llava.reduction.frames import concatenated_features, with_cls
from llava.reduction.stand_in import reduce_features
from llava.transfer import to_device


@dataclass
class TowerOnce:
    """What several passes over the same pictures share, so that the vision tower runs once.

    Attributes:
        read: what the projector reads of the tiles; None: nothing has run.
    """

    read: VisionFeatures | VisualTokens | None = None


@dataclass(frozen=True)
class EncodedPictures:
    """Images and clips as they enter the language model.

    Attributes:
        tokens: [K, D], in order.
        lengths: [N] int64 on the host, how many of them each image or clip has.
        frames: [K] int64 on the host, the number in the batch of the image or frame that each token belongs to; None
            where nobody asked.
    """

    tokens: Tensor
    lengths: Tensor
    frames: Tensor | None = None


class VisualEncoding(VisionModules):
    """Mixin for the inner model: encodes images with the modules that `VisionModules` holds."""

    training: bool

    def encode_tiles(
        self,
        pixels: Tensor,
        text: Tensor | None = None,
        reduction: Reduction = None,
        frames: Sequence[int] | None = None,
        **beside: Tensor | None,
    ) -> tuple[Tensor, VisualTokens]:
        """Tower, reducers and projector.

        Args:
            pixels: [T, 3, H, W].
            text: [T, E] or [T, S, E], embedding of the text that goes with each tile, for a reducer that reads it.
            reduction: see `Reduction`.
            frames: how tiles form clips, see `VisionFeatures`.
            beside: what else `VisionFeatures` has that does not come from the tower: `text_mask`, `padding`.

        Returns:
            The projected tokens of all tiles [T * M, D] or, where counts differ, those that `mask` marks as real;
            and the reducer's output, for what came from where.
        """
        methods = self.reducers(reduction)
        return self._project(self.read_tiles(pixels, text, methods, frames, **beside), methods)

    def read_tiles(
        self,
        pixels: Tensor,
        text: Tensor | None,
        methods: Reducers,
        frames: Sequence[int] | None = None,
        **beside: Tensor | None,
    ) -> VisionFeatures | VisualTokens:
        """Tower and encoder reducer: what the projector reads of T tiles; tokens that it made, where the encoder
        reducer reads those. Arguments as for `encode_tiles`."""
        vision = self._see(pixels, methods, frames)
        for name, value in {"text": text, "frames": frames, **beside}.items():
            setattr(vision, name, value)
        if vision.padding is not None and vision.source is not None:  # of the tokens that a method in the tower left
            vision.padding = vision.padding.gather(1, vision.source.clamp(min=0)) & (vision.source >= 0)
        if methods.projector is not None:
            return vision
        if methods.needs.projected:
            vision.projected = self.mm_projector(vision.features.to(self._projector_dtype()))
        tokens = reduce_features(vision, methods)
        if frames is None or not self.keeps_frame_cls(methods):
            return tokens
        assert vision.cls is not None
        cls = self.mm_projector(vision.cls.to(self._projector_dtype())) if methods.needs.projected else vision.cls
        return with_cls(tokens, cls, frames)

    def keeps_frame_cls(self, reduction: Reduction = None) -> bool:
        """Whether the class token of a frame goes before its patches: in Video-LLaVA, unless a method has it among its
        own tokens, or fuses patches in the projector."""
        methods = self.reducers(reduction)
        return self.video_tower is not None and methods.projector is None and not methods.needs.cls

    def _see(self, pixels: Tensor, methods: Reducers, frames: Sequence[int] | None) -> VisionFeatures:
        """The tower's features of all tiles; frames go through the video tower, where there is one."""
        tower, other = self._tower(), self.video_tower
        read, needs = tower.blocks_read(methods.projector), methods.needs
        if other is None or (frames is None and not self.training):
            seen: VisionFeatures = tower(pixels, needs, read, methods.tower)
            return seen
        needs = replace(needs, cls=True) if frames is not None or self.training else needs
        counts = [0] * len(pixels) if frames is None else frames
        is_frame = torch.tensor([count > 0 for count in counts for _ in range(max(count, 1))])
        places = [(~is_frame).nonzero()[:, 0], is_frame.nonzero()[:, 0]]
        parts, unseen = [], []
        for one, rows in zip((tower, other), places, strict=True):
            if len(rows):
                parts.append(one(pixels[to_device(rows, pixels.device)], needs, read, methods.tower))
            elif self.training:  # all ranks run the same modules, see `LlavaMetaForCausalLM._visual_tokens`
                unseen.append(one(torch.zeros_like(pixels[:1]), needs, read, methods.tower))
        vision = parts[0] if len(parts) == 1 else concatenated_features(parts, torch.cat(places).argsort())
        for blank in unseen:
            nothing = blank.features.flatten()[:0].sum()
            vision.features = vision.features + nothing
            vision.hidden_states = {block: states + nothing for block, states in vision.hidden_states.items()}
        return vision

    def _project(self, read: VisionFeatures | VisualTokens, methods: Reducers) -> tuple[Tensor, VisualTokens]:
        """The projector, with a reducer in it; results as for `encode_tiles`."""
        if isinstance(read, VisionFeatures):
            assert methods.projector is not None
            tokens = methods.projector(read, **self.projector_modules())
            return tokens.features.flatten(0, 1), tokens
        flat, real = read.features.flatten(0, 1), read.host_mask.flatten()
        if not bool(real.all()):
            flat = flat.index_select(0, to_device(real.nonzero()[:, 0], flat.device))
        if methods.needs.projected:
            return flat, read
        return self.mm_projector(flat.to(self._projector_dtype())), read

    def _project_stored(self, stored: StoredFeatures, methods: Reducers) -> tuple[Tensor, VisualTokens]:
        """`_project` for what `store_features` made of the same tiles."""
        tower, tokens = self._tower(), stored.tokens.to(self._tower().device)
        if methods.projector is not None:
            blocks = dict.fromkeys(tower.blocks_read(methods.projector))
            states = (tokens if tokens.ndim == 3 else tokens.unsqueeze(1)).unflatten(0, (len(stored.lengths), -1))
            by_block = dict(zip(blocks, states.unbind(2), strict=True))
            first = next(iter(by_block.values()))
            grid = self.tile_grid(methods)
            return self._project(VisionFeatures(first, grid=grid, hidden_states=by_block), methods)
        mask, source = stored.rows()
        layout = VisualTokens(torch.empty(*mask.shape, 0), mask, source, stored.grid)
        return self.mm_projector(tokens.to(self._projector_dtype())), layout

    def _projector_dtype(self) -> torch.dtype:
        weight = next((w for module in self.projector_modules().values() for w in module.parameters()), None)
        return self._tower().dtype if weight is None else weight.dtype

    def encode_images(
        self,
        images: Sequence[Tensor] | StoredFeatures,
        image_sizes: ImageSizes = None,
        texts: Sequence[str] | None = None,
        reduction: Reduction = None,
    ) -> tuple[Tensor, Tensor]:
        """Visual tokens of all images in the order in which they enter the language model.

        Args:
            images: N tensors [3, H, W] or [tiles, 3, H, W], or clips of `llava.model.image_inputs.Clip`; or what is
                stored of N pictures.
            image_sizes: N pairs (width, height) of the original pictures in pixels; needed for anyres.
            texts: N texts, one for each image, for a reducer that reads them.
            reduction: see `Reduction`.

        Returns:
            Tokens [K, D], and how many of them each image has, [N] int64 on the CPU.
        """
        encoded = self.encode_pictures(images, image_sizes, texts, reduction)
        return encoded.tokens, encoded.lengths

    def encode_pictures(
        self,
        pictures: Sequence[Picture] | StoredFeatures,
        image_sizes: ImageSizes = None,
        texts: Sequence[str] | None = None,
        reduction: Reduction = None,
        once: TowerOnce | None = None,
    ) -> EncodedPictures:
        """The same with what a decoder method may ask of it.

        Args:
            once: shared by calls with the same pictures whose methods differ in the projector alone.
            Others as for `encode_images`.
        """
        reducers = self.reducers(reduction)
        if isinstance(pictures, StoredFeatures):
            counts, is_clip = pictures.tiles, [False] * len(pictures)
            projected, tokens = self._project_stored(pictures, reducers)
        else:
            pictures = list(pictures)
            counts, is_clip = tile_counts(pictures), [isinstance(picture, Clip) for picture in pictures]
            beside = self._beside(texts, counts, is_clip, image_sizes, reducers)
            frames = frame_counts(pictures)
            once = once or TowerOnce()
            if once.read is None:
                text = beside.pop("text", None)
                once.read = self.read_tiles(self._tiles(pictures), text, reducers, frames, **beside)
            projected, tokens = self._project(once.read, reducers)
        layouts = self._layouts(tokens, counts, image_sizes, is_clip)
        index = torch.cat(layouts)
        if hasattr(self, "image_newline"):
            projected = torch.cat([projected, self.image_newline.to(projected).unsqueeze(0)])
        index = index.masked_fill(index == NEWLINE, len(projected) - 1)
        asked = reducers.decoder is not None and reducers.decoder.pool == "frame"
        return EncodedPictures(
            projected[to_device(index, projected.device)],
            torch.tensor([len(layout) for layout in layouts]),
            self._frame_numbers(tokens, layouts, counts, is_clip, reducers) if asked else None,
        )

    def _tiles(self, pictures: Sequence[Picture]) -> Tensor:
        """Pixels of all tiles and frames, [T, 3, H, W]."""
        tower = self._tower()
        check_side(pictures, tower.image_size)
        if not self.training:  # there the loss shows it, without waiting for the device
            check_finite(pictures)
        tiles = [pixels.reshape(-1, *pixels.shape[-3:]) for pixels in map(pixels_of, pictures)]
        return torch.cat([to_device(tile, tower.device) for tile in tiles])

    def _beside(
        self,
        texts: Sequence[str] | None,
        counts: list[int],
        is_clip: list[bool],
        image_sizes: ImageSizes,
        methods: Reducers,
    ) -> dict[str, Tensor | None]:
        """What a method reads besides what the tower makes, for each tile; `counts` tiles an image."""
        needs, beside = methods.needs, dict[str, Tensor | None]()
        sizes = size_pairs(image_sizes, len(counts)) if needs.padding else None
        is_tiled = any(count > 1 for count, clip in zip(counts, is_clip, strict=True) if not clip)
        if sizes is not None and not is_tiled and getattr(self.config, "image_aspect_ratio", None) == "pad":
            tower = self._tower()
            masks = [padded_patches(size, tower.image_size, self.tile_grid(methods)) for size in sizes]
            padding = torch.stack(masks).repeat_interleave(torch.tensor(counts), dim=0)  # a clip's size is its frames'
            beside["padding"] = to_device(padding, tower.device)
        if needs.text is None:
            return beside
        assert methods.encoder is not None
        if texts is None:
            raise ValueError(
                "this model's reduction reads the prompt's text: pass texts=[...], one for each sample of the batch"
            )
        check_texts(texts, len(counts), "image")
        distinct = list(dict.fromkeys(texts))  # images of one sample share its text
        embeds, mask = self._embed_texts([methods.encoder.phrases(text) for text in distinct], needs.text)
        rows = torch.tensor([distinct.index(text) for text in texts]).repeat_interleave(torch.tensor(counts))
        beside["text"] = embeds[to_device(rows, embeds.device)]
        beside["text_mask"] = None if mask is None else mask[to_device(rows, mask.device)]
        return beside

    def _embed_texts(self, phrases: list[list[str]], kind: str) -> tuple[Tensor, Tensor | None]:
        """Embeddings of the phrases of Q questions as `Needs.text` says, [Q, E] or [Q, S, E]; [Q, S], what is real."""
        if kind == "words":
            return self._embed_words(phrases)
        tower = self._tower()
        assert tower.text_tower is not None
        texts = [" ".join(parts) for parts in phrases]
        if kind == "pooled":
            return tower.text_tower.embed_texts(texts, tower.name), None
        return pad_rows(tower.text_tower.embed_segments(texts, tower.name))

    def _embed_words(self, phrases: list[list[str]]) -> tuple[Tensor, Tensor]:
        """The language model's embeddings of the tokens of each word, without context; nothing is learnt by it."""
        if self.tokenizer is None:
            raise ValueError(
                "this model's reduction reads the words of the question: open the model with load_pretrained_model, or "
                "set model.tokenizer"
            )
        ids = [
            [token for word in words for token in self.tokenizer(word, add_special_tokens=False).input_ids]
            for words in phrases
        ]
        nothing = [self.tokenizer.bos_token_id or 0]  # of a question without a word, as in a batch without images
        padded, mask = pad_rows([torch.tensor(row or nothing) for row in ids])
        device = self.embed_tokens.weight.device
        with torch.no_grad():  # one call: ZeRO-3 waits in each for all ranks, whose questions differ in number
            return self.embed_tokens(to_device(padded, device)), to_device(mask, device)

    def layout_lengths(
        self,
        tokens: VisualTokens | None,
        tiles: list[int],
        image_sizes: ImageSizes = None,
        is_clip: Sequence[bool] | None = None,
    ) -> list[int]:
        """Tokens that each image has in the language model, with those for the ends of rows.

        Args:
            tokens: what a reducer made of all tiles, [T, M, any width]; None: all patches, without a reduction.
            tiles: how many of the T tiles each of the N images has, or frames each clip.
            image_sizes: N pairs (width, height) of the original pictures in pixels; needed for anyres.
            is_clip: which of the N are clips; None: none of them.
        """
        if tokens is None:
            tokens = VisualTokens(torch.empty(sum(tiles), self._tower().num_patches, 0))
            if is_clip is not None and self.keeps_frame_cls(Reducers()):
                frames = [entry for clip, n in zip(is_clip, tiles, strict=True) for entry in ([n] if clip else [0] * n)]
                tokens = with_cls(tokens, torch.empty(sum(tiles), 0), frames)
        return [len(layout) for layout in self._layouts(tokens, tiles, image_sizes, is_clip)]

    def _layouts(
        self,
        tokens: VisualTokens,
        counts: list[int],
        image_sizes: ImageSizes,
        is_clip: Sequence[bool] | None = None,
    ) -> list[Tensor]:
        """For each image or clip, indices into the projected tokens, or NEWLINE; a clip is flat, frame after frame."""
        is_clip = [False] * len(counts) if is_clip is None else is_clip
        spec, sizes = self._layout_spec(tokens.grid), size_pairs(image_sizes, len(counts))
        flat = replace(spec, merge_type="flat")
        t, m = tokens.features.shape[:2]
        mask = tokens.host_mask
        # Only where several tiles are put together do lengths depend on which patches were kept.
        tiled = [count for count, clip in zip(counts, is_clip, strict=True) if not clip]
        is_read = spec.merge_type != "flat" and max(tiled, default=1) > 1
        source = torch.arange(m).expand(t, m) if tokens.source is None or not is_read else tokens.source.cpu()
        packed = mask.flatten().cumsum(0) - 1
        layouts, start = [], 0
        for i, count in enumerate(_rows_of(tokens, counts, is_clip)):
            rows = slice(start, start + count)
            how = flat if is_clip[i] else spec
            local = image_layout(source[rows], mask[rows], None if sizes is None else sizes[i], how)
            layouts.append(torch.where(local == NEWLINE, NEWLINE, packed[local + start * m]))
            start += count
        return layouts

    def _frame_numbers(
        self, tokens: VisualTokens, layouts: list[Tensor], counts: list[int], is_clip: Sequence[bool], methods: Reducers
    ) -> Tensor:
        """[K] int64, the number of the image or frame of each token that `layouts` name."""
        patches, has_cls = math.prod(self.tile_grid(methods)), self.keeps_frame_cls(methods)
        t, m = tokens.features.shape[:2]
        row = torch.arange(t).repeat_interleave(m)[tokens.host_mask.flatten()]  # of each projected token
        source = None
        if tokens.frames is not None and tokens.source is not None:
            source = tokens.source.cpu().flatten()[tokens.host_mask.flatten()]
        numbers, start, first = [], 0, 0
        for layout, rows, count, clip in zip(layouts, _rows_of(tokens, counts, is_clip), counts, is_clip, strict=True):
            if not clip:
                frame = torch.zeros_like(layout)
            elif source is None or rows > 1:
                frame = row[layout] - start
            else:  # of all frames together: what stands for several patches goes with the last frame
                frame = torch.where(source[layout] < 0, count - 1, source[layout] // patches)
                if has_cls:  # in front, one of each frame
                    frame[:count] = torch.arange(count)
            numbers.append(frame + first)
            start, first = start + rows, first + (count if clip else 1)
        return torch.cat(numbers)

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


def _rows_of(tokens: VisualTokens, counts: Sequence[int], is_clip: Sequence[bool]) -> list[int]:
    """How many rows of `tokens` each image or clip has, of `counts` tiles or frames."""
    if tokens.frames is None:
        return list(counts)
    return [1 if clip else count for count, clip in zip(counts, is_clip, strict=True)]


def pad_rows(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Q tensors [S, ...] of different S, at least 1, as one [Q, S, ...]; and [Q, S] bool, what is no padding."""
    padded = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    mask = torch.arange(padded.shape[1]) < torch.tensor([len(row) for row in rows]).unsqueeze(1)
    return padded, to_device(mask, padded.device)


def store_features(read: VisionFeatures | VisualTokens, counts: list[int]) -> StoredFeatures:
    """What `read_tiles` made of some pictures as it can be stored, on the host.

    Args:
        read: of T tiles.
        counts: tiles of each picture.
    """
    if isinstance(read, VisionFeatures):
        states = list(read.hidden_states.values())
        read = VisualTokens(states[0] if len(states) == 1 else torch.stack(states, dim=2))
    mask = None if read.mask is None else read.mask.cpu()
    tokens, source = read.features.cpu(), None if read.source is None else read.source.cpu()
    t, m = tokens.shape[:2]
    return StoredFeatures(
        tokens=tokens.flatten(0, 1) if mask is None else tokens[mask],
        lengths=[m] * t if mask is None else mask.sum(dim=1).tolist(),
        tiles=counts,
        source=source if source is None else source.flatten() if mask is None else source[mask],
        grid=read.grid,
    )
