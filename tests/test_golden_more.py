"""Inputs and outputs of released code of the field's methods, and of plain references where it may not be run.

A family of cases is a row of `ROWS`: the method, its options by a case's JSON, and what is compared. Cases on the
encoder's side start from the stored output of the vision tower (`tower_i`); those that stand against noise also from
pixels.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from llava.model.image_layout import padded_patches
from llava.model.language_model.drop_plan import keep_best
from llava.model.language_model.staged import StagedPass
from llava.model.multimodal_encoder.regrouping import run_block
from llava.reduction import VisionFeatures, available, build
from llava.reduction.tower.tokens import TowerTokens
from tests.conftest import GOLDEN
from tests.golden.pack import FILES, MORE, read_index, read_packed
from tests.test_golden import check_answer, open_checkpoint, pixels

CASES = GOLDEN.parent / "golden-more" / "cases"  # beside the repository, which keeps a selection itself
TOKENS = {"atol": 1e-4, "rtol": 0}
IMAGES = 3
Case = dict[str, Tensor]
About = dict[str, Any]


def read_more(name: str) -> tuple[Case, About]:
    """Tensors and JSON of a case: of the set beside the repository, or of the selection in `tests/golden/more`."""
    if CASES.is_dir():
        return load_file(CASES / f"{name}.safetensors"), json.loads((CASES / f"{name}.json").read_text("utf-8"))
    about = MORE / FILES / read_index(MORE)["files"][f"{name}.json"]
    return read_packed(f"{name}.safetensors", MORE), json.loads(about.read_text("utf-8"))


def seam(*images: int, **more: Tensor) -> VisionFeatures:
    """What the tower hands on for some images, all that a method may need of the selected block."""
    cases = [read_more(f"tower_{i}")[0] for i in images]
    every = {name: torch.cat([case[name] for case in cases]) for name in cases[0]}
    hidden = every["hidden_states"]
    return VisionFeatures(
        hidden[:, 1:],
        grid=(24, 24),
        keys=every["keys"],
        num_heads=every["cls_attention"].shape[1],
        attention={"selected": every["cls_attention"][..., 1:]},
        cls=hidden[:, 0],
        patch_embeds=every["image_embeds"],
        projected=every["projected"],
        **more,
    )


@contextlib.contextmanager
def tower_gives(model: Any, vision: VisionFeatures) -> Iterator[None]:
    """Put stored features in the place of the vision tower's."""
    with mock.patch.object(model.get_vision_tower(), "forward", lambda *_, **__: vision):
        yield


def images_of(about: About) -> list[int]:
    return about["images"] if "images" in about else [about["image"]]


def stands(about: About) -> bool:
    """Whether the case also holds from pixels, on another machine."""
    said = about["stands"]
    return said["pixels_float64"] and said["pixels_moved_1e-6"] == "3/3"


@dataclass
class Row:
    """A family of cases.

    Attributes:
        method: its registered name.
        options: of a case, from its JSON.
        check: compares; called with this row, the case's name and the golden folder.
        beside: `text` and the like of a case for `VisionFeatures`, which no tower makes.
    """

    method: str
    options: Callable[[About], dict[str, Any]]
    check: Callable[[Row, str, Path], None]
    beside: Callable[[Any, Case, About], dict[str, Tensor]] = lambda *_: {}

    def reduction(self, about: About) -> dict[str, Any]:
        return {"name": self.method, **self.options(about)}


# What is compared -------------------------------------------------------------------------------------------------


