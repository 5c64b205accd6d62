"""From pixels to the tokens that enter the language model.

images -> vision tower -> [encoder reducer] -> projector, with a [projector reducer] in it -> layout

What enters the projector may be stored (`store_features`) and given in place of the images.

Shapes: N images, T tiles of all images, M kept tokens a tile, K visual tokens of all images together, E width of CLIP's
shared space, D language-model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llava.data.stored_features import StoredFeatures
from llava.model.image_inputs import ImageSizes, check_finite, check_side, image_list, size_pairs, tile_counts
from llava.model.image_layout import NEWLINE, LayoutSpec, image_layout, padded_patches
from llava.model.prompt_inputs import check_texts
from llava.model.vision_modules import Reduction, VisionModules
from llava.reduction.base import Reducers, VisionFeatures, VisualTokens
from llava.reduction.stand_in import reduce_features
from llava.transfer import to_device


@dataclass
class TowerOnce:
    """What several passes over the same images share, so that the vision tower runs once.

    Attributes:
        read: of the tiles, what the projector reads; None: nothing has run.
        tiles: of each image.
    """

    read: VisionFeatures | VisualTokens | None = None
    tiles: list[int] = field(default_factory=list)


class VisualEncoding(VisionModules):
    """Mixin for the inner model: encodes images with the modules that `VisionModules` holds."""

    training: bool

    def encode_tiles(
        self, pixels: Tensor, text: Tensor | None = None, reduction: Reduction = None, **beside: Tensor | None
    ) -> tuple[Tensor, VisualTokens]:
        """Tower, reducers and projector.

        Args:
            pixels: [T, 3, H, W].
            text: [T, E] or [T, S, E], embedding of the text that goes with each tile, for a reducer that reads it.
            reduction: see `Reduction`.
            beside: what else `VisionFeatures` has that does not come from the tower: `text_mask`, `padding`.

        Returns:
            The projected tokens of all tiles [T * M, D] or, where counts differ, those that `mask` marks as real;
            and the reducer's output, for what came from where.
        """
        methods = self.reducers(reduction)
        return self._project(self.read_tiles(pixels, text, methods, **beside), methods)

    def read_tiles(
        self, pixels: Tensor, text: Tensor | None, methods: Reducers, **beside: Tensor | None
    ) -> VisionFeatures | VisualTokens:
        """Tower and encoder reducer: what the projector reads of T tiles; tokens that it made, where the encoder
        reducer reads those. Arguments as for `encode_tiles`."""
        tower = self._tower()
        vision: VisionFeatures = tower(pixels, methods.needs, tower.blocks_read(methods.projector), methods.tower)
        for name, value in {"text": text, **beside}.items():
            setattr(vision, name, value)
        if methods.projector is not None:
            return vision
        if methods.needs.projected:
            vision.projected = self.mm_projector(vision.features.to(self._projector_dtype()))
        return reduce_features(vision, methods)

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
            return self._project(VisionFeatures(first, grid=tower.grid, hidden_states=by_block), methods)
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
        once: TowerOnce | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Visual tokens of all images in the order in which they enter the language model.

        Args:
            images: N tensors [3, H, W] or [tiles, 3, H, W]; or what is stored of N pictures.
            image_sizes: N pairs (width, height) of the original pictures in pixels; needed for anyres.
            texts: N texts, one for each image, for a reducer that reads them.
            reduction: see `Reduction`.
            once: shared by calls with the same images whose methods differ in the projector alone.

        Returns:
            Tokens [K, D], and how many of them each image has, [N] int64 on the CPU.
        """
        reducers = self.reducers(reduction)
        if isinstance(images, StoredFeatures):
            counts = images.tiles
            projected, tokens = self._project_stored(images, reducers)
        else:
            once = once or TowerOnce()
            if once.read is None:
                pixels, once.tiles = self._tiles(images)
                beside = self._beside(texts, once.tiles, image_sizes, reducers)
                once.read = self.read_tiles(pixels, methods=reducers, **{"text": None, **beside})
            counts = once.tiles
            projected, tokens = self._project(once.read, reducers)
        layouts = self._layouts(tokens, counts, image_sizes)
        index = torch.cat(layouts)
        if hasattr(self, "image_newline"):
            projected = torch.cat([projected, self.image_newline.to(projected).unsqueeze(0)])
        index = index.masked_fill(index == NEWLINE, len(projected) - 1)
        return projected[to_device(index, projected.device)], torch.tensor([len(layout) for layout in layouts])

    def _tiles(self, images: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
        """Pixels of all tiles [T, 3, H, W], and how many tiles each image is."""
        tower, pictures = self._tower(), image_list(images)
        check_side(pictures, tower.image_size)
        counts = tile_counts(pictures)
        if not self.training:  # there the loss shows it, without waiting for the device
            check_finite(pictures)
        tiles = [picture.reshape(-1, *picture.shape[-3:]) for picture in pictures]
        return torch.cat([to_device(tile, tower.device) for tile in tiles]), counts

    def _beside(
        self, texts: Sequence[str] | None, counts: list[int], image_sizes: ImageSizes, methods: Reducers
    ) -> dict[str, Tensor | None]:
        """What a method reads besides what the tower makes, for each tile; `counts` tiles an image."""
        needs, beside = methods.needs, dict[str, Tensor | None]()
        if needs.padding and max(counts, default=0) == 1 and getattr(self.config, "image_aspect_ratio", None) == "pad":
            sizes = size_pairs(image_sizes, len(counts))
            if sizes is not None:
                tower = self._tower()
                masks = [padded_patches(size, tower.image_size, tower.grid) for size in sizes]
                beside["padding"] = to_device(torch.stack(masks), tower.device)
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
        """The language model's embeddings of the tokens of each word, without context."""
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
        device = self.embed_tokens.weight.device
        return pad_rows([self.embed_tokens(torch.tensor(row or nothing, device=device)) for row in ids])

    def layout_lengths(
        self, tokens: VisualTokens | None, tiles: list[int], image_sizes: ImageSizes = None
    ) -> list[int]:
        """Tokens that each image has in the language model, with those for the ends of rows.

        Args:
            tokens: what a reducer made of all tiles, [T, M, any width]; None: all patches, without a reduction.
            tiles: how many of the T tiles each of the N images has.
            image_sizes: N pairs (width, height) of the original pictures in pixels; needed for anyres.
        """
        if tokens is None:
            tokens = VisualTokens(torch.empty(sum(tiles), self._tower().num_patches, 0))
        return [len(layout) for layout in self._layouts(tokens, tiles, image_sizes)]

    def _layouts(self, tokens: VisualTokens, counts: list[int], image_sizes: ImageSizes) -> list[Tensor]:
        """For each image, indices into the projected tokens, or NEWLINE."""
        spec, sizes = self._layout_spec(tokens.grid), size_pairs(image_sizes, len(counts))
        t, m = tokens.features.shape[:2]
        mask = tokens.host_mask
        # Only where several tiles are put together do lengths depend on which patches were kept.
        is_read = spec.merge_type != "flat" and max(counts, default=1) > 1
        source = torch.arange(m).expand(t, m) if tokens.source is None or not is_read else tokens.source.cpu()
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


def pad_rows(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Q tensors [S, E] of different S, at least 1, as one [Q, S, E]; and [Q, S] bool, what is no padding."""
    lengths = torch.tensor([len(row) for row in rows], device=rows[0].device)
    padded = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    return padded, torch.arange(padded.shape[1], device=lengths.device) < lengths.unsqueeze(1)


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
