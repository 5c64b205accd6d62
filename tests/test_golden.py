"""The released implementations' own inputs and outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llava.model.builder import load_pretrained_model
from llava.reduction import VisionFeatures, build
from tests.conftest import GOLDEN
from tests.golden.pack import read_tensors, unpack

LOGITS = {"atol": 2e-3, "rtol": 0}


def open_checkpoint(golden: Path, name: str, base: str | None = None, **kwargs: Any) -> Any:
    """The model of a golden checkpoint, in float32."""
    return load_pretrained_model(
        golden / "checkpoints" / name,
        None if base is None else golden / base,
        device="cpu",
        dtype=torch.float32,
        vision_tower=golden / "clip",
        **kwargs,
    )[1]


def read_case(golden: Path, name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    case = golden / "cases" / name
    return load_file(f"{case}.safetensors"), json.loads(Path(f"{case}.json").read_text(encoding="utf-8"))


def pixels(golden: Path, name: str) -> torch.Tensor:
    return load_file(golden / "cases" / f"{name}.safetensors")["pixel_values"].float()


@torch.no_grad()
def check_answer(model: Any, case: dict[str, torch.Tensor], **inputs: Any) -> torch.Tensor:
    """Compare logits and greedy tokens; the logits are returned."""
    logits = model(input_ids=case["input_ids"], **inputs).logits
    torch.testing.assert_close(logits[0, -16:], case["logits"], **LOGITS)
    if "generated" in case:
        tokens = model.generate(case["input_ids"], **inputs, max_new_tokens=12, do_sample=False)
        assert tokens.tolist() == case["generated"].tolist()
    return logits


@pytest.fixture(scope="module")
def llava15(golden: Path) -> Any:
    return open_checkpoint(golden, "llava-v1.5-7b")


@pytest.fixture(scope="module")
def llava16(golden: Path) -> Any:
    return open_checkpoint(golden, "llava-v1.6-vicuna-7b")


@pytest.mark.parametrize("i", range(3))
def test_llava15(golden: Path, llava15: Any, i: int) -> None:
    case, _ = read_case(golden, f"llava15_{i}")
    check_answer(llava15, case, images=pixels(golden, "pixels_pad")[i : i + 1])


def test_llava15_train(golden: Path, llava15: Any) -> None:
    case, _ = read_case(golden, "llava15_train")
    weight = llava15.get_model().mm_projector[0].weight.requires_grad_(True)
    batch = {name: case[name] for name in ("input_ids", "attention_mask", "labels")}
    loss = llava15(**batch, images=pixels(golden, "pixels_pad")).loss
    (gradient,) = torch.autograd.grad(loss, weight)
    torch.testing.assert_close(loss.detach(), case["loss"][0], atol=1e-4, rtol=0)
    expected = case["grad_mm_projector_0_weight"]
    assert (gradient - expected).norm() <= 1e-3 * expected.norm()


@pytest.mark.parametrize("i", range(3))
def test_llava16(golden: Path, llava16: Any, i: int) -> None:
    case, about = read_case(golden, f"llava16_{i}")
    inputs = {"images": [pixels(golden, f"pixels_anyres_{i}")], "image_sizes": [about["image_size"]]}
    logits = check_answer(llava16, case, **inputs)
    assert logits.shape[1] == about["sequence_length"]


@pytest.mark.parametrize(
    ("name", "reduction"),
    [
        ("lora_full_tokens", None),
        *((f"lora_prumerge_{i}", "prumerge") for i in range(3)),
        *((f"lora_prumerge_plus_{i}", "prumerge_plus") for i in range(3)),
    ],
)
def test_lora(golden: Path, name: str, reduction: str | None) -> None:
    model = open_checkpoint(golden, "llava-v1.5-7b-lora-prunemerge", "vicuna", reduction=reduction)
    case, about = read_case(golden, name)
    i = 1 if name == "lora_full_tokens" else int(name[-1])
    logits = check_answer(model, case, images=pixels(golden, "pixels_pad")[i : i + 1])
    assert logits.shape[1] == about.get("sequence_length", logits.shape[1])


def use_pyramiddrop(model: Any, about: dict[str, Any]) -> None:
    model.set_reduction({"name": "pyramiddrop", "layers": about["layers"], "ratios": about["ratios"]})


@pytest.mark.parametrize("i", range(3))
def test_pyramiddrop(golden: Path, i: int) -> None:
    case, about = read_case(golden, f"pdrop_{i}")
    model = open_checkpoint(golden, "llava-v1.5-7b")
    use_pyramiddrop(model, about)
    logits = check_answer(model, case, images=pixels(golden, "pixels_pad")[i : i + 1])
    assert logits.shape[1] == about["final_length"]


@pytest.mark.parametrize("i", range(3))
def test_pyramiddrop_anyres(golden: Path, i: int) -> None:
    case, about = read_case(golden, f"pdrop_next_{i}")
    model = open_checkpoint(golden, "llava-v1.6-vicuna-7b")
    use_pyramiddrop(model, about)
    inputs = {"images": [pixels(golden, f"pixels_anyres_{i}")], "image_sizes": [about["image_size"]]}
    logits = check_answer(model, case, **inputs)
    assert logits.shape[1] == about["final_length"]


@pytest.mark.parametrize("i", range(3))
def test_pyramiddrop_train(golden: Path, i: int) -> None:
    case, about = read_case(golden, f"pdrop_train_{i}")
    model = open_checkpoint(golden, "llava-v1.5-7b").train()
    use_pyramiddrop(model, about)
    (sample,) = about["samples"]
    weights = {
        "grad_mm_projector_0_weight": model.get_model().mm_projector[0].weight,
        "grad_q_proj_7": model.get_model().layers[7].self_attn.q_proj.weight,
    }
    batch = {name: case[name] for name in ("input_ids", "attention_mask", "labels")}
    loss = model(**batch, images=pixels(golden, "pixels_pad")[sample : sample + 1]).loss
    gradients = torch.autograd.grad(loss, [weight.requires_grad_(True) for weight in weights.values()])
    torch.testing.assert_close(loss.detach(), case["loss"][0], atol=1e-4, rtol=0)
    for name, gradient in zip(weights, gradients, strict=True):
        assert (gradient - case[name]).norm() <= 1e-3 * case[name].norm(), name


@pytest.mark.parametrize("name", ["adaptive_0", "adaptive_1", "adaptive_2", "fixed_1_8", "fixed_1_4"])
@pytest.mark.parametrize("method", ["prumerge", "prumerge_plus"])
def test_prumerge_tokens(golden: Path, method: str, name: str) -> None:
    case, about = read_case(golden, f"{method}_{name}")
    vision = VisionFeatures(case["features"], keys=case["keys"], queries=case["queries"])
    tokens = build(method, variant="release", ratio=about.get("ratio"))(vision)
    assert tokens.counts.tolist() == [about["kept"]] * len(case["features"])
    torch.testing.assert_close(tokens.features, case["output"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", ["prumerge", "prumerge_plus"])
def test_prumerge_batches_images_of_different_counts(golden: Path, method: str) -> None:
    cases = [read_case(golden, f"{method}_adaptive_{i}")[0] for i in range(3)]
    batch = {name: torch.cat([case[name] for case in cases]) for name in ("features", "keys", "queries")}
    tokens = build(method)(VisionFeatures(**batch))
    for i, case in enumerate(cases):
        torch.testing.assert_close(tokens.features[i][tokens.mask[i]], case["output"][0], atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def llava_stf(golden: Path) -> Any:
    return open_checkpoint(golden, "llava-v1.5-7b-STF")


@pytest.mark.parametrize("i", range(3))
def test_stf(golden: Path, llava_stf: Any, i: int) -> None:
    """The config of this checkpoint names no method: its weights do."""
    case, about = read_case(golden, f"stf_{i}")
    image = pixels(golden, "pixels_pad")[i : i + 1]
    logits = check_answer(llava_stf, case, images=image)
    assert logits.shape[1] == about["sequence_length"]
    tokens, counts = llava_stf.get_model().encode_images(image)
    assert counts.tolist() == [144]
    torch.testing.assert_close(tokens, case["output"][0], **LOGITS)


@torch.no_grad()
def test_stf_tokens(golden: Path, llava_stf: Any) -> None:
    case, about = read_case(golden, "stf_0")
    model = llava_stf.get_model()
    assert list(model.projector_reducer.blocks(24, 23)) == about["layers"]
    states = {block: case[f"hidden_{block}"][:, 1:] for block in about["layers"]}
    vision = VisionFeatures(states[23], grid=(24, 24), hidden_states=states)
    tokens = model.projector_reducer(vision, model.mm_projector, model.mm_projector_crosslayer)
    torch.testing.assert_close(tokens.features, case["output"], atol=1e-5, rtol=0)


@torch.no_grad()
def test_stf_in_a_batch(golden: Path, llava_stf: Any) -> None:
    images = pixels(golden, "pixels_pad")
    tokens, counts = llava_stf.get_model().encode_images(images)
    assert counts.tolist() == [144] * 3
    outputs = [read_case(golden, f"stf_{i}")[0]["output"][0] for i in range(3)]
    torch.testing.assert_close(tokens, torch.cat(outputs), **LOGITS)


@pytest.mark.parametrize("folder", ["llava-v1.5-7b-pretrain", "llava-v1.5-7b-STF-pretrain"])
def test_projector_folder_opens_on_its_base(golden: Path, folder: str) -> None:
    model = open_checkpoint(golden, folder, "vicuna")
    saved = torch.load(golden / "checkpoints" / folder / "mm_projector.bin", weights_only=True)
    assert saved.keys() == {n for n, _ in model.named_parameters() if "mm_projector" in n}
    for name, weight in saved.items():
        torch.testing.assert_close(model.get_parameter(name), weight.float())


if GOLDEN.is_dir():

    def test_what_is_packed_is_the_set(tmp_path: Path) -> None:
        unpack(tmp_path)
        files = [path for path in GOLDEN.rglob("*") if path.is_file() and path != GOLDEN / "README.md"]
        assert {path.relative_to(GOLDEN) for path in files} <= {p.relative_to(tmp_path) for p in tmp_path.rglob("*")}
        for path in files:
            packed = tmp_path / path.relative_to(GOLDEN)
            if path.suffix not in (".bin", ".safetensors"):
                assert packed.read_bytes() == path.read_bytes(), path
                continue
            tensors, expected = read_tensors(packed), read_tensors(path)
            assert list(tensors) == list(expected), path
            for name, tensor in expected.items():
                assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor), (path, name)