@torch.no_grad()
def check_after_the_tower(row: Row, name: str, golden: Path) -> None:
    """Kept patches and tokens from the seam; the answer from the seam, and from pixels where the case stands."""
    case, about = read_more(name)
    images = images_of(about)
    model = with_method(golden, row.reduction(about))
    vision = seam(*images, **row.beside(model, case, about))
    tokens = build(**row.reduction(about))(vision)
    assert tokens.mask is None or tokens.mask.all()
    if "kept" in case:
        patches = [[p for p in kept if p >= 0] for kept in tokens.source.tolist()]
        assert patches == [[p for p in kept if p >= 0] for kept in case["kept"].tolist()]
    if "output" in case:
        features = tokens.features
        if features.shape[-1] != case["output"].shape[-1]:
            features = model.get_model().mm_projector(features)
        torch.testing.assert_close(features, case["output"], **TOKENS)
    if "input_ids" not in case:
        return
    inputs: dict[str, Any] = {"images": pixels(golden, "pixels_pad")[images]}
    if "image_size" in about:
        inputs["image_sizes"] = [about["image_size"]]
    if row.method == "cdpruner":
        inputs["texts"] = [about["text"]]  # in some cases another than the prompt's
    with tower_gives(model, vision):
        check_answer(model, case, **inputs)
    if stands(about):
        check_answer(model, case, **inputs)


@torch.no_grad()
def check_in_the_tower(row: Row, name: str, golden: Path) -> None:
    """Tokens and their patches from pixels in float64, and the answer where the case stands."""
    case, about = read_more(name)
    images = pixels(golden, "pixels_pad")[images_of(about)]
    model = with_method(golden, row.reduction(about))
    inner = model.get_model()
    with in_float64(model.get_vision_tower()):
        tokens = inner.read_tiles(images, None, inner.reducers())
    assert tokens.features.shape == case["output"].shape
    if about["stands"]["pixels_float64"]:
        atol = 1e-3 * float(case["output"].abs().max())
        torch.testing.assert_close(tokens.features.float(), case["output"], atol=atol, rtol=0)
        if "source" in case:
            assert tokens.assignment.tolist() == case["source"].tolist()
    if "input_ids" in case and stands(about):
        check_answer(model, case, images=images)


@torch.no_grad()
def check_in_the_decoder(row: Row, name: str, golden: Path) -> None:
    """Kept patches of the last drop, and the answer."""
    case, about = read_more(name)
    i = int(name.rpartition("_")[2])
    model = with_method(golden, row.reduction(about))
    images = pixels(golden, "pixels_pad")[i : i + 1]
    with norm_weight(model, case.get("norm_weight")):
        if "kept" in case:
            spliced = model.splice_images(case["input_ids"], images=images)
            staged = StagedPass(spliced.image_index, reducer=model.get_model().decoder_reducer)
            model.get_model()(inputs_embeds=spliced.inputs_embeds, staged=staged)
            patches = staged.kept[0] - about["image_start"]
            assert patches[(patches >= 0) & (patches < 576)].tolist() == case["kept"].tolist()
        logits = check_answer(model, case, images=images)
    assert logits.shape[1] == about.get("final_length", logits.shape[1])


class Watched:
    """What a method with several drops chose in one prefill of one sample with one image."""

    def __init__(self, reducer: Any) -> None:
        self.scores: list[Tensor] = []
        self.kept: list[Tensor] = []
        self.merged: list[Tensor] = []
        self.heads: list[Tensor] = []
        self.raters = torch.empty(0)
        self.reducer = reducer

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        def noted(name: str, into: Callable[..., None]) -> Any:
            call = getattr(self.reducer, name)

            def also(*given: Any) -> Any:
                result = call(*given)
                into(result, *given)
                return result

            return mock.patch.object(self.reducer, name, also)

        def keep(scores: Tensor, pool: Tensor, *counts: Tensor) -> Tensor:
            result = keep_best(scores, pool, *counts)
            self.kept.append(result[0][pool[0] >= 0].nonzero()[:, 0])
            return result

        with contextlib.ExitStack() as stack:
            stack.enter_context(noted("queries", lambda found, _: setattr(self, "raters", found[0].nonzero()[:, 0])))
            stack.enter_context(noted("score", lambda found, given: self.scores.append(found[0][given.pool[0] >= 0])))
            stack.enter_context(noted("merge", lambda found, *_: self.merged.append(found.features[0])))
            stack.enter_context(noted("strongest_heads", lambda found, _: self.heads.append(found[0])))
            stack.enter_context(mock.patch("llava.model.language_model.staged.keep_best", keep))
            yield


