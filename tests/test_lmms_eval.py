"""lmms-eval itself, on local tasks: its own class `llava` on this package, and the plugin's."""

from __future__ import annotations

import dataclasses
import inspect
import json
import multiprocessing
import os
import re
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import datasets
import filelock
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image, ImageFile

from llava.constants import IMAGE_TOKEN_INDEX, VIDEO_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.data import build_prompt_ids
from llava.eval.lmms.prompts import read_context, read_messages
from llava.eval.lmms.reduction import parse_reduction
from llava.mm_utils import process_images, process_video, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.reduction.registry import available, method_class
from tests.ranks import free_port, redirect_output
from tests.standins.video_qa import write_clip
from tests.test_videos import write
from tests.tiny_llava import save_tiny_llava
from tests.tiny_world import PATCH, SIDE, make_readable, make_tiny_world

pytest.importorskip("lmms_eval", reason="bash scripts/setup_env.sh train,dev,lmms-eval")
loguru = pytest.importorskip("loguru")

PATCHES = (SIDE // PATCH) ** 2
QUESTIONS = [  # text, images
    ("What color is it?", ["red"]),
    ("What color is it?", ["blue"]),
    ("Say red.", []),
    ("Is <image> as dark as <image>?", ["black", "green"]),
    ("Are these two of one color?", ["green", "red"]),
    ("Name the color of this picture in a single word.", ["green"]),
    ("Where is the light? <image> Left or right?", ["black"]),
]
RIGHT = 3  # questions whose answer in the file is the model's own
PRUMERGE = {"reduction": "prumerge", "ratio": 0.25}
SOURCE = """
dataset_path: parquet
dataset_kwargs: {data_files: {test: QUESTIONS}}
test_split: test
doc_to_visual: !function read.images
doc_to_text: text
"""
GENERATE = """
output_type: generate_until
doc_to_target: answer
generation_kwargs: {until: ["</s>"], max_new_tokens: 4, temperature: 0, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
KINDS = {
    "colors": GENERATE,
    "colors_chat": "doc_to_messages: !function read.messages" + GENERATE,
    "colors_choice": """
output_type: multiple_choice
doc_to_choice: [red, dark green]
doc_to_target: 0
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
}
READ = """
def images(doc):
    return doc["images"]

def messages(doc):
    words = doc["text"].split("<image>")
    if len(words) == 1:
        content = [{"type": "image", "url": image} for image in doc["images"]]
        return [{"role": "user", "content": [*content, {"type": "text", "text": doc["text"]}]}]
    content = [{"type": "text", "text": words[0].strip()}]
    for image, word in zip(doc["images"], words[1:]):
        content += [{"type": "image", "url": image}, {"type": "text", "text": word.strip()}]
    return [{"role": "user", "content": content}]
"""


@dataclass(frozen=True)
class World:
    """A checkpoint, and a folder with tasks."""

    checkpoint: Path
    tasks: Path


# What lmms-eval changes in other libraries, for the whole process.
CHANGED = (
    (ImageFile, "LOAD_TRUNCATED_IMAGES"),
    (type(filelock.FileLock), "__call__"),
    (ssl.SSLContext, "__reduce__"),
    (torch.distributed.distributed_c10d, "default_pg_timeout"),
)


@pytest.fixture(scope="module", autouse=True)
def _other_libraries_as_they_were() -> Iterator[None]:
    """For the tests after these."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in CHANGED:
            patch.setattr(owner, name, getattr(owner, name))
        yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaVA that says words, whose CLIP reads."""
    root = tmp_path_factory.mktemp("model")
    clip = make_tiny_world(root / "tiny").clip
    make_readable(clip)
    return save_tiny_llava(root, clip, reduction=None, initializer_range=0.2)  # by which its answers differ


def picture(color: str) -> Image.Image:
    image = Image.new("RGB", (40, 30), color)
    image.paste("white", (0, 0, 12, 30))
    return image


