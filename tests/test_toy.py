"""The toy world: files that are valid and reproducible, held-out scenes that are held out, models that load."""

from __future__ import annotations

import hashlib
import json
import random
import re
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel, LlamaForCausalLM

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.data import preprocess
from llava.eval.questions import read_questions
from llava.reduction import VisionFeatures, build

TOY = Path(__file__).resolve().parent.parent / "playground" / "toy"
sys.path.insert(0, str(TOY))

import generate  # noqa: E402
import world  # noqa: E402

SIZES = {"pretrain": 20, "finetune": 60, "heldout": 16}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    generate.generate(folder, seed=3, **SIZES)
    return folder


def digests(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def samples(data: Path) -> list[dict]:
    return [s for part in ("pretrain", "finetune") for s in json.loads((data / f"{part}.json").read_text())]


def image_names(sample: dict) -> list[str]:
    names = sample.get("image", [])
    return [names] if isinstance(names, str) else names


def test_same_seed_same_files(data: Path, tmp_path: Path) -> None:
    generate.generate(tmp_path / "again", seed=3, **SIZES)
    generate.generate(tmp_path / "other", seed=4, **SIZES)
    assert digests(tmp_path / "again") == digests(data)
    assert digests(tmp_path / "other")["heldout.jsonl"] != digests(data)["heldout.jsonl"]


def test_data_of_others_is_not_replaced(tmp_path: Path) -> None:
    few = {"pretrain": 1, "finetune": 1, "heldout": 0}
    (tmp_path / "finetune.json").write_text("mine")
    with pytest.raises(ValueError, match=r"finetune\.json was not written by this script"):
        generate.generate(tmp_path, **few)
    assert [path.name for path in tmp_path.iterdir()] == ["finetune.json"]
    for _ in range(2):  # its own may be written again
        generate.generate(tmp_path / "new", **few)


def test_every_image_opens_and_markers_match(data: Path) -> None:
    found = samples(data)
    assert len(found) == SIZES["pretrain"] + SIZES["finetune"]
    assert len({s["id"] for s in found}) == len(found)
    shapes = set()
    for sample in found:
        names = image_names(sample)
        text = "".join(turn["value"] for turn in sample["conversations"])
        assert text.count(DEFAULT_IMAGE_TOKEN) == len(names)
        for name in names:
            with Image.open(data / "images" / name) as image:
                image.load()
                shapes.add((image.width > image.height) - (image.width < image.height))
    assert shapes == {-1, 0, 1}
    counts = {len(image_names(s)) for s in found}
    assert counts == {0, 1, 2}


def test_questions_are_balanced_and_their_images_exist(data: Path) -> None:
    questions = read_questions(data / "heldout.jsonl")
    assert len(questions) == 2 * SIZES["heldout"]
    by_type = [q.category for q in questions]
    assert {by_type.count(c) for c in world.CATEGORIES} == {len(questions) // len(world.CATEGORIES)}
    assert all((data / "images" / q.images[0]).is_file() and q.answer for q in questions)


def test_heldout_pictures_do_not_occur_in_training(data: Path) -> None:
    files = {part: digests(data / "images" / part) for part in ("pretrain", "finetune", "heldout")}
    trained = set(files["pretrain"].values()) | set(files["finetune"].values())
    assert not trained & set(files["heldout"].values())


def test_the_split_follows_from_the_scene_alone() -> None:
    rng = random.Random(0)
    trained = {world.sample_scene(rng).key for _ in range(500)}
    heldout = {world.sample_scene(rng, heldout=True).key for _ in range(200)}
    assert not trained & heldout
    assert not any(world.is_heldout(world.sample_scene(rng)) for _ in range(200))


def test_answers_are_true() -> None:
    rng = random.Random(1)
    for _ in range(200):
        scene = world.sample_scene(rng)
        for question in world.ask(scene, rng):
            if question.category == "count":
                assert question.answer == str(len(scene.things))
            elif question.category == "exists":
                named = any(t.name in question.text for t in scene.things)
                assert question.answer == ("yes" if named else "no")
            elif question.category == "background":
                assert question.answer == scene.background
            elif question.category == "color":
                (match,) = (t for t in scene.things if t.shape in question.text)
                assert question.answer == match.color


def test_drawing_marks_every_object() -> None:
    rng = random.Random(2)
    for _ in range(50):
        scene = world.sample_scene(rng)
        image, owner = world.draw_scene(scene, rng)
        assert image.size == owner.size
        marks = {mark for mark, count in enumerate(owner.histogram()) if count}
        assert marks == set(range(len(scene.things) + 1))


def test_models_load_and_are_small() -> None:
    clip = CLIPModel.from_pretrained(TOY / "models" / "clip")
    vicuna = LlamaForCausalLM.from_pretrained(TOY / "models" / "vicuna")
    assert (
        clip.config.vision_config.image_size
        == CLIPImageProcessor.from_pretrained(TOY / "models" / "clip").crop_size["height"]
    )
    assert all(torch.isfinite(p).all() for model in (clip, vicuna) for p in model.parameters())
    assert sum(p.stat().st_size for p in (TOY / "models").rglob("*") if p.is_file()) < 5_000_000


def test_the_language_model_reads_scenes_told_in_words() -> None:
    folder = TOY / "models" / "vicuna"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rng = random.Random(5)
    right = asked = 0
    for _ in range(15):
        scene = world.sample_scene(rng, heldout=True)
        turns = generate._turns(world.ask(scene, rng), world.describe(scene, rng) + "\n")
        ids, labels = preprocess(turns, tokenizer, "v1", has_image=False)
        with torch.no_grad():
            guess = model(ids[None]).logits[0, :-1].argmax(-1)
        learnt = labels[1:] != -100
        right += int((guess == labels[1:])[learnt].sum())
        asked += int(learnt.sum())
    assert right / asked > 0.8


def test_the_tower_looks_at_objects() -> None:
    """The patches that PruMerge keeps show objects, and their number grows with the objects'."""
    folder = TOY / "models" / "clip"
    model, processor = (
        CLIPModel.from_pretrained(folder, dtype=torch.float32).eval(),
        CLIPImageProcessor.from_pretrained(folder),
    )
    side = model.config.vision_config.image_size
    patch = model.config.vision_config.patch_size
    block = model.vision_model.encoder.layers[-1]
    rng = random.Random(6)
    kept: dict[int, list[int]] = {1: [], 4: []}
    hits = []
    for number in (1, 4) * 10:
        scene = next(s for s in iter(lambda: world.sample_scene(rng, heldout=True), None) if len(s.things) == number)
        image, owner = world.draw_scene(scene, rng)
        image, owner = image.resize((side, side)), owner.resize((side, side), Image.Resampling.NEAREST)
        with torch.no_grad():
            pixels = processor(image, return_tensors="pt").pixel_values
            hidden = model.vision_model(pixels, output_hidden_states=True).hidden_states[-2]
            normed = block.layer_norm1(hidden)
            attention = block.self_attn
            vision = VisionFeatures(hidden[:, 1:], keys=attention.k_proj(normed), queries=attention.q_proj(normed))
            tokens = build("prumerge")(vision)
        source = tokens.source[0][tokens.source[0] >= 0]
        shown = (
            torch.tensor(list(owner.getdata())).view(side // patch, patch, side // patch, patch).amax((1, 3)).flatten()
        )
        hits += (shown[source] > 0).tolist()
        kept[number].append(len(source))
    assert sum(hits) / len(hits) > 0.9
    assert sum(kept[4]) > 1.3 * sum(kept[1])


def test_the_quickstart_removes_nothing() -> None:
    """An earlier run in its folder is kept."""
    script = (TOY.parents[1] / "scripts" / "quickstart.sh").read_text()
    assert not re.search(r"^\s*rm\b", script, re.MULTILINE)
