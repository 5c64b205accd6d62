"""Names that LLaVA's programs, lmms-eval and VLMEvalKit import from `llava`, and calls of them as those make them."""

from __future__ import annotations

import base64
import copy
import importlib
import json
import runpy
from abc import abstractproperty
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, TextStreamer

from llava import conversation as conversation_lib
from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_PLACEHOLDER, IMAGE_TOKEN_INDEX
from llava.conversation import SeparatorStyle, conv_templates, default_conversation
from llava.eval import model_vqa_loader, model_vqa_mmbench, model_vqa_qbench, model_vqa_science
from llava.eval.run_llava import conv_mode_of, eval_model, place_markers
from llava.mm_utils import (
    KeywordsStoppingCriteria,
    get_model_name_from_path,
    load_image_from_base64,
    process_images,
    tokenizer_image_token,
)
from llava.model.builder import load_pretrained_model
from llava.train.llava_trainer import LLaVATrainer
from llava.train.modeling import load_model, read_config
from llava.train.settings.parsing import parse_args
from llava.train.train import make_supervised_data_module, train
from llava.utils import disable_torch_init
from tests.tiny_world import ROOT, TinyWorld, make_tiny_world

MARKS = "DEFAULT_IM_START_TOKEN DEFAULT_IM_END_TOKEN DEFAULT_IMAGE_TOKEN IMAGE_TOKEN_INDEX"
EVALUATION = {
    "llava.constants": MARKS,
    "llava.conversation": "conv_templates SeparatorStyle",
    "llava.model.builder": "load_pretrained_model",
    "llava.utils": "disable_torch_init",
    "llava.mm_utils": "tokenizer_image_token process_images get_model_name_from_path",
}
STOPPING = {"llava.mm_utils": EVALUATION["llava.mm_utils"] + " KeywordsStoppingCriteria"}
# Program -> module -> names, as they stand in its import statements. (Not here: llava.serve, and video.)
IMPORTS: dict[str, dict[str, str]] = {
    "LLaVA llava/__init__.py": {"llava": "LlavaLlamaForCausalLM"},
    "LLaVA llava/model/__init__.py": {
        "llava.model": "LlavaLlamaForCausalLM LlavaConfig LlavaMistralForCausalLM LlavaMistralConfig",
        "llava.model.language_model.llava_llama": "LlavaLlamaForCausalLM LlavaConfig",
        "llava.model.language_model.llava_mistral": "LlavaMistralForCausalLM LlavaMistralConfig",
    },
    "LLaVA-NeXT llava/model/__init__.py": {
        "llava.model": "LlavaQwenForCausalLM LlavaQwenConfig",
        "llava.model.language_model.llava_qwen": "LlavaQwenForCausalLM LlavaQwenConfig",
    },
    "LLaVA README.md": {
        "llava.model.builder": "load_pretrained_model",
        "llava.mm_utils": "get_model_name_from_path",
        "llava.eval.run_llava": "eval_model",
    },
    "LLaVA llava/eval/run_llava.py": {**EVALUATION, "llava.constants": f"{MARKS} IMAGE_PLACEHOLDER"},
    "LLaVA llava/eval/model_vqa.py": EVALUATION,
    "LLaVA llava/eval/model_vqa_loader.py": EVALUATION,
    "LLaVA llava/eval/model_vqa_science.py": EVALUATION | STOPPING,
    "LLaVA llava/eval/model_vqa_mmbench.py": {
        **EVALUATION,
        "llava.mm_utils": EVALUATION["llava.mm_utils"] + " load_image_from_base64",
    },
    "LLaVA llava/eval/model_vqa_qbench.py": EVALUATION | STOPPING,
    "LLaVA llava/eval/model_qa.py": {"llava.conversation": "default_conversation", "llava.utils": "disable_torch_init"},
    "LLaVA llava/serve/cli.py": EVALUATION,
    "LLaVA llava/train/train_mem.py": {"llava.train.train": "train"},
    "LLaVA llava/train/train.py": {
        "llava.constants": f"IGNORE_INDEX {MARKS}",
        "llava.train.llava_trainer": "LLaVATrainer",
        "llava": "conversation",
        "llava.mm_utils": "tokenizer_image_token",
    },
    "programs on top of LLaVA's training": {
        "llava.train.train": "make_supervised_data_module ModelArguments DataArguments TrainingArguments"
    },
    "LLaVA scripts/merge_lora_weights.py": {
        "llava.model.builder": "load_pretrained_model",
        "llava.mm_utils": "get_model_name_from_path",
    },
    "lmms-eval llava": {**EVALUATION, "llava.constants": f"{MARKS} IGNORE_INDEX", "llava.utils": ""},
    "lmms-eval llava_onevision": {**EVALUATION, **STOPPING, "llava.constants": f"{MARKS} IGNORE_INDEX"},
    "lmms-eval llava_vid": {
        **EVALUATION,
        **STOPPING,
        "llava.model.language_model.llava_llama": "LlavaConfig",
        "llava.model.language_model.llava_qwen": "LlavaQwenConfig",
    },
    "VLMEvalKit llava": {**EVALUATION, **STOPPING, "llava.utils": ""},
}


