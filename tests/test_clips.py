"""Clips in a batch: frames beside images, every method on them, alone and with others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llava.model.image_inputs import Clip
from llava.model.language_model.staged import StagedPass
from llava.reduction import available, build
from llava.reduction.base import EncoderReducer
from llava.reduction.registry import method_class
from tests.methods_table import NAMES, model_that_suits, runs
from tests.tiny_models import pad, prompt, tiny_model
from tests.tiny_world import SIDE

PATCHES = (SIDE // 8) ** 2
OPTIONS = {"none": {}, **{name: {k: v for k, v in runs(name)[0].items() if k != "name"} for name in NAMES}}
ROWS = {
    "alike": [prompt(3, "clip", 4, seed=i) for i in range(2)],
    "mixed": [prompt("image", 3, "clip", 2), prompt(4), prompt(1, "clip", "clip", 6), prompt("image", 2)],
}
FRAMES = [3, 2, 4]
TEXTS = ["a red bus turns", "no image here", "something quite different", "what"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return model_that_suits(tmp_path_factory.mktemp("world")).eval()


def use(model: Any, name: str, **more: Any) -> None:
    model.set_reduction("none")
    if name != "none":
        model.set_reduction({"name": name, **OPTIONS[name], **more})


def inputs_of(rows: list[torch.Tensor]) -> list[dict[str, Any]]:
    """Keyword arguments of each row by itself."""
    generator, frames, single = torch.Generator().manual_seed(1), iter(FRAMES), []
    for row, text in zip(rows, TEXTS, strict=False):
        images = torch.randn(int((row == -200).sum()), 3, SIDE, SIDE, generator=generator)
        clips = [torch.randn(next(frames), 3, SIDE, SIDE, generator=generator) for _ in range(int((row == -201).sum()))]
        single.append({"input_ids": row.unsqueeze(0), "images": list(images), "videos": clips, "texts": [text]})
    return single


def batch_of(single: list[dict[str, Any]], side: str = "right") -> dict[str, Any]:
    ids, mask = pad([one["input_ids"][0] for one in single], side)
    every = {name: [part for one in single for part in one[name]] for name in ("images", "videos", "texts")}
    return {"input_ids": ids, "attention_mask": mask, **every}


def joint_methods() -> list[str]:
    return [name for name in available()["encoder"] if method_class(name).ranks_frames]


def check_alone_and_together(model: Any, rows: str, side: str) -> None:
    single = inputs_of(ROWS[rows])
    batch = batch_of(single, side)
    ask = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    logits = model(**batch).logits
    tokens = model.generate(batch.pop("input_ids"), **batch, **ask)
    for i, one in enumerate(single):
        alone = model(**one).logits[0]
        own = logits[i, -len(alone) :] if side == "left" else logits[i, : len(alone)]
        torch.testing.assert_close(own, alone, atol=1e-4, rtol=0)
        assert tokens[i].tolist() == model.generate(one.pop("input_ids"), **one, **ask)[0].tolist()


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(("rows", "side"), [("alike", "right"), ("mixed", "right"), ("mixed", "left")])
@torch.no_grad()
def test_a_sample_is_the_same_alone_and_in_a_batch(model: Any, rows: str, side: str, name: str) -> None:
    use(model, name)
    check_alone_and_together(model, rows, side)


@pytest.mark.parametrize("name", joint_methods())
@torch.no_grad()
def test_frames_ranked_together_alone_and_in_a_batch(model: Any, name: str) -> None:
    use(model, name, frames="joint")
    check_alone_and_together(model, "mixed", "right")


@pytest.mark.parametrize(("name", "half"), [("pyramiddrop", {"ratios": [0.5]}), ("fastv", {"ratio": 0.5})])
@torch.no_grad()
def test_frames_that_compete_for_themselves(model: Any, name: str, half: dict[str, Any]) -> None:
    """Of each frame as many tokens stay, where a clip as a whole may lose all of one."""
    use(model, name, pool="frame", **half)
    check_alone_and_together(model, "mixed", "left")
    one = inputs_of([prompt(2, "clip", 3)])[0]
    spliced = model.splice_images(one["input_ids"], videos=one["videos"])
    staged = StagedPass(spliced.pool_index, reducer=model.get_model().decoder_reducer, plan=spliced.plan)
    model.get_model()(inputs_embeds=spliced.inputs_embeds, attention_mask=spliced.attention_mask, staged=staged)
    kept = spliced.pool_index[0, staged.kept[0]]
    assert torch.bincount(kept[kept >= 0]).tolist() == [PATCHES // 2] * FRAMES[0]


@torch.no_grad()
def test_the_padding_of_a_picture_beside_a_clip(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told from the picture whether or not the batch has clips."""
    use(model, "mmtok", tokens=6)
    monkeypatch.setattr(model.config, "image_aspect_ratio", "pad", raising=False)
    picture, clip = torch.randn(3, SIDE, SIDE), Clip(torch.randn(3, 3, SIDE, SIDE))
    inner = model.get_model()
    alone = inner.encode_pictures([picture], [(60, 20)], ["red"])
    unpadded = inner.encode_pictures([picture], None, ["red"])
    assert not torch.allclose(alone.tokens, unpadded.tokens, atol=1e-4)
    both = inner.encode_pictures([clip, picture], [(SIDE, SIDE), (60, 20)], ["a bus", "red"])
    torch.testing.assert_close(both.tokens[-6:], alone.tokens, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_clip_is_its_frames_in_order(model: Any) -> None:
    """One marker for a clip and one for each frame give the same rows."""
    use(model, "none")
    clip = torch.randn(3, 3, SIDE, SIDE)
    as_clip = model(input_ids=prompt(2, "clip", 3).unsqueeze(0), videos=[clip]).logits
    as_images = model(input_ids=prompt(2, "image", "image", "image", 3).unsqueeze(0), images=clip).logits
    assert as_clip.shape[1] == 1 + 2 + 3 * PATCHES + 3
    torch.testing.assert_close(as_clip, as_images)
    stacked = model(input_ids=prompt(2, "clip", 3).unsqueeze(0), videos=clip.unsqueeze(0)).logits
    torch.testing.assert_close(stacked, as_clip)


@pytest.mark.parametrize("name", joint_methods())
@torch.no_grad()
def test_frames_ranked_together_are_one_large_picture(model: Any, name: str) -> None:
    """A plain concatenation of the frames' features gives the same tokens; the budget is a frame's, times frames."""
    use(
        model, name, frames="joint", **({} if "ratio" in OPTIONS[name] or "tokens" in OPTIONS[name] else {"ratio": 0.3})
    )
    inner = model.get_model()
    reducers, clip = inner.reducers(), torch.randn(3, 3, SIDE, SIDE)
    texts = ["a red bus"] if reducers.read_text else None
    encoded = inner.encode_pictures([Clip(clip)], texts=texts)
    beside = inner._beside(texts, [3], [True], None, reducers)
    assert isinstance(reducers.encoder, EncoderReducer)
    method = reducers.encoder
    seen = method.measured(inner._see(clip, reducers, [3]))
    for key, value in beside.items():
        setattr(seen, key, value)
    if reducers.needs.projected:
        seen.projected = inner.mm_projector(seen.features)

    def one(value: torch.Tensor | None) -> torch.Tensor | None:
        return None if value is None else value[:, value.shape[1] - PATCHES :].reshape(1, 3 * PATCHES, -1)

    joined = type(seen)(
        one(seen.features),
        keys=one(seen.keys),
        num_heads=seen.num_heads,
        attention={k: torch.cat(list(v), dim=1).unsqueeze(0) / 3 for k, v in seen.attention.items()},
        hidden_states={k: one(v) for k, v in seen.hidden_states.items()},
        patch_embeds=one(seen.patch_embeds),
        projected=one(seen.projected),
        text=None if seen.text is None else seen.text[:1],
        text_mask=None if seen.text_mask is None else seen.text_mask[:1],
    )
    tokens = method.for_frames(3)(joined)
    expected = tokens.features[0] if reducers.needs.projected else inner.mm_projector(tokens.features[0])
    torch.testing.assert_close(encoded.tokens, expected, atol=1e-5, rtol=0)
    assert int(tokens.source.max()) >= PATCHES  # of a later frame


@torch.no_grad()
def test_frames_of_a_smaller_picture_ranked_together(model: Any) -> None:
    """A token's number counts the patches of the smaller frames, and its frame follows from it."""
    tower = {"name": "resize", "tokens": 4}
    encoder = {"name": "fastervlm", "tokens": 2, "frames": "joint"}
    model.set_reduction(
        {"tower": tower, "encoder": encoder, "decoder": {"name": "fastv", "tokens": 1, "pool": "frame"}}
    )
    inner, clip = model.get_model(), torch.randn(3, 3, SIDE, SIDE)
    source = inner.read_tiles(clip, None, inner.reducers(), [3]).source[0]
    assert len(set((source // 4).tolist())) > 1
    assert inner.encode_pictures([Clip(clip)]).frames.tolist() == (source // 4).tolist()


@torch.no_grad()
def test_tiles_beside_frames_ranked_together() -> None:
    """Tokens of a picture's tiles are laid out on the grid of the smaller tiles, whatever else is in the batch."""
    model = tiny_model(anyres=True)
    model.set_reduction(
        {"tower": {"name": "resize", "tokens": 4}, "encoder": {"name": "fastervlm", "tokens": 3, "frames": "joint"}}
    )
    side = model.get_vision_tower().image_size
    picture, clip = torch.randn(3, 3, side, side), Clip(torch.randn(2, 3, side, side))
    inner, size = model.get_model(), (2 * side, side)
    alone = inner.encode_pictures([picture], [size])
    together = inner.encode_pictures([picture, clip], [size, (side, side)])
    assert together.lengths[0] == alone.lengths[0]
    torch.testing.assert_close(together.tokens[: len(alone.tokens)], alone.tokens)


@torch.no_grad()
def test_counts_of_clips_come_after_those_of_images(model: Any) -> None:
    use(model, "spatial", rows=2, columns=2)
    clip, image = torch.randn(3, 3, SIDE, SIDE), torch.randn(1, 3, SIDE, SIDE)
    assert model.count_visual_tokens(image, videos=[clip]) == [(PATCHES, 4), (3 * PATCHES, 12)]


@pytest.mark.parametrize("name", OPTIONS)
def test_training_with_clips(model: Any, name: str) -> None:
    """Gradients of a batch with clips, images and text; adaptive counts differ by frame."""
    use(model, name)
    model.train()
    batch = batch_of(inputs_of(ROWS["mixed"]))
    labels = batch["input_ids"].masked_fill((batch["attention_mask"] == 0) | (batch["input_ids"] < 0), -100)
    output = model(**batch, labels=labels)
    output.loss.backward()
    assert output.loss.isfinite()
    for module in model.get_model().projector_modules().values():
        learnt = [weight for weight in module.parameters() if weight.requires_grad]
        assert sum(float(weight.grad.abs().sum()) for weight in learnt) > 0
    if name != "m3":  # whose counts are sums over its scales
        assert int(output.counts[4]) == 5  # images and clips
        assert int(output.counts[7]) == 2 + sum(FRAMES)  # pictures for the tower
    model.eval()
    model.zero_grad()


CLIP = torch.zeros(2, 3, SIDE, SIDE)
WRONG = [
    ({"videos": []}, "1 clip markers .sample 0: 1. but 0 videos"),
    ({"videos": [CLIP, CLIP]}, "1 clip markers .sample 0: 1. but 2 videos"),
    ({"videos": CLIP}, r"videos of shape \(2, 3, 32, 32\): expected \[N, F, 3, H, W\]"),
    ({"videos": [CLIP[0]]}, r"video 0 is .*expected float pixels \[F, 3, H, W\]"),
    ({"videos": [CLIP[:0]]}, r"video 0 is .*expected float pixels"),
    ({"videos": [CLIP[..., :16]]}, "video 0 has shape .* reads 32 x 32 pixels"),
    ({"videos": [CLIP + torch.nan]}, "video 0: NaN or infinity"),
    ({"videos": "clip.mp4"}, "videos are str .*process_video"),
]


@pytest.mark.parametrize(("given", "said"), WRONG)
def test_clips_that_do_not_fit(model: Any, given: dict[str, Any], said: str) -> None:
    use(model, "none")
    with pytest.raises(ValueError, match=said):
        model(input_ids=prompt(2, "clip", 3).unsqueeze(0), **given)


def test_a_method_that_needs_a_grid_takes_frames_one_by_one() -> None:
    with pytest.raises(ValueError, match="method 'spatial': it works on one picture at a time"):
        build("spatial", tokens=4, frames="joint")
