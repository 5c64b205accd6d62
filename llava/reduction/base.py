"""What passes between the model and a reducer, and one base class a site.

Shapes, here and in every reducer: N images (tiles count as images), P patches, M kept tokens, C vision width,
D language-model width, h x w the grid of patches (P = h * w).
"""

from __future__ import annotations

import abc
import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from typing_extensions import dataclass_transform

from llava.reduction.options import check_fields, values_of
from llava.reduction.tower.tokens import BlockTokens, Regrouping

PROJECTOR_MODULES = ("mm_projector", "mm_projector_crosslayer", "query_abstractor")
"""What lies between vision tower and language model, by its names in LLaVA and in the methods' releases."""

FIXED_WEIGHTS = ("query_abstractor.pos_embed",)
"""Endings of the names of weights in these modules that never learn."""

Place = int | Literal["early", "selected", "last"]
"""A block of the vision tower: its number from 0, or from -1 for the last one; or by name, the block whose output
`mm_vision_select_layer` selects, the last one, or an early one, a fifth of the way up: block 5 of 24."""


@dataclass(frozen=True)
class Needs:
    """What a method after the tower reads besides `features`. The tower computes this and nothing else.

    Attributes:
        attention: blocks whose attention from CLS to the patches is read.
        keys: the block whose keys are read.
        queries: the block whose queries are read, all of them.
        cls_query: the block whose query of CLS is read.
        cls: whether the class token of the selected hidden state is read.
        hidden: numbers of blocks after which the hidden state is read (0: the embeddings), see `VisionFeatures`.
        patch_embeds: whether the patches in CLIP's shared space are read.
        projected: whether the projector's output for all patches is read. The method's tokens then are of that width,
            and do not go through the projector again.
        text: how the prompt's question is read, if it is: "pooled", one CLIP embedding of it, cut at the text tower's
            length; "segments", one CLIP embedding for every stretch of that length; "words", the language model's
            embedding of each token of the method's `phrases`.
        padding: whether patches that only pad the picture are told from others.
        grid: whether patches must lie on a grid, as after some methods in the tower they no longer do.
    """

    attention: tuple[Place, ...] = ()
    keys: Place | None = None
    queries: Place | None = None
    cls_query: Place | None = None
    cls: bool = False
    hidden: tuple[int, ...] = ()
    patch_embeds: bool = False
    projected: bool = False
    text: Literal["pooled", "segments", "words"] | None = None
    padding: bool = False
    grid: bool = False

    @property
    def places(self) -> set[Place]:
        """Blocks whose attention or projections are read."""
        named = (self.keys, self.queries, self.cls_query)
        return {*self.attention, *(place for place in named if place is not None)}

    @property
    def clip_text(self) -> bool:
        """Whether CLIP's text tower, or the projections beside it, must be there."""
        return self.patch_embeds or self.text in ("pooled", "segments")