@pytest.mark.parametrize("program", IMPORTS)
def test_names_are_where_programs_import_them(program: str) -> None:
    for module, names in IMPORTS[program].items():
        for name in names.split():
            found = getattr(importlib.import_module(module), name, None)
            assert found is not None, f"{program}: from {module} import {name}"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return make_tiny_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def checkpoint(world: TinyWorld) -> Path:
    """A full LLaVA, trained for one step."""
    folder = world.root / "llava-v1.5-tiny"
    train(parse_args(world.flags(folder, max_steps=1)))
    return folder


@pytest.fixture(scope="module")
def opened(checkpoint: Path) -> tuple[Any, Any, Any]:
    name = get_model_name_from_path(str(checkpoint))
    disable_torch_init()
    return load_pretrained_model(model_path=str(checkpoint), model_base=None, model_name=name, device="cpu")[:3]


def picture(world: TinyWorld) -> Image.Image:
    return Image.open(world.images / "red.png").convert("RGB")


def prompt_of(conversation: Any, question: str) -> str:
    conversation.append_message(conversation.roles[0], question)
    conversation.append_message(conversation.roles[1], None)
    return conversation.get_prompt()


# The ways to open a model: program -> arguments -----------------------------------------------------------------

OPENING: dict[str, dict[str, Any]] = {
    "LLaVA model_worker": {"load_8bit": False, "load_4bit": False, "device": "cpu", "use_flash_attn": False},
    "LLaVA merge_lora_weights": {"device_map": "cpu"},
    "lmms-eval llava": {"device_map": "cpu", "multimodal": True, "attn_implementation": "sdpa"},
    "lmms-eval llava, first release": {"device_map": "", "device": "cpu", "use_flash_attention_2": False},
    "lmms-eval llava_onevision": {
        "device_map": "cpu",
        "multimodal": True,
        "attn_implementation": "sdpa",
        "overwrite_config": {"mm_spatial_pool_stride": 2, "mm_spatial_pool_mode": "bilinear"},
    },
    "lmms-eval llava_vid": {
        "device_map": "cpu",
        "torch_dtype": "bfloat16",
        "overwrite_config": {"rope_scaling": {"factor": 2.0, "type": "linear"}, "max_sequence_length": 8192},
        "attn_implementation": "sdpa",
    },
    "VLMEvalKit LLaVA": {"device": "cpu", "device_map": "cpu"},
    "VLMEvalKit LLaVA_Next2": {"device_map": None},
    "LLaVA, all defaults said": {"device_map": "auto", "device": "cpu", "torch_dtype": torch.float16},
}