def say(opened: tuple[Any, ...], text: str, names: list[str]) -> str:
    """The model's answer, asked as LLaVA's README does."""
    tokenizer, model, processor, _ = opened
    conversation = conv_templates["vicuna_v1"].copy()
    conversation.append_message(conversation.roles[0], "<image>\n" * len(names) + text)
    ids = torch.tensor([tokenizer_image_token(conversation.get_prompt(), tokenizer)])
    images = process_images([picture(name) for name in names], processor, model.config) if names else None
    new = model.generate(ids, images=images, do_sample=False, max_new_tokens=4, pad_token_id=0)
    return tokenizer.decode(new[0], skip_special_tokens=True).strip()


@pytest.fixture(scope="module")
def opened(checkpoint: Path) -> tuple[Any, ...]:
    return load_pretrained_model(checkpoint, device="cpu")


@pytest.fixture(scope="module")
def world(checkpoint: Path, opened: tuple[Any, ...], tmp_path_factory: pytest.TempPathFactory) -> World:
    tasks = tmp_path_factory.mktemp("tasks")
    right = [say(opened, *question) for question in QUESTIONS[:RIGHT]]
    rows = [
        {"text": text, "images": [picture(name) for name in names], "answer": answer}
        for (text, names), answer in zip_longest(QUESTIONS, right, fillvalue="no")
    ]
    table = datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image()))
    table.to_parquet(str(tasks / "questions.parquet"))
    (tasks / "read.py").write_text(READ)
    for name, more in KINDS.items():
        task = SOURCE.replace("QUESTIONS", str(tasks / "questions.parquet"))
        (tasks / f"{name}.yaml").write_text(f"task: {name}\n{task}{more}")
    return World(checkpoint, tasks)


