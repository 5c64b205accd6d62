"""What passes between the model and a reducer, and one base class a site.

Shapes, here and in every reducer: N images (tiles count as images), P patches, M kept tokens, C vision width,
D language-model width, h x w the grid of patches (P = h * w).
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from typing_extensions import dataclass_transform

from llava.reduction.options import check_fields, values_of


@dataclass
class VisionFeatures:
    """Output of the vision tower for N images.

    Only `features` is always there. The rest is computed where the reducer names it in `needs`.

    Attributes:
        features: [N, P, C], the selected hidden state without CLS; the first of `hidden_states`, if there are any.
        grid: (h, w), rows and columns of the patches.
        keys: [N, 1 + P, C], output of the last block's key projection, CLS first (no CLS row for a tower without it).
        queries: [N, 1 + P, C], the same for the queries; a reducer that needs `cls_query` reads row 0 only and
            may be handed [N, 1, C].
        num_heads: heads of the tower's attention, into which keys and queries are divided.
        hidden_states: block number -> [N, P, C], output of that many blocks, without CLS; in the order in which the
            reducer named the blocks.
        patch_embeds: [N, P, E], the patches in the space that CLIP shares between images and texts.
        text: [N, E], the embedding there of the text that goes with each image.
    """

    features: Tensor
    grid: tuple[int, int] | None = None
    keys: Tensor | None = None
    queries: Tensor | None = None
    num_heads: int = 1
    hidden_states: Mapping[int, Tensor] = field(default_factory=dict)
    patch_embeds: Tensor | None = None
    text: Tensor | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for what is no tensor, or of a shape that does not go with `features`."""
        n, p, _ = _float_shape("features", self.features, "[N, P, C]", (None, None, None))
        if self.grid is not None and not _is_grid(self.grid, (p, p - 1)):  # with CLS, one more than the grid has
            raise ValueError(f"grid={self.grid!r}: expected (rows, columns) of the {p} patches in features")
        width = None
        if self.keys is not None:
            _, tokens, width = _float_shape("keys", self.keys, "[N, P or 1 + P, C]", (n, (p, p + 1), None))
            if self.queries is not None:
                _float_shape("queries", self.queries, "[N, 1 or as many as keys, C]", (n, (1, tokens), width))
        heads = self.num_heads
        if not isinstance(heads, int) or heads < 1 or (width or 0) % heads:
            raise ValueError(f"num_heads={heads!r}: expected a whole number that divides the {width or 'C'} channels")
        if not isinstance(self.hidden_states, Mapping):
            raise ValueError(f"hidden_states is {type(self.hidden_states).__name__}: expected {{block: tensor}}")
        for block, state in self.hidden_states.items():
            _float_shape(f"hidden_states[{block}]", state, "as features", tuple(self.features.shape))
        embeds = None
        if self.patch_embeds is not None:
            *_, embeds = _float_shape("patch_embeds", self.patch_embeds, "[N, P, E]", (n, p, None))
        if self.text is not None:
            _float_shape("text", self.text, "[N, E]", (n, embeds))


def _float_shape(
    name: str, value: Any, expected: str, sizes: tuple[int | tuple[int, ...] | None, ...]
) -> tuple[int, ...]:
    """The shape of a float tensor, each of whose sizes is the one given, one of those given, or any but 0."""
    shape = tuple(value.shape) if isinstance(value, Tensor) and value.is_floating_point() else ()
    allowed = [size if isinstance(size, tuple) else (size,) for size in sizes]
    if len(shape) != len(sizes) or any(
        size == 0 or (ok != (None,) and size not in ok) for size, ok in zip(shape, allowed, strict=True)
    ):
        kind = f"{value.dtype} of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name} is {kind}: expected a float tensor {expected}, here {list(sizes)} (None: any)")
    return shape


def _is_grid(grid: Any, cells: tuple[int, ...]) -> bool:
    if not isinstance(grid, tuple | list) or len(grid) != 2 or not all(type(side) is int and side > 0 for side in grid):
        return False
    return grid[0] * grid[1] in cells


@dataclass
class VisualTokens:
    """Tokens that stand for N images, ragged where images keep different numbers.

    Attributes:
        features: [N, M, C]; rows beyond an image's count are zero.
        mask: [N, M] bool, True at real tokens, which come first in each row; None where all are real.
        source: [N, M] int64, the patch each token came from, in raster order of the grid; -1 for an aggregate of
            several patches and for rows beyond the count. None where token i is patch i. On the host where the
            method knows it without looking at the pixels.
        grid: (h, w), where `source` counts cells of a coarser grid in place of patches; None: the patches'.
        lengths: tokens of each image, where the host knows them: then it need not wait for `mask`.
    """

    features: Tensor
    mask: Tensor | None = None
    source: Tensor | None = None
    grid: tuple[int, int] | None = None
    lengths: list[int] | None = None
    _host_mask: Tensor | None = field(default=None, init=False, repr=False)

    @property
    def host_mask(self) -> Tensor:
        """[N, M] bool on the host, real tokens; waits for the device where neither `lengths` nor anything tells."""
        if self._host_mask is None:
            n, m = self.features.shape[:2]
            if self.lengths is not None:
                self._host_mask = torch.arange(m) < torch.tensor(self.lengths).unsqueeze(1)
            else:
                self._host_mask = torch.ones(n, m, dtype=torch.bool) if self.mask is None else self.mask.cpu()
        return self._host_mask

    @property
    def counts(self) -> Tensor:
        """Tokens an image, [N] int64."""
        if self.mask is None:
            n, m = self.features.shape[:2]
            return torch.full((n,), m, device=self.features.device)
        return self.mask.sum(dim=1)


