"""Templates, ids and labels: against the release, and properties that hold for any tokenizer and text."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, BatchEncoding, PreTrainedTokenizerFast

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import Template, conv_templates, get_template
from llava.data import (
    ConversationError,
    NoTrainableTokensError,
    build_prompt,
    build_prompt_ids,
    preprocess,
)
from llava.data.preprocessing import place_images
from llava.mm_utils import tokenizer_image_token

CHAT_TEMPLATES = sorted({template.name for template in conv_templates.values()} - {"plain"})
MARKS = [
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<im_start>",
    "<im_end>",
]
CORPUS = [
    "What is the colour of the bus?\n\nAnswer the question using a single word or phrase.",
    "user\n\nassistant\n\n\nUSER: system ASSISTANT: [INST] [/INST] <<SYS>>\n<</SYS>>\n\n  a man  riding",
    "A chat between a curious user and an artificial intelligence assistant. \n 你好 été \n\n\n ...\n",
] * 3
LLAMA_3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level_tokenizer(bos: bool, trim_offsets: bool) -> PreTrainedTokenizerFast:
    """A small byte-level BPE joining line breaks, as Qwen's (no bos) or Llama 3's (bos, trimmed offsets)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA_3_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([*MARKS, "</s>", "<s>", "<pad>"])
    post: Any = processors.ByteLevel(trim_offsets=trim_offsets)
    if bos:
        start = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))])
        post = processors.Sequence([post, start])
    tokenizer.post_processor = post
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>" if bos else None,
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )


def metaspace_tokenizer(scheme: str) -> PreTrainedTokenizerFast:
    """A small BPE with byte fallback and a space before each text ("always", as Llama's) or the "first"."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=True)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator([text.replace("\n", " ") for text in CORPUS], trainer)
    # Trained as special tokens, the bytes would be found in text and skipped in decoding.
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = state["added_tokens"][:3]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.add_special_tokens(MARKS)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


class Wrapped:
    """A tokenizer with another one's vocabulary and something taken from it."""

    def __init__(self, tokenizer: Any, is_fast: bool, offsets: bool) -> None:
        self.tokenizer, self.is_fast, self.offsets = tokenizer, is_fast, offsets
        self.bos_token_id = tokenizer.bos_token_id

    def __call__(self, text: str, **kwargs: Any) -> Any:
        if kwargs.get("return_offsets_mapping") and not self.is_fast:
            raise NotImplementedError("a slow tokenizer has no offsets")
        encoding = self.tokenizer(text, **kwargs)
        if not self.offsets and "offset_mapping" in encoding:
            encoding["offset_mapping"] = [(0, 0) for _ in encoding["offset_mapping"]]
        return encoding

    def decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids))


TOKENIZERS = {
    "qwen": byte_level_tokenizer(bos=False, trim_offsets=False),
    "llama_3": byte_level_tokenizer(bos=True, trim_offsets=True),
    "llama": metaspace_tokenizer("always"),
    "llama_non_legacy": metaspace_tokenizer("first"),
}
TOKENIZERS["slow"] = Wrapped(TOKENIZERS["qwen"], is_fast=False, offsets=True)
TOKENIZERS["broken_offsets"] = Wrapped(TOKENIZERS["llama_3"], is_fast=True, offsets=False)

words = st.sampled_from(
    ["a", " ", "\n", "\n\n", "  ", "2", ".", ":", "bus", "</", "[", "]", "{", "é", "你好", "👍", "\t", "\r\n"]
)
texts = st.one_of(
    st.lists(words, max_size=8).map("".join),
    # The space of sentencepiece looks like a space again when decoded; lone surrogates are no text.
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=12),
).filter(lambda text: not any(mark in text for mark in ["<image>", "<s>", "</s>", "<unk>", "<pad>", *MARKS]))
conversations = st.lists(st.tuples(texts, texts.filter(str.strip)), min_size=1, max_size=3)


def turns(rounds: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"from": role, "value": text} for pair in rounds for role, text in zip(("human", "gpt"), pair, strict=True)]


def learned_runs(ids: list[int], labels: list[int]) -> list[list[int]]:
    pairs = zip(ids, labels, strict=True)
    runs = [(key, list(group)) for key, group in groupby(pairs, key=lambda pair: pair[1] != IGNORE_INDEX)]
    return [[token for token, _ in group] for key, group in runs if key]