def run(
    world: World, model: str, task: str = "colors", batch_size: int = 1, simple: bool = True, **arguments: object
) -> Any:
    """What lmms-eval's evaluator returns."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    values = {"pretrained": world.checkpoint, "conv_template": "vicuna_v1", **arguments}
    return simple_evaluate(
        model=model,
        model_args=",".join(f"{name}={value}" for name, value in values.items()),
        tasks=[task],
        batch_size=batch_size,
        device="cpu",
        task_manager=TaskManager(include_path=str(world.tasks), include_defaults=False, model_name=model),
        force_simple=simple,
        bootstrap_iters=0,
    )


def samples(results: Any) -> list[dict[str, Any]]:
    (rows,) = results["samples"].values()
    return sorted(rows, key=lambda row: row["doc_id"])


def answers(results: Any) -> list[str]:
    return [row["filtered_resps"][0].strip() for row in samples(results)]


def visual_tokens(results: Any) -> list[list[tuple[int, int]]]:
    return [row["token_counts"][0]["visual_tokens"] for row in samples(results)]


@pytest.fixture(scope="module")
def ours(world: World) -> Any:
    return run(world, "llava_reduced")


def test_llavas_own_class_says_and_scores_the_same(world: World, ours: Any) -> None:
    theirs = run(world, "llava", device_map="auto")
    assert theirs["config"]["model_backend"] == "lmms_eval.models.simple.llava.Llava (simple)"
    assert answers(ours) == answers(theirs)
    assert len(set(answers(ours))) == len(QUESTIONS)
    scores = [results["results"]["colors"]["exact_match,none"] for results in (ours, theirs)]
    assert scores == [pytest.approx(RIGHT / len(QUESTIONS))] * 2


def test_visual_tokens_are_in_the_results(ours: Any) -> None:
    assert visual_tokens(ours) == [[(PATCHES, PATCHES)] * len(names) for _, names in QUESTIONS]
    assert ours["throughput"]["avg_visual_tokens_per_image"] == PATCHES
    text_alone = samples(ours)[2]["token_counts"][0]
    assert text_alone["input_tokens"] > 0
    assert ours["efficiency"]["overall"]["docs_with_token_counts"] == len(QUESTIONS)


def test_the_chat_form_asks_the_same(world: World, ours: Any) -> None:
    chat = run(world, "llava_reduced", "colors_chat", batch_size=3, simple=False)
    assert chat["config"]["model_backend"] == "llava.eval.lmms.models.LlavaReducedChat (chat)"
    assert answers(chat) == answers(ours)


@pytest.mark.parametrize(
    "arguments",
    [
        PRUMERGE,
        {"encoder": "{name: trim, variant: paper}"},
        {"reduction": '{"encoder": "prumerge", "decoder": {"name": "pyramiddrop", "layers": [1], "ratios": [0.5]}}'},
    ],
    ids=["prumerge", "trim", "prumerge and pyramiddrop"],
)
def test_reduced_answers_do_not_depend_on_the_batch(world: World, ours: Any, arguments: dict[str, Any]) -> None:
    alone, together = (run(world, "llava_reduced", batch_size=size, **arguments) for size in (1, 3))
    assert answers(alone) == answers(together)
    assert visual_tokens(alone) == visual_tokens(together)
    assert answers(alone) != answers(ours)
    assert answers(alone)[2] == answers(ours)[2]  # without an image there is nothing to reduce
    counts = [after for row in visual_tokens(alone) for _, after in row]
    assert max(counts) < PATCHES
    assert alone["throughput"]["avg_visual_tokens_per_image"] == pytest.approx(sum(counts) / len(counts))


def test_trim_reads_the_question(world: World) -> None:
    arguments = {"name": "trim", "variant": "paper"}
    _, model, processor, _ = load_pretrained_model(world.checkpoint, reduction=arguments, device="cpu")
    got = visual_tokens(run(world, "llava_reduced", batch_size=3, **{"reduction": json.dumps(arguments)}))
    for (text, names), counts in zip(QUESTIONS, got, strict=True):
        pixels = list(process_images([picture(name) for name in names], processor, model.config)) if names else []
        question = text.replace("<image>", "")
        expected = model.count_visual_tokens(pixels, texts=[question] * len(names)) if names else []
        assert counts == expected


def test_options_are_scored(world: World) -> None:
    alone, together = (run(world, "llava_reduced", "colors_choice", size, encoder="prumerge") for size in (1, 3))
    losses = [[pair[0] for (pair,) in row["resps"]] for row in samples(alone)]
    assert alone["results"]["colors_choice"]["acc,none"] == sum(row[0] < row[1] for row in losses) / len(losses)
    assert [[pair[0] for (pair,) in row["resps"]] for row in samples(together)] == [
        pytest.approx(row) for row in losses
    ]


def scored(model: Any, continuation: str) -> list[Any]:
    """What a model's loglikelihood gives for a continuation of a text and of a question about an image."""
    from lmms_eval.api.instance import Instance

    docs = [{"images": []}, {"images": [picture("red")]}]
    model.task_dict = {"colors": {"test": docs}}
    return [
        Instance(
            request_type="loglikelihood",
            arguments=("What color?", continuation, lambda doc: doc["images"], i, "colors", "test"),
            idx=0,
            metadata={"task": "colors", "doc_id": i, "repeats": 1},
        )
        for i in range(len(docs))
    ]


def make(name: str, arguments: str) -> Any:
    from lmms_eval.models import get_model

    return get_model(name, force_simple=True).create_from_arg_string(arguments, {"batch_size": 2, "device": "cpu"})


def test_a_continuation_has_the_loss_that_llavas_own_class_gives(checkpoint: Path) -> None:
    model = make("llava_reduced", f"pretrained={checkpoint}")
    mine = [result.text for result in model.loglikelihood(scored(model, "red"))]
    other = make("llava", f"pretrained={checkpoint},device_map=auto")
    theirs = other.loglikelihood(scored(other, "red"))
    assert [loss for loss, _ in mine] == [pytest.approx(loss, rel=1e-3) for loss, _ in theirs]
    # The likeliest next token is what greedy decoding gives, and another one is not.
    batch, _ = model._collate(scored(model, ""))
    batch.ids, batch.mask = batch.ids[1:, :-1], batch.mask[1:, :-1]
    batch.texts, batch.counts = batch.texts[1:], batch.counts[1:]
    likeliest = model.model(batch.ids, images=batch.images).logits[0, -1].argmax()
    batch.ids, batch.mask = (torch.nn.functional.pad(part, (0, 1), value=1) for part in (batch.ids, batch.mask))
    for token, greedy in ((likeliest, True), (likeliest - 1, False)):
        batch.ids[0, -1] = token
        labels = torch.full_like(batch.ids, -100)
        labels[0, -1] = token
        assert model._score(batch, labels)[0][1] is greedy