@pytest.mark.parametrize("program", OPENING)
def test_models_open_as_programs_open_them(program: str, checkpoint: Path) -> None:
    arguments = OPENING[program]
    name = get_model_name_from_path(str(checkpoint))
    _, model, processor, length = load_pretrained_model(str(checkpoint), None, name, **arguments)
    model.tie_weights()
    assert model.device.type == "cpu" and processor is not None
    wanted = arguments.get("torch_dtype")
    assert wanted is None or str(model.dtype).endswith(str(wanted).rpartition(".")[2])
    overwritten = dict(arguments.get("overwrite_config", {}))
    if rope := overwritten.pop("rope_scaling", None):
        assert model.config.rope_parameters["factor"] == rope["factor"]
    assert {key: getattr(model.config, key) for key in overwritten} == overwritten
    assert length == overwritten.get("max_sequence_length", 512)


def test_flash_attention_by_llavas_word(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="flash-attn"):
        load_pretrained_model(str(checkpoint), None, "llava", use_flash_attn=True, device="cpu")
    with pytest.raises(ValueError, match="choose one of"):
        load_pretrained_model(str(checkpoint), None, "llava", torch_dtype="float17")
    with pytest.raises(TypeError, match="no_such_word"):  # lmms-eval leaves out what is not known
        load_pretrained_model(str(checkpoint), None, "llava", no_such_word=True)


# Conversations ---------------------------------------------------------------------------------------------------


def test_conversations_as_programs_use_them() -> None:
    assert default_conversation.version == "v1"
    assert default_conversation.copy().roles == ("USER", "ASSISTANT")
    conv = copy.deepcopy(conv_templates["qwen_1_5"])  # VLMEvalKit and lmms-eval copy so
    prompt = prompt_of(conv, "<image>\nHi")
    conv.messages[1][1] = "Yes"  # lmms-eval's loglikelihood, and LLaVA's cli
    assert conv.get_prompt() == prompt + "Yes<|im_end|>\n"
    assert copy.deepcopy(conv).messages == conv.messages
    assert copy.deepcopy(conv_templates["qwen_1_5"]).messages == []


@pytest.mark.parametrize(
    ("name", "stop"),
    [
        ("vicuna_v1", "</s>"),
        ("llava_v1", "</s>"),
        ("llava_v0", "###"),
        ("mpt", "<|im_end|>"),
        ("chatml_direct", "<|im_end|>"),
        ("qwen_1_5", "<|im_end|>"),
        ("llava_llama_3", "<|eot_id|>"),
    ],
)
def test_the_stop_string_that_programs_read_off(name: str, stop: str) -> None:
    conv = conv_templates[name].copy()
    assert (conv.sep if conv.sep_style != SeparatorStyle.TWO else conv.sep2) == stop
    assert conv_templates[name].sep_style is conv.sep_style


def test_templates_of_llava() -> None:
    """https://github.com/haotian-liu/LLaVA/blob/c121f04/llava/conversation.py"""
    system = conv_templates["llava_v1"].system
    conv = conv_templates["llava_v0"].copy()
    assert prompt_of(conv, "one") == f"{system}###Human: one###Assistant:"
    conv.messages[-1][-1] = "two"
    assert prompt_of(conv, "three") == f"{system}###Human: one###Assistant: two###Human: three###Assistant:"
    assert prompt_of(conv_templates["mpt"].copy(), "one").startswith("<|im_start|>system\nA conversation between")


# Answers ---------------------------------------------------------------------------------------------------------


def answer(opened: tuple[Any, Any, Any], ids: Tensor, **arguments: Any) -> str:
    tokenizer, model, _ = opened
    with torch.inference_mode():
        new = model.generate(ids, do_sample=False, max_new_tokens=4, use_cache=True, **arguments)
    return tokenizer.batch_decode(new, skip_special_tokens=True)[0].strip()