def check_learned(rounds: list[tuple[str, str]], tokenizer: Any, template: Template, has_image: bool) -> None:
    ids, labels = preprocess(turns(rounds), tokenizer, template.name, has_image)
    assert ids.dtype == labels.dtype == torch.long
    runs = learned_runs(ids.tolist(), labels.tolist())
    assert all(label in (IGNORE_INDEX, token) for token, label in zip(ids.tolist(), labels.tolist(), strict=True))
    assert len(runs) == len(rounds)
    for run, (_, answer) in zip(runs, rounds, strict=True):
        expected = template.answer_lead + answer + template.answer_close
        # A sentencepiece decoder drops one space in front of a text.
        assert tokenizer.decode(run) in (expected, expected.removeprefix(" "))


@pytest.fixture(scope="session")
def vicuna(golden: Path) -> Any:
    return AutoTokenizer.from_pretrained(golden / "vicuna")


@pytest.fixture(scope="session")
def vicuna_with_marks(golden: Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(golden / "vicuna")
    tokenizer.add_tokens(MARKS, special_tokens=True)
    return tokenizer


def test_equals_the_release(golden: Path, vicuna: Any) -> None:
    cases = json.loads((golden / "cases" / "preprocess.json").read_text())
    for case in cases["expected"]:
        conversation = cases["conversations"][case["conversation"]]
        has_image = any("<image>" in turn["value"] for turn in conversation)
        ids, labels = preprocess(conversation, vicuna, case["version"], has_image)
        assert ids.tolist() == case["input_ids"], case["version"]
        assert labels.tolist() == case["labels"], case["version"]


@pytest.mark.parametrize("name", ["llava15_0", "llava15_1", "llava15_2", "llava16_0"])
def test_prompt_ids_equal_the_release(golden: Path, vicuna: Any, name: str) -> None:
    from safetensors.torch import load_file

    case = json.loads((golden / "cases" / f"{name}.json").read_text())
    expected = load_file(golden / "cases" / f"{name}.safetensors")["input_ids"].flatten()
    prompt = build_prompt(case["question"], "vicuna_v1")
    assert torch.equal(build_prompt_ids(case["question"], vicuna, "vicuna_v1"), expected)
    assert torch.equal(tokenizer_image_token(prompt, vicuna, return_tensors="pt"), expected)


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("name", CHAT_TEMPLATES)
@settings(max_examples=25, deadline=None)
@given(rounds=conversations)
def test_labels_decode_to_the_answers(name: str, tokenizer: str, rounds: list[tuple[str, str]]) -> None:
    check_learned(rounds, TOKENIZERS[tokenizer], get_template(name), has_image=False)


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
@settings(max_examples=25, deadline=None)
@given(rounds=conversations)
def test_labels_decode_to_the_answers_sentencepiece(
    name: str, vicuna_with_marks: Any, rounds: list[tuple[str, str]]
) -> None:
    check_learned(rounds, vicuna_with_marks, get_template(name), has_image=False)


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@settings(max_examples=25, deadline=None)
@given(question=texts, answer=texts.filter(str.strip))
def test_captions_decode_to_the_caption(tokenizer: str, question: str, answer: str) -> None:
    check_learned([(question + "<image>", answer)], TOKENIZERS[tokenizer], get_template("plain"), has_image=True)


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("name", CHAT_TEMPLATES)
@settings(max_examples=25, deadline=None)
@given(question=texts, answer=texts.filter(str.strip), images=st.integers(0, 2), marks=st.booleans())
def test_inference_reads_what_training_reads(
    name: str, tokenizer: str, question: str, answer: str, images: int, marks: bool
) -> None:
    value = "<image>\n" * images + question
    ids, labels = preprocess(
        turns([(value, answer)]), TOKENIZERS[tokenizer], name, images > 0, mm_use_im_start_end=marks
    )
    start = int((labels != IGNORE_INDEX).nonzero()[0])
    prompt = build_prompt_ids(question, TOKENIZERS[tokenizer], name, images, mm_use_im_start_end=marks)
    assert torch.equal(prompt, ids[:start])
    assert int((ids == IMAGE_TOKEN_INDEX).sum()) == images
    text = build_prompt(question, name, images, mm_use_im_start_end=marks)
    assert tokenizer_image_token(text, TOKENIZERS[tokenizer]) == prompt.tolist()


def test_a_token_never_reaches_from_the_prompt_into_the_answer() -> None:
    tokenizer = TOKENIZERS["qwen"]
    whole = tokenizer("assistant\n\nRed", add_special_tokens=False).tokens()
    assert "ĊĊ" in whole, "the case needs a vocabulary that joins two line breaks"
    check_learned([("Which?", "\nRed"), ("Sure?", "\n\nYes")], tokenizer, get_template("qwen"), has_image=False)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("plain", "<image>"),
        ("llava_v1", "the human's questions. USER: <image>\nHi ASSISTANT:"),
        ("llama_2", "don't share false information.\n<</SYS>>\n\n<image>\nHi [/INST]"),
        ("mistral_instruct", "[INST] <image>\nHi [/INST]"),
        (
            "chatml_direct",
            "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n<image>\nHi<|im_end|>"
            "<|im_start|>assistant\n",
        ),
        (
            "qwen_2",
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
            "<|im_start|>user\n<image>\nHi<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "llama_3",
            "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n<image>\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
    ],
)
def test_prompts(name: str, expected: str) -> None:
    prompt = build_prompt("Hi", name)
    assert prompt.endswith(expected)
    conversation = conv_templates[name].copy()
    conversation.append_message(conversation.roles[0], "<image>\nHi")
    conversation.append_message(conversation.roles[1], None)
    assert conversation.get_prompt() == prompt


