"""MMTok: against a plain loop, and the way of words and padding from a call to the reducer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from llava.model.image_layout import padded_patches
from llava.reduction import VisionFeatures, build
from tests.test_model import SIZES, pictures
from tests.tiny_models import SIDE, pad, prompt, tiny_model
from tests.tiny_world import make_tiny_world

GRID = (4, 4)
ROWS = [prompt("image", 3, "image", 2), prompt(4), prompt(1, "image", 6)]
TEXTS = ["is there a red bus", "no image here", "count something quite different"]


def random_vision(patches: int, words: list[int], padding: list[int], seed: int) -> VisionFeatures:
    """Of an image for each number of words and of padded patches."""
    generator = torch.Generator().manual_seed(seed)
    n, most = len(words), max(words)
    return VisionFeatures(
        torch.randn(n, patches, 6, generator=generator),
        projected=torch.randn(n, patches, 8, generator=generator),
        text=torch.randn(n, most, 8, generator=generator),
        text_mask=torch.arange(most) < torch.tensor(words).unsqueeze(1),
        padding=torch.arange(patches) < torch.tensor(padding).unsqueeze(1),
    )


def slow_mmtok(vision: VisionFeatures, i: int, tokens: int) -> list[int]:
    """Image i, row by row in float64: the kept patches in raster order."""

    def softmax_of_cosines(a: Tensor, others: Tensor, temperature: float) -> Tensor:
        cosines = [float(a @ b / (a.norm() * b.norm())) for b in others.double()]
        return (torch.tensor(cosines, dtype=torch.float64) / temperature).softmax(dim=0)

    words = vision.text[i][vision.text_mask[i]].double()
    rows = [softmax_of_cosines(word, vision.projected[i], 0.02) / len(words) for word in words]
    patches = vision.features[i].double()
    rows += [0.5 * softmax_of_cosines(patch, patches, 0.2) / len(patches) for patch in patches]
    chosen: list[int] = []
    shown = [p for p in range(len(patches)) if not vision.padding[i, p]]
    for _ in range(min(tokens, len(patches))):
        left = [p for p in shown if p not in chosen] or [p for p in range(len(patches)) if p not in chosen]
        best = [max([0.0, *(float(row[c]) for c in chosen)]) for row in rows]
        gains = {p: sum(max(0.0, float(row[p]) - b) for row, b in zip(rows, best, strict=True)) for p in left}
        chosen.append(max(left, key=gains.__getitem__))
    return sorted(chosen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [1, 5, 12, 20])
def test_the_loop(tokens: int, dtype: torch.dtype) -> None:
    """Words differ in number from image to image, and so does the padding, which the last images need."""
    vision = random_vision(16, [3, 1, 5, 2], [0, 4, 8, 13], seed=tokens)
    for name in ("features", "projected", "text"):
        setattr(vision, name, getattr(vision, name).to(dtype))
    found = build("mmtok", tokens=tokens)(vision)
    assert found.features.dtype == dtype
    for i in range(4):
        kept = slow_mmtok(vision, i, tokens)
        assert found.source[i].tolist() == kept
        assert found.features[i].equal(vision.projected[i, kept])


def test_words_that_are_padding_change_nothing() -> None:
    vision = random_vision(16, [3, 1], [0, 4], seed=0)
    reducer = build("mmtok", tokens=6)
    kept = reducer(vision).source
    vision.text[1, 1:] = 100.0
    assert reducer(vision).source.equal(kept)
    alone = VisionFeatures(vision.features[1:], projected=vision.projected[1:], text=vision.text[1:, :1])
    alone.padding = vision.padding[1:]
    assert reducer(alone).source.equal(kept[1:])


@pytest.mark.parametrize(
    ("question", "words"),
    [
        ("What is in the image?\nAnswer the question using a single word or phrase.", ["in", "image"]),
        (
            "Is the dog's ball red?\nAnswer with the option's letter from the given choices directly.",
            ["dog", "s", "ball", "red"],
        ),
        ("Where is it?", ["Where", "is", "it?"]),
        ("", []),
    ],
)
def test_words_of_a_question(question: str, words: list[str]) -> None:
    assert build("mmtok").phrases(question) == words


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(make_tiny_world(tmp_path_factory.mktemp("world")).llm)


def reading_model(tokenizer: Any, reduction: Any = None, **settings: Any) -> Any:
    model = tiny_model(vocab_size=len(tokenizer), **settings)
    model.tokenizer = tokenizer
    model.set_reduction(reduction or {"name": "mmtok", "tokens": 5})
    return model


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("settings", [{}, {"tower": "siglip"}, {"anyres": True}], ids=str)
@torch.no_grad()
def test_a_sample_is_asked_its_own_question(tokenizer: Any, settings: dict[str, Any], side: str) -> None:
    model = reading_model(tokenizer, **settings)
    images = pictures(settings.get("anyres", False))[:3]
    ids, mask = pad(ROWS, side)
    sizes = SIZES[:3]
    logits = model(input_ids=ids, attention_mask=mask, images=images, image_sizes=sizes, texts=TEXTS).logits
    kept = 0
    for i, own in ((0, slice(0, 2)), (2, slice(2, 3))):
        one = {"input_ids": ROWS[i][None], "images": images[own], "image_sizes": sizes[own]}
        alone = model(**one, texts=[TEXTS[i]]).logits[0]
        place = slice(-len(alone), None) if side == "left" else slice(len(alone))
        torch.testing.assert_close(logits[i, place], alone, atol=1e-4, rtol=0)
        others = [model(**one, texts=[text]).logits[0] for text in ("zebra", "9 8 7")]
        kept += any(len(other) != len(alone) or (other - alone).abs().max() > 1e-3 for other in others)
    assert kept


@pytest.mark.parametrize(
    "reduction",
    [
        {"name": "mmtok", "tokens": 6},
        {"tower": {"name": "tome", "tokens": 12}, "encoder": {"name": "mmtok", "tokens": 4}},
    ],
    ids=["alone", "after tome"],
)
@torch.no_grad()
def test_no_patch_of_the_padding(tokenizer: Any, reduction: Any) -> None:
    """Known where pictures are padded and their sizes are given, also of the tokens that a method in the tower left."""
    model = reading_model(tokenizer, reduction)
    inner, images = model.get_model(), [*torch.randn(2, 3, SIDE, SIDE)]
    sizes = [(2 * SIDE, SIDE), (SIDE, 2 * SIDE)]
    read = {}
    original = inner.read_tiles
    inner.read_tiles = lambda *args, **kwargs: read.setdefault("tokens", original(*args, **kwargs))
    inner.encode_images(images, sizes, TEXTS[:2])
    for i, size in enumerate(sizes):
        padding = padded_patches(size, SIDE, GRID)
        assert int(padding.sum()) == 8
        assert not padding[read["tokens"].source[i]].any()
    assert "padding" not in inner._beside(TEXTS[:2], [1, 1], [False, False], None, inner.reducers())
    model.config.image_aspect_ratio = "anyres"
    assert "padding" not in inner._beside(TEXTS[:2], [1, 1], [False, False], sizes, inner.reducers())


def test_the_padding_of_a_picture_beside_a_clip(tokenizer: Any) -> None:
    """What is known of a picture does not depend on its neighbours; frames have no padding."""
    inner = reading_model(tokenizer).get_model()
    size = (2 * SIDE, SIDE)
    padding = inner._beside(TEXTS[:2], [1, 3], [False, True], [size, (SIDE, SIDE)], inner.reducers())["padding"]
    assert padding[0].equal(padded_patches(size, SIDE, GRID))
    assert padding.shape == (4, 16)
    assert not padding[1:].any()


def test_a_batch_without_images_learns(tokenizer: Any) -> None:
    model = reading_model(tokenizer).train()
    model(input_ids=ROWS[1][None], labels=ROWS[1][None]).loss.backward()
    assert model.get_model().mm_projector[0].weight.grad is not None


def test_without_a_question(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"pass projected= and text= \[N, S, D\], or call the model with texts="):
        build("mmtok")(VisionFeatures(torch.zeros(1, 4, 2)))
    model = reading_model(tokenizer)
    model.tokenizer = None
    one = {"input_ids": ROWS[2][None], "images": torch.randn(1, 3, SIDE, SIDE)}
    with pytest.raises(ValueError, match=r"reads the prompt's text: pass texts="):
        model(**one)
    with pytest.raises(ValueError, match="reads the words of the question: open the model with load_pretrained_model"):
        model(**one, texts=["a bus"])