def test_generation_as_programs_call_it(opened: tuple[Any, Any, Any], world: TinyWorld) -> None:
    tokenizer, model, processor = opened
    image = picture(world)
    ids = tokenizer_image_token(
        prompt_of(conv_templates["vicuna_v1"].copy(), f"{DEFAULT_IMAGE_TOKEN}\nWhat?"),
        tokenizer,
        IMAGE_TOKEN_INDEX,
        return_tensors="pt",
    ).unsqueeze(0)
    pixels = process_images([image], processor, model.config).half()  # all of them hand on half precision
    plain = answer(opened, ids, images=pixels, image_sizes=[image.size], temperature=0, top_p=None, num_beams=1)
    padding = {"attention_mask": ids.ne(0), "pad_token_id": 0}
    assert answer(opened, ids, images=list(pixels), image_sizes=[list(image.size)], **padding) == plain
    criteria = KeywordsStoppingCriteria(["</s>"], tokenizer, ids)
    assert answer(opened, ids, images=pixels, stopping_criteria=[criteria]) == plain
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    assert answer(opened, ids, images=pixels, streamer=streamer) == plain
    config = abstractproperty()  # what VLMEvalKit hands on in place of the model's config
    config.image_aspect_ratio = "pad"
    assert torch.equal(process_images([image], processor, config).half(), pixels)
    labels = ids.clone()
    labels[0, :-3] = -100
    output = model(input_ids=ids, labels=labels, images=pixels, use_cache=True, image_sizes=[image.size])
    assert output["loss"].isfinite() and output["logits"].ndim == 3


def test_text_alone_as_lmms_eval_asks(opened: tuple[Any, Any, Any]) -> None:
    ids = torch.tensor([opened[0]("Say red").input_ids])
    assert isinstance(answer(opened, ids, images=None, image_sizes=[], pad_token_id=0), str)


def test_keywords_stop_where_the_answer_has_them(opened: tuple[Any, Any, Any]) -> None:
    tokenizer = opened[0]
    prompt = torch.tensor([tokenizer("a###b").input_ids])
    criteria = KeywordsStoppingCriteria(["###", "</s>"], tokenizer, prompt)

    def done(*texts: str) -> list[bool]:
        rows = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
        alone = criteria(torch.tensor(rows), None)
        assert alone.dtype == torch.bool
        after = criteria(torch.cat([prompt.expand(len(rows), -1), torch.tensor(rows)], dim=1), None)
        assert torch.equal(alone, after)
        return alone.tolist()

    assert done("x###", "xxxx") == [True, False]
    assert done("</s>") == [True]
    assert done("##") == [False]


def test_an_image_of_base64_text(world: TinyWorld) -> None:
    text = base64.b64encode((world.images / "red.png").read_bytes()).decode()
    assert load_image_from_base64(text).convert("RGB").tobytes() == picture(world).tobytes()
    for wrong in ("abc", base64.b64encode(b"no image").decode()):
        with pytest.raises(ValueError, match="no image in base64"):
            load_image_from_base64(wrong)


def test_configs_register_a_second_time() -> None:
    from llava.model.language_model.llava_llama import LlavaConfig
    from llava.model.language_model.llava_qwen import LlavaQwenConfig

    AutoConfig.register("llava_llama", LlavaConfig)  # lmms-eval's llava_vid does
    AutoConfig.register("llava_qwen", LlavaQwenConfig)


# LLaVA's programs ------------------------------------------------------------------------------------------------


def test_run_llava_as_in_the_readme(
    checkpoint: Path, world: TinyWorld, opened: tuple[Any, Any, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """https://github.com/haotian-liu/LLaVA#quick-start-with-huggingface"""
    values = {
        "model_path": str(checkpoint),
        "model_base": None,
        "model_name": get_model_name_from_path(str(checkpoint)),
        "query": "What color is it?",
        "conv_mode": None,
        "image_file": str(world.images / "red.png"),
        "sep": ",",
        "temperature": 0,
        "top_p": None,
        "num_beams": 1,
        "max_new_tokens": 4,
    }
    args = type("Args", (), values)()
    said = eval_model(args)
    assert capsys.readouterr().out == f"{said}\n"
    tokenizer, model, processor = opened
    prompt = prompt_of(conv_templates["llava_v1"].copy(), "<image>\nWhat color is it?")
    ids = torch.tensor([tokenizer_image_token(prompt, tokenizer)])
    assert said == answer(opened, ids, images=process_images([picture(world)], processor, model.config))
    args.image_file = ",".join(2 * [args.image_file])
    args.tokenizer, args.model, args.image_processor = opened
    args.query = f"Is {IMAGE_PLACEHOLDER} as {IMAGE_PLACEHOLDER}?"
    assert isinstance(eval_model(args), str)


def test_the_template_of_a_name_and_the_place_of_images() -> None:
    names = {"llava-v1.5-7b": "llava_v1", "llava-v1.6-mistral-7b": "mistral_instruct", "out": "llava_v0"}
    names |= {"llava-v1.6-34b": "chatml_direct", "llava-llama-2-13b": "llava_llama_2"}
    assert {name: conv_mode_of(name) for name in names} == names
    assert place_markers(f"Is {IMAGE_PLACEHOLDER} red?", 1, False) == "Is <image> red?"
    assert place_markers("Same?", 2, True) == "<im_start><image><im_end>\n" * 2 + "Same?"


def flags_of(checkpoint: Path, world: TinyWorld, questions: Path, *more: str) -> list[str]:
    """The flags of LLaVA's evaluation scripts."""
    paths = {"--model-path": checkpoint, "--question-file": questions, "--answers-file": questions.parent / "a.jsonl"}
    words = [str(word) for pair in paths.items() for word in pair]
    return [*words, "--image-folder", str(world.images), "--temperature", "0", "--conv-mode", "vicuna_v1", *more]


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "a.jsonl").read_text().splitlines()]


