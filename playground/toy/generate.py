"""Write the toy data: image files and conversations in LLaVA's formats.

    python playground/toy/generate.py [--output playground/data/toy] [--seed 0] [--pretrain 1500] ...

    images/{pretrain,finetune,heldout}/NAME.jpg|png   pictures, of several aspect ratios
    pretrain.json    captions, one an image (LLaVA's blip_laion_cc_sbu_558k.json)
    finetune.json    conversations, some without an image, some about two (llava_v1_5_mix665k.json)
    heldout.jsonl    questions about scenes that occur nowhere else (question.jsonl, answers added)

The same arguments give the same files.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from tqdm import tqdm
from world import CATEGORIES, MAX_OBJECTS, Question, Scene, ask, caption, describe, draw_scene, sample_scene

from llava.files import note_files, read_file_list

OUTPUT = Path(__file__).resolve().parent.parent / "data" / "toy"
REQUESTS = (
    "Provide a brief description of the given image.",
    "Describe the image concisely.",
    "Write a terse but informative summary of the picture.",
    "What is in the photo?",
)
WRITTEN = ("images", "pretrain.json", "finetune.json", "heldout.jsonl")
TEXT_ONLY_EVERY, PAIR_EVERY = 12, 15  # one conversation in so many is without an image, or about two
ORDINALS = ("the first", "the second")

Sample = dict[str, object]


def _save_image(scene: Scene, rng: random.Random, folder: Path, name: str) -> str:
    """Draw a scene into `folder`, as JPEG or, one in four, PNG. Returns the path below the images folder."""
    image, _ = draw_scene(scene, rng)
    if rng.random() < 0.25:
        path = folder / f"{name}.png"
        image.save(path)
    else:
        path = folder / f"{name}.jpg"
        image.save(path, quality=92)
    return f"{folder.name}/{path.name}"


def _turns(questions: list[Question], opening: str, closing: str = "") -> list[dict[str, str]]:
    """A conversation; the first question stands between `opening` and `closing`."""
    turns = []
    for index, question in enumerate(questions):
        text = f"{opening}{question.text}{closing}" if index == 0 else question.text
        turns += [{"from": "human", "value": text}, {"from": "gpt", "value": question.answer}]
    return turns


def _pair_questions(scenes: tuple[Scene, Scene], rng: random.Random) -> list[Question]:
    """Questions that need both pictures."""
    names = [{t.name for t in scene.things} for scene in scenes]
    questions = [
        Question(f"Which image shows the {name}?", ORDINALS[i], "pair")
        for i in (0, 1)
        for name in sorted(names[i] - names[1 - i])
    ]
    questions = rng.sample(questions, min(2, len(questions)))
    counts = [len(scene.things) for scene in scenes]
    if counts[0] != counts[1]:
        answer = ORDINALS[counts[1] > counts[0]]
        questions.append(Question("Which image shows more objects?", answer, "pair"))
    return questions


def pretrain_samples(number: int, rng: random.Random, images: Path, objects: int) -> list[Sample]:
    """Caption samples, `number` of them, with their images."""
    samples: list[Sample] = []
    for index in tqdm(range(number), desc="pretrain images", leave=False, disable=None):
        scene = sample_scene(rng, most=objects)
        request = rng.choice(REQUESTS)
        request = f"<image>\n{request}" if rng.random() < 0.5 else f"{request}\n<image>"
        samples.append(
            {
                "id": f"pretrain-{index:06d}",
                "image": _save_image(scene, rng, images, f"{index:06d}"),
                "conversations": [
                    {"from": "human", "value": request},
                    {"from": "gpt", "value": caption(scene)},
                ],
            }
        )
    return samples


def _finetune_sample(index: int, rng: random.Random, images: Path, objects: int) -> Sample:
    name = f"{index:06d}"
    scene = sample_scene(rng, most=objects)
    sample: Sample = {"id": f"finetune-{name}"}
    if index % TEXT_ONLY_EVERY == TEXT_ONLY_EVERY - 1:
        return sample | {"conversations": _turns(ask(scene, rng), describe(scene, rng) + "\n")}
    if index % PAIR_EVERY == PAIR_EVERY - 1:
        pair = (scene, sample_scene(rng, most=objects))
        questions = _pair_questions(pair, rng)
        if questions:
            files = [_save_image(s, rng, images, f"{name}-{k}") for k, s in enumerate(pair)]
            return sample | {"image": files, "conversations": _turns(questions, "<image>\n<image>\n")}
    opening, closing = ("<image>\n", "") if rng.random() < 0.8 else ("", "\n<image>")
    conversations = _turns(ask(scene, rng), opening, closing)
    return sample | {"image": _save_image(scene, rng, images, name), "conversations": conversations}


def finetune_samples(number: int, rng: random.Random, images: Path, objects: int) -> list[Sample]:
    """Question-answering conversations, `number` of them, with their images."""
    return [
        _finetune_sample(i, rng, images, objects)
        for i in tqdm(range(number), desc="finetune images", leave=False, disable=None)
    ]


def heldout_questions(number: int, rng: random.Random, images: Path, objects: int) -> list[Sample]:
    """Two questions, of different types, about each of `number` held-out images; every type equally often."""
    rows: list[Sample] = []
    for index in tqdm(range(number), desc="held-out images", leave=False, disable=None):
        wanted = [CATEGORIES[(2 * index + k) % len(CATEGORIES)] for k in (0, 1)]
        scene, questions = _scene_with(wanted, rng, objects)
        image = _save_image(scene, rng, images, f"{index:06d}")
        for question in questions:
            row = {"question_id": len(rows), "image": image, "text": question.text}
            rows.append(row | {"answer": question.answer, "category": question.category})
    return rows


def _scene_with(wanted: list[str], rng: random.Random, objects: int) -> tuple[Scene, list[Question]]:
    """A held-out scene with one question of each wanted type."""
    while True:
        scene = sample_scene(rng, heldout=True, most=objects)
        by_type = {question.category: question for question in ask(scene, rng)}
        if all(category in by_type for category in wanted):
            return scene, [by_type[category] for category in wanted]


def note_own(output: Path, written: tuple[str, ...]) -> None:
    """Make the folder `output` and note what a script writes there.

    Raises:
        ValueError: it holds something of that name which the script did not write.
    """
    own = read_file_list(output) or {}
    for name in written:
        if (output / name).exists() and name not in own:
            raise ValueError(
                f"{output / name} was not written by this script, and would be replaced; move it away, or choose "
                "another --output"
            )
    output.mkdir(parents=True, exist_ok=True)
    note_files(output, dict.fromkeys(written))


def generate(
    output: Path,
    seed: int = 0,
    pretrain: int = 1500,
    finetune: int = 3000,
    heldout: int = 200,
    objects: int = MAX_OBJECTS,
) -> None:
    """Write the whole data set below `output`.

    Args:
        output: the folder.
        seed: of all that is drawn.
        pretrain: caption samples.
        finetune: conversations.
        heldout: held-out images, two questions each.
        objects: most objects in a scene, 2 or more.

    Raises:
        ValueError: an impossible `objects`, or `output` holds data that this script did not write.
    """
    if not 2 <= objects <= MAX_OBJECTS:
        raise ValueError(f"objects={objects}: scenes have at most 2 to {MAX_OBJECTS} objects")
    note_own(output, WRITTEN)
    folders = {name: output / "images" / name for name in ("pretrain", "finetune", "heldout")}
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    # One random stream each: asking for more of one part leaves the others as they are.
    streams = {name: random.Random(f"{seed}-{name}") for name in folders}
    captions = pretrain_samples(pretrain, streams["pretrain"], folders["pretrain"], objects)
    talks = finetune_samples(finetune, streams["finetune"], folders["finetune"], objects)
    questions = heldout_questions(heldout, streams["heldout"], folders["heldout"], objects)
    write_data(output, {"pretrain": captions, "finetune": talks}, questions)


def write_data(output: Path, samples: dict[str, list[Sample]], questions: list[Sample]) -> None:
    """Samples as JSON files of these names, and the held-out questions as JSON lines."""
    for name, some in samples.items():
        (output / f"{name}.json").write_text(json.dumps(some, indent=1) + "\n", encoding="utf-8")
    lines = "".join(json.dumps(row) + "\n" for row in questions)
    (output / "heldout.jsonl").write_text(lines, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the toy data in LLaVA's formats.")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pretrain", type=int, default=1500, help="caption samples")
    parser.add_argument("--finetune", type=int, default=3000, help="conversations")
    parser.add_argument("--heldout", type=int, default=200, help="held-out images, two questions each")
    parser.add_argument("--objects", type=int, default=MAX_OBJECTS, help="most objects in a scene")
    try:
        generate(**vars(parser.parse_args()))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