@dataclass_transform(kw_only_default=True)
class Reducer(nn.Module):
    """A method of reduction. Its options are the fields of its class, as `llava.reduction.options` reads them.

    Raises:
        ValueError: a value that the method cannot work with.
    """

    method: ClassVar[str] = ""  # the name that it is registered under

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        dataclass(kw_only=True, eq=False, repr=False)(cls)

    def __post_init__(self) -> None:
        super().__init__()
        check_fields(self.method, self)
        self.validate()

    def validate(self) -> None:
        """Raise ValueError for options that exclude each other; each of them has the type and range of its field."""

    def mistake(self, message: str) -> ValueError:
        """An error that names the method."""
        return ValueError(f"method '{self.method}': {message}")

    @property
    def needs(self) -> frozenset[str]:
        """What the method reads besides `features`: keys, queries, cls_query, patch_embeds, text."""
        return frozenset()

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in values_of(self).items())


class EncoderReducer(Reducer, abc.ABC):
    """Acts on the vision tower's output, before the projector."""

    @abc.abstractmethod
    def forward(self, vision: VisionFeatures) -> VisualTokens:
        """[N, P, C] patches in, [N, M, C] tokens out."""


class ProjectorReducer(Reducer, abc.ABC):
    """Works in the projector: fewer tokens out than patches in, at the language model's width.

    It has no weights of its own. It says which modules it needs; they are the model's, under LLaVA's names, so that
    they are trained, saved and opened as the projector.
    """

    def blocks(self, depth: int, selected: int) -> tuple[int, ...]:
        """Blocks of the tower whose outputs are read, in this order; none: the selected hidden state is.

        Args:
            depth: blocks of the tower.
            selected: the block whose output `mm_vision_select_layer` names.

        Raises:
            ValueError: the tower does not have the blocks that the options name.
        """
        return ()

    @abc.abstractmethod
    def reduced_grid(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the cells that take the patches' place.

        Raises:
            ValueError: the method can't divide a grid of (h, w) patches.
        """

    @abc.abstractmethod
    def build_modules(self, vision_width: int, width: int, plain: Callable[[int], nn.Module]) -> dict[str, nn.Module]:
        """New modules for `forward`, by their names in the model: `mm_projector`, and what comes before it.

        Args:
            vision_width: C.
            width: D.
            plain: makes the projector of `mm_projector_type`, for the width that enters it.
        """

    @abc.abstractmethod
    def forward(
        self, vision: VisionFeatures, mm_projector: nn.Module, mm_projector_crosslayer: nn.Module | None = None
    ) -> VisualTokens:
        """[N, P, C] patches in, [N, M, D] tokens out, through the modules of `build_modules`."""


@dataclass(frozen=True)
class Drop:
    """One drop of image tokens inside the language model.

    Attributes:
        after: number of layers that have run before it, at least 1.
        keep: int(V * keep) of the V tokens with which an image entered the language model stay, in [0, 1].
        ranked_by: number (from 0) of the layer whose input and weights rank the tokens; `after` for the layer that
            comes next, less for one that has run.
    """

    after: int
    keep: float
    ranked_by: int


@dataclass
class LayerInput:
    """What ranks the tokens of B rows: the input of one layer of the language model.

    Attributes:
        layer: the layer; its modules may be called, and are then adapted (PEFT) and gathered (ZeRO-3) ones.
        hidden: [B, L, D], what enters the layer.
        position_embeddings: cosine and sine of the rotary embedding, [B or 1, L, head width] each.
        mask: [B, L] bool, real tokens.
        queries: [B, Q] int64, columns of the tokens whose attention counts: the one before each answer, or the last.
        query_mask: [B, Q] bool, which of them are real.
    """

    layer: nn.Module
    hidden: Tensor
    position_embeddings: tuple[Tensor, Tensor]
    mask: Tensor
    queries: Tensor
    query_mask: Tensor


class DecoderReducer(Reducer, abc.ABC):
    """Drops image tokens between layers of the language model.

    It says where, how many and by which score; `llava.model.language_model.staged` runs the layers.
    """

    renumbers: ClassVar[bool] = True  # positions are 0, 1, 2, ... again after a drop; otherwise tokens keep theirs

    pool: Literal["image", "sample"] = "image"  # which tokens compete: those of one image, or of all of a sample

    @abc.abstractmethod
    def drops(self, num_layers: int) -> list[Drop]:
        """The drops in a language model of this many layers, in their order.

        Raises:
            ValueError: a drop does not lie between two layers.
        """

    def kept_fractions(self, num_layers: int) -> list[float]:
        """For each layer the fraction of the image tokens that entered which it sees."""
        left = {drop.after: drop.keep for drop in self.drops(num_layers)}
        fractions = [1.0]
        for layer in range(1, num_layers):
            fractions.append(left.get(layer, fractions[-1]))
        return fractions

    @abc.abstractmethod
    def score(self, given: LayerInput) -> Tensor:
        """[B, L] float32: the higher a token's score, the longer it stays."""


@dataclass(frozen=True)
class Reducers:
    """The methods that one forward pass goes through, by site; None where nothing is reduced."""

    encoder: EncoderReducer | None = None
    projector: ProjectorReducer | None = None
    decoder: DecoderReducer | None = None

    @property
    def read_text(self) -> bool:
        """Whether images are compared with the prompt's text."""
        return self.encoder is not None and "text" in self.encoder.needs
