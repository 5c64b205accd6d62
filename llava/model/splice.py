"""Put the visual tokens of a batch where its image markers stand: one pass, any mix of samples.

Shapes: B samples, S tokens a row of ids, L tokens a row after the splice, K visual tokens of all images together,
D language-model width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX, VIDEO_TOKEN_INDEX
from llava.transfer import to_device


@dataclass
class Spliced:
    """A batch ready for the language model's layers.

    Attributes:
        inputs_embeds: [B, L, D], zero at padding.
        attention_mask: [B, L] int64, 1 at real tokens.
        position_ids: [B, L] int64, 0, 1, 2, ... over the real tokens of a row; 0 at padding.
        labels: [B, L] int64, -100 at images and padding; None where none were given.
        image_index: [B, L] int64, number of the image or clip in the batch that a token belongs to; -1 for text and
            padding.
        pool_index: the same with the frames of a clip numbered like images, where a decoder method lets each compete
            for itself; otherwise `image_index`.
        left: whether rows are padded on the left.
        images: how many images and clips the batch holds.
        tiles: how many pictures they are for the vision tower.
        plan: the same on the host.
    """

    inputs_embeds: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    labels: Tensor | None
    image_index: Tensor
    pool_index: Tensor
    left: bool
    images: int = 0
    tiles: int = 0
    plan: SplicePlan | None = None


@dataclass
class SplicePlan:
    """Where every token of the spliced batch comes from, on the host; see `plan_splice`."""

    source: Tensor  # [B, L] int64 into [B * S text tokens, K visual tokens, one row of zeros]
    attention_mask: Tensor  # [B, L] bool
    position_ids: Tensor  # [B, L]
    image_index: Tensor  # [B, L]
    left: bool
    lengths: list[int]  # real tokens of each row
    pool_index: Tensor  # [B, L], see `Spliced`
    labels: Tensor | None = None  # [B, L], set by `splice`


def is_marker(ids: Tensor) -> Tensor:
    """Where an image or a clip goes: bool, of the shape of the ids."""
    return (ids == IMAGE_TOKEN_INDEX) | (ids == VIDEO_TOKEN_INDEX)


def plan_splice(
    input_ids: Tensor,
    mask: Tensor,
    image_lengths: Tensor,
    max_length: int | None = None,
    left: bool = False,
    frames: Tensor | None = None,
) -> SplicePlan:
    """Lay out the rows of a batch, with each marker as wide as its image.

    All of it is on the host, where lengths become shapes and nothing waits for the device.

    Args:
        input_ids: [B, S] int64; IMAGE_TOKEN_INDEX stands for an image, VIDEO_TOKEN_INDEX for a clip. Markers in
            row-major order take the images and clips in order.
        mask: [B, S] bool, real tokens; padding may stand on either side.
        image_lengths: [N] int64, visual tokens of each image or clip.
        max_length: rows are cut after this many tokens; None cuts none.
        left: pad on the left.
        frames: [K] int64, the image or frame of each visual token, where those are the pools of a decoder method.
    """
    b, s = input_ids.shape
    is_image = is_marker(input_ids) & mask
    widths = mask.long().masked_scatter(is_image, image_lengths)
    ends = widths.cumsum(dim=1)
    row_lengths = ends[:, -1]
    kept_lengths = row_lengths if max_length is None else row_lengths.clamp(max=max_length)
    total, length = int(row_lengths.sum()), int(kept_lengths.max())

    # One entry for each token of all rows, padding left out: the place in input_ids that it comes from, its row, its
    # position in the row.
    place = torch.repeat_interleave(torch.arange(b * s), widths.flatten(), output_size=total)
    row = place // s
    position = torch.arange(total) - (row_lengths.cumsum(0) - row_lengths)[row]
    from_image = is_image.flatten()[place]
    image_number = (is_image.flatten().cumsum(0) - 1)[place].masked_fill(~from_image, -1)
    # Visual tokens appear in the order in which they lie in memory, so a running count is their index.
    source = torch.where(from_image, b * s + from_image.cumsum(0) - 1, place)

    shift = length - kept_lengths if left else torch.zeros_like(kept_lengths)
    column = position + shift[row]
    inside = position < kept_lengths[row]
    # What is cut off is written to a column of its own after the row, and dropped with it.
    target = row * (length + 1) + torch.where(inside, column, length)

    def rows(values: Tensor, fill: int) -> Tensor:
        out = torch.full((b * (length + 1),), fill, dtype=values.dtype)
        return out.index_put_((target,), values).view(b, length + 1)[:, :length]

    zero_row = b * s + int(image_lengths.sum())
    source = rows(source, zero_row)
    mask, positions, images = source != zero_row, rows(position, 0), rows(image_number, -1)
    pools = images
    if frames is not None:
        pools = torch.where(images < 0, images, frames[(source - b * s).clamp(0, max(len(frames) - 1, 0))])
    return SplicePlan(source, mask, positions, images, left, kept_lengths.tolist(), pools)


def splice(text_embeds: Tensor, visual_tokens: Tensor | None, labels: Tensor | None, plan: SplicePlan) -> Spliced:
    """Gather embeddings and labels as planned; the result is where the text's embeddings are.

    Args:
        text_embeds: [B, S, D]; what stands at markers and padding is not read.
        visual_tokens: [K, D] of all images in order; None without images.
        labels: [B, S] int64 on the host, or None.
        plan: from `plan_splice`.
    """
    d = text_embeds.shape[-1]
    parts = [text_embeds.reshape(-1, d)]
    if visual_tokens is not None:
        parts.append(visual_tokens.to(text_embeds))  # the projector may be on another device
    parts.append(text_embeds.new_zeros(1, d))
    plan = replace(plan, labels=None if labels is None else _place_labels(labels, plan))
    given = [plan.source, plan.attention_mask.long(), plan.position_ids, plan.image_index, plan.pool_index]
    if plan.labels is not None:
        given.append(plan.labels)
    source, mask, positions, images, pools, *rest = to_device(torch.stack(given), text_embeds.device)
    embeds = torch.cat(parts)[source]
    return Spliced(embeds, mask, positions, rest[0] if rest else None, images, pools, plan.left, plan=plan)


def _place_labels(labels: Tensor, plan: SplicePlan) -> Tensor:
    flat = labels.flatten()
    is_text = (plan.image_index < 0) & plan.attention_mask
    return flat[plan.source.clamp(max=flat.numel() - 1)].masked_fill(~is_text, IGNORE_INDEX)
