"""Checkpoints of M3, TokenPacker and MQT as released: opened by their own keys and names, and written so again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from llava.files import projector_file
from llava.model.builder import load_pretrained_model
from llava.model.convert import convert
from llava.reduction import ReductionConfig, VisionFeatures, build
from llava.reduction.projector.mqt import QUERIES, positions
from llava.train.settings.parsing import parse_args
from llava.train.train import train
from tests.test_training import LORA, PROJECTOR, run
from tests.tiny_world import SIDE, TinyWorld, make_tiny_world

TOKENPACKER = [
    "q_proj_1.weight",
    "k_proj_1.0.weight",
    "k_proj_1.0.bias",
    "k_proj_1.2.weight",
    "k_proj_1.2.bias",
    "v_proj_1.0.weight",
    "v_proj_1.0.bias",
    "v_proj_1.2.weight",
    "v_proj_1.2.bias",
    "ln_q_1.weight",
    "ln_q_1.bias",
    "ln_k_1.weight",
    "ln_k_1.bias",
    "ln_v_1.weight",
    "ln_v_1.bias",
    "clip_attn.in_proj_weight",
    "clip_attn.in_proj_bias",
    "clip_attn.out_proj.weight",
    "clip_attn.out_proj.bias",
    "mlp.0.weight",
    "mlp.0.bias",
    "mlp.2.weight",
    "mlp.2.bias",
]
MQT = [
    "pos_embed",
    "query",
    "proj",
    "attn.in_proj_weight",
    "attn.in_proj_bias",
    "attn.out_proj.weight",
    "attn.out_proj.bias",
    "ln_q.weight",
    "ln_q.bias",
    "ln_k.weight",
    "ln_k.bias",
    "ln_v.weight",
    "ln_v.bias",
]
SCALES = [1, 4, 16]
# The method that makes the weights, the keys of the release's config.json, and the weights' names.
RELEASES: dict[str, tuple[dict[str, Any], dict[str, Any], set[str]]] = {
    "m3": (
        {"name": "m3", "scales": SCALES},
        {"matryoshka_vis_token_scale": SCALES},
        {f"model.mm_projector.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")},
    ),
    "tokenpacker": (
        {"name": "tokenpacker"},
        {"mm_projector_type": "tokenpacker"},
        {f"model.mm_projector.{name}" for name in TOKENPACKER},
    ),
    "mqt": (
        {"name": "mqt", "draws": True},
        {"num_visual_tokens": "second_stage", "mm_query_abstractor_type": "matry_query"},
        {f"model.query_abstractor.{name}" for name in MQT},
    ),
    "mqt by its weights": ({"name": "mqt"}, {}, {f"model.query_abstractor.{name}" for name in MQT}),
    "tokenpacker by its weights": ({"name": "tokenpacker"}, {}, {f"model.mm_projector.{name}" for name in TOKENPACKER}),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return make_tiny_world(tmp_path_factory.mktemp("world"))


def weight_names(folder: Path) -> set[str]:
    """Of what is no part of the vision tower or the language model."""
    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            names |= {name for name in weights.keys() if "mm_projector" in name or "query_abstractor" in name}  # noqa: SIM118
    return names


def answer(folder: Path, base: Path | None = None, **settings: Any) -> torch.Tensor:
    model = load_pretrained_model(folder, base, device="cpu", dtype=torch.float32, **settings)[1]
    pixels = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids=torch.tensor([[1, 50, -200, 60, 61]]), images=pixels).logits


@pytest.fixture(scope="module")
def folders(world: TinyWorld) -> dict[str, Path]:
    """A full checkpoint for each release, with its keys and without ours."""
    made = {}
    for name, (method, keys, _) in RELEASES.items():
        folder = world.root / name.replace(" ", "_")
        run(world, folder, reduction=json.dumps(method), max_steps=1)
        file = folder / "config.json"
        config = json.loads(file.read_text())
        assert config.pop("reduction") == {"projector": method}
        file.write_text(json.dumps(config | keys))
        made[name] = folder
    return made


@pytest.mark.parametrize("name", RELEASES)
def test_a_release_opens_and_is_written_again(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    method, keys, names = RELEASES[name]
    assert weight_names(folders[name]) == names
    tokenizer, model, *_ = load_pretrained_model(folders[name], device="cpu", dtype=torch.float32)
    assert model.config.reduction == {"projector": method}
    model.save_pretrained(tmp_path / "again")
    tokenizer.save_pretrained(tmp_path / "again")
    assert weight_names(tmp_path / "again") == names
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert keys.items() <= written.items()
    torch.testing.assert_close(answer(tmp_path / "again"), answer(folders[name]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["tokenpacker", "mqt"])
def test_they_have_no_place_in_llava_hf(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="llava-hf layouts can't express this model's reduction"):
        convert(folders[name], tmp_path / "hf")
    with pytest.raises(ValueError, match=r"llava-hf layouts have mlp2x_gelu only|needs another projector"):
        convert(folders[name], tmp_path / "hf", drop_reduction=True)
    with pytest.raises(ValueError, match=r"tokenpacker is the projector of the method|needs another projector"):
        load_pretrained_model(folders[name], device="cpu", reduction="none")


def test_the_shapes_are_the_releases() -> None:
    """Of CLIP-L and Vicuna 7B."""
    with torch.device("meta"):
        packer = build("tokenpacker").build_modules(1024, 4096, nn.Linear)["mm_projector"]
        queries = build("mqt").build_modules(1024, 4096, nn.Linear)["query_abstractor"]
    assert packer.clip_attn.heads == 8 and queries.attn.heads == 16
    shapes = {name: tuple(weight.shape) for name, weight in packer.named_parameters()}
    assert shapes.keys() == set(TOKENPACKER)
    assert shapes["k_proj_1.0.weight"] == (1024, 4096) and shapes["clip_attn.in_proj_weight"] == (3072, 1024)
    assert shapes["mlp.0.weight"] == (4096, 1024)
    shapes = {name: tuple(weight.shape) for name, weight in queries.named_parameters()}
    assert shapes.keys() == set(MQT)
    assert shapes["query"] == shapes["pos_embed"] == (256, 1024) and shapes["proj"] == (1024, 4096)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["m3", "tokenpacker", "mqt"])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    """Tokens are those of float32, up to rounding."""
    torch.manual_seed(0)
    method = build(name)
    modules = nn.ModuleDict(method.build_modules(16, 8, lambda width: nn.Linear(width, 8)))
    features = torch.randn(2, 16, 16)
    vision = VisionFeatures(features, grid=(4, 4), hidden_states={3: features, 2: features.roll(1, 0)})
    exact = method(vision, **modules).features
    states = {block: state.to(dtype) for block, state in vision.hidden_states.items()}
    tokens = method(VisionFeatures(features.to(dtype), grid=(4, 4), hidden_states=states), **modules.to(dtype)).features
    assert tokens.dtype == dtype
    assert (tokens.float() - exact).norm() <= 0.03 * exact.norm()


# TokenPacker -----------------------------------------------------------------------------------------------------


def test_tokenpacker_reads_the_releases_blocks() -> None:
    assert build("tokenpacker").blocks(24, 23) == (23, 12, 16, 22, 23)
    assert build("tokenpacker").blocks(27, 26) == (26, 14, 18, 25, 26)
    assert build("tokenpacker").blocks(4, 3) == (3, 2, 2, 3, 3)
    with pytest.raises(ValueError, match=r"scale=2 does not divide .* 27 x 27 patches; set scale to one of 3"):
        build("tokenpacker").token_count((27, 27))
    with pytest.raises(ValueError, match="scale=5 is not known; choose one of: 2, 3, 4"):
        build("tokenpacker", scale=5)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_tokenpacker_by_a_plain_loop(scale: int) -> None:
    """Each query by torch's interpolation and attention, over the patches of its own window."""
    torch.manual_seed(0)
    method, c = build("tokenpacker", scale=scale, heads=2), 8
    modules = method.build_modules(c, 6, nn.Linear)
    packer = modules["mm_projector"]
    states = {23: torch.randn(1, 144, c), **{level: torch.randn(1, 144, c) for level in (12, 16, 22)}}
    tokens = method(VisionFeatures(states[23], grid=(12, 12), hidden_states=states), **modules)
    attention = nn.MultiheadAttention(c, 2, batch_first=True)
    attention.load_state_dict(packer.clip_attn.state_dict())
    picture = states[23].mT.view(1, c, 12, 12)
    coarse = nn.functional.interpolate(picture, scale_factor=1 / scale, mode="bilinear")
    multi = torch.cat([states[level] for level in (12, 16, 22, 23)], dim=2).view(12, 12, 4 * c)
    side = 12 // scale
    for cell in range(side**2):
        row, column = divmod(cell, side)
        inside = multi[row * scale : (row + 1) * scale, column * scale : (column + 1) * scale].reshape(1, -1, 4 * c)
        query = packer.ln_q_1(packer.q_proj_1(coarse[0, :, row, column])).view(1, 1, c)
        keys, values = packer.ln_k_1(packer.k_proj_1(inside)), packer.ln_v_1(packer.v_proj_1(inside))
        torch.testing.assert_close(tokens.features[0, cell], packer.mlp(attention(query, keys, values)[0])[0, 0])
    assert tokens.grid == (side, side)


