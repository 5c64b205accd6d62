"""Frames of clips as the methods after the tower see them: one by one, or all of a clip as one large picture.

Shapes: N pictures (tiles and frames count as pictures), F frames of a clip, P patches, M kept tokens, C vision width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from llava.reduction.base import EncoderReducer, VisionFeatures, VisualTokens
from llava.transfer import to_device

TENSORS = (
    *("features", "keys", "queries", "cls", "patch_embeds", "projected"),
    *("text", "text_mask", "padding", "mask", "source", "assignment"),
)
MAPPINGS = ("attention", "hidden_states")


def reduce_jointly(
    reducer: EncoderReducer,
    vision: VisionFeatures,
    run: Callable[[EncoderReducer, VisionFeatures], VisualTokens],
) -> VisualTokens:
    """Each clip as one picture of F * P patches, and each picture or tile alone.

    Args:
        reducer: the method after the tower.
        vision: with `frames`.
        run: runs a method on pictures of one number of patches.

    Returns:
        A row for each entry of `vision.frames`; `source` counts the patches of all frames of a clip.
    """
    assert vision.frames is not None
    all_frames, vision = vision.frames, reducer.measured(vision)
    rows, units, start = dict[int, list[int]](), dict[int, list[int]](), 0
    for unit, frames in enumerate(all_frames):
        count = max(frames, 1)
        rows.setdefault(count, []).extend(range(start, start + count))
        units.setdefault(count, []).append(unit)
        start += count
    parts = [run(reducer.for_frames(count), _joined(_taken(vision, rows[count]), count)) for count in rows]
    order = torch.tensor([unit for each in units.values() for unit in each]).argsort()
    tokens = concatenated_tokens(parts, order)
    return replace(tokens, frames=[max(frames, 1) for frames in all_frames])


def concatenated_tokens(parts: Sequence[VisualTokens], order: Tensor) -> VisualTokens:
    """The rows of several as those of one, padded alike.

    Args:
        parts: of one width of features and one grid.
        order: [N] int64 on the host, for each row of the result its place in the rows of all parts.
    """
    width = max(part.features.shape[1] for part in parts)
    device = parts[0].features.device
    at = to_device(order, device)
    masks, sources = [], []
    for part in parts:
        n, m = part.features.shape[:2]
        real = torch.ones(n, m, dtype=torch.bool, device=device) if part.mask is None else part.mask
        masks.append(pad(real, (0, width - m)))
        source = torch.arange(m).expand(n, m) if part.source is None else part.source
        sources.append(pad(source.to(device), (0, width - m), value=-1))
    features = torch.cat([pad(part.features, (0, 0, 0, width - part.features.shape[1])) for part in parts])
    known = [
        part.lengths or ([part.features.shape[1]] * len(part.features) if part.mask is None else []) for part in parts
    ]
    lengths = [length for each in known for length in each] if all(known) else None
    return VisualTokens(
        features[at],
        torch.cat(masks)[at],
        torch.cat(sources)[at],
        parts[0].grid,
        None if lengths is None else [lengths[place] for place in order.tolist()],
    )


def concatenated_features(parts: Sequence[VisionFeatures], order: Tensor) -> VisionFeatures:
    """The pictures of several towers of one shape as those of one; `order` as for `concatenated_tokens`."""
    at, width = to_device(order, parts[0].features.device), max(part.features.shape[1] for part in parts)
    if any(part.features.shape[1] < width or part.mask is not None for part in parts):
        parts = [_padded(part, width) for part in parts]

    def cat(tensors: Sequence[Tensor]) -> Tensor:  # a device map may have the towers on two devices
        return torch.cat([tensor.to(at.device) for tensor in tensors])[at]

    changes: dict[str, Any] = {}
    for name in TENSORS:
        values = [getattr(part, name) for part in parts]
        if values[0] is not None:
            changes[name] = cat(values)
    for name in MAPPINGS:
        changes[name] = {key: cat([getattr(part, name)[key] for part in parts]) for key in getattr(parts[0], name)}
    return replace(parts[0], **changes)


def with_cls(tokens: VisualTokens, cls: Tensor, frames: Sequence[int]) -> VisualTokens:
    """The class token of each frame before its tokens; of a clip that is one row, those of all its frames.

    Args:
        tokens: of the pictures of `frames`, in a row each, or in a row a clip where `tokens.frames` says so.
        cls: [N, C], of each picture.
        frames: see `VisionFeatures`.
    """
    joint, device = tokens.frames is not None, tokens.features.device
    added = [count for count in frames for _ in range(1 if joint else max(count, 1))]
    if not joint:
        added = [min(count, 1) for count in added]
    most, n = max(added), len(added)
    is_frame = torch.tensor([count > 0 for count in frames for _ in range(max(count, 1))])
    is_cls = torch.arange(most) < torch.tensor(added).unsqueeze(1)
    front = cls.new_zeros(n, most, cls.shape[1])
    # By numbers, as the host knows them: a mask on the device would have to be waited for.
    row, column, frame = (to_device(each, device) for each in (*is_cls.nonzero(as_tuple=True), *is_frame.nonzero().T))
    front[row, column] = cls[frame]
    m = tokens.features.shape[1]
    real = torch.ones(n, m, dtype=torch.bool, device=device) if tokens.mask is None else tokens.mask
    real = torch.cat([to_device(is_cls, device), real], dim=1)
    source = torch.arange(m, device=device).expand(n, m) if tokens.source is None else tokens.source
    source = torch.cat([source.new_full((n, most), -1), source], dim=1)
    order = (~real).long().argsort(dim=1, stable=True)  # real ones first
    features = torch.cat([front.to(tokens.features.dtype), tokens.features], dim=1)
    lengths = tokens.lengths or ([m] * n if tokens.mask is None else None)
    return replace(
        tokens,
        features=features.gather(1, order.unsqueeze(-1).expand_as(features)),
        mask=real.gather(1, order),
        source=source.gather(1, order.to(source.device)),
        lengths=None if lengths is None else [a + b for a, b in zip(added, lengths, strict=True)],
        assignment=None,
    )


def _mapped(vision: VisionFeatures, change: Callable[[str, Tensor], Tensor | None], **more: Any) -> VisionFeatures:
    """With every tensor changed; `change` is told the field's name."""
    tensors = {name: value for name in TENSORS if (value := getattr(vision, name)) is not None}
    changes: dict[str, Any] = {name: change(name, value) for name, value in tensors.items()}
    for name in MAPPINGS:
        held: Mapping[Any, Tensor] = getattr(vision, name)
        changes[name] = {key: change(name, value) for key, value in held.items()}
    return replace(vision, **{**changes, **more})