def test_a_tasks_way_to_generate() -> None:
    from llava.eval.lmms.models import _vqa_options

    def options(**generation: Any) -> tuple[Any, ...]:
        made = _vqa_options(generation, "vicuna_v1")
        return made.temperature, made.top_p, made.num_beams, made.max_new_tokens

    assert options() == (0, None, 1, 1024)
    assert options(do_sample=True, top_p=0.9, max_new_tokens=5) == (1, 0.9, 1, 5)
    assert options(do_sample=False, temperature=0.7, num_beams=3) == (0, None, 3, 1024)
    assert options(temperature=0.2) == (0.2, None, 1, 1024)


def test_until_cuts_an_answer(checkpoint: Path, opened: tuple[Any, ...]) -> None:
    said: list[str] = []
    sink = loguru.logger.add(said.append)
    model = make("llava_reduced", f"pretrained={checkpoint}")
    whole = say(opened, "What color?", ["red"])
    stop = whole[2:4]
    generation = {"until": [stop], "max_new_tokens": 4, "top_k": 3}
    requests = scored(model, "")
    for request in requests:
        request.request_type, request.arguments = "generate_until", (*request.args[:1], generation, *request.args[2:])
    assert model.generate_until(requests)[1].text == whole[: whole.index(stop)].strip()
    assert generation == {"until": [stop], "max_new_tokens": 4, "top_k": 3}
    loguru.logger.remove(sink)
    assert "no effect: top_k" in "".join(said)


def test_prompts_have_images_at_their_places(opened: tuple[Any, ...]) -> None:
    tokenizer, image, other = opened[0], picture("red"), picture("blue")
    prompt = read_context("Is <image> red?", [image])
    ids = prompt.encode(tokenizer, "vicuna_v1").input_ids
    conversation = conv_templates["vicuna_v1"].copy()
    conversation.append_message(conversation.roles[0], "Is <image> red?")
    assert ids.tolist() == tokenizer_image_token(conversation.get_prompt(), tokenizer)
    assert prompt.text == "Is  red?"
    marked = conversation.get_prompt().replace("<image>", "<im_start><image><im_end>")
    ids = prompt.encode(tokenizer, "vicuna_v1", mm_use_im_start_end=True).input_ids
    assert ids.tolist() == tokenizer_image_token(marked, tokenizer)
    assert read_context("Say it.", [image, other]).rounds == [("<image> <image>\nSay it.", None)]
    literal = read_context("What is <image>?", None).encode(tokenizer, "vicuna_v1").input_ids
    assert IMAGE_TOKEN_INDEX not in literal
    with pytest.raises(ValueError, match=r"1 <image> for 2 image\(s\)"):
        read_context("Is <image> red?", [image, other]).encode(tokenizer, "vicuna_v1")


