"""Methods in the projector that are trained for several numbers of tokens at once, of which inference chooses one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from llava.constants import IGNORE_INDEX
from llava.reduction import ReductionConfig, VisionFeatures, build
from llava.train.settings.legacy import translate_legacy
from tests.test_model import ROWS, SIZES, pictures
from tests.tiny_models import pad, tiny_model

SCALES = [1, 4, 16]


def training_batch(anyres: bool = False) -> dict[str, Any]:
    """The rows of tests/test_model.py, of which the last half is learnt."""
    ids, mask = pad(ROWS, "right")
    labels = ids.masked_fill((ids < 0) | ~mask.bool(), IGNORE_INDEX)
    labels[:, : ids.shape[1] // 3] = IGNORE_INDEX
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
        "images": pictures(anyres),
        "image_sizes": SIZES,
    }


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("anyres", [False, True])
def test_m3_trains_the_mean_of_its_scales(anyres: bool, packed: bool) -> None:
    """One pass of the vision tower gives the loss and the gradients of a whole forward pass for each scale."""
    model = tiny_model(anyres=anyres, reduction={"name": "m3", "scales": SCALES}, attn_implementation="packed_sdpa")
    model.train().requires_grad_(True)
    batch = {**training_batch(anyres), "packed": packed}
    passes = [model(**batch, reduction={"name": "m3", "tokens": scale}) for scale in SCALES]
    mean = torch.stack([output.loss for output in passes]).mean()
    expected = gradients(model, mean)
    tower = model.get_vision_tower()
    with mock.patch.object(tower, "forward", wraps=tower.forward) as encoded:
        output = model(**batch)
    assert encoded.call_count == 1
    torch.testing.assert_close(output.loss, mean)
    found = gradients(model, output.loss)
    assert found.keys() == expected.keys()
    assert any("vision_tower" in name for name in found)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4)
    tokens, images = output.counts[0], output.counts[4]
    assert tokens == sum(int(one.counts[0]) for one in passes)
    assert images == passes[0].counts[4] == len(SIZES)


def test_m3_of_a_batch_without_images() -> None:
    """The tower runs once for its blank picture, as on ranks that have some."""
    model = tiny_model(reduction={"name": "m3", "scales": SCALES}).train().requires_grad_(True)
    batch = {key: value[2:3] for key, value in training_batch().items() if key not in ("images", "image_sizes")}
    tower = model.get_vision_tower()
    with mock.patch.object(tower, "forward", wraps=tower.forward) as encoded:
        loss = model(**batch).loss
    assert encoded.call_count == 1
    assert gradients(model, loss)["model.mm_projector.0.weight"].abs().sum() == 0


def test_m3_at_inference_is_chosen_by_the_call() -> None:
    model = tiny_model(reduction={"name": "m3", "scales": SCALES})
    image = [pictures(False)[0]]
    for tokens in SCALES:
        reduction = {"name": "m3", "tokens": tokens}
        assert model.count_visual_tokens(image, reduction=reduction) == [(16, tokens)]
    assert model.count_visual_tokens(image) == model.count_visual_tokens(image, reduction="none") == [(16, 16)]


def test_m3_pools_what_the_projector_gives() -> None:
    """By a plain loop over cells."""
    vision = VisionFeatures(torch.randn(2, 24, 6), grid=(4, 6))
    projector = torch.nn.Linear(6, 5)
    tokens = build("m3", tokens=6)(vision, projector)
    projected = projector(vision.features).view(2, 4, 6, 5)
    for cell in range(6):
        row, column = 2 * (cell // 3), 2 * (cell % 3)
        mean = projected[:, row : row + 2, column : column + 2].mean(dim=(1, 2))
        torch.testing.assert_close(tokens.features[:, cell], mean)
    assert tokens.grid == (2, 3)


def test_m3_scales_of_any_grid() -> None:
    """By default those of the release, as far as the grid has them."""
    method = build("m3")
    assert sorted(one.token_count((24, 24)) for one in method.in_training((24, 24), 0)) == [1, 9, 36, 144, 576]
    assert sorted(one.token_count((4, 4)) for one in method.in_training((4, 4), 0)) == [1, 4, 16]
    assert [one.tokens for one in build("m3", tokens=9).in_training((24, 24), 0)] == [9]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 100}, "24 x 24 patches can't be pooled to 100 tokens; choose among 1, 4, 9, 16, 36, 64, 144, 576"),
        ({"scales": [1, 100]}, "can't be pooled to 100 tokens"),
    ],
)
def test_m3_refuses_other_numbers(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build("m3", **options).token_count((24, 24))
    with pytest.raises(ValueError, match="must be a list of different numbers"):
        build("m3", scales=[4, 4])


@pytest.mark.parametrize(
    ("value", "method"),
    [
        ([1, 9, 36, 144, 576], {"name": "m3", "scales": [1, 9, 36, 144, 576]}),
        ("1,9,36", {"name": "m3", "scales": [1, 9, 36]}),
        (36, {"name": "m3", "tokens": 36}),
        ("36", {"name": "m3", "tokens": 36}),
        (None, {}),
    ],
)
def test_the_key_of_m3s_release(value: Any, method: dict[str, Any]) -> None:
    config = SimpleNamespace(matryoshka_vis_token_scale=value)
    assert ReductionConfig.of_model(config).projector == method


def test_the_flag_of_m3s_release() -> None:
    (flag,) = translate_legacy(["--matryoshka_vis_token_scale", "1,9,36"], known=["reduction"])
    assert ReductionConfig.parse(flag.partition("=")[2]).projector == {"name": "m3", "scales": [1, 9, 36]}
    with pytest.raises(ValueError, match="matryoshka_vis_token_scale='many': expected numbers of tokens"):
        translate_legacy(["--matryoshka_vis_token_scale", "many"], known=["reduction"])