def _taken(vision: VisionFeatures, rows: Sequence[int]) -> VisionFeatures:
    index = torch.tensor(rows)
    return _mapped(vision, lambda _, value: value[to_device(index, value.device)], frames=None)


def _joined(vision: VisionFeatures, frames: int) -> VisionFeatures:
    """Clips of F frames each as pictures of F * P patches."""
    if frames == 1:
        return vision
    p = vision.features.shape[1]

    def join(name: str, value: Tensor) -> Tensor | None:
        clips = value.unflatten(0, (-1, frames))
        if name in ("text", "text_mask"):
            return clips[:, 0]
        if name in ("cls", "assignment"):
            return None
        if name == "attention":  # [N, F, H, P]; what is paid to all patches adds up to 1 as in one picture
            return clips.transpose(1, 2).flatten(2, 3) / frames
        if name in ("keys", "queries"):  # without CLS, of which there is one a frame
            clips = clips[:, :, value.shape[1] - p :]
        if name == "source":
            patches = vision.assignment.shape[1] if vision.assignment is not None else p
            offset = torch.arange(frames, device=value.device).view(1, -1, 1) * patches
            clips = torch.where(clips < 0, clips, clips + offset)
        return clips.flatten(1, 2)

    return _mapped(vision, join, grid=None)


def _padded(vision: VisionFeatures, width: int) -> VisionFeatures:
    """Rows of the tower's tokens as wide as another tower's; only what a method inside the tower leaves is there."""
    n, m = vision.features.shape[:2]
    real = torch.ones(n, m, dtype=torch.bool, device=vision.features.device) if vision.mask is None else vision.mask
    source = torch.arange(m, device=real.device).expand(n, m) if vision.source is None else vision.source
    return replace(
        vision,
        features=pad(vision.features, (0, 0, 0, width - m)),
        mask=pad(real, (0, width - m)),
        source=pad(source, (0, width - m), value=-1),
        hidden_states={},
    )