def test_conversation_over_several_turns() -> None:
    first = conv_templates["v1"].copy()
    first.system = "Sys."
    first.append_message("USER", "one")
    copied = first.copy()
    first.append_message("ASSISTANT", "two")
    first.append_message("USER", "three")
    first.append_message("ASSISTANT", None)
    assert first.get_prompt() == "Sys. USER: one ASSISTANT: two</s>USER: three ASSISTANT:"
    assert copied.get_prompt() == "Sys. USER: one ASSISTANT:"
    assert (first.sep, first.sep2, first.stop_strings) == (" ", "</s>", ["</s>"])
    with pytest.raises(ValueError, match="belongs to 'USER'"):
        first.append_message("ASSISTANT", "again")
    assert conv_templates["v1"].copy().messages == []
    llama = conv_templates["llava_llama_2"].copy()
    llama.system = ""
    for text in ("one", "two", "three"):
        llama.append_message(llama.roles[len(llama.messages) % 2], text)
    assert llama.get_prompt() == "[INST] one [/INST] two </s><s>[INST] three [/INST]"


def test_unknown_template_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"unknown conversation template 'vicuna'.*vicuna_v1"):
        preprocess(turns([("a", "b")]), TOKENIZERS["qwen"], "vicuna", False)
    with pytest.raises(TypeError):
        conv_templates["v1"] = conv_templates["plain"]  # type: ignore[index]


def test_a_template_that_would_cut_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="ends in a space"):
        Template(name="bad", question_close="A: ", answer_close="</s>")
    with pytest.raises(ValueError, match="answer_close is empty"):
        Template(name="bad", answer_close="")


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("Look. <image>", "<image>\nLook."),
        ("<image>", "<image>"),
        ("no image ", "no image "),
        ("<image>\n<image>\nWhich?", "<image>\n<image>\nWhich?"),
        ("First <image>, then <image>?", "First <image>, then <image>?"),
    ],
)
def test_place_images(question: str, expected: str) -> None:
    assert place_images(question) == expected
    marked = place_images(question, mm_use_im_start_end=True)
    assert marked == expected.replace("<image>", "<im_start><image><im_end>")


def test_several_images_are_counted() -> None:
    ids, _ = preprocess(
        turns([("<image>\n<image>\nWhich?", "one"), ("And <image>?", "two")]), TOKENIZERS["llama"], "v1", True
    )
    assert int((ids == IMAGE_TOKEN_INDEX).sum()) == 3