@torch.no_grad()
def check_in_steps(row: Row, name: str, golden: Path) -> None:
    """Raters, scores, heads, kept and merged tokens of each drop, what they come from, and the answer."""
    case, about = read_more(name)
    i = int(name.rpartition("_")[2])
    model = with_method(golden, row.reduction(about))
    images = pixels(golden, "pixels_pad")[i : i + 1]
    with tower_gives(model, seam(i)):
        spliced = model.splice_images(case["input_ids"], images=images)
    staged = StagedPass(spliced.image_index, reducer=model.get_model().decoder_reducer)
    watched = Watched(staged.reducer)
    with watched.watch():
        model.get_model()(inputs_embeds=spliced.inputs_embeds, staged=staged)
    first = about["image_start"]
    assert (watched.raters - first - 576).tolist() == case["text_raters"].tolist()
    origin = torch.arange(576)
    for step, (score, kept) in enumerate(zip(watched.scores, watched.kept, strict=True)):
        expected = case[f"score_{step}"]
        atol = 2e-6 if about["version"] == "1.5" else 1e-3 * float(expected.abs().max())
        torch.testing.assert_close(score, expected, atol=atol, rtol=0)
        assert kept.tolist() == case[f"kept_{step}"].tolist()
        merged = watched.merged[step] if watched.merged else torch.empty(0, 64)
        torch.testing.assert_close(merged, case.get(f"merged_{step}", merged), **TOKENS)
        origin = torch.cat([origin[kept], origin.new_full((len(merged),), -1)])
        assert origin.tolist() == case[f"origin_{step}"].tolist()
    assert len(watched.scores) == len(about["layers"])
    assert watched.merged == [] or f"merged_{step}" in case
    assert torch.equal(torch.stack(watched.heads), case["heads"]) if "heads" in case else not watched.heads
    # The runner puts merged tokens where the case has them: in the places of tokens that were dropped.
    visual = staged.kept[0][first : first + len(origin)] - first
    assert visual[origin >= 0].tolist() == origin[origin >= 0].tolist()
    logits = check_answer(model, case, images=images)
    assert logits.shape[1] == about["final_length"]


def check_tome_step(row: Row, name: str, golden: Path) -> None:
    """One merge on random inputs."""
    from llava.reduction.tower.tome import merge_pairs

    case, _ = read_more(name)
    for key in case:
        if key.startswith("source_"):
            _, n, pairs = key.split("_")
            how = merge_pairs(case[f"metric_{n}"].float(), int(pairs), first=1)
            tokens = TowerTokens.of(case[f"x_{n}"].float(), first=1)
            torch.testing.assert_close(tokens.regrouped(how).features, case[f"output_{n}_{pairs}"], **TOKENS)
            assert how.into.tolist() == case[key].tolist()
            tokens.sizes = case[f"size_{n}"].float().squeeze(-1)
            sized = tokens.regrouped(how)
            torch.testing.assert_close(sized.features, case[f"output_sized_{n}_{pairs}"], **TOKENS)
            torch.testing.assert_close(sized.sizes, case[f"size_after_{n}_{pairs}"].squeeze(-1), **TOKENS)


@torch.no_grad()
def check_in_the_projector(row: Row, name: str, golden: Path) -> None:
    """Tokens from the seam, and the answer from pixels."""
    case, about = read_more(name)
    i = int(name.rpartition("_")[2])
    model = opened(golden)
    model.set_reduction("none")
    inputs = {"images": pixels(golden, "pixels_pad")[i : i + 1], "reduction": row.reduction(about)}
    with tower_gives(model, seam(i)):
        tokens, _ = model.get_model().encode_images(**inputs)
    if "output" in case:
        torch.testing.assert_close(tokens, case["output"], **TOKENS)
    logits = check_answer(model, case, **inputs)
    assert logits.shape[1] == about.get("final_length", logits.shape[1])