@dataclass
class VisionFeatures:
    """Output of the vision tower for N images.

    Only `features` is always there. The rest is computed where the reducer names it in `needs`. After a method in the
    tower, P counts the tokens that it left.

    Attributes:
        features: [N, P, C], the selected hidden state without CLS; the first of `hidden_states`, if there are any.
        grid: (h, w), rows and columns of the patches; None where tokens do not lie on a grid.
        keys: [N, 1 + P, C], output of a block's key projection, CLS first (no CLS row for a tower without it).
        queries: [N, 1 + P, C], the same for the queries; a reducer that needs `cls_query` reads row 0 only and
            may be handed [N, 1, C].
        num_heads: heads of the tower's attention, into which keys and queries are divided.
        attention: by place as the reducer named it, [N, H, P] float32, the softmaxed attention that CLS pays the
            patches, head by head, its own column left out after the softmax; in a tower without CLS, the mean of what
            all patches pay.
        cls: [N, C], the class token of the selected hidden state; None for a tower without it.
        hidden_states: block number -> [N, P, C], output of that many blocks, without CLS; in the order in which the
            reducer named the blocks.
        patch_embeds: [N, P, E], the patches in the space that CLIP shares between images and texts.
        projected: [N, P, D], what the projector makes of `features`.
        text: [N, E], the embedding of the text that goes with each image; or [N, S, E] of its S segments, or [N, S, D]
            of its words.
        text_mask: [N, S] bool, real segments or words, which come first; None: all are.
        padding: [N, P] bool, patches that only pad the picture; None: there are none, or it is not known.
        mask: [N, P] bool, real tokens, where a method in the tower left different numbers; None: all are.
        source: [N, P] int64 after a method in the tower, as `VisualTokens` has it; None: token i is patch i.
        assignment: [N, patches] int64 after a method in the tower, see `VisualTokens`.
        frames: how the N pictures form clips, in their order: F for a clip of F frames, 0 for what is no frame, a
            picture or a tile of one. None: there are no clips.
    """

    features: Tensor
    grid: tuple[int, int] | None = None
    keys: Tensor | None = None
    queries: Tensor | None = None
    num_heads: int = 1
    attention: Mapping[Place, Tensor] = field(default_factory=dict)
    cls: Tensor | None = None
    hidden_states: Mapping[int, Tensor] = field(default_factory=dict)
    patch_embeds: Tensor | None = None
    projected: Tensor | None = None
    text: Tensor | None = None
    text_mask: Tensor | None = None
    padding: Tensor | None = None
    mask: Tensor | None = None
    source: Tensor | None = None
    assignment: Tensor | None = None
    frames: Sequence[int] | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for what is no tensor, or of a shape that does not go with `features`."""
        n, p, c = _float_shape("features", self.features, "[N, P, C]", (None, None, None))
        if self.grid is not None and not _is_grid(self.grid, (p, p - 1)):  # with CLS, one more than the grid has
            raise ValueError(f"grid={self.grid!r}: expected (rows, columns) of the {p} patches in features")
        self._check_projections(n, p)
        if not isinstance(self.attention, Mapping):
            raise ValueError(f"attention is {type(self.attention).__name__}: expected {{place: tensor}}")
        for place, rows in self.attention.items():
            _float_shape(f"attention[{place!r}]", rows, "[N, H, P]", (n, None, p))
        if self.cls is not None:
            _float_shape("cls", self.cls, "[N, C]", (n, c))
        if not isinstance(self.hidden_states, Mapping):
            raise ValueError(f"hidden_states is {type(self.hidden_states).__name__}: expected {{block: tensor}}")
        for block, state in self.hidden_states.items():
            _float_shape(f"hidden_states[{block}]", state, "as features", tuple(self.features.shape))
        width = embeds = None
        if self.projected is not None:
            *_, width = _float_shape("projected", self.projected, "[N, P, D]", (n, p, None))
        if self.patch_embeds is not None:
            *_, embeds = _float_shape("patch_embeds", self.patch_embeds, "[N, P, E]", (n, p, None))
        if self.text is not None:
            several = isinstance(self.text, Tensor) and self.text.ndim == 3
            widths = tuple(size for size in (embeds, width) if size is not None)
            sizes = (n, None, widths or None) if several else (n, embeds)
            _float_shape("text", self.text, "[N, E] or [N, S, E]", sizes)

    def _check_projections(self, n: int, p: int) -> None:
        width = None
        if self.keys is not None:
            _, tokens, width = _float_shape("keys", self.keys, "[N, P or 1 + P, C]", (n, (p, p + 1), None))
            if self.queries is not None:
                _float_shape("queries", self.queries, "[N, 1 or as many as keys, C]", (n, (1, tokens), width))
        heads = self.num_heads
        if not isinstance(heads, int) or heads < 1 or (width or 0) % heads:
            raise ValueError(f"num_heads={heads!r}: expected a whole number that divides the {width or 'C'} channels")


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
        assignment: [N, patches] int64, the token that each patch went into, -1 for one that went into none; None where
            a method does not say.
        frames: how many pictures each row stands for, where the frames of a clip are one: `source` then counts their
            patches frame by frame. None: one.
    """

    features: Tensor
    mask: Tensor | None = None
    source: Tensor | None = None
    grid: tuple[int, int] | None = None
    lengths: list[int] | None = None
    assignment: Tensor | None = None
    frames: list[int] | None = None
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
    is_trained: ClassVar[bool] = False  # whether it needs weights that were trained with it
    budget_conflicts: ClassVar[tuple[str, ...]] = ("ratio",)  # options that a budget takes the place of, besides those

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        dataclass(kw_only=True, eq=False, repr=False)(cls)

    def __post_init__(self) -> None:
        super().__init__()
        check_fields(self.method, self)
        self.validate()

    @property
    def is_adaptive(self) -> bool:
        """Whether each image's own scores say how many tokens it keeps."""
        return False

    def validate(self) -> None:
        """Raise ValueError for options that exclude each other; each of them has the type and range of its field."""

    @classmethod
    def budget_choices(cls, entering: int) -> Sequence[Mapping[str, Any]]:
        """Options to choose from for a `budget`, from the fewest tokens to the most; none: it can't be told one.

        Args:
            entering: visual tokens of a tile that come to the method.
        """
        if not hasattr(cls, "tokens"):  # a field's default
            return ()
        return [{"tokens": count} for count in range(1, entering + 1)]

    def mistake(self, message: str) -> ValueError:
        """An error that names the method."""
        return ValueError(f"method '{self.method}': {message}")

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in values_of(self).items())


