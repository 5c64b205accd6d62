"""Conversion to llava-hf and back: logits, prompts, exact round trips, and targets that stay whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaNextForConditionalGeneration
from typer.testing import CliRunner

from llava.cli import app
from llava.cli import main as cli_main
from llava.conversation import conv_templates, get_template
from llava.data.preprocessing import build_prompt, build_prompt_ids
from llava.mm_utils import process_images
from llava.model.builder import load_pretrained_model
from llava.model.convert import convert
from llava.model.llava_hf import export
from llava.model.llava_hf.chat_template import chat_template
from llava.model.llava_hf.opening import KEPT
from tests.hf_folders import SIZES, hf_folder, picture, word_tokenizer
from tests.tiny_models import tiny_model, vision_config

CLOSE = {"atol": 1e-4, "rtol": 0}
HF = {False: LlavaForConditionalGeneration, True: LlavaNextForConditionalGeneration}
QUESTION = "what is the red thing ?"
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}


def save_ours(folder: Path, *, added: tuple[str, ...] = (), **options: Any) -> Path:
    """One of our checkpoints, complete with tokenizer and image processor."""
    from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

    tower = options.get("tower", "clip")
    tiny_model(**options).save_pretrained(folder)
    word_tokenizer(*added).save_pretrained(folder)
    side = vision_config(tower).image_size
    if tower == "clip":
        size: dict[str, Any] = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
        CLIPImageProcessorPil(**size).save_pretrained(folder)
    else:
        SiglipImageProcessorPil(size={"height": side, "width": side}).save_pretrained(folder)
    return folder


def assert_served_alike(
    source: Path, target: Path, image: Image.Image, question: str, version: str, **kwargs: Any
) -> None:
    """transformers, reading `target` alone, computes for one image and question what we do."""
    tokenizer, ours, image_processor, _ = load_pretrained_model(source, device="cpu", dtype=torch.float32, **kwargs)
    anyres = ours.config.image_aspect_ratio == "anyres"
    theirs = HF[anyres].from_pretrained(target, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(target)
    markers = bool(getattr(ours.config, "mm_use_im_start_end", False))
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    prompt = processor.apply_chat_template([message], add_generation_prompt=True)
    assert prompt == build_prompt(question, version, mm_use_im_start_end=markers)
    inputs = processor(images=image, text=prompt, return_tensors="pt")
    pixels = process_images([image], image_processor, ours.config)
    assert (pixels - inputs["pixel_values"]).abs().max() < 1e-6
    mine: dict[str, Any] = {"images": pixels, "image_sizes": [image.size]}
    mine["input_ids"] = build_prompt_ids(question, tokenizer, version, mm_use_im_start_end=markers).unsqueeze(0)
    rows = ours.config.vocab_size
    torch.testing.assert_close(ours(**mine).logits, theirs(**inputs).logits[..., :rows], **CLOSE)
    new = theirs.generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :]
    assert ours.generate(**mine, **GREEDY).tolist() == new.tolist()


def assert_same_checkpoint(first: Path, second: Path, **kwargs: Any) -> None:
    """Weights bit for bit, tokenizer, settings and image preparation."""
    tokenizer, model, processor, length = load_pretrained_model(first, device="cpu", **kwargs)
    tokenizer_2, model_2, processor_2, length_2 = load_pretrained_model(second, device="cpu")
    weights, weights_2 = model.state_dict(), model_2.state_dict()
    assert weights.keys() == weights_2.keys()
    for name, weight in weights.items():
        assert weight.dtype == weights_2[name].dtype and torch.equal(weight, weights_2[name]), name
    for name in ("pad_token", "padding_side", "chat_template", "model_max_length"):
        assert getattr(tokenizer, name) == getattr(tokenizer_2, name)
    assert tokenizer.get_vocab() == tokenizer_2.get_vocab()
    assert tokenizer("what is <image> it?").input_ids == tokenizer_2("what is <image> it?").input_ids
    assert (processor.to_dict(), length) == (processor_2.to_dict(), length_2)
    # Where the vision tower was read from need not be where it came from; old releases name another architecture.
    ignored = {"_name_or_path": "", "mm_vision_tower": "", "architectures": []}
    config, config_2 = (m.config.to_dict() | ignored for m in (model, model_2))
    assert config == {key: config_2.get(key) for key in config}


@pytest.fixture(scope="module", params=["llava-v1.5-7b", "llava-v1.6-vicuna-7b"])
def golden_pair(request: pytest.FixtureRequest, golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A release's checkpoint, its tower, and the same in the llava-hf layout."""
    source, tower = golden / "checkpoints" / request.param, golden / "clip"
    target = convert(source, tmp_path_factory.mktemp("golden") / request.param, "hf", vision_tower=tower)
    return source, tower, target