def test_model_vqa_loader(checkpoint: Path, world: TinyWorld, tmp_path: Path) -> None:
    """With the flags of PyramidDrop's scripts for LLaVA's program, whose list has the first stage's 1.0."""
    questions = tmp_path / "q.jsonl"
    questions.write_text(json.dumps({"question_id": 3, "image": "red.png", "text": "What color?"}) + "\n")
    drops = ["--layer_list", "[1]", "--image_token_ratio_list", "[1.0,0.5]", "--pdrop_infer"]
    model_vqa_loader.main(flags_of(checkpoint, world, questions, "--max_new_tokens", "3", *drops))
    (row,) = rows_of(tmp_path)
    assert (row["question_id"], row["prompt"], row["metadata"]) == (3, "What color?", {})


def test_model_vqa_science(checkpoint: Path, world: TinyWorld, tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "Which?\n<image>"}, {"from": "gpt", "value": "A"}]
    rows = [{"id": "7", "image": "red.png", "conversations": turns}, {"id": "8", "conversations": turns}]
    questions = tmp_path / "q.json"
    questions.write_text(json.dumps(rows))
    short = ["--single-pred-prompt", "--max_new_tokens", "3"]
    model_vqa_science.main(flags_of(checkpoint, world, questions, *short))
    asked = "Which?\nAnswer with the option's letter from the given choices directly."
    assert [(r["question_id"], r["prompt"]) for r in rows_of(tmp_path)] == [("7", f"<image>\n{asked}"), ("8", asked)]
    questions.write_text(json.dumps([{"id": "7"}]))
    with pytest.raises(ValueError, match="entry 0: expected id, conversations"):
        model_vqa_science.main(flags_of(checkpoint, world, questions, "--overwrite"))


def test_model_vqa_mmbench(checkpoint: Path, world: TinyWorld, tmp_path: Path) -> None:
    image = base64.b64encode((world.images / "red.png").read_bytes()).decode()
    columns = ["index", "image", "question", "hint", "A", "B", "C", "D"]
    lines = [[5, image, "Which?", "nan", "red", "blue", "", ""]]
    lines += [[6, image, "Where?", "Look.", "up", "down", "left", ""]]
    questions = tmp_path / "q.tsv"
    questions.write_text("\n".join("\t".join(map(str, line)) for line in [columns, *lines]))
    rounds = ["--all-rounds", "--single-pred-prompt", "--lang", "cn", "--max_new_tokens", "2"]
    model_vqa_mmbench.main(flags_of(checkpoint, world, questions, *rounds))
    rows = rows_of(tmp_path)
    assert [(row["question_id"], row["round_id"]) for row in rows] == [(5, 0), (5, 1), (6, 0), (6, 1), (6, 2)]
    assert rows[1]["prompt"] == "Which?\nA. blue\nB. red"
    assert (rows[1]["options"], rows[1]["option_char"]) == (["blue", "red"], ["B", "A"])
    assert rows[2]["prompt"] == "Look.\nWhere?\nA. up\nB. down\nC. left"
    questions.write_text("index\tquestion\n1\tWhich?\n")
    with pytest.raises(ValueError, match="line 2: no image"):
        model_vqa_mmbench.main(flags_of(checkpoint, world, questions, "--overwrite"))