class TowerReducer(Reducer, abc.ABC):
    """Acts inside the vision tower, between a block's attention and its MLP.

    It says in which blocks, and what becomes of the tokens there; `llava.model.multimodal_encoder.regrouping` runs the
    blocks and does sizes, order, `source`, CLS and the padding of ragged rows.
    """

    keeps_grid: ClassVar[bool] = False  # whether tokens still lie on a grid, which a projector may fuse

    @property
    def tracks_sizes(self) -> bool:
        """Whether a token counts in the next block as many patches as went into it; otherwise one."""
        return True

    @property
    def proportional(self) -> bool:
        """Whether attention counts a token as often as its size says: log(size) is added to the logits of its key."""
        return False

    def input_grid(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of patches of the picture that enters, for a tower of (h, w): it is resized to them.

        Raises:
            ValueError: the options do not suit the grid.
        """
        return grid

    def blocks(self, depth: int, selected: int) -> Sequence[int]:
        """Numbers (from 0) of the blocks in which `regroup` is called; the first `selected` of `depth` lead to what is
        read.

        Raises:
            ValueError: the tower does not have the blocks that the options name.
        """
        return ()

    def chosen_blocks(self, chosen: Sequence[int], selected: int) -> Sequence[int]:
        """An option that names blocks, as `blocks` returns it.

        Raises:
            ValueError: they do not rise, or one does not lead to what is read.
        """
        if not chosen or list(chosen) != sorted({*chosen}) or chosen[-1] >= selected:
            raise self.mistake(
                f"blocks={list(chosen)}: expected rising numbers from 0 to {selected - 1}, of blocks that lead to what "
                "is read of the vision tower"
            )
        return chosen

    def regroup(self, given: BlockTokens) -> Regrouping | None:
        """What becomes of the tokens in a block of `blocks`; None: they stay as they are."""
        return None

    def forward(self, vision: VisionFeatures) -> VisualTokens:
        """The tokens that leave the tower, [N, M, C]."""
        return VisualTokens(
            vision.features,
            vision.mask,
            vision.source,
            vision.grid if self.keeps_grid else None,
            assignment=vision.assignment,
        )


class EncoderReducer(Reducer, abc.ABC):
    """Acts on the vision tower's output, before the projector."""

    ranks_frames: ClassVar[bool] = False  # whether the patches of all frames of a clip can be ranked together

    frames: Literal["each", "joint"] = "each"  # of a clip: a method's budget is spent on each, or on all together

    def validate(self) -> None:
        super().validate()
        if self.frames == "joint" and not self.ranks_frames:
            raise self.mistake("it works on one picture at a time: frames=each is all it can do")

    def measured(self, vision: VisionFeatures) -> VisionFeatures:
        """With what the method measures on each picture; called before the frames of a clip are joined to one."""
        return vision

    def for_frames(self, frames: int) -> EncoderReducer:
        """The method for a clip of so many frames as one picture: as many tokens as for each of them alone."""
        tokens = getattr(self, "tokens", None)
        if frames == 1 or tokens is None:
            return self
        return type(self)(**{**values_of(self), "tokens": frames * tokens})

    @property
    def needs(self) -> Needs:
        """What the method reads besides `features`."""
        return Needs()

    def phrases(self, question: str) -> list[str]:
        """What is embedded of the prompt's question, where `needs.text` asks for it: one text, or words."""
        return [question]

    @abc.abstractmethod
    def forward(self, vision: VisionFeatures) -> VisualTokens:
        """[N, P, C] patches in, [N, M, C] tokens out; [N, M, D] where the method `needs` what is projected."""


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
    def token_count(self, grid: tuple[int, int]) -> int:
        """Tokens that a tile of (h, w) patches becomes.

        Raises:
            ValueError: the method can't work on such a grid.
        """

    def placed(self, tokens: Tensor, grid: tuple[int, int]) -> VisualTokens:
        """[N, M, D] tokens of tiles of (h, w) patches with what they stand for; here each is an aggregate of all."""
        return VisualTokens(tokens, source=torch.full(tokens.shape[:2], -1))

    def in_training(self, grid: tuple[int, int], draw: int) -> Sequence[ProjectorReducer]:
        """The methods that a batch is trained with, one forward pass each; the loss is the mean of theirs.

        Args:
            grid: (h, w), patches of a tile.
            draw: a whole number that differs from step to step and from process to process, for a method that draws.
        """
        return (self,)

    def trained_like(self, **options: Any) -> Self:
        """This method with other options for one pass: the same object to whoever watches it."""
        other = copy.copy(self)  # it shares the hooks
        for name, value in options.items():
            setattr(other, name, value)
        return other

    @abc.abstractmethod
    def build_modules(self, vision_width: int, width: int, plain: Callable[[int], nn.Module]) -> dict[str, nn.Module]:
        """New modules for `forward`, by their names in the model, which are among `PROJECTOR_MODULES`.

        Args:
            vision_width: C.
            width: D.
            plain: makes the projector of `mm_projector_type`, for the width that enters it.
        """

    @abc.abstractmethod
    def forward(self, vision: VisionFeatures, *args: Any, **modules: Any) -> VisualTokens:
        """[N, P, C] patches in, [N, M, D] tokens out, through the modules of `build_modules`, given by name."""


@dataclass(frozen=True)
class Drop:
    """One drop of image tokens inside the language model.

    Attributes:
        after: number of layers that have run before it, at least 1.
        keep: what stays: a fraction of the V tokens with which an image entered the language model, int(V * keep), in
            [0, 1]; or a whole number of tokens.
        ranked_by: number (from 0) of the layer whose input and weights rank the tokens; `after` for the layer that
            comes next, less for one that has run.
    """

    after: int
    keep: float | int
    ranked_by: int


@dataclass
class EnteringTokens:
    """A batch as it enters the language model, for a method that chooses which tokens rank.

    Attributes:
        hidden: [B, L, D], the input embeddings.
        mask: [B, L] bool, real tokens.
        pool: [B, L] int64, see `LayerInput`.
        answer: [B, L] bool, tokens that are learnt; None outside of training.
    """

    hidden: Tensor
    mask: Tensor
    pool: Tensor
    answer: Tensor | None = None


@dataclass
class LayerInput:
    """What ranks the tokens of B rows: the input of one layer of the language model.

    Attributes:
        layer: the layer; its modules may be called, and are then adapted (PEFT) and gathered (ZeRO-3) ones.
        hidden: [B, L, D], what enters the layer.
        position_embeddings: cosine and sine of the rotary embedding, [B or 1, L, head width] each.
        mask: [B, L] bool, real tokens.
        queries: [B, Q] int64, columns of the tokens whose attention counts: the one before each answer, or the last;
            or those of `DecoderReducer.queries`.
        query_mask: [B, Q] bool, which of them are real.
        output: [B, L, D], what the drop works on: the output of the layers that have run.
        norm: the language model's last norm.
        rotary: the language model's rotary embedding.
        positions: [B, L] int64, of the tokens that are still there.
        pool: [B, L] int64, the pool (an image, or all of a sample) in which a token competes, numbered from 0 row by
            row; -1 for what is never dropped.
        answer: [B, L] bool, tokens that are learnt; None outside of training.
        drop: the drop that is made.
        entered: [P] int64 on the host, tokens of each pool that entered the language model.
        present: [P] int64 on the host, tokens of each pool that are still there.
        kept: [P] int64 on the host, tokens of each pool that stay as they are.
        merged: [P] int64 on the host, tokens that others of the pool are merged into.
    """

    layer: nn.Module
    hidden: Tensor
    position_embeddings: tuple[Tensor, Tensor]
    mask: Tensor
    queries: Tensor
    query_mask: Tensor
    output: Tensor = field(default_factory=lambda: torch.empty(0))
    norm: nn.Module = field(default_factory=nn.Identity)
    rotary: nn.Module = field(default_factory=nn.Identity)
    positions: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    pool: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    answer: Tensor | None = None
    drop: Drop = Drop(1, 1.0, 0)
    entered: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    present: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    kept: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    merged: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))


