"""Video-LLaVA: two towers and a projector, against transformers' model, from both layouts, with every method."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
    VideoLlavaImageProcessor,
)

from llava.cost.sizes import Sizes
from llava.eval.answering import Answerer, VqaOptions
from llava.eval.questions import Question
from llava.mm_utils import process_images
from llava.model.builder import load_pretrained_model
from llava.model.convert import convert
from llava.model.image_inputs import Clip
from llava.reduction.base import VisionFeatures
from llava.reduction.frames import concatenated_features
from tests.hf_folders import picture, word_tokenizer
from tests.standins.video_qa import write_clip
from tests.tiny_models import PATCH, SIDE, pad, prompt

FRAMES, PATCHES = 8, (SIDE // PATCH) ** 2
CLOSE = {"atol": 1e-4, "rtol": 0}
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}


def hf_folder(folder: Path, **settings: Any) -> Path:
    """A tiny random checkpoint as transformers writes it."""
    torch.manual_seed(0)
    tokenizer = word_tokenizer("<image>", "<video>", "<pad>")
    image, video = (tokenizer.convert_tokens_to_ids(token) for token in ("<image>", "<video>"))
    tower = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    config = VideoLlavaConfig(
        vision_config=tower,
        text_config=text,
        image_token_index=image,
        video_token_index=video,
        image_seq_length=PATCHES,
        video_seq_length=FRAMES * (PATCHES + 1),
        **settings,
    )
    model = VideoLlavaForConditionalGeneration(config)
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.2)
    model.save_pretrained(folder)
    size, crop = {"shortest_edge": SIDE}, {"height": SIDE, "width": SIDE}
    VideoLlavaImageProcessor(size=size, crop_size=crop).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf_folder(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def released(hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same checkpoint in the layout of Video-LLaVA's release."""
    folder = tmp_path_factory.mktemp("release") / "video-llava"
    return convert(hf, folder, "llava")


@pytest.fixture(scope="module")
def theirs(hf: Path) -> Any:
    return VideoLlavaForConditionalGeneration.from_pretrained(hf).eval()


@pytest.fixture(scope="module", params=["hf", "released"])
def ours(request: pytest.FixtureRequest) -> Any:
    return load_pretrained_model(request.getfixturevalue(request.param), device="cpu")[1]


ROWS = {
    "clip": [prompt(3, "clip", 4)],
    "picture": [prompt(2, "image", 3)],
    "mixed": [prompt(2, "image", 1, "clip", 3), prompt(5), prompt("clip", 2), prompt(1, "image", 6)],
}


