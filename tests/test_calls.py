"""What one call may be given: a method of its own, and arguments that are refused with a reason."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch

from llava.reduction import ReductionConfig, VisionFeatures
from tests.test_model import ROWS, SIZES, pictures
from tests.tiny_models import SIDE, pad, prompt, tiny_model

FASTV = {"name": "fastv", "layer": 1, "ratio": 0.6}
METHODS: tuple[Any, ...] = (
    "none",
    "prumerge",
    {"name": "prumerge_plus", "ratio": 0.25},
    FASTV,
    {"encoder": {"name": "spatial", "rows": 2, "columns": 3}, "decoder": {**FASTV, "layer": 2}},
)
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}


def batch(side: str = "left") -> dict[str, Any]:
    ids, mask = pad(ROWS, side)
    return {"input_ids": ids, "attention_mask": mask, "images": pictures(False), "image_sizes": SIZES}


@pytest.mark.parametrize("own", [None, FASTV, "prumerge"], ids=str)
@torch.no_grad()
def test_a_method_for_one_call(own: Any) -> None:
    model, other = tiny_model(), tiny_model()
    model.set_reduction(own)
    before = model(**batch()).logits
    for method in METHODS:
        other.set_reduction(method)
        torch.testing.assert_close(model(**batch(), reduction=method).logits, other(**batch()).logits)
        for beams in (1, 2):
            tokens = model.generate(**batch(), reduction=method, num_beams=beams, **GREEDY)
            assert tokens.tolist() == other.generate(**batch(), num_beams=beams, **GREEDY).tolist()
        counts = other.count_visual_tokens(pictures(False), SIZES)
        assert model.count_visual_tokens(pictures(False), SIZES, reduction=method) == counts
    assert torch.equal(model(**batch()).logits, before)


@torch.no_grad()
def test_threads_with_methods_of_their_own_do_not_meet() -> None:
    model = tiny_model(num_hidden_layers=4)

    def answers(method: Any, start: Barrier | None = None) -> list[list[int]]:
        with torch.no_grad():  # the mode is a thread's own
            if start is not None:
                start.wait()
            return [model.generate(**batch(), reduction=method, **GREEDY).tolist() for _ in range(3)]

    alone = [answers(method) for method in METHODS]
    start = Barrier(len(METHODS))
    with ThreadPoolExecutor(len(METHODS)) as pool:
        together = list(pool.map(lambda method: answers(method, start), METHODS))
    assert together == alone
    assert len({str(tokens) for tokens in alone}) > 2


def test_a_method_that_needs_other_weights_than_there_are() -> None:
    model = tiny_model()
    for method in ("token_concat", {"name": "stf", "mbtf": 2}):
        with pytest.raises(ValueError, match="needs another projector than this checkpoint has"):
            model.generate(**batch(), reduction=method)
    with pytest.raises(ValueError, match=r"without CLIP's text tower: open it with load_pretrained_model\(.*'trim'"):
        model(**batch(), reduction="trim")
    with pytest.raises(ValueError, match="unknown reduction method 'prune'"):
        model(**batch(), reduction="prune")
    with pytest.raises(ValueError, match="choose from 1 to 2"):
        model(**batch(), reduction={**FASTV, "layer": 7})
    model.set_reduction({"name": "stf", "mbtf": 2})
    with pytest.raises(ValueError, match=r"trained with reduction=\{'projector': \{'name': 'stf'"):
        model(**batch(), reduction="none")
    model(**batch(), reduction=FASTV)  # keeps the projector's method
    assert model.config.reduction == {"projector": {"name": "stf", "mbtf": 2}}


def test_a_picture_without_a_marker_is_refused() -> None:
    model = tiny_model()
    ids = prompt(5).unsqueeze(0)
    image = [pictures(False)[0]]
    with pytest.raises(ValueError, match="1 images were given, but the ids hold 0 image markers"):
        model.generate(ids, images=image, **GREEDY)
    with pytest.raises(ValueError, match="an image without a marker would not be seen"):
        model(input_ids=ids, images=image)
    with pytest.raises(ValueError, match="or inputs_embeds; not both"):
        model.generate(inputs_embeds=torch.zeros(1, 4, 48), images=image, **GREEDY)
    with pytest.raises(ValueError, match="images enter with input_ids"):
        model(inputs_embeds=torch.zeros(1, 4, 48), images=image)
    blank = [torch.zeros(3, SIDE, SIDE)]  # LLaVA's collator sends one for a text-only sample
    assert model.generate(ids, images=blank, **GREEDY).tolist() == model.generate(ids, **GREEDY).tolist()


def with_value(values: torch.Tensor, value: float) -> torch.Tensor:
    """A copy whose last element is `value`."""
    changed = values.clone()
    changed[(-1,) * changed.ndim] = value
    return changed


IDS, MASK = pad(ROWS, "left")
PIXELS = torch.stack(pictures(False))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": IDS[0]}, r"input_ids are a tensor of int64 with shape \[\d+\] on cpu: expected a tensor"),
        ({"input_ids": IDS.float()}, "input_ids are a tensor of float32"),
        ({"input_ids": IDS[:, :0]}, "expected at least one token"),
        ({"input_ids": IDS.tolist()}, "input_ids are list"),
        ({"input_ids": IDS.to("meta")}, "on meta: expected a tensor"),
        ({"input_ids": with_value(IDS, -5)}, r"sample 4 hold -5: expected ids from 0 to 95 .*, or -200 where an image"),
        ({"input_ids": with_value(IDS, 96)}, "sample 4 hold 96: expected ids from 0 to 95"),
        ({"attention_mask": MASK[:, 1:]}, r"attention_mask is a tensor .*: expected what input_ids are, a tensor of"),
        ({"attention_mask": MASK.tolist()}, "attention_mask is list"),
        ({"images": PIXELS.to(torch.uint8)}, "image 0 is a tensor of uint8 .*: expected float pixels"),
        ({"images": [*PIXELS[:4], with_value(PIXELS[4], torch.nan)]}, "image 4: NaN or infinity"),
        ({"images": [with_value(PIXELS[0], torch.inf), *PIXELS[1:]]}, "image 0: NaN or infinity"),
        ({"images": [image.numpy() for image in PIXELS]}, "image 0 is ndarray .*: expected float pixels"),
        ({"images": PIXELS[:, :, 1:]}, r"image 0 has shape \(3, 55, 56\): the vision tower reads 56 x 56 pixels"),
        ({"images": "a.png"}, "images are str 'a.png': expected what llava.mm_utils.process_images returns"),
        ({"image_sizes": SIZES[0]}, r"image_sizes are tuple \(60, 60\): expected one pair \(width, height\)"),
        ({"image_sizes": [(0, 5)] * 5}, "a picture is at least 1 pixel wide and high"),
        ({"texts": "abcde"}, "texts are str 'abcde': expected a list of strings, one for each sample"),
        ({"past_key_values": ()}, "past_key_values is tuple .*: expected the cache"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_wrong_arguments_are_refused(change: dict[str, Any], message: str) -> None:
    model = tiny_model()
    inputs = {"input_ids": IDS, "attention_mask": MASK, "images": PIXELS, **change}
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=message):
            call(**inputs)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (IDS[:, 1:], "labels is a tensor .*: expected what input_ids are"),
        (IDS.float(), "labels are a tensor of float32 .*: expected int64, -100 where nothing is learnt"),
        (with_value(IDS.clamp(min=0), 96), "labels of sample 4 hold 96: expected ids from 0 to 95"),
        (with_value(IDS.clamp(min=0), -5), "labels of sample 4 hold -5: .*, or -100 where nothing is learnt"),
    ],
)
def test_wrong_labels_are_refused_in_training_too(labels: torch.Tensor, message: str) -> None:
    model = tiny_model().train()
    with pytest.raises(ValueError, match=message):
        model(input_ids=IDS, attention_mask=MASK, images=PIXELS, labels=labels)


def test_training_does_not_read_pixels() -> None:
    """Reading them on the host would wait for the device in every step; a NaN shows in the loss."""
    model = tiny_model().train()
    images = [*PIXELS[:4], with_value(PIXELS[4], torch.nan)]
    labels = IDS.masked_fill(IDS < 0, -100)
    loss = model(input_ids=IDS, attention_mask=MASK, images=images, labels=labels).loss
    assert loss.isnan()


def test_padding_may_hold_anything() -> None:
    model = tiny_model()
    ids = IDS.masked_fill(MASK == 0, -100)
    expected = model(input_ids=IDS, attention_mask=MASK, images=PIXELS).logits
    assert torch.equal(model(input_ids=ids, attention_mask=MASK, images=PIXELS).logits, expected)


N, P, C = 2, 16, 8
FEATURES = torch.zeros(N, P, C)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"features": None}, r"features is NoneType: expected a float tensor \[N, P, C\]"),
        ({"features": FEATURES[0]}, r"features is torch.float32 of shape \[16, 8\]"),
        ({"features": FEATURES[:, :0]}, "features is .* expected a float tensor"),
        ({"features": FEATURES.long()}, "features is torch.int64"),
        ({"grid": (4, 5)}, r"grid=\(4, 5\): expected \(rows, columns\) of the 16 patches"),
        ({"grid": 4}, "grid=4: expected"),
        ({"keys": torch.zeros(N, P + 2, C)}, r"keys is .*: expected a float tensor \[N, P or 1 \+ P, C\]"),
        ({"keys": torch.zeros(1, P, C)}, "keys is"),
        ({"keys": torch.zeros(N, P, C), "queries": torch.zeros(N, 3, C)}, "queries is"),
        ({"keys": torch.zeros(N, P, C), "num_heads": 3}, "num_heads=3: expected a whole number that divides the 8"),
        ({"hidden_states": [FEATURES]}, "hidden_states is list"),
        ({"hidden_states": {2: FEATURES[:1]}}, r"hidden_states\[2\] is"),
        ({"patch_embeds": torch.zeros(N, P + 1, 4)}, "patch_embeds is"),
        ({"text": "a question"}, r"text is str: expected a float tensor \[N, E\]"),
        ({"patch_embeds": torch.zeros(N, P, 4), "text": torch.zeros(N, 5)}, r"text is .*\[N, E\]"),
    ],
)
def test_vision_features_that_do_not_go_together(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VisionFeatures(**{"features": FEATURES, "grid": (4, 4), **fields})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"name": ["prumerge"]}, "unknown reduction method"),
        ({"encoder": {"name": {}}}, "unknown reduction method {}"),
        ({"encoder": {"name": "prumerge", "ratio": {1, 2}}}, "reduction.encoder: Object of type set"),
        ("{" * 3000, "is nested too deeply"),
        (5, "expected a method's name or a mapping"),
    ],
    ids=["list", "mapping", "set", "deep", "number"],
)
def test_reductions_of_odd_types(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReductionConfig.parse(value)