@dataclass
class MergedTokens:
    """Tokens that dropped ones become. They come after the kept ones of their pool, in this order.

    Attributes:
        features: [P, M, D], those of each pool.
        columns: [P, M] int64, for each the column of a dropped token of the same pool, in whose place it stands.
    """

    features: Tensor
    columns: Tensor


class DecoderReducer(Reducer, abc.ABC):
    """Drops image tokens between layers of the language model.

    It says where, how many and by which score; `llava.model.language_model.staged` runs the layers.
    """

    # Which tokens compete: those of one image or clip, of one image or frame, or of all of a sample.
    pool: Literal["image", "frame", "sample"] = "image"

    @property
    def renumbers(self) -> bool:
        """Whether positions are 0, 1, 2, ... again after a drop; otherwise tokens keep theirs."""
        return True

    @abc.abstractmethod
    def drops(self, num_layers: int) -> list[Drop]:
        """The drops in a language model of this many layers, in their order.

        Raises:
            ValueError: a drop does not lie between two layers.
        """

    def kept(self, drop: Drop, entered: Tensor, present: Tensor) -> Tensor:
        """[P] int64 on the host, tokens of each pool that stay as they are; `present` are cut to, if it says more.

        Args:
            drop: one of `drops`.
            entered: [P] int64, tokens of each pool that entered the language model.
            present: [P] int64, those that are still there.
        """
        if isinstance(drop.keep, int):
            return torch.full_like(entered, drop.keep)
        return (entered.double() * drop.keep).long()

    def merged(self, drop: Drop, dropped: Tensor) -> Tensor:
        """[P] int64 on the host, tokens that `dropped` [P] ones of each pool are merged into; see `merge`."""
        return torch.zeros_like(dropped)

    def queries(self, given: EnteringTokens) -> Tensor | None:
        """[B, L] bool, the tokens whose attention ranks, in rows with images; None: those before answers, or the last.

        The tokens are text, and are never dropped.
        """
        return None

    @abc.abstractmethod
    def score(self, given: LayerInput) -> Tensor:
        """[B, L] float32: the higher a token's score, the longer it stays. Of each pool the best `given.kept` stay."""

    def merge(self, given: LayerInput, scores: Tensor, keep: Tensor) -> MergedTokens:
        """What dropped tokens become, for a method whose `merged` says how many.

        Args:
            given: see there.
            scores: [B, L], what `score` returned.
            keep: [B, L] bool, tokens that stay.
        """
        raise NotImplementedError

    def layer_counts(self, num_layers: int, entered: int) -> list[int]:
        """For each layer the tokens that it sees of an image that entered with `entered`."""
        first = present = torch.tensor([entered])
        left = {}
        for drop in self.drops(num_layers):
            kept = torch.minimum(self.kept(drop, first, present), present)
            present = kept + self.merged(drop, present - kept)
            left[drop.after] = int(present)
        counts = [entered]
        for layer in range(1, num_layers):
            counts.append(left.get(layer, counts[-1]))
        return counts


@dataclass(frozen=True)
class Reducers:
    """The methods that one forward pass goes through, by site; None where nothing is reduced."""

    tower: TowerReducer | None = None
    encoder: EncoderReducer | None = None
    projector: ProjectorReducer | None = None
    decoder: DecoderReducer | None = None

    @property
    def needs(self) -> Needs:
        """What the method after the tower reads."""
        return Needs() if self.encoder is None else self.encoder.needs

    def input_grid(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of patches of the picture that enters a tower of (h, w)."""
        return grid if self.tower is None else self.tower.input_grid(grid)

    @property
    def are_adaptive(self) -> bool:
        """Whether an image's own scores say how many tokens enter the language model."""
        return any(reducer is not None and reducer.is_adaptive for reducer in (self.tower, self.encoder))

    @property
    def read_text(self) -> bool:
        """Whether images are compared with the prompt's text."""
        return self.needs.text is not None