def test_messages_become_rounds(opened: tuple[Any, ...]) -> None:
    image = {"type": "image", "url": picture("red")}

    def text(words: str) -> dict[str, str]:
        return {"type": "text", "text": words}

    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [image, text("What?")]},
        {"role": "assistant", "content": [text("Red.")]},
        {"role": "user", "content": [text("As"), image, text("or"), image, text(" ?")]},
    ]
    prompt = read_messages(messages)
    assert prompt.system == "Be brief."
    assert prompt.rounds == [("<image>\nWhat?", "Red."), ("As <image> or <image> ?", None)]
    assert (len(prompt.images), prompt.text) == (3, "As  or  ?")
    marked = read_messages([{"role": "user", "content": [image, text("Is <image> red?")]}])
    assert marked.rounds == [("Is <image> red?", None)]
    for content, reason in (
        ([{"type": "audio", "url": "a.wav"}], "it has audio"),
        ([{"type": "image", "url": 3}], "int"),
        ([{"type": "video", "url": 3}], "int"),
    ):
        with pytest.raises(ValueError, match=reason):
            read_messages([{"role": "user", "content": content}])
    with pytest.raises(ValueError, match="the last message is not the user's"):
        read_messages(messages[:3])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("reduction=prumerge,ration=0.25", "'?ration'?"),
        ("reduction=prumerge,ratio=2", "ratio"),
        ("reduction=prumerg", "prumerg.*known methods"),
        ("ratio=0.25", "ratio: no argument of this model"),
        ("reduction=trim,encoder=prumerge", "reduction=trim and encoder exclude"),
        ("encoder=pyramiddrop", "works at the site 'decoder'"),
        ("reduction=pyramiddrop,layers=[1", "layers"),
        ("conv_template=vicuna", "vicuna"),
        ("num_frames=0", "num_frames=0"),
        ("fps=1,max_frames_num=0", "max_frames=0"),
    ],
)
def test_a_wrong_argument_is_named(arguments: str, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        make("llava_reduced", f"pretrained=no-such-folder,{arguments}")


def about(model: Any, docs: list[tuple[str, list[Any]]], chat: bool = False) -> list[Any]:
    """lmms-eval's own requests: a text, and visuals as its task classes hand them over."""
    from lmms_eval.api.instance import Instance
    from lmms_eval.api.task import ConfigurableMessagesTask

    model.task_dict = {"clips": {"test": docs}}
    generation = {"until": ["</s>"], "max_new_tokens": 4, "temperature": 0}

    def arguments(number: int) -> tuple[Any, ...]:
        place = (number, "clips", "test")
        if chat:
            text = docs[number][0]
            return (text, lambda doc: ConfigurableMessagesTask._build_user_turn(doc[1], text), generation, *place)
        return (docs[number][0], generation, lambda doc: doc[1], *place)

    return [
        Instance(
            request_type="generate_until",
            arguments=arguments(i),
            idx=0,
            metadata={"task": "clips", "doc_id": i, "repeats": 1},
        )
        for i in range(len(docs))
    ]


def test_clips_among_pictures(checkpoint: Path, opened: tuple[Any, ...], tmp_path: Path) -> None:
    """Paths of files and folders, several and beside pictures, in both forms, alone and in a batch."""
    file = write(tmp_path / "clip.mp4", 12)
    write_clip(tmp_path / "frames", 2, frames=4)
    docs: list[tuple[str, list[Any]]] = [
        ("What moves?", [str(file)]),
        ("Which of both?", [str(file), str(tmp_path / "frames")]),
        ("Is it in the picture?", [picture("red"), str(file)]),
        ("What color?", [picture("blue")]),
        ("Say it.", []),
    ]
    said = {}
    for size, chat in ((1, False), (5, False), (5, True)):
        from lmms_eval.models import get_model

        arguments = f"pretrained={checkpoint},max_frames_num=3"
        kind = get_model("llava_reduced", force_simple=not chat)
        model = kind.create_from_arg_string(arguments, {"batch_size": size, "device": "cpu"})
        said[size, chat] = model.generate_until(about(model, docs, chat))
    clip = (3 * PATCHES, 3 * PATCHES)
    counts = [[clip], [clip] * 2, [(PATCHES, PATCHES), clip], [(PATCHES, PATCHES)], []]
    for answered in said.values():
        assert [result.text for result in answered] == [result.text for result in said[1, False]]
        assert [result.token_counts.visual_tokens for result in answered] == counts
    tokenizer, model, processor, _ = opened
    pixels = process_video(str(file), processor, model.config, num_frames=3)
    ids = build_prompt_ids("What moves?", tokenizer, "vicuna_v1", 0, num_videos=1).unsqueeze(0)
    new = model.generate(ids, videos=[pixels], do_sample=False, max_new_tokens=4, pad_token_id=0)
    assert said[1, False][0].text == tokenizer.decode(new[0], skip_special_tokens=True).strip()
    assert len({result.text for result in said[1, False]}) > 1


def test_a_clip_that_is_not_there_is_named_with_its_document(checkpoint: Path) -> None:
    model = make("llava_reduced", f"pretrained={checkpoint}")
    with pytest.raises(ValueError, match=r"task clips, document 0: .*nowhere\.mp4"):
        model.generate_until(about(model, [("What?", ["nowhere.mp4"])]))


def test_clips_have_their_places(opened: tuple[Any, ...]) -> None:
    image, clip = picture("red"), "a.MP4"
    assert read_context("What?", [clip]).rounds == [("<video>\nWhat?", None)]
    assert read_context("What?", [clip, image]).rounds == [("<video> <image>\nWhat?", None)]
    prompt = read_context("Is it in <video>?", [image, clip])
    assert prompt.rounds == [("<image>\nIs it in <video>?", None)]
    assert (prompt.text, prompt.videos) == ("Is it in ?", [clip])
    ids = prompt.encode(opened[0], "vicuna_v1").input_ids
    assert ids[ids < 0].tolist() == [IMAGE_TOKEN_INDEX, VIDEO_TOKEN_INDEX]
    with pytest.raises(ValueError, match=r"1 <video> for 2 clip\(s\)"):
        read_context("Is it in <video>?", [clip, clip]).encode(opened[0], "vicuna_v1")
    content = [{"type": "text", "text": "Is"}, {"type": "video", "url": clip}, {"type": "text", "text": "long?"}]
    assert read_messages([{"role": "user", "content": content}]).rounds == [("Is <video> long?", None)]


def test_every_option_of_a_method_is_an_argument() -> None:
    from lmms_eval.utils import simple_parse_args_string

    from llava.eval.lmms import models

    given = simple_parse_args_string("reduction=pyramiddrop,layers=[1,2],ratios=[0.5,0.25]")
    method = parse_reduction(given.pop("reduction"), {}, given)
    assert method is not None
    assert method.decoder == {"name": "pyramiddrop", "layers": [1, 2], "ratios": [0.5, 0.25]}
    taken = set(inspect.signature(models.LlavaReduced.__init__).parameters)
    for names in available().values():
        for name in names:
            assert not taken & {option.name for option in dataclasses.fields(method_class(name))}


def run_rank(world: World, log: Path, out: Path, environment: dict[str, str]) -> None:
    """One of several processes; the first writes what lmms-eval returns to it."""
    redirect_output(str(log))
    os.environ.update(environment, ACCELERATE_USE_CPU="true", CUDA_VISIBLE_DEVICES="")
    results = run(world, "llava_reduced", "colors_chat", batch_size=2, simple=False, **PRUMERGE)
    if results is not None:
        out.write_text(json.dumps({"answers": answers(results), "visual_tokens": visual_tokens(results)}))


@pytest.mark.slow
def test_two_processes_share_the_questions(world: World, tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.extension", "tests.preload"])
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = []
    for rank in range(2):
        environment = {**place, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        arguments = (world, tmp_path / "log", tmp_path / "out.json", environment)
        processes.append(context.Process(target=run_rank, args=arguments, daemon=True))
        processes[-1].start()
    for process in processes:
        process.join(timeout=200)
    log = (tmp_path / "log").read_text()
    assert [process.exitcode for process in processes] == [0, 0], log[-3000:]
    alone = run(world, "llava_reduced", "colors_chat", simple=False, **PRUMERGE)
    expected = {"answers": answers(alone), "visual_tokens": visual_tokens(alone)}
    assert json.loads((tmp_path / "out.json").read_text()) == json.loads(json.dumps(expected))
    assert re.search("Model Responding: 100%.* 4/4 ", log)  # of 7