def test_image_tag_is_text_without_images() -> None:
    ids, labels = preprocess(turns([("Explain <image>", "An <image> tag")]), TOKENIZERS["qwen"], "v1", False)
    assert IMAGE_TOKEN_INDEX not in ids.tolist()
    assert TOKENIZERS["qwen"].decode(ids.tolist()).count("<image>") == 2
    assert "An <image> tag" in TOKENIZERS["qwen"].decode(labels[labels != IGNORE_INDEX].tolist())


def test_last_question_without_answer_is_read_only() -> None:
    open_end = [*turns([("a", "b")]), {"from": "human", "value": "c"}]
    ids, labels = preprocess(open_end, TOKENIZERS["qwen"], "v1", False)
    assert len(learned_runs(ids.tolist(), labels.tolist())) == 1


HUMAN = {"from": "human", "value": "Hi <image>"}
ANSWER = {"from": "gpt", "value": "Yes"}


@pytest.mark.parametrize(
    ("conversation", "version", "error", "match"),
    [
        ([], "v1", ConversationError, "non-empty list"),
        ("text", "v1", ConversationError, "non-empty list"),
        ([HUMAN, "text"], "v1", ConversationError, "turn 1 is not"),
        ([HUMAN, {"from": "gpt"}], "v1", ConversationError, "turn 1 is not"),
        (
            [HUMAN, {"from": "bot", "value": "x"}],
            "v1",
            ConversationError,
            "turn 1 is from 'bot'; known roles",
        ),
        ([HUMAN, HUMAN, ANSWER], "v1", ConversationError, "turn 1 is from 'human', expected 'gpt'"),
        ([ANSWER, ANSWER, HUMAN], "v1", ConversationError, "turn 1 is from 'gpt', expected 'human'"),
        ([HUMAN, {"from": "gpt", "value": "<image>"}], "v1", ConversationError, "only human turns"),
        ([HUMAN], "v1", NoTrainableTokensError, "no answer"),
        ([ANSWER], "v1", NoTrainableTokensError, "no answer"),
        ([HUMAN, ANSWER, HUMAN, ANSWER], "plain", ConversationError, "one caption, got 4 turns"),
        ([{"from": "human", "value": "Hi"}, ANSWER], "plain", ConversationError, "shows none"),
    ],
)
def test_bad_conversations_name_the_sample(
    conversation: Any, version: str, error: type[ValueError], match: str
) -> None:
    with pytest.raises(error, match=match) as caught:
        preprocess(conversation, TOKENIZERS["qwen"], version, True, sample="sample 'x7'")
    assert "sample 'x7'" in str(caught.value)


def test_all_labels_masked_names_the_sample() -> None:
    def silent(text: str, **_: Any) -> BatchEncoding:
        return BatchEncoding({"input_ids": []})

    silent.is_fast, silent.bos_token_id = False, None  # type: ignore[attr-defined]
    with pytest.raises(NoTrainableTokensError, match=r"'x7'.* no token for its answers"):
        preprocess([HUMAN, ANSWER], silent, "v1", True, sample="sample 'x7'")


def test_start_token_comes_once() -> None:
    tokenizer = TOKENIZERS["llama_3"]
    with_start = build_prompt_ids("Hi", tokenizer, "v1", 0, system="<s>A chat.")
    assert torch.equal(with_start, build_prompt_ids("Hi", tokenizer, "v1", 0, system="A chat."))
    assert with_start.tolist().count(tokenizer.bos_token_id) == 1
    assert tokenizer_image_token("<s><image>", tokenizer) == tokenizer_image_token("<image>", tokenizer)


def test_wrong_number_of_images_in_a_question() -> None:
    with pytest.raises(ValueError, match=r"2 <image> for 1 image"):
        build_prompt("<image> <image>", "v1", 1)


@pytest.mark.parametrize("version", ["v1", "chatml", "llava_llama_2"])
def test_an_empty_answer_trains_the_token_that_ends_it(vicuna_with_marks: Any, version: str) -> None:
    turns = [{"from": "human", "value": "Is there text?"}, {"from": "gpt", "value": ""}]
    labels = preprocess(turns, vicuna_with_marks, version, has_image=False).labels
    learnt = vicuna_with_marks.decode(labels[labels != IGNORE_INDEX])
    assert get_template(version).stop.strip() in learnt