def test_model_vqa_qbench(checkpoint: Path, world: TinyWorld, tmp_path: Path) -> None:
    """With the flag of LLaVA's program for the questions; rows hold the entry, and the answer as `response` too."""
    entry = {"img_path": "red.png", "question": "清楚吗?", "candidates": ["是", "否"], "correct_ans": "是"}
    questions = tmp_path / "q.json"
    questions.write_text(json.dumps([entry]))
    flags = flags_of(checkpoint, world, questions, "--lang", "zh", "--max_new_tokens", "3")
    model_vqa_qbench.main([flag.replace("--question-file", "--questions-file") for flag in flags])
    (row,) = rows_of(tmp_path)
    assert row["prompt"] == "清楚吗?\\在下列选项中选择一个:\nA. 是\nB. 否"
    assert row["response"] == row["text"] and entry.items() <= row.items()


# Training --------------------------------------------------------------------------------------------------------


def test_llavas_own_train_mem(world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train_mem.py", *world.flags(tmp_path, max_steps=1)])
    train(attn_implementation="flash_attention_2")
    assert (tmp_path / "model.safetensors").is_file()


def test_a_trainer_made_as_llavas_programs_make_it(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = parse_args(world.flags(tmp_path, lora_enable=True, lora_r=2, max_steps=1))
    config = read_config(arguments)
    tokenizer = AutoTokenizer.from_pretrained(world.llm, model_max_length=512, padding_side="right", use_fast=False)
    tokenizer.pad_token = tokenizer.unk_token
    monkeypatch.setattr(conversation_lib, "default_conversation", conv_templates[arguments.model.version])
    model = load_model(arguments, config, tokenizer)
    arguments.data.image_processor = model.get_base_model().get_vision_tower().image_processor  # type: ignore
    data = make_supervised_data_module(tokenizer=tokenizer, data_args=arguments.data)
    trainer = LLaVATrainer(model=model, tokenizer=tokenizer, args=arguments.training, **data)
    trainer.train()
    trainer.save_model()
    assert (tmp_path / "adapter_model.safetensors").is_file()


# Fields of LoraConfig in PEFT 0.4. Releases of the time of LLaVA's own code, up to 0.10, refuse others.
PEFT_0_4 = """auto_mapping base_model_name_or_path bias fan_in_fan_out inference_mode init_lora_weights layers_pattern
layers_to_transform lora_alpha lora_dropout modules_to_save peft_type r revision target_modules task_type"""


def test_an_adapter_has_no_key_that_old_releases_of_peft_refuse(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And LLaVA's two scripts that take a result apart and together."""
    lora, merged, projector = tmp_path / "lora", tmp_path / "merged", tmp_path / "parts" / "mm_projector.bin"
    train(parse_args(world.flags(lora, lora_enable=True, lora_r=2, max_steps=1)))
    written = json.loads((lora / "adapter_config.json").read_text())
    assert set(written) == set(PEFT_0_4.split())
    config = json.loads((lora / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]  # where transformers 4 looks for it

    def script(name: str, *words: object) -> None:
        monkeypatch.setattr("sys.argv", [name, *map(str, words)])
        runpy.run_path(str(ROOT / "scripts" / name), run_name="__main__")

    script("merge_lora_weights.py", "--model-path", lora, "--model-base", world.llm, "--save-model-path", merged)
    script("extract_mm_projector.py", "--model-path", merged, "--output", projector)
    weights = torch.load(projector, weights_only=True)
    assert sorted(weights) == [f"model.mm_projector.{i}.{part}" for i in (0, 2) for part in ("bias", "weight")]
    model = load_pretrained_model(merged, None, "llava", device="cpu")[1]
    model.get_model().load_projector(weights, projector)