def check_m3_training(row: Row, name: str, golden: Path) -> None:
    """The loss of each scale, their mean, and its gradients."""
    case, about = read_more(name)
    model = open_checkpoint(golden, "llava-v1.5-7b", reduction={"name": "m3", "scales": about["scales"]}).train()
    batch = {key: case[key] for key in ("input_ids", "attention_mask", "labels")}
    batch["images"] = pixels(golden, "pixels_pad")
    with torch.no_grad():
        losses = [model(**batch, reduction={"name": "m3", "tokens": scale}).loss for scale in about["scales"]]
    torch.testing.assert_close(torch.stack(losses), case["losses"], atol=1e-4, rtol=0)
    inner = model.get_model()
    named = {
        "grad_mm_projector_0_weight": inner.mm_projector[0].weight,
        "grad_layers_7_q_proj_weight": inner.layers[7].self_attn.q_proj.weight,
    }
    for weight in named.values():
        weight.requires_grad_(True)
    loss = model(**batch).loss
    torch.testing.assert_close(loss.detach(), case["loss"][0], atol=1e-4, rtol=0)
    for (key, _), gradient in zip(named.items(), torch.autograd.grad(loss, list(named.values())), strict=True):
        assert (gradient - case[key]).norm() <= 1e-3 * case[key].norm()


def check_with_weights(row: Row, name: str, golden: Path) -> None:
    """As `check_in_the_projector`, with the family's weights in the projector's place; from stored features too."""
    case, about = read_more(name)
    weights, _ = read_more(f"{row.method}_weights")
    model = opened(golden)
    own = model.get_model().projector_modules()
    model.set_reduction({"name": row.method})
    model.get_model().load_projector(weights, f"{row.method}_weights")
    if "features_multi" in case:
        method, features = build(row.method, **row.options(about)), case["features"].unsqueeze(0)
        states = {
            23: features,
            **dict(zip((12, 16, 22), case["features_multi"].unsqueeze(0).chunk(4, 2), strict=False)),
        }
        with torch.no_grad():
            modules = model.get_model().projector_modules()
            tokens = method(VisionFeatures(features, grid=(24, 24), hidden_states=states), **modules)
        torch.testing.assert_close(tokens.features[0], case["output"], **TOKENS)
    i = int(name.rpartition("_")[2])
    inputs = {"images": pixels(golden, "pixels_pad")[i : i + 1], "reduction": row.reduction(about)}
    with torch.no_grad():
        tokens, _ = model.get_model().encode_images(**inputs)
    torch.testing.assert_close(tokens, case["output"], atol=1e-3 * float(case["output"].abs().max()), rtol=0)
    logits = check_answer(model, case, **inputs)
    assert logits.shape[1] == about.get("final_length", logits.shape[1])
    model.set_reduction("none")
    model.get_model()._set_projector(own)


def check_vscan(row: Row, name: str, golden: Path) -> None:
    """What is selected, from pixels; what it becomes, from the seam; what each drop keeps; and the answer."""
    case, about = read_more(name)
    i = int(name.rpartition("_")[2])
    images = pixels(golden, "pixels_pad")[i : i + 1]
    drop = {"name": "vscan_drop", "layers": about["layers"], "keep": about["counts"]}
    model = with_method(golden, {"encoder": row.reduction(about), "decoder": drop})
    inner = model.get_model()
    vision = seam(i)
    vision.attention = model.get_vision_tower()(images, inner.reducers().needs).attention
    tokens = build(**row.reduction(about))(vision)
    assert tokens.source[0].tolist() == case["selected"].tolist()
    torch.testing.assert_close(tokens.features[0], case["output"], **TOKENS)
    spliced = model.splice_images(case["input_ids"], images=images)
    first, last = about["image_start"], about["image_start"] + about["visual_tokens"]
    for number in range(len(about["counts"])):
        some = {key: drop[key][: number + 1] for key in ("layers", "keep")}
        staged = StagedPass(spliced.image_index, reducer=build("vscan_drop", **some))
        inner(inputs_embeds=spliced.inputs_embeds, staged=staged)
        kept = staged.kept[0]
        assert (kept[(kept >= first) & (kept < last)] - first).tolist() == entered(case, number).tolist()
    logits = check_answer(model, case, images=images)
    assert logits.shape[1] == about["final_length"]


def entered(case: Case, number: int) -> Tensor:
    """What drop `number` keeps, by its place among the tokens that entered the language model."""
    kept = case[f"kept_{number}"]
    return kept if number == 0 else entered(case, number - 1)[kept]