# MQT -------------------------------------------------------------------------------------------------------------


def test_mqts_positions(golden: Path) -> None:
    from tests.test_golden_more import read_more

    released = read_more("mqt_weights")[0]["model.query_abstractor.pos_embed"]
    assert torch.equal(positions(16, released.shape[1]), released.float())


def test_fewer_queries_are_a_prefix() -> None:
    torch.manual_seed(0)
    modules = build("mqt").build_modules(8, 6, nn.Linear)
    vision = VisionFeatures(torch.randn(2, 12, 8), grid=(3, 4))
    every = build("mqt")(vision, **modules)
    assert every.features.shape == (2, QUERIES, 6) and every.source.eq(-1).all()
    few = build("mqt", tokens=5)(vision, **modules)
    torch.testing.assert_close(few.features, every.features[:, :5])


def test_mqt_draws_of_all_even_numbers() -> None:
    drawn = [build("mqt", draws=True).in_training((4, 4), draw)[0].tokens for draw in range(500)]
    assert set(drawn) == set(range(2, 257, 2))
    assert build("mqt", tokens=9).in_training((4, 4), 3)[0].tokens == 9


def test_mqt_in_two_stages(world: TinyWorld, tmp_path: Path) -> None:
    """All queries, into query_abstractor.bin, by MQT's flags; then a draw a step, which a run that goes on repeats."""
    flags = world.flags(tmp_path / "first", **{**PROJECTOR, "tune_mm_mlp_adapter": False}, data_path=world.captions)
    release = ["--tune_mm_query_abstractor", "True", "--num_visual_tokens", "first_stage"]
    trainer = train(parse_args([*flags, *release]))
    assert trainer.state.log_history[0]["visual_tokens"] == QUERIES
    file = projector_file(tmp_path / "first")
    written = torch.load(file, weights_only=True)
    assert file.name == "query_abstractor.bin"
    assert written.keys() == RELEASES["mqt"][2]
    fresh = positions(16, written["model.query_abstractor.query"].shape[1])
    assert torch.equal(written["model.query_abstractor.pos_embed"].float(), fresh)
    assert answer(tmp_path / "first", world.llm).shape[1] == 4 + QUERIES

    release = ["--pretrain_mm_query_abstractor", str(file), "--num_visual_tokens", "second_stage"]
    saves = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, **LORA}
    folder = tmp_path / "second"
    argv = [*world.flags(folder, **saves), *release]
    whole = train(parse_args(argv))
    steps = [(entry["visual_tokens"], entry["loss"]) for entry in whole.state.log_history if "loss" in entry]
    assert len({count for count, _ in steps}) > 1
    assert all(count % 2 == 0 and count <= QUERIES for count, _ in steps)
    for left in (*folder.glob("*.*"), *folder.glob("checkpoint-[23]/*")):  # it goes on from the first step
        left.unlink() if left.is_file() else None
    again = train(parse_args(argv))
    repeated = [(entry["visual_tokens"], entry["loss"]) for entry in again.state.log_history if "loss" in entry]
    torch.testing.assert_close(torch.tensor(repeated), torch.tensor(steps), atol=1e-4, rtol=1e-4)


def test_a_flag_takes_back_the_one_before(world: TinyWorld, tmp_path: Path) -> None:
    (tmp_path / "mm_projector.bin").touch()
    argv = world.flags(tmp_path / "run", pretrain_mm_mlp_adapter=tmp_path / "mm_projector.bin")
    assert parse_args([*argv, "--pretrain_mm_mlp_adapter", "none"]).model.pretrain_mm_mlp_adapter is None


def test_the_key_of_mqts_release() -> None:
    for value, method in {"first_stage": {}, "16": {"tokens": 16}, 16: {"tokens": 16}}.items():
        config = type("Config", (), {"num_visual_tokens": value})
        assert ReductionConfig.of_model(config).projector == {"name": "mqt", **method}
    with pytest.raises(ValueError, match="num_visual_tokens='all': expected a number, first_stage or second_stage"):
        ReductionConfig.of_model(type("Config", (), {"num_visual_tokens": "all"}))
