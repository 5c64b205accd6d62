"""Tokenizers: the ids of training stay those of every checkpoint that is written from it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import Tokenizer, models
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
)

from llava.constants import IMAGE_TOKEN_INDEX
from llava.data.preprocessing import preprocess
from llava.model.convert import convert
from llava.model.tokenizer import open_tokenizer, save_tokenizer
from llava.train.merge import merge_checkpoint
from llava.train.modeling import load_tokenizer
from llava.train.settings.parsing import parse_args
from llava.train.train import train
from tests.tiny_world import ROOT, make_tiny_world

TOY = ROOT / "playground" / "toy" / "models" / "vicuna"
SPECIAL = ("<s>", "</s>", "<unk>")
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4}
SIZES = {"vocab_size": 600, "hidden_size": 32, "intermediate_size": 48, **HEADS}
# `legacy` in tokenizer_config.json; how tokenizer.json splits, None for sentencepiece alone; what `legacy` is meant.
CASES = {
    "true": (True, None, True),
    "false": (False, None, False),
    "absent": (None, None, True),
    "true-fast": (True, "always", True),
    "false-fast": (False, "first", False),
    "absent-fast-first": (None, "first", False),
    "absent-fast-of-transformers-4": (None, "prepend", True),
    "absent-mistral": (None, None, True),
}
WORDS = ("circle", "a red square", "USER:", " ASSISTANT:", "\n", "\n\n", " ", "  ", "▁", "é🙂", "0")
texts = st.lists(st.sampled_from([*WORDS, *SPECIAL]), max_size=8).map("".join)
quick = settings(max_examples=50, deadline=None, derandomize=True)


def write_tokenizer(folder: Path, legacy: bool | None, splits: str | None) -> Path:
    """The toy's tokenizer as files of different releases have it."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(TOY / "tokenizer.model", folder / "tokenizer.model")
    config = {**json.loads((TOY / "tokenizer_config.json").read_text()), "legacy": legacy}
    if splits is not None:
        LlamaTokenizer.from_pretrained(TOY, legacy=splits != "first").save_pretrained(folder)
        (folder / "tokenizer.model").unlink()
    if splits == "prepend":  # as transformers 4 wrote them
        fast = json.loads((folder / "tokenizer.json").read_text())
        prepend = {"type": "Prepend", "prepend": "▁"}
        replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        fast |= {"pre_tokenizer": None, "normalizer": {"type": "Sequence", "normalizers": [prepend, replace]}}
        (folder / "tokenizer.json").write_text(json.dumps(fast))
    if legacy is None:
        del config["legacy"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


class Run(NamedTuple):
    """A run's tokenizer, and those that are opened from what came of it."""

    trained: Any
    ours: dict[str, Any]
    theirs: dict[str, Any]
    processor: Any
    legacy: bool

    def __repr__(self) -> str:
        return "run"


@pytest.fixture(scope="module", params=CASES)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """LoRA training, its checkpoint, the merged model, llava-hf and back."""
    legacy, splits, meant = CASES[request.param]
    root = tmp_path_factory.mktemp("run")
    world = make_tiny_world(root)
    shutil.rmtree(world.llm)
    config = {"model_type": "mistral" if "mistral" in request.param else "llama", "num_hidden_layers": 1, **SIZES}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).save_pretrained(world.llm)
    write_tokenizer(world.llm, legacy, splits)
    lora = {"lora_enable": True, "lora_r": 2, "max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    arguments = parse_args(world.flags(root / "lora", **lora))
    trainer = train(arguments)
    merge_checkpoint(str(root / "lora"), root / "merged")
    convert(root / "merged", root / "hf", template="v1")
    convert(root / "hf", root / "back", "llava")
    folders = ("lora", "lora/checkpoint-1", "merged", "hf", "back")
    return Run(
        trainer.processing_class,
        {name: open_tokenizer(root / name) for name in folders} | {"again": load_tokenizer(arguments)},
        {name: AutoTokenizer.from_pretrained(root / name) for name in folders},
        AutoProcessor.from_pretrained(root / "hf"),
        meant,
    )


@quick
@given(text=texts)
def test_ids_are_those_of_training(run: Run, text: str) -> None:
    expected = run.trained(text).input_ids
    for name, tokenizer in run.ours.items():
        assert tokenizer(text).input_ids == expected, name
    for name, tokenizer in run.theirs.items():
        assert tokenizer(text).input_ids == expected, f"{name}, opened by transformers"


@quick
@given(questions=st.lists(st.sampled_from(["where?", "What is it?\nSay."]), min_size=1, max_size=3))
def test_chats_of_the_hf_export_have_the_ids_of_training(run: Run, questions: list[str]) -> None:
    """One turn and several, a picture in front: what transformers' processor writes and tokenizes."""
    conversation, messages = [], []
    for index, question in enumerate(questions):
        picture = [{"type": "image"}] if index == 0 else []
        messages += [
            {"role": "user", "content": [*picture, {"type": "text", "text": question}]},
            {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
        ]
        text = f"<image>\n{question}" if index == 0 else question
        conversation += [{"from": "human", "value": text}, {"from": "gpt", "value": "red"}]
    expected = preprocess(conversation, run.trained, "v1", has_image=True).input_ids.tolist()
    text = run.processor.apply_chat_template(messages)
    image = run.processor.tokenizer.convert_tokens_to_ids("<image>")
    ids = run.processor.tokenizer(text).input_ids
    assert [IMAGE_TOKEN_INDEX if token == image else token for token in ids] == expected
    for tokenizer in run.ours.values():
        assert preprocess(conversation, tokenizer, "v1", has_image=True).input_ids.tolist() == expected


def test_the_switch_is_what_llavas_releases_read(run: Run) -> None:
    """transformers 4 without a tokenizer.json: sentencepiece for each piece between special tokens."""
    sentencepiece = SentencePieceProcessor(model_file=str(TOY / "tokenizer.model"))
    first, second = (sentencepiece.encode(text) for text in ("red", "USER:"))
    if not run.legacy:
        second = sentencepiece.encode("red" + "USER:")[len(first) :]
    assert run.trained("red</s>USER:").input_ids == [1, *first, 2, *second]


@quick
@given(text=texts)
def test_the_toys_tokenizer_is_the_same_slow_and_fast(text: str) -> None:
    """Spaces are kept, as with Llama's: sentencepiece's default would drop those at the end and of two one."""
    text = text.replace("<", " ").replace("▁", "").lstrip(" ")
    slow = SentencePieceProcessor(model_file=str(TOY / "tokenizer.model")).encode(text)
    assert open_tokenizer(TOY)(text, add_special_tokens=False).input_ids == slow


def test_checkpoints_that_lost_the_switch_split_as_they_did(tmp_path: Path) -> None:
    """As earlier versions wrote them: their tokenizer.json still says it, and a run that goes on keeps to it."""
    base, text = write_tokenizer(tmp_path / "base", None, None), "red</s>USER:"
    seen = []
    for legacy in (True, False):
        first = LlamaTokenizer.from_pretrained(base, legacy=legacy)
        first.save_pretrained(old := tmp_path / str(legacy))
        assert "legacy" not in json.loads((old / "tokenizer_config.json").read_text())
        seen.append(first(text).input_ids)
        assert open_tokenizer(old)(text).input_ids == open_tokenizer(base, like=old)(text).input_ids == seen[-1]
    assert seen[0] != seen[1]


def test_the_sentencepiece_model_goes_along(tmp_path: Path) -> None:
    """LLaVA's own code reads no other file."""
    save_tokenizer(open_tokenizer(TOY), tmp_path)
    assert (tmp_path / "tokenizer.model").read_bytes() == (TOY / "tokenizer.model").read_bytes()
    save_tokenizer(open_tokenizer(tmp_path), tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["legacy"] is True


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.model", b"nonsense" * 9, "is no sentencepiece model"),
        ("tokenizer.model", b"", "is no sentencepiece model|holds no tokenizer"),
        ("tokenizer.model", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is no sentencepiece model"),
        ("tokenizer.model", None, "holds no tokenizer|does not open"),
        ("tokenizer.json", b'{"version": "1.0"', "tokenizer.json is damaged"),
        ("tokenizer.json", b'{"version": "1.0"}', "does not open"),
        ("tokenizer_config.json", b"{", "tokenizer_config.json is damaged"),
        ("tokenizer_config.json", b"[]", "tokenizer_config.json: expected a JSON object"),
    ],
)
def test_damaged_files_are_named(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path, True, None)
    (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        open_tokenizer(folder)
    assert "tiktoken" not in str(raised.value) and str(folder) in str(raised.value)


def test_a_tokenizer_that_names_no_end_is_refused(tmp_path: Path) -> None:
    """As tokenizer.json alone does, for models whose class does not know it."""
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no token that ends an answer \(eos_token\): its tokenizer_config.json"):
        open_tokenizer(tmp_path)


@pytest.mark.parametrize("legacy", [None, True])
def test_a_sentencepiece_model_may_put_no_space_in_front(legacy: bool | None, tmp_path: Path) -> None:
    """Yi's, that of LLaVA-1.6-34B; its release encoded every piece of text as sentencepiece does."""
    words = tmp_path / "words.txt"
    words.write_text("hello world\nwhat is in the picture\n" * 20)
    SentencePieceTrainer.train(
        input=str(words),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if legacy is not None:
        settings["legacy"] = legacy
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    reference = SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    opened = open_tokenizer(tmp_path)
    save_tokenizer(opened, tmp_path / "saved")
    fast = json.loads((tmp_path / "saved" / "tokenizer.json").read_text())
    fast["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}  # as transformers 4 wrote it
    (tmp_path / "tokenizer.json").write_text(json.dumps({**fast, "pre_tokenizer": None}))
    for tokenizer in (opened, open_tokenizer(tmp_path / "saved"), open_tokenizer(tmp_path)):
        for text in ("hello world", "\nwhat is", " in"):
            assert tokenizer(text, add_special_tokens=False).input_ids == reference.encode(text)
        joined = tokenizer("hello</s>world", add_special_tokens=False).input_ids
        assert joined == [*reference.encode("hello"), tokenizer.eos_token_id, *reference.encode("world")]