def check_vispruner_random(row: Row, name: str, golden: Path) -> None:
    """The choice of a batch of two on random inputs."""
    case, about = read_more(name)
    vision = VisionFeatures(case["features"].float(), attention={"selected": case["cls_attention"]})
    for tokens, ratio in about["combos"]:
        kept = build(row.method, tokens=tokens, important_ratio=ratio)(vision).source
        assert kept.tolist() == case[f"kept_{tokens}_{ratio:g}"].tolist()


def check_holov_random(row: Row, name: str, golden: Path) -> None:
    """The choice on random inputs, in regions of one size and of two."""
    case, _ = read_more(name)
    for key in (key for key in case if key.startswith("kept_")):
        _, kind, tokens = key.split("_")
        features = case[f"features_{kind}"].float()
        attention = {"selected": case[f"attention_{kind}"].unsqueeze(1)}
        vision = VisionFeatures(features, attention=attention, projected=features)
        assert build(row.method, tokens=int(tokens))(vision).source.tolist() == case[key].tolist()


def check_cdpruner_wide(row: Row, name: str, golden: Path) -> None:
    """The choice on random inputs of a width above the number of tokens."""
    case, about = read_more(name)
    values = {key: value.float() for key, value in case.items() if not key.startswith("kept")}
    vision = VisionFeatures(
        values["projected"],
        projected=values["projected"],
        patch_embeds=values["image_embeds"],
        text=values["text_embeds"].unsqueeze(0),
    )
    for tokens in about["tokens"]:
        assert build(row.method, tokens=tokens)(vision).source.tolist() == case[f"kept_{tokens}"].tolist()


def block_of(case: Case, about: About) -> CLIPEncoderLayer:
    """A block of a vision tower with a case's weights, which has what runs before and after it."""
    width = case["x"].shape[-1]
    hidden = case["weights.mlp.fc1.bias"].shape[0]
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=hidden,
        num_attention_heads=about["num_heads"],
        hidden_act="gelu",
        layer_norm_eps=about["layernorm_eps"],
        attn_implementation="eager",
    )
    weights = {name.removeprefix("weights."): case[name].float() for name in case if name.startswith("weights.")}
    for kind in ("weight", "bias"):
        joined = weights.pop(f"attn.qkv.{kind}").chunk(3)
        weights |= {f"self_attn.{name}_proj.{kind}": part for name, part in zip("qkv", joined, strict=True)}
    names = {"attn.proj": "self_attn.out_proj", "norm1": "layer_norm1", "norm2": "layer_norm2"}
    for old, new in names.items():
        weights = {name.replace(old, new): weight for name, weight in weights.items()}
    block = CLIPEncoderLayer(config).eval()
    block.load_state_dict(weights)
    return block


def check_evit_block(row: Row, name: str, golden: Path) -> None:
    """One block at several shares, and twice at one of them."""
    case, about = read_more(name)
    block = block_of(case, about)
    entered = TowerTokens.of(case["x"].float(), first=1)
    for key, of in about["cases"].items():
        reducer = build(row.method, keep=of["keep_rate"], fuse=of["fuse_token"])
        left = run_block(block, entered, reducer, 0, 1)
        torch.testing.assert_close(left.features, case[f"output_{key}"], **TOKENS)
        kept = case[f"kept_{key}"]
        assert left.source[:, 1 : 1 + kept.shape[1]].tolist() == kept.tolist()
        assert left.source.shape[1] - 1 == of["tokens_without_cls"]
    reducer = build(row.method, keep=0.7)
    once = run_block(block, entered, reducer, 0, 1)
    twice = run_block(block, TowerTokens.of(once.features, first=1), reducer, 0, 1)
    torch.testing.assert_close(twice.features, case["output_twice_0.7_fuse"], **TOKENS)
    assert twice.source[:, 1:-1].tolist() == case["kept_twice_0.7_fuse"].tolist()