def inputs_of(rows: list[torch.Tensor], side: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A batch for our model and the same for theirs."""
    generator = torch.Generator().manual_seed(1)
    count = {mark: sum(int((row == mark).sum()) for row in rows) for mark in (-200, -201)}
    images = torch.randn(count[-200], 3, SIDE, SIDE, generator=generator)
    clips = torch.randn(count[-201], FRAMES, 3, SIDE, SIDE, generator=generator)
    rows = [row.where(row < 0, row % 20 + 3) for row in rows]  # words of theirs
    ids, mask = pad(rows, side)
    mine = {"input_ids": ids, "attention_mask": mask, "images": images, "videos": list(clips)}
    widths = {-200: (25, PATCHES), -201: (26, FRAMES * (PATCHES + 1))}
    long = [
        torch.cat([torch.full((widths[t][1],), widths[t][0]) if t in widths else torch.tensor([t]) for t in row])
        for row in ([int(token) for token in row] for row in rows)
    ]
    their_ids, their_mask = pad(long, side)
    other: dict[str, Any] = {"input_ids": their_ids, "attention_mask": their_mask}
    if len(images):
        other["pixel_values"] = images
    if len(clips):
        other["pixel_values_videos"] = clips
    return mine, other


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rows", ROWS)
@torch.no_grad()
def test_logits_and_tokens_are_those_of_transformers(ours: Any, theirs: Any, rows: str, side: str) -> None:
    tokenizer = ours.tokenizer
    assert [tokenizer.convert_tokens_to_ids(mark) for mark in ("<image>", "<video>")] != [None, None]
    mine, other = inputs_of(ROWS[rows], side)
    logits, expected = ours(**mine).logits, theirs(**other).logits
    real = other["attention_mask"].bool()
    vocabulary = logits.shape[-1]  # the release's has no rows for the markers
    torch.testing.assert_close(logits[real], expected[real][:, :vocabulary], **CLOSE)
    if side == "left":
        new = theirs.generate(**other, **GREEDY)[:, other["input_ids"].shape[1] :]
        if bool((new < vocabulary).all()):
            assert ours.generate(**mine, **GREEDY).tolist() == new.tolist()


@torch.no_grad()
def test_eight_image_markers_are_a_clip(ours: Any) -> None:
    """As Video-LLaVA's own prompts have it, beside pictures."""
    marks = ["image"] * FRAMES
    mine, _ = inputs_of(ROWS["mixed"], "left")
    expected = ours(**mine).logits
    rows = [prompt(2, "image", 1, *marks, 3), prompt(5), prompt(*marks, 2), prompt(1, "image", 6)]
    ids, mask = pad([row.where(row < 0, row % 20 + 3) for row in rows], "left")
    same = {**mine, "input_ids": ids, "attention_mask": mask}
    torch.testing.assert_close(ours(**same).logits, expected)


@torch.no_grad()
def test_a_clip_shows_in_the_logits(ours: Any) -> None:
    """Guards the comparisons: pictures and frames go through towers of their own, and the order of frames counts."""
    mine, _ = inputs_of(ROWS["clip"], "right")
    logits = ours(**mine).logits
    turned = ours(**{**mine, "videos": [mine["videos"][0].flip(0)]}).logits
    assert (logits - turned)[0, -1].abs().max() > 0.02
    inner, clip = ours.get_model(), mine["videos"][0]
    images, frames = inner.vision_tower(clip).features, inner.video_tower(clip).features
    assert (images - frames).abs().max() > 0.1


def test_names_in_the_release(released: Path) -> None:
    names = set(load_file(released / "model.safetensors"))
    for kind in ("image", "video"):
        assert f"model.{kind}_tower.{kind}_tower.embeddings.class_embedding" in names
        assert f"model.{kind}_tower.{kind}_tower.encoder.layers.3.mlp.fc2.weight" in names
    assert {"model.mm_projector.0.weight", "model.mm_projector.2.bias"} <= names
    assert not [name for name in names if "vision_tower" in name or "vision_model" in name]
    config = json.loads((released / "config.json").read_text(encoding="utf-8"))
    assert config["mm_image_tower"] == config["mm_vision_tower"]
    assert config["mm_video_tower"]


@torch.no_grad()
def test_the_releases_own_config_names_towers_otherwise(released: Path, tmp_path: Path) -> None:
    """Without `mm_vision_tower`, which is ours."""
    folder = tmp_path / "as-released"
    folder.mkdir()
    for file in released.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["mm_vision_tower"] = None
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    model = load_pretrained_model(folder, device="cpu")[1]
    assert model.get_model().video_tower is not None


@torch.no_grad()
def test_to_transformers_layout_and_back(hf: Path, released: Path, theirs: Any, tmp_path: Path) -> None:
    again = convert(released, tmp_path / "hf", "hf")
    model = VideoLlavaForConditionalGeneration.from_pretrained(again).eval()
    _, other = inputs_of(ROWS["mixed"], "right")
    words = AutoTokenizer.from_pretrained(again)
    image, video = words.convert_tokens_to_ids("<image>"), words.convert_tokens_to_ids("<video>")
    ids = other["input_ids"].where(other["input_ids"] != 26, video).where(other["input_ids"] != 25, image)
    real, rows = other["attention_mask"].bool(), 25
    logits = model(**{**other, "input_ids": ids}).logits[real][:, :rows]
    torch.testing.assert_close(logits, theirs(**other).logits[real][:, :rows], **CLOSE)
    back = convert(again, tmp_path / "llava", "llava")
    expected, got = load_file(released / "model.safetensors"), load_file(back / "model.safetensors")
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_settings_come_back_from_transformers_layout(released: Path, tmp_path: Path) -> None:
    """How pictures are padded and what the towers are called, for which that layout has no place."""
    folder = Path(shutil.copytree(released, tmp_path / "own"))
    file = folder / "config.json"
    names = {"mm_image_tower": "hub/image", "mm_vision_tower": "hub/image", "mm_video_tower": "hub/video"}
    config = {**json.loads(file.read_text()), **names, "image_aspect_ratio": "pad"}
    config["mm_video_config"]["num_frames"] = FRAMES  # as LanguageBind's says, and its other tower's 1
    file.write_text(json.dumps(config))
    back = convert(convert(folder, tmp_path / "hf"), tmp_path / "back", "llava")
    config = json.loads((back / "config.json").read_text())
    assert {name: config[name] for name in names} == names
    assert config["image_aspect_ratio"] == "pad"
    file.write_text(json.dumps({**json.loads(file.read_text()), "image_aspect_ratio": "anyres"}))
    with pytest.raises(ValueError, match="video_llava has neither tiles"):
        convert(folder, tmp_path / "tiled")


def test_pixels_are_those_of_transformers(hf: Path) -> None:
    _, model, processor, _ = load_pretrained_model(hf, device="cpu")
    image = picture((90, 60))
    mine = process_images([image], processor, model.config)[0]
    other = VideoLlavaImageProcessor.from_pretrained(hf)(images=[image], return_tensors="pt")
    torch.testing.assert_close(mine, next(iter(other.values()))[0], atol=1e-5, rtol=0)


def test_a_missing_weight_of_the_video_tower_is_named(released: Path, tmp_path: Path) -> None:
    folder = tmp_path / "torn"
    folder.mkdir()
    for file in released.iterdir():
        if file.name not in ("model.safetensors", "files.json"):
            (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(released / "model.safetensors")
    del weights["model.video_tower.video_tower.encoder.layers.2.mlp.fc1.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing.*encoder\.layers\.2\.mlp\.fc1\.weight"):
        load_pretrained_model(folder, device="cpu")


METHODS: list[dict[str, Any]] = [
    {"name": "prumerge"},
    {"name": "prumerge_plus"},
    {"name": "prumerge", "frames": "joint", "ratio": 0.25},
    {"name": "visionzip", "tokens": 6},
    {"name": "divprune", "tokens": 5},
    {"name": "divprune", "tokens": 5, "frames": "joint"},
    {"name": "tome", "tokens": 7},
    {"tower": {"name": "tome", "tokens": 9}, "encoder": {"name": "divprune", "tokens": 4}},
    {"name": "pyramiddrop", "layers": [1], "ratios": [0.5]},
    {"name": "pyramiddrop", "layers": [1], "ratios": [0.5], "pool": "frame"},
    {"encoder": {"name": "prumerge"}, "decoder": {"name": "fastv", "layer": 1, "ratio": 0.5}},
]


@pytest.mark.parametrize("reduction", METHODS, ids=json.dumps)
@torch.no_grad()
def test_methods_alone_and_in_a_batch(ours: Any, reduction: dict[str, Any]) -> None:
    mine, _ = inputs_of(ROWS["mixed"], "left")
    mine["videos"][1] = mine["videos"][1][:3]  # clips of different lengths
    logits = ours(**mine, reduction=reduction).logits
    tokens = ours.generate(**mine, **GREEDY, reduction=reduction)
    images, clips = iter(mine["images"]), iter(mine["videos"])
    for i, (ids, mask) in enumerate(zip(mine["input_ids"], mine["attention_mask"], strict=True)):
        row = ids[mask.bool()]
        alone = {
            "input_ids": row.unsqueeze(0),
            "images": [next(images) for _ in range(int((row == -200).sum()))],
            "videos": [next(clips) for _ in range(int((row == -201).sum()))],
        }
        own = ours(**alone, reduction=reduction).logits[0]
        torch.testing.assert_close(logits[i, -len(own) :], own, **CLOSE)
        assert tokens[i].tolist() == ours.generate(**alone, **GREEDY, reduction=reduction)[0].tolist()


@torch.no_grad()
def test_a_frame_keeps_its_class_token(ours: Any) -> None:
    clip, image = torch.randn(FRAMES, 3, SIDE, SIDE), torch.randn(1, 3, SIDE, SIDE)
    full = [(PATCHES, PATCHES), (FRAMES * (PATCHES + 1), FRAMES * (PATCHES + 1))]
    assert ours.count_visual_tokens(image, videos=[clip]) == full
    reduced = ours.count_visual_tokens(image, videos=[clip], reduction={"name": "divprune", "tokens": 5})
    assert [after for _, after in reduced] == [5, FRAMES * 6]
    reduced = ours.count_visual_tokens(image, videos=[clip], reduction={"name": "visionzip", "tokens": 6})
    assert [after for _, after in reduced] == [6, FRAMES * 6]  # CLS is among its own


@pytest.mark.parametrize("rows", [[prompt(3, "clip", 4)], [prompt(2, "image", 3)], [prompt(5)]], ids=str)
def test_every_batch_of_training_runs_both_towers(ours: Any, rows: list[torch.Tensor]) -> None:
    """Ranks must run the same modules, whatever their batches hold, or ZeRO-3 waits for ever."""
    ran = []
    towers = {"image": ours.get_model().vision_tower, "video": ours.get_model().video_tower}
    hooks = [tower.register_forward_hook(lambda *_, kind=kind: ran.append(kind)) for kind, tower in towers.items()]
    ours.train()
    try:
        mine, _ = inputs_of(rows, "right")
        labels = mine["input_ids"].where(mine["input_ids"] >= 0, -100)
        loss = ours(**mine, labels=labels).loss
        loss.backward()
    finally:
        ours.eval()
        for hook in hooks:
            hook.remove()
    assert sorted(ran) == ["image", "video"]
    assert loss.isfinite()
    assert ours.get_model().mm_projector[0].weight.grad is not None
    ours.zero_grad()


def test_the_tower_that_a_batch_does_not_need_gets_gradients(ours: Any) -> None:
    """Also where a method reads other blocks than the selected one: DDP waits for all gradients."""
    model = copy.deepcopy(ours)
    model.set_reduction({"name": "stf", "kernel": 1, "mbtf": 1})
    towers = {"image": model.get_model().vision_tower, "video": model.get_model().video_tower}
    for tower in towers.values():
        tower.vision_tower.embeddings.patch_embedding.requires_grad_(True)
    model.train()
    mine, _ = inputs_of([prompt(2, "image", 3)], "right")
    model(**mine, labels=mine["input_ids"].where(mine["input_ids"] >= 0, -100)).loss.backward()
    grads = {kind: tower.vision_tower.embeddings.patch_embedding.weight.grad for kind, tower in towers.items()}
    assert grads["image"] is not None and bool(grads["image"].any())
    assert grads["video"] is not None and not bool(grads["video"].any())


def test_methods_that_need_a_text_tower_are_refused(ours: Any) -> None:
    with pytest.raises(ValueError, match=r"trim.*a tower of frames has no text tower"):
        ours.set_reduction({"name": "trim", "tokens": 4})


def test_towers_on_two_devices() -> None:
    """As a device map may place them: what they make comes together on the first one's."""
    parts = [VisionFeatures(torch.zeros(n, 4, 8, device=device)) for n, device in ((1, "meta"), (2, "cpu"))]
    both = concatenated_features(parts, torch.tensor([1, 0, 2]))
    assert (both.features.device.type, both.features.shape) == ("meta", (3, 4, 8))


def test_costs_count_the_weights_of_both_towers(ours: Any) -> None:
    inner = ours.get_model()
    counted = sum(p.numel() for tower in (inner.vision_tower, inner.video_tower) for p in tower.parameters())
    assert Sizes.of(ours).weights["tower"] == counted


def test_frames_compete_with_their_class_tokens(ours: Any) -> None:
    """Also where a method ranks all frames together, which puts the class tokens in front."""
    method = {"encoder": {"name": "divprune", "tokens": 5, "frames": "joint"}}
    method["decoder"] = {"name": "pyramiddrop", "layers": [1], "ratios": [0.5], "pool": "frame"}
    clip = torch.randn(FRAMES, 3, SIDE, SIDE)
    with torch.no_grad():
        frames = ours.get_model().encode_pictures([Clip(clip)], reduction=method).frames
    assert frames[:FRAMES].tolist() == list(range(FRAMES))
    assert len(frames) == FRAMES * 6
    assert frames[FRAMES:].tolist() == sorted(frames[FRAMES:].tolist())


def test_llava_eval_asks_about_clips(released: Path, tmp_path: Path) -> None:
    """Frames are counted with their class token, in the batch and alone, and beside a picture."""
    write_clip(tmp_path / "clip", 2)
    Image.new("RGB", (40, 30), "red").save(tmp_path / "picture.png")
    options = VqaOptions(image_folder=str(tmp_path), temperature=0, max_new_tokens=4, count_visual_tokens=True)
    questions = [Question(0, "what moves?", videos=("clip",)), Question(1, "what is it?", images=("picture.png",))]
    whole = FRAMES * (PATCHES + 1)
    for method, most in (("none", whole), ({"name": "prumerge", "ratio": 0.25}, whole // 2)):
        tokenizer, model, processor, _ = load_pretrained_model(released, reduction=method, device="cpu")
        answerer = Answerer(tokenizer, model, processor, options)
        together = answerer.answer(questions)
        assert [answer.text for answer in together] == [answerer.answer([each])[0].text for each in questions]
        ((before, after),), ((of_picture, _),) = (answer.visual_tokens or [] for answer in together)
        assert (before, of_picture) == (whole, PATCHES)
        assert FRAMES < after <= most and (after == whole) == (method == "none")
        assert [answer.tiles for answer in together] == [FRAMES, 1]
