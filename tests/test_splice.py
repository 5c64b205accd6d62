"""The splice and the layout of tiles, against plain loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.mm_utils import get_anyres_image_grid_shape
from llava.model.image_layout import NEWLINE, LayoutSpec, image_layout, unpadded_box
from llava.model.splice import plan_splice, splice
from tests.tiny_models import PINPOINTS, SIDE

PAD, IMAGE = None, "image"
ROW = st.lists(st.sampled_from(["text", "text", "text", IMAGE]), min_size=1, max_size=9)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), rows=st.lists(ROW, min_size=1, max_size=4), left_in=st.booleans(), left_out=st.booleans())
def test_splice_equals_the_loop(data: st.DataObject, rows: list[list[str]], left_in: bool, left_out: bool) -> None:
    max_length = data.draw(st.one_of(st.none(), st.integers(1, 20)))
    width = max(map(len, rows)) + data.draw(st.integers(0, 2))
    ids = torch.full((len(rows), width), 9)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        start = width - len(row) if left_in else 0
        for j, kind in enumerate(row):
            ids[i, start + j] = IMAGE_TOKEN_INDEX if kind == IMAGE else 100 * i + j
            mask[i, start + j] = True
    count = sum(row.count(IMAGE) for row in rows)
    lengths = torch.tensor(data.draw(st.lists(st.integers(0, 6), min_size=count, max_size=count)), dtype=torch.long)
    text = torch.randn(len(rows), width, 3)
    visual = torch.randn(int(lengths.sum()), 3)

    expected, image, used = [], 0, 0
    for i in range(len(rows)):
        row_out = []
        for j in range(width):
            if not mask[i, j]:
                continue
            if ids[i, j] == IMAGE_TOKEN_INDEX:
                n = int(lengths[image])
                row_out += [(visual[used + k], IGNORE_INDEX, image) for k in range(n)]
                image, used = image + 1, used + n
            else:
                row_out.append((text[i, j], int(ids[i, j]), -1))
        expected.append(row_out[:max_length])

    plan = plan_splice(ids, mask, lengths, max_length, left_out)
    out = splice(text, visual, ids, plan)
    longest = max(map(len, expected))
    assert out.inputs_embeds.shape == (len(rows), longest, 3)
    assert out.labels is not None
    for i, row_out in enumerate(expected):
        place = slice(longest - len(row_out), longest) if left_out else slice(0, len(row_out))
        assert out.attention_mask[i].sum() == len(row_out)
        assert out.attention_mask[i, place].all()
        assert out.position_ids[i, place].tolist() == list(range(len(row_out)))
        if row_out:
            embeds, labels, images = zip(*row_out, strict=True)
            torch.testing.assert_close(out.inputs_embeds[i, place], torch.stack(embeds))
            assert out.labels[i, place].tolist() == list(labels)
            assert out.image_index[i, place].tolist() == list(images)
        padding = out.attention_mask[i] == 0
        assert not out.inputs_embeds[i][padding].any()
        assert (out.labels[i][padding] == IGNORE_INDEX).all()
        assert (out.image_index[i][padding] == -1).all()


GRID = (3, 4)


def spec(merge_type: str) -> LayoutSpec:
    return LayoutSpec(merge_type, GRID, SIDE, PINPOINTS)


def slow_layout(source: torch.Tensor, mask: torch.Tensor, size: tuple[int, int], merge_type: str) -> list[int]:
    """The layout's rule, written as loops over rows and columns."""
    t, m = source.shape
    numbers = torch.arange(t * m).view(t, m).tolist()
    if merge_type == "flat":
        return [numbers[i][j] for i in range(t) for j in range(m) if mask[i, j]]
    out = [numbers[0][j] for j in range(m) if mask[0, j]]
    unpad = merge_type == "spatial_unpad"
    if t == 1:
        return [*out, NEWLINE] if unpad else out
    columns, rows = get_anyres_image_grid_shape(size, PINPOINTS, SIDE)
    h, w = GRID
    top, bottom, left, right = unpadded_box(columns * w, rows * h, size) if unpad else (0, rows * h, 0, columns * w)
    for y in range(top, bottom):
        line = []
        for x in range(left, right):
            tile = 1 + y // h * columns + x // w
            patch = y % h * w + x % w
            line += [numbers[tile][j] for j in range(m) if mask[tile, j] and source[tile, j] == patch]
        out += [*line, NEWLINE] if unpad and (line or left == right) else line
    aggregates = [numbers[i][j] for i in range(1, t) for j in range(m) if mask[i, j] and source[i, j] == -1]
    return [*out, *aggregates, NEWLINE] if aggregates and unpad else [*out, *aggregates]


@settings(max_examples=100, deadline=None)
@given(
    size=st.tuples(st.integers(1, 400), st.integers(1, 400)),
    merge_type=st.sampled_from(["flat", "spatial", "spatial_unpad"]),
    kept=st.integers(1, 12),
    single=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_layout_equals_the_loop(size: tuple[int, int], merge_type: str, kept: int, single: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    columns, rows = get_anyres_image_grid_shape(size, PINPOINTS, SIDE)
    tiles = 1 if single else 1 + columns * rows
    patches = GRID[0] * GRID[1]
    order = torch.rand(tiles, patches, generator=generator).argsort(dim=1)[:, :kept]
    counts = torch.randint(1, kept + 1, (tiles, 1), generator=generator)
    slot = torch.arange(kept + 1)
    mask = slot <= counts
    source = torch.nn.functional.pad(order, (0, 1), value=-1).masked_fill(slot >= counts, -1)
    assert image_layout(source, mask, size, spec(merge_type)).tolist() == slow_layout(source, mask, size, merge_type)


def test_unknown_merge_type() -> None:
    with pytest.raises(ValueError, match="mm_patch_merge_type='mosaic': choose one of flat, spatial"):
        spec("mosaic")