def check_ats_block(row: Row, name: str, golden: Path) -> None:
    """Two blocks one after another, the second as for each sample alone."""
    case, about = read_more(name)
    block, reducer = block_of(case, about), build(row.method, blocks=[0, 1])
    entered = TowerTokens.of(case["x"].float(), first=1)
    one = run_block(block, entered, reducer, 0, 2)
    torch.testing.assert_close(one.features, case["output_stage1"], **TOKENS)
    assert one.source[:, 1:].tolist() == case["kept_stage1"].tolist()
    assert one.mask.tolist() == case["policy_stage1"].squeeze(2).bool().tolist()
    two = run_block(block, one, reducer, 1, 2)
    for i in range(3):
        kept = case[f"kept_stage2_alone_{i}"][0].long()
        count = 1 + len(kept)
        assert two.source[i].tolist() == [-1, *one.source[i][1 + kept].tolist(), *[-1] * (two.mask.shape[1] - count)]
        torch.testing.assert_close(two.features[i, :count], case[f"output_stage2_alone_{i}"][0], **TOKENS)
        assert two.mask[i].sum() == count


@contextlib.contextmanager
def in_float64(tower: Any) -> Iterator[None]:
    """Run the tower in float64, where near ties fall as they do exactly."""
    tower.double()
    yield
    tower.float()


@contextlib.contextmanager
def norm_weight(model: Any, weight: Tensor | None) -> Iterator[None]:
    """Put another weight into the language model's last norm."""
    norm = model.get_model().norm
    own = norm.weight.data
    norm.weight.data = own if weight is None else weight
    yield
    norm.weight.data = own


def words_and_padding(model: Any, case: Case, about: About) -> dict[str, Tensor]:
    """Embeddings of the stored words, and the patches that lie in the padding, as many as the case says."""
    padding = padded_patches(tuple(about["image_size"]), 336, (24, 24)).unsqueeze(0)
    assert int(padding.sum()) == about["excluded_padding_patches"]
    words, phrases = case["keyword_ids"], build("mmtok").phrases(about["question"])
    assert " ".join(phrases) == about["keywords"]
    own = [token for word in phrases for token in model.tokenizer(word, add_special_tokens=False).input_ids]
    assert words[0].tolist() == [model.tokenizer.bos_token_id, *own]
    return {"text": model.get_model().embed_tokens(words[:, 1:]), "padding": padding}


# The table --------------------------------------------------------------------------------------------------------

ROWS: dict[str, Row] = {
    "visionzip": Row(
        "visionzip", lambda about: {key: about[key] for key in ("dominant", "contextual")}, check_after_the_tower
    ),
    "divprune": Row("divprune", lambda about: {"tokens": about["tokens"]}, check_after_the_tower),
    "tome_paper": Row("tome", lambda about: {"per_block": about["r_per_block"]}, check_in_the_tower),
    "tome_lightcompress": Row(
        "tome",
        lambda about: {"per_block": about.get("r_per_block", about["r"]), "variant": "lightcompress"},
        check_in_the_tower,
    ),
    "tome_step": Row("tome", lambda _: {}, check_tome_step),
    "dart": Row(
        "dart",
        lambda about: {
            "layer": about["layer"],
            "image_pivots": about["pivot_image_token"],
            "text_pivots": about["pivot_text_token"],
            **(
                {"tokens": about["max_num_trunction"]}
                if about["max_num_trunction"]
                else {"ratio": about["reduction_ratio"]}
            ),
        },
        check_in_the_decoder,
    ),
    "fastervlm": Row("fastervlm", lambda about: {"tokens": about["tokens"]}, check_after_the_tower),
    "vispruner": Row(
        "vispruner", lambda about: {key: about[key] for key in ("tokens", "important_ratio")}, check_after_the_tower
    ),
    "vispruner_random": Row("vispruner", lambda _: {}, check_vispruner_random),
    "holov": Row("holov", lambda about: {"tokens": about["tokens"]}, check_after_the_tower),
    "holov_random": Row("holov", lambda _: {}, check_holov_random),
    "cdpruner": Row(
        "cdpruner",
        lambda about: {"tokens": about["tokens"]},
        check_after_the_tower,
        lambda _, case, about: {"text": case["text_embeds"].expand(len(images_of(about)), -1, -1)},
    ),
    "m3": Row("m3", lambda about: {"tokens": about["scale"]}, check_in_the_projector),
    "m3_train": Row("m3", lambda _: {}, check_m3_training),
    "tokenpacker": Row("tokenpacker", lambda about: {"scale": about["scale"]}, check_with_weights),
    "mqt": Row("mqt", lambda about: {"tokens": about["tokens"]}, check_with_weights),
    "mmtok": Row("mmtok", lambda about: {"tokens": about["tokens"]}, check_after_the_tower, words_and_padding),
    "cdpruner_wide": Row("cdpruner", lambda _: {}, check_cdpruner_wide),
    "evit": Row("evit", lambda _: {}, check_evit_block),
    "ats": Row("ats", lambda _: {}, check_ats_block),
    "sparsevlm": Row(
        "sparsevlm",
        lambda about: {
            "version": about["version"],
            "layers": about["layers"],
            "keep": about["keep"],
            **({"heads": about["heads"]} if "heads" in about else {}),
        },
        check_in_steps,
    ),
    "fastv": Row("fastv", lambda about: {"layer": about["layer"], "ratio": about["rate"]}, check_in_the_decoder),
    "vscan": Row("vscan", lambda about: {"tokens": about["visual_tokens"]}, check_vscan),
}
INPUTS = ("tower_", "tokenpacker_weights", "mqt_weights")  # read by other cases


