"""VScan: both halves against plain loops, any grid and tower, and methods beside each half."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from llava.model.language_model.staged import StagedPass
from llava.reduction import VisionFeatures, build
from llava.reduction.encoder.vscan import windows
from tests.test_model import SIZES, pictures
from tests.test_staged import LAYERS, check_batch, staged_model
from tests.tiny_models import prompt, tiny_model

CLOSE = {"atol": 1e-4, "rtol": 0}


def random_vision(grid: tuple[int, int], seed: int = 0, images: int = 2) -> VisionFeatures:
    generator = torch.Generator().manual_seed(seed)
    patches = grid[0] * grid[1]
    attention = {place: torch.rand(images, 3, patches, generator=generator) for place in ("early", "selected")}
    features, projected = (torch.randn(images, patches, width, generator=generator) for width in (6, 8))
    return VisionFeatures(features, grid=grid, attention=attention, projected=projected)


def slow_windows(grid: tuple[int, int]) -> list[list[int]]:
    """Patches of each window: lines are dealt to windows in order, as evenly as whole lines allow."""

    def lines(cells: int) -> list[list[int]]:
        parts = min(4, cells)
        cuts = [-(-cells * i // parts) for i in range(parts + 1)]
        return [list(range(a, b)) for a, b in itertools.pairwise(cuts)]

    return [[r * grid[1] + c for r in rows for c in columns] for rows in lines(grid[0]) for columns in lines(grid[1])]


def slow_vscan(vision: VisionFeatures, i: int, tokens: int) -> tuple[list[int], Tensor]:
    """Image i patch by patch in float64: the kept patches, and what they become."""
    early, overall = (vision.attention[place][i].double().mean(dim=0).tolist() for place in ("early", "selected"))
    kept: list[int] = []
    parts = slow_windows(vision.grid)
    for part in parts:
        kept += sorted(part, key=lambda p: -early[p])[: tokens // 2 // len(parts)]
    others = [p for p in range(len(early)) if p not in kept]
    kept = sorted(kept + sorted(others, key=lambda p: -overall[p])[: tokens - tokens // 2])
    projected = vision.projected[i].double()
    members: dict[int, list[int]] = {p: [p] for p in kept}
    for p in set(range(len(early))) - set(kept):
        cosines = {k: float(torch.cosine_similarity(projected[p], projected[k], dim=0)) for k in kept}
        members[max(kept, key=cosines.__getitem__)].append(p)
    return kept, torch.stack([projected[members[p]].mean(dim=0) for p in kept])


@pytest.mark.parametrize("grid", [(24, 24), (8, 12), (7, 10), (3, 5), (1, 7)], ids=str)
@pytest.mark.parametrize("tokens", [1, 9, 33, 64, 200])
def test_the_loop(grid: tuple[int, int], tokens: int) -> None:
    vision = random_vision(grid, seed=tokens)
    found = build("vscan", tokens=tokens)(vision)
    for i in range(2):
        kept, expected = slow_vscan(vision, i, tokens)
        assert found.source[i].tolist() == kept
        assert found.lengths[i] == len(kept)
        torch.testing.assert_close(found.features[i].double(), expected, atol=1e-5, rtol=0)
        assert found.assignment[i, kept].tolist() == list(range(len(kept)))


@pytest.mark.parametrize("grid", [(24, 24), (27, 27), (2, 6)], ids=str)
def test_windows_are_nearly_equal(grid: tuple[int, int]) -> None:
    window, sizes = windows(grid)
    assert sizes.tolist() == window.bincount().tolist()
    assert len(sizes) == min(4, grid[0]) * min(4, grid[1])
    assert sizes.min() >= (grid[0] // min(4, grid[0])) * (grid[1] // min(4, grid[1]))
    if grid == (24, 24):
        assert sizes.unique().tolist() == [36]
        assert window.view(24, 24)[6:12, 18:].unique().tolist() == [7]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    vision = random_vision((8, 8))
    vision.projected = vision.projected.to(dtype)
    found = build("vscan", tokens=40)(vision)
    assert found.features.dtype == dtype
    for i in range(2):
        kept, expected = slow_vscan(vision, i, 40)
        assert found.source[i].tolist() == kept
        torch.testing.assert_close(found.features[i].double(), expected, atol=1e-2, rtol=0)


def test_what_it_reads() -> None:
    assert build("vscan").needs.attention == ("early", "selected")
    assert build("vscan", local_block=-3).needs.attention == (-3, "selected")
    with pytest.raises(ValueError, match="by windows of their grid: pass projected= and grid="):
        build("vscan")(VisionFeatures(torch.zeros(1, 4, 2)))


@torch.no_grad()
def test_after_a_method_in_the_tower() -> None:
    """One that takes tokens away in the block that is read, or after it, is refused."""
    model = tiny_model()
    with pytest.raises(ValueError, match="it reads block 0 of the vision tower, in which or after which 'tome' still"):
        model.set_reduction({"tower": {"name": "tome", "tokens": 9}, "encoder": {"name": "vscan"}})


@pytest.mark.parametrize("settings", [{}, {"tower": "siglip"}, {"anyres": True}], ids=str)
@torch.no_grad()
def test_as_many_tokens_as_patches_change_nothing(settings: dict[str, Any]) -> None:
    model = tiny_model(**settings)
    given = {"images": pictures(settings.get("anyres", False)), "image_sizes": SIZES}
    tokens, counts = model.get_model().encode_images(**given, reduction={"name": "vscan", "tokens": 32})
    every, lengths = model.get_model().encode_images(**given, reduction="none")
    assert counts.tolist() == lengths.tolist()
    torch.testing.assert_close(tokens, every, **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_sample_does_not_depend_on_its_batch_without_cls(side: str) -> None:
    """Rows with several images and without any; towers with CLS are in the tests of all methods."""
    drop = {"name": "vscan_drop", "layers": [2], "keep": [3]}
    reduction = {"encoder": {"name": "vscan", "tokens": 8}, "decoder": drop}
    check_batch(staged_model(reduction=reduction, tower="siglip"), side, False)


@pytest.mark.parametrize("encoder", [None, {"name": "vscan", "tokens": 20}, {"name": "visionzip", "tokens": 9}])
@torch.no_grad()
def test_the_drop_is_pyramiddrops_with_numbers(encoder: Any) -> None:
    """The same tokens as by the ratios that give these numbers, after any method or none."""
    after = {} if encoder is None else {"encoder": encoder}
    model = staged_model(reduction={**after, "decoder": {"name": "vscan_drop", "layers": [2, 4], "keep": [6, 3]}})
    ids, image = prompt(3, "image", 5).unsqueeze(0), torch.randn(1, 3, 56, 56)
    spliced = model.splice_images(ids, images=image)
    entered = int((spliced.image_index >= 0).sum())
    results = []
    for reducer in (
        model.get_model().decoder_reducer,
        build("pyramiddrop", layers=[2, 4], ratios=[(6 + 1e-6) / entered, (3 + 1e-6) / entered]),
    ):
        staged = StagedPass(spliced.image_index, reducer=reducer)
        hidden = model.get_model()(inputs_embeds=spliced.inputs_embeds, staged=staged).last_hidden_state
        results.append((staged.kept.tolist(), hidden))
    assert results[0][0] == results[1][0]
    assert len(results[0][0][0]) == ids.shape[1] - 1 + 3
    torch.testing.assert_close(results[0][1], results[1][1], **CLOSE)


def test_fewer_tokens_than_are_kept_all_stay() -> None:
    assert build("vscan_drop", layers=[2, 4], keep=[6, 3]).layer_counts(LAYERS, 4) == [4, 4, 4, 4, 3, 3]
    assert build("vscan_drop", layers=[], keep=[]).layer_counts(LAYERS, 4) == [4] * LAYERS
    assert build("vscan_drop").layer_counts(32, 96) == [96] * 16 + [32] * 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [1, 2]}, "must be lists of one length, a number for each drop"),
        ({"layers": [1, 2], "keep": [3]}, "must be lists of one length, a number for each drop"),
        ({"layers": [2, 1], "keep": [4, 3]}, r"layers=\[2, 1\] must rise"),
        ({"layers": [1, 2], "keep": [3, 4]}, r"keep=\[3, 4\] must fall"),
    ],
)
def test_wrong_options_of_the_drop(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build("vscan_drop", **options)