@pytest.mark.parametrize("image", [0, 1, 2])
@torch.no_grad()
def test_golden_checkpoints_as_hf(golden_pair: Any, golden: Path, image: int) -> None:
    source, tower, target = golden_pair
    picture = Image.open(sorted((golden / "images").iterdir())[image]).convert("RGB")
    question = "What is it, and where?\nSay it in a word."
    assert_served_alike(source, target, picture, question, "v1", vision_tower=tower)


def test_golden_round_trip(golden_pair: Any, tmp_path: Path) -> None:
    source, tower, target = golden_pair
    back = convert(target, tmp_path / "back", "llava")
    assert_same_checkpoint(source, back, vision_tower=tower)
    config, original = (json.loads((f / "config.json").read_text()) for f in (back, source))
    for key in [key for key in original if key.startswith(("mm_", "image_", "tokenizer_"))]:
        assert config[key] == original[key], key
    assert (back / "tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()
    assert KEPT not in config


@torch.no_grad()
def test_lora_is_merged(golden: Path, tmp_path: Path) -> None:
    base: dict[str, Any] = {"model_base": golden / "vicuna", "vision_tower": golden / "clip"}
    source = golden / "checkpoints" / "llava-v1.5-7b-lora-prunemerge"
    # In the checkpoint's own float16 the sums would be rounded, and logits differ by that.
    target = convert(source, tmp_path / "hf", "hf", dtype=torch.float32, **base)
    assert_served_alike(source, target, picture((50, 80)), QUESTION, "v1", merge_lora=True, **base)
    merged = convert(source, tmp_path / "llava", "llava", **base)
    assert_same_checkpoint(source, merged, merge_lora=True, **base)


@pytest.mark.parametrize(
    ("options", "version"),
    [
        pytest.param({"image_aspect_ratio": "square"}, "v1", id="llama-square"),
        pytest.param({"backbone": "mistral", "anyres": True}, "mistral_instruct", id="mistral-anyres"),
        pytest.param({"backbone": "qwen2", "tie_word_embeddings": True}, "qwen", id="qwen2-tied"),
        pytest.param({"backbone": "qwen3", "anyres": True, "vocab_size": 30}, "qwen", id="qwen3-anyres"),
        pytest.param({"tower": "siglip"}, "v1", id="siglip"),
        pytest.param({"tower": "siglip", "anyres": True}, "v1", id="siglip-anyres"),
        pytest.param({"mm_vision_select_feature": "cls_patch", "mm_vision_select_layer": 1}, "v1", id="cls"),
        pytest.param(
            {"mm_use_im_start_end": True, "added": ("<im_start>", "<im_end>", "<pad>")}, "v1", id="im_start_end"
        ),
    ],
)
@torch.no_grad()
def test_there_and_back(options: dict[str, Any], version: str, tmp_path: Path) -> None:
    source = save_ours(tmp_path / "ours", **options)
    target = convert(source, tmp_path / "hf", "hf", max_shard_size="50KB")
    assert len(list(target.glob("model-*.safetensors"))) > 1
    assert_served_alike(source, target, picture(SIZES["wide"]), QUESTION, version)
    assert_same_checkpoint(source, convert(target, tmp_path / "back", "llava"))


@pytest.mark.parametrize("kind", ["llava", "llava_next"])
@torch.no_grad()
def test_a_checkpoint_of_llava_hf_becomes_ours(kind: str, tmp_path: Path) -> None:
    """Without our settings in its config, the vocabulary is cut in front of `<image>` and `<pad>`."""
    source = hf_folder(tmp_path / "hf", kind)
    target = convert(source, tmp_path / "llava", "llava", vision_tower="some/tower")
    config = json.loads((target / "config.json").read_text())
    rows = len(word_tokenizer())
    assert (config["vocab_size"], config["mm_vision_tower"]) == (rows, "some/tower")
    tokenizer, model, processor, _ = load_pretrained_model(target, device="cpu")
    assert len(tokenizer) == rows and tokenizer.pad_token == "<unk>" and tokenizer.chat_template is None
    _, original, _, _ = load_pretrained_model(source, device="cpu")
    image = picture(SIZES["tall"])
    inputs: dict[str, Any] = {
        "input_ids": build_prompt_ids(QUESTION, tokenizer, "v1").unsqueeze(0),
        "images": process_images([image], processor, model.config),
        "image_sizes": [image.size],
    }
    torch.testing.assert_close(model(**inputs).logits, original(**inputs).logits[..., :rows], **CLOSE)


def test_new_rows_are_the_mean(tmp_path: Path) -> None:
    source = save_ours(tmp_path / "ours")
    weights = {}
    for path in convert(source, tmp_path / "hf").glob("*.safetensors"):
        weights |= load_file(path)
    rows = load_pretrained_model(source, device="cpu")[1].get_input_embeddings().weight
    embeddings = weights["language_model.model.embed_tokens.weight"]
    assert len(embeddings) % 64 == 0 and len(embeddings) > len(rows)
    torch.testing.assert_close(embeddings[len(rows) :], rows.detach().mean(0).expand(len(embeddings) - len(rows), -1))


@pytest.mark.parametrize("name", sorted(set(conv_templates) - {"plain", "v0_plain"}))
def test_chat_template_writes_what_training_reads(name: str) -> None:
    rounds = [("<image>\nwhat {{ is }} it?", "a 'red' \"thing\""), ("where?\n", "left\\right"), ("é", None)]
    template = get_template(name)
    messages: list[dict[str, Any]] = []
    for question, answer in rounds:
        text = question.removeprefix("<image>\n")
        content: Any = text if text == question else [{"type": "text", "text": text}, {"type": "image"}]
        messages.append({"role": "user", "content": content})
        if answer is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    jinja = environment.from_string(chat_template(template))
    for system in (None, "be brief", ""):
        head = [] if system is None else [{"role": "system", "content": system}]
        expected = "".join(segment.text for segment in template.render(rounds, system))
        assert jinja.render(messages=head + messages, add_generation_prompt=True) == expected


# Errors, and what they leave behind


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": {"encoder": {"name": "prumerge"}}}, r"can't express .*prumerge.*--drop-reduction"),
        ({"mm_projector_type": "linear"}, "mm_projector_type='linear'"),
        ({"mm_projector_type": "mlp3x_gelu"}, "mm_projector_type='mlp3x_gelu'"),
        ({"anyres": True, "mm_patch_merge_type": "spatial"}, "'anyres' with mm_patch_merge_type='spatial'"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "'pad' with mm_patch_merge_type='spatial_unpad'"),
        ({"anyres": True, "mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature='cls_patch'"),
    ],
)
def test_what_hf_can_not_express(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = save_ours(tmp_path / "ours", **options)
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


@torch.no_grad()
def test_reduction_can_be_dropped(tmp_path: Path) -> None:
    source = save_ours(tmp_path / "ours", reduction={"encoder": {"name": "prumerge"}})
    target = convert(source, tmp_path / "hf", drop_reduction=True)
    assert_served_alike(source, target, picture(SIZES["tall"]), QUESTION, "v1", reduction="none")
    back = load_pretrained_model(convert(target, tmp_path / "back", "llava"), device="cpu")[1]
    assert not getattr(back.config, "reduction", None)


def test_targets_are_not_overwritten(tmp_path: Path) -> None:
    source = save_ours(tmp_path / "ours")
    target = tmp_path / "hf"
    target.mkdir()
    convert(source, target)
    (target / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"exists and is not empty.*--overwrite"):
        convert(source, target)
    convert(source, target, overwrite=True)
    assert (target / "notes.txt").read_text() == "mine" and (target / "config.json").is_file()
    with pytest.raises(ValueError, match="is the source"):
        convert(source, tmp_path / "hf" / ".." / "ours", overwrite=True)
    with pytest.raises(ValueError, match="has the llava-hf layout already"):
        convert(target, tmp_path / "again", "hf")
    with pytest.raises(ValueError, match="to='gguf': choose hf or llava"):
        convert(source, tmp_path / "again", "gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "ours"]


def test_an_interrupted_conversion_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = save_ours(tmp_path / "ours"), tmp_path / "hf"
    convert(source, target)
    before = {path.name: path.read_bytes() for path in target.iterdir()}

    def full_disk(*args: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(export, "_write_processor", full_disk)
    with pytest.raises(OSError, match="no space left"):
        convert(source, target, overwrite=True)
    with pytest.raises(OSError, match="no space left"):
        convert(source, tmp_path / "new")
    monkeypatch.setattr("sys.argv", ["llava", "convert", str(source), str(tmp_path / "new")])
    with pytest.raises(SystemExit) as end:
        cli_main()
    assert end.value.code == 74 and capsys.readouterr().err.endswith("error: no space left on device\n")
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "ours"]


def test_command(tmp_path: Path) -> None:
    source = save_ours(tmp_path / "ours")
    arguments = ["convert", str(source), str(tmp_path / "hf"), "--dtype", "bfloat16", "--template", "llava_v1"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf").dtype == torch.bfloat16
    assert "curious human" in AutoProcessor.from_pretrained(tmp_path / "hf").chat_template
    for wrong, message in ((["--dtype", "int3"], "dtype 'int3'"), (["--template", "v9"], "template 'v9'")):
        failed = CliRunner().invoke(app, ["convert", str(source), str(tmp_path / "no"), *wrong])
        assert message in str(failed.exception) and not (tmp_path / "no").exists()