def key_of(name: str) -> str:
    """The key in `ROWS` that the case's name begins with; the longest one."""
    return max((key for key in ROWS if name.startswith(key)), key=len)


def row_of(name: str) -> Row:
    return ROWS[key_of(name)]


def packed_names() -> list[str]:
    return [file.removesuffix(".json") for file in read_index(MORE)["files"]]


def names() -> list[str]:
    every = [file.stem for file in CASES.glob("*.json")] if CASES.is_dir() else packed_names()
    return sorted(name for name in every if not name.startswith(INPUTS))


_OPENED: list[Any] = []


def opened(golden: Path) -> Any:
    """The checkpoint of all cases, with eager attention as theirs."""
    if not _OPENED:
        _OPENED.append(open_checkpoint(golden, "llava-v1.5-7b", attn_implementation="eager"))
    return _OPENED[0]


def with_method(golden: Path, reduction: dict[str, Any]) -> Any:
    """That checkpoint with a method, and none of those that it had."""
    model = opened(golden)
    model.set_reduction("none")
    model.set_reduction(reduction)
    return model


@pytest.mark.parametrize("name", [name for name in names() if name.startswith("cdpruner") and name != "cdpruner_wide"])
@torch.no_grad()
def test_a_text_in_segments(name: str, golden: Path) -> None:
    """CLIP's tokens of the question, uncut, and an embedding for each stretch."""
    case, about = read_more(name)
    model = opened(golden)
    model.set_reduction("trim")
    tower = model.get_vision_tower()
    (embeds,) = tower.text_tower.embed_segments([about["text"]], tower.name)
    torch.testing.assert_close(embeds, case["text_embeds"], **TOKENS)
    assert tower.text_tower._tokenizer(about["text"]).input_ids == case["text_ids"][0].tolist()


@pytest.mark.parametrize("name", names())
def test_case(name: str, golden: Path) -> None:
    row = row_of(name)
    if row.method not in {method for methods in available().values() for method in methods}:
        pytest.skip(f"{row.method} is not registered yet")
    row.check(row, name, golden)


def test_every_family_is_packed() -> None:
    """A clone of the repository alone compares each of them."""
    packed = packed_names()
    assert {key_of(name) for name in packed if not name.startswith(INPUTS)} == set(ROWS)
    assert any(name.startswith("sparsevlm_plus") for name in packed)


if CASES.is_dir():

    def test_what_is_packed_is_of_the_set() -> None:
        for name in packed_names():
            expected, about = read_more(name)
            tensors = read_packed(f"{name}.safetensors", MORE)
            stored = MORE / FILES / read_index(MORE)["files"][f"{name}.json"]
            assert json.loads(stored.read_text("utf-8")) == about, name
            assert list(tensors) == list(expected), name
            for key, tensor in expected.items():
                assert tensors[key].dtype == tensor.dtype and torch.equal(tensors[key], tensor), (name, key)
