"""The projector's methods: groups of patches, fused blocks, and what they make of a model's weights and layout."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, gelu

from llava.model.convert import convert
from llava.model.image_layout import NEWLINE, LayoutSpec, image_layout
from llava.reduction import ReductionConfig, VisionFeatures, available, build
from llava.reduction.base import ProjectorReducer
from llava.reduction.projector.grouping import GroupingReducer, concatenate_neighbours
from llava.reduction.projector.stf import evenly_spaced, options_of_weights
from llava.reduction.registry import method_class
from llava.train.checkpoints.saving import part_of
from tests.test_builder import answer, assert_same_model, edit_config, llava_on, open_model, projector_folder, save
from tests.test_convert import save_ours
from tests.tiny_models import PINPOINTS, SIDE, prompt, tiny_model
from tests.tiny_world import TinyWorld, make_tiny_world

METHODS: dict[str, dict[str, Any]] = {
    "stf-release": {"name": "stf", "mbtf": [2, 1]},
    "stf-paper": {"name": "stf", "mbtf": 3, "variant": "paper"},
    "stf-two-tokens": {"name": "stf", "mbtf": "off", "tokens_out": 2},
    "mbtf-alone": {"name": "stf", "kernel": 1, "mbtf": 1},
    "avgpool": {"name": "avgpool"},
    "token_concat": {"name": "token_concat"},
}
TABLE_4 = [(1, 1), (2, 1), (2, 2), (4, 4), (4, 8), (8, 16), (8, 32)]


def plain(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 10), nn.GELU(), nn.Linear(10, 10))


def modules_of(reducer: ProjectorReducer, c: int, d: int = 10) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return reducer.build_modules(c, d, plain)


def random_vision(grid: tuple[int, int], c: int, blocks: int = 0, n: int = 2) -> VisionFeatures:
    generator = torch.Generator().manual_seed(1)
    states = {b: torch.randn(n, grid[0] * grid[1], c, generator=generator) for b in range(blocks, -1, -1)}
    return VisionFeatures(states.pop(0), grid=grid, hidden_states=states)


def slow_projector(options: Any, vision: VisionFeatures, modules: dict[str, nn.Module]) -> Tensor:
    """Patch by patch and cell by cell, from the weights alone, [N, P / k^2 * E, D]."""
    assert vision.grid is not None
    (h, w), k = vision.grid, options.kernel
    variant, e = getattr(options, "variant", None), getattr(options, "tokens_out", 1)
    fusion = modules.get("mm_projector_crosslayer")
    images = []
    for i in range(len(vision.features)):
        patches = []
        for p in range(h * w):
            patch = vision.features[i, p]
            if fusion is not None:
                wide = torch.cat([vision.hidden_states[b][i, p] for b in vision.hidden_states])
                patch = linear(fusion[2], gelu(linear(fusion[0], wide)))
                patch = gelu(patch) if variant == "paper" else patch
            patches.append(patch)
        tokens: list[Tensor] = []
        for row in range(0, h, k):
            for column in range(0, w, k):
                square = [patches[(row + y) * w + column + x] for y in range(k) for x in range(k)]
                tokens += slow_cell(square, modules["mm_projector"], variant if k > 1 else None, e)
        images.append(torch.stack(tokens))
    return torch.stack(images)


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    return layer.weight @ x + layer.bias


def slow_cell(square: list[Tensor], projector: nn.Module, variant: str | None, e: int) -> list[Tensor]:
    wide = torch.stack(square, dim=1).flatten()  # channel by channel, as the weight of a convolution
    if projector[0].in_features == len(square[0]):  # AvgPool, or a single patch
        wide = torch.stack(square).mean(dim=0)
    if variant == "paper":
        parts = gelu(linear(projector[0], wide)).view(e, -1)
        return [gelu(linear(projector[5], gelu(linear(projector[3], part)))) for part in parts]
    return list(linear(projector[2], gelu(linear(projector[0], wide))).view(e, -1))


def test_every_method_that_groups_is_here() -> None:
    """Others have tests of their own."""
    grouping = {name for name in available()["projector"] if issubclass(method_class(name), GroupingReducer)}
    assert {method["name"] for method in METHODS.values()} == grouping


@pytest.mark.parametrize("grid", [(4, 4), (2, 6), (8, 2)], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_agrees_with_a_plain_loop(name: str, grid: tuple[int, int]) -> None:
    reducer = build(**METHODS[name])
    assert isinstance(reducer, ProjectorReducer)
    modules = modules_of(reducer, c=6)
    vision = random_vision(grid, 6, blocks=len(reducer.blocks(3, 2)))
    tokens = reducer(vision, **modules)
    expected = slow_projector(reducer, vision, modules)
    torch.testing.assert_close(tokens.features, expected, atol=1e-5, rtol=0)
    rows, columns = grid[0] // reducer.kernel, grid[1] // reducer.kernel
    assert tokens.grid == (rows, columns)
    per_cell = getattr(reducer, "tokens_out", 1)
    assert tokens.source.tolist() == [[cell for cell in range(rows * columns) for _ in range(per_cell)]] * 2
    alone = VisionFeatures(
        vision.features[1:], grid=grid, hidden_states={b: s[1:] for b, s in vision.hidden_states.items()}
    )
    torch.testing.assert_close(reducer(alone, **modules).features, tokens.features[1:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_precisions_and_gradients(name: str, dtype: torch.dtype) -> None:
    """Features of a half-precision tower, projected by weights of that type, and by float32 ones as in training."""
    reducer = build(**METHODS[name])
    vision = random_vision((4, 4), 6, blocks=len(reducer.blocks(3, 2)))
    modules = modules_of(reducer, c=6)
    exact = reducer(vision, **modules).features
    vision.features = vision.features.to(dtype)
    vision.hidden_states = {b: s.to(dtype) for b, s in vision.hidden_states.items()}
    trained = reducer(vision, **modules).features
    trained.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for m in modules.values() for p in m.parameters())
    tokens = reducer(vision, **{name: module.to(dtype) for name, module in modules.items()}).features
    assert (trained.dtype, tokens.dtype) == (torch.float32, dtype)
    torch.testing.assert_close(tokens.float(), exact, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_concatenation_is_a_convolution_with_identity_weights(k: int) -> None:
    """The release's concatenation, and the paper's first convolution for any weights."""
    vision = random_vision((6, 12), c=5)
    image = vision.features.transpose(1, 2).unflatten(2, (6, 12))
    wide = concatenate_neighbours(vision.features, (6, 12), k)
    identity = torch.eye(5 * k * k).view(5 * k * k, 5, k, k)
    convolved = conv2d(image, identity, stride=k).flatten(2).transpose(1, 2)
    assert torch.equal(wide, convolved)
    weight = torch.randn(7, 5, k, k)
    convolved = conv2d(image, weight, stride=k).flatten(2).transpose(1, 2)
    torch.testing.assert_close(wide @ weight.flatten(1).T, convolved, atol=1e-5, rtol=1e-5)


def outputs(module: nn.Module, x: Tensor) -> list[tuple[int, ...]]:
    """Shapes after each linear layer."""
    shapes: list[tuple[int, ...]] = []
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(lambda _m, _i, y: shapes.append(tuple(y.shape)))
    module(x)
    return shapes


def test_shapes_of_table_1() -> None:
    with torch.device("meta"):
        modules = modules_of(build("stf", variant="paper"), c=1024, d=4096)
        fusion = outputs(modules["mm_projector_crosslayer"], torch.empty(1, 24 * 24, 8 * 1024))
        assert fusion == [(1, 576, 4096), (1, 576, 1024)]
        shapes = outputs(modules["mm_projector"], torch.empty(1, 12 * 12, 4 * 1024))
    assert [(n, p, m[-1]) for n, p, *m in shapes] == [(1, 144, 4096), (1, 144, 16384), (1, 144, 4096)]
    for module in modules.values():
        layers = [type(layer).__name__ for layer in module if not isinstance(layer, nn.Unflatten)]
        assert layers == ["Linear", "GELU"] * (len(layers) // 2)


@pytest.mark.parametrize("variant", ["release", "paper"])
@pytest.mark.parametrize(("k", "e"), TABLE_4)
def test_tokens_of_table_4(k: int, e: int, variant: str) -> None:
    with torch.device("meta"):
        reducer = build("stf", kernel=k, tokens_out=e, variant=variant)
        blocks = reducer.blocks(24, 23)
        modules = modules_of(reducer, c=1024, d=4096)
        states = {block: torch.empty(1, 576, 1024) for block in blocks}
        tokens = reducer(VisionFeatures(torch.empty(1, 576, 1024), grid=(24, 24), hidden_states=states), **modules)
    assert tokens.features.shape == (1, (24 // k) ** 2 * e, 10 if k == 1 else 4096)


def test_blocks() -> None:
    paper, release = build("stf", variant="paper"), build("stf")
    assert paper.blocks(24, 23) == (3, 6, 9, 12, 15, 18, 21, 24)
    assert release.blocks(24, 23) == (23, 21, 18, 15, 12, 9, 6, 3)
    assert release.blocks(24, 24) == (24, 21, 18, 15, 12, 9, 6, 3)
    assert build("stf", mbtf=[5, 1, 24]).blocks(24, 23) == build("stf", mbtf=(5, 1, 24)).blocks(24, 23) == (5, 1, 24)
    assert build("stf", mbtf=1).blocks(24, 23) == (23,)
    for off in (None, False, "off"):
        assert build("stf", mbtf=off).blocks(24, 23) == ()
    assert evenly_spaced(4, 27) == (7, 14, 20, 27)
    for depth in (1, 7, 24, 27):
        for count in range(1, depth + 1):
            blocks = evenly_spaced(count, depth)
            assert len(set(blocks)) == count
            assert (min(blocks) >= 1, max(blocks)) == (True, depth)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": 0}, "kernel=0 must be a whole number, 1 or more"),
        ({"kernel": True}, "kernel=True must be a whole number"),
        ({"kernel": 2.0}, "kernel=2.0 must be a whole number"),
        ({"tokens_out": 5}, "tokens_out=5 would make more tokens than the 2 x 2 patches"),
        ({"tokens_out": 0}, "tokens_out=0 must be a whole number"),
        ({"mbtf": -1}, "mbtf=-1 must be a whole number, 1 or more, a list"),
        ({"mbtf": True}, "mbtf=True must be a whole number, 1 or more, a list"),
        ({"mbtf": []}, r"mbtf=\[\] must be a list of different blocks"),
        ({"mbtf": [3, 3]}, r"mbtf=\[3, 3\] must be a list of different blocks"),
        ({"mbtf": [0, 3]}, r"mbtf=\[0, 3\] must be"),
        ({"variant": "fast"}, "variant='fast' is not known"),
        ({"size": 2}, "has no option 'size'; it has: kernel, tokens_out, mbtf, variant"),
    ],
)
def test_options_that_can_not_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build("stf", **options)


@pytest.mark.parametrize(
    ("reduction", "message"),
    [
        ({"name": "stf"}, "mbtf=8 asks for more blocks than the 4 that the vision tower has"),
        ({"name": "stf", "mbtf": [5]}, r"mbtf=\[5\] means the blocks \[5\]; the vision tower has the blocks 1 to 4"),
        ({"name": "stf", "mbtf": 4}, r"mbtf=4 means the blocks \[3, 3, 2, 1\]"),
        ({"name": "avgpool", "kernel": 3}, "kernel=3 does not divide .* 4 x 4 patches; set kernel to one of 1, 2, 4"),
        ({"encoder": "prumerge", "projector": "avgpool"}, "'prumerge' keeps patches here and there, and .*'avgpool'"),
        ({"encoder": "avgpool"}, "method 'avgpool' works at the site 'projector', not 'encoder'"),
    ],
)
def test_what_does_not_suit_the_tower(reduction: dict[str, Any], message: str) -> None:
    model = tiny_model()
    before = dict(model.named_parameters())
    with pytest.raises(ValueError, match=message):
        model.set_reduction(reduction)
    assert not ReductionConfig.of_model(model.config)
    assert dict(model.named_parameters()).keys() == before.keys()
    with pytest.raises(ValueError, match=message):
        tiny_model(reduction=ReductionConfig.parse(reduction).to_dict())


@pytest.mark.parametrize(
    ("grid", "kernel", "fitting"),
    [((24, 24), 5, "1, 2, 3, 4, 6, 8, 12, 24"), ((27, 27), 2, "1, 3, 9, 27"), ((4, 6), 4, "1, 2"), ((5, 7), 5, "1")],
)
def test_grids_that_the_kernel_does_not_divide(grid: tuple[int, int], kernel: int, fitting: str) -> None:
    reducer, vision = build("avgpool", kernel=kernel), random_vision(grid, 6)
    message = f"kernel={kernel} does not divide .* {grid[0]} x {grid[1]} patches; set kernel to one of {fitting}$"
    with pytest.raises(ValueError, match=message):
        reducer(vision, **modules_of(reducer, c=6))


def test_channels_that_the_tokens_do_not_divide() -> None:
    with pytest.raises(ValueError, match="tokens_out=5 does not divide the 54 channels of a fused group"):
        modules_of(build("stf", variant="paper", kernel=3, tokens_out=5), c=6)


def test_cls_has_no_neighbours() -> None:
    with pytest.raises(ValueError, match="mm_vision_select_feature=cls_patch keeps CLS among the patches"):
        tiny_model(mm_vision_select_feature="cls_patch").set_reduction("avgpool")


def test_inputs_that_are_missing() -> None:
    reducer, vision = build("stf"), random_vision((2, 2), 6)
    modules = modules_of(reducer, c=6)
    with pytest.raises(ValueError, match=r"pass hidden_states=\{block: ...\}"):
        reducer(vision, **modules)
    vision.grid = None
    with pytest.raises(ValueError, match=r"pass grid=\(h, w\)"):
        reducer(vision, **modules)


# In a model


def test_the_tower_keeps_and_runs_no_more_than_what_is_read() -> None:
    model = tiny_model()
    tower = model.get_vision_tower()
    pixels = torch.randn(2, 3, SIDE, SIDE)
    expected = tower.vision_tower(pixels, output_hidden_states=True).hidden_states
    ran: list[int] = []
    for i, block in enumerate(tower.vision_tower.encoder.layers):
        block.register_forward_hook(lambda _m, _i, _o, i=i: ran.append(i + 1))
    for blocks in ((), (2, 1), (4, 2), (3,)):
        ran.clear()
        vision = tower(pixels, blocks=blocks)
        assert tuple(vision.hidden_states) == blocks
        for block, state in vision.hidden_states.items():
            torch.testing.assert_close(state, expected[block][:, 1:])
        torch.testing.assert_close(vision.features, expected[blocks[0] if blocks else 3][:, 1:])
        assert ran == list(range(1, max(blocks or (3,)) + 1))


@pytest.mark.parametrize(
    ("reduction", "depth"),
    [
        ("none", 3),
        ("{name: stf, kernel: 2, mbtf: [2, 1]}", 2),
        ("{name: stf, kernel: 2, mbtf: 2, variant: paper}", 4),
        ("{name: stf, kernel: 2, mbtf: off}", 3),
    ],
)
def test_the_depth_that_is_read_is_the_depth_that_runs(reduction: str, depth: int) -> None:
    model = tiny_model(reduction=ReductionConfig.parse(reduction).to_dict()).get_model()
    ran: list[int] = []
    for i, block in enumerate(model.get_vision_tower().vision_tower.encoder.layers):
        block.register_forward_hook(lambda _m, _i, _o, i=i: ran.append(i + 1))
    model.encode_images(torch.randn(1, 3, SIDE, SIDE))
    assert ran == list(range(1, depth + 1))
    assert model.tower_depth_read == depth


def test_tokens_of_one_cell_stay_together_where_a_picture_is_unpadded() -> None:
    """As the same grid with one token a cell, each replaced by two."""
    spec = LayoutSpec("spatial_unpad", (2, 2), SIDE, PINPOINTS)
    for size, tiles in [((60, 60), 5), ((40, 150), 4), ((200, 45), 4), ((100, 52), 3)]:
        cells = torch.arange(4).expand(tiles, 4)
        one = image_layout(cells, torch.ones_like(cells, dtype=torch.bool), size, spec)
        pairs = torch.arange(4).repeat_interleave(2).expand(tiles, 8)
        two = image_layout(pairs, torch.ones_like(pairs, dtype=torch.bool), size, spec)
        expected = [j for i in one.tolist() for j in ([i] if i == NEWLINE else [2 * i, 2 * i + 1])]
        assert two.tolist() == expected


@pytest.mark.parametrize("name", METHODS)
def test_counts_of_unpadded_tiles(name: str) -> None:
    """A square picture fills its 2 x 2 tiles: a row of cells ends in a newline, and nothing is cut off."""
    model = tiny_model(anyres=True)
    model.set_reduction(METHODS[name])
    reducer = model.get_model().projector_reducer
    side, per_cell = 4 // reducer.kernel, getattr(reducer, "tokens_out", 1)
    whole = side * side * per_cell
    image = torch.randn(5, 3, SIDE, SIDE)
    assert model.count_visual_tokens([image], [(100, 100)]) == [(16 + 64 + 8, whole + 4 * whole + 2 * side)]


@pytest.mark.parametrize("name", METHODS)
def test_a_training_batch_without_images_reaches_every_module(name: str) -> None:
    model = tiny_model().train()
    model.set_reduction(METHODS[name])
    ids = prompt(5).unsqueeze(0)
    model(input_ids=ids, labels=ids).loss.backward()
    weights = [p for n, p in model.named_parameters() if part_of(n) == "projector"]
    assert all(p.grad is not None and not p.grad.any() for p in weights)


def test_modules_are_named_as_in_the_release() -> None:
    model = tiny_model()
    model.set_reduction(METHODS["stf-release"])
    names = {name for name, _ in model.named_parameters() if part_of(name) == "projector"}
    parts = ("mm_projector.0", "mm_projector.2", "mm_projector_crosslayer.0", "mm_projector_crosslayer.2")
    assert names == {f"model.{part}.{kind}" for part in parts for kind in ("weight", "bias")}


def test_a_new_method_starts_the_projector_anew_only_where_it_must(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model()
    own = model.get_model().mm_projector
    for same in ("avgpool", {"name": "stf", "kernel": 1, "mbtf": None}, "none"):
        model.set_reduction(same)
        assert model.get_model().mm_projector is own
    assert not caplog.messages
    model.set_reduction("token_concat")
    assert model.get_model().mm_projector is not own
    assert "its projector starts anew" in caplog.text
    fused = model.get_model().mm_projector
    with pytest.raises(ValueError, match=r"reduction=none .* needs another projector .* trained with .*token_concat"):
        model.set_reduction("none", keep_projector=True)
    assert model.get_model().mm_projector is fused
    model.set_reduction(METHODS["stf-release"])
    model.set_reduction("none")
    assert not any("crosslayer" in name for name, _ in model.named_parameters())


# Checkpoints


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return make_tiny_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("name", METHODS)
def test_a_saved_model_opens_with_its_method(name: str, world: TinyWorld, tmp_path: Path) -> None:
    model = llava_on(world, reduction=METHODS[name])
    opened = open_model(save(model, world, tmp_path / "full"))
    assert opened.config.reduction == model.config.reduction
    assert_same_model(opened, model)


def test_methods_of_other_weights_are_refused_in_opening(world: TinyWorld, tmp_path: Path) -> None:
    folder = save(llava_on(world), world, tmp_path / "plain")
    assert open_model(folder, reduction="avgpool").config.reduction == {"projector": {"name": "avgpool"}}
    for other in ("token_concat", METHODS["stf-paper"]):
        with pytest.raises(ValueError, match="needs another projector than this checkpoint has"):
            open_model(folder, reduction=other)
    folder = save(llava_on(world, reduction=METHODS["stf-release"]), world, tmp_path / "stf")
    for other in ("none", "avgpool", METHODS["stf-paper"]):
        with pytest.raises(ValueError, match="needs another projector than this checkpoint has"):
            open_model(folder, reduction=other)


# The release's manner: two blocks of three do not come out evenly, so one.
RELEASED = {"name": "stf", "mbtf": 1}
SHOWN = {"name": "stf", "variant": "release", "kernel": 2, "mbtf": 1}


@pytest.mark.parametrize("shard", ["1GB", "20KB"])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_released_weights_tell_their_method(kind: str, shard: str, world: TinyWorld, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = llava_on(world, reduction=RELEASED)
    folder = save(model, world, tmp_path / "full", max_shard_size=shard)
    edit_config(folder, reduction=None)
    if kind == "bin":
        for file in folder.glob("*.safetensors"):
            torch.save(load_file(file), folder / file.name.replace("safetensors", "bin"))
            file.unlink()
        for file in folder.glob("model*.bin"):
            file.rename(folder / f"pytorch_{file.name}")
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            text = index.read_text().replace('"model-', '"pytorch_model-').replace(".safetensors", ".bin")
            (folder / "pytorch_model.bin.index.json").write_text(text)
            index.unlink()
    opened = open_model(folder)
    assert opened.config.reduction == {"projector": SHOWN}
    assert_same_model(opened, model)
    again = save(opened, world, tmp_path / "again")
    assert json.loads((again / "config.json").read_text())["reduction"] == {"projector": SHOWN}


def test_a_projector_folder_tells_its_method(world: TinyWorld, tmp_path: Path) -> None:
    model = llava_on(world, reduction=RELEASED)
    folder = projector_folder(world, tmp_path / "projector", model)
    edit_config(folder, reduction=None)
    torch.testing.assert_close(answer(open_model(folder, model_base=world.llm)), answer(model))
    (folder / "config.json").unlink()
    opened = open_model(folder, model_base=world.llm, vision_tower=world.clip)
    torch.testing.assert_close(answer(opened), answer(model))
    with pytest.raises(ValueError, match=r"has no config.json to name a vision tower; pass vision_tower="):
        open_model(folder, model_base=world.llm)
    with pytest.raises(ValueError, match=r"holds a projector only; pass the language model as model_base="):
        open_model(folder)


def shapes_of(model: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in model.named_parameters()}


@pytest.mark.parametrize("name", ["stf-paper", "mbtf-alone"])
def test_weights_that_do_not_tell_their_method(name: str, world: TinyWorld, tmp_path: Path) -> None:
    model = llava_on(world, reduction=METHODS[name])
    with pytest.raises(ValueError, match=r"are not of the released STF's shapes: .*Name the method"):
        options_of_weights(shapes_of(model))
    folder = save(model, world, tmp_path / "full")
    edit_config(folder, reduction=None)
    with pytest.raises(ValueError, match="are not of the released STF's shapes"):
        open_model(folder)


def test_weights_without_fused_blocks_are_not_judged() -> None:
    model = tiny_model()
    assert options_of_weights(shapes_of(model)) is None
    model.set_reduction("token_concat")
    assert options_of_weights(shapes_of(model)) is None
    with pytest.raises(ValueError, match="not of the released STF's shapes"):
        options_of_weights({"mm_projector_crosslayer.0.weight": (8, 8)})


def test_converting_within_llavas_layout_writes_the_method(world: TinyWorld, tmp_path: Path) -> None:
    model = llava_on(world, reduction=RELEASED)
    folder = save(model, world, tmp_path / "full")
    edit_config(folder, reduction=None)
    target = convert(folder, tmp_path / "again", "llava")
    assert json.loads((target / "config.json").read_text())["reduction"] == {"projector": SHOWN}
    assert_same_model(open_model(target), model)


def test_hf_has_no_place_for_a_fused_projector(tmp_path: Path) -> None:
    source = save_ours(tmp_path / "stf", reduction={"projector": METHODS["stf-release"]})
    with pytest.raises(ValueError, match="llava-hf layouts can't express this model's reduction"):
        convert(source, tmp_path / "hf")
    with pytest.raises(ValueError, match=r"reduction=none .* needs another projector"):
        convert(source, tmp_path / "hf", drop_reduction=True)
    source = save_ours(tmp_path / "pooled", reduction={"projector": METHODS["avgpool"]})
    assert (convert(source, tmp_path / "hf", drop_reduction=True) / "config.json").is_file()


def test_bitsandbytes_leaves_projector_and_tower_alone() -> None:
    from transformers.quantizers.quantizers_utils import should_convert_module

    from llava.model.builder import NOT_QUANTIZED

    model = tiny_model()
    model.set_reduction(METHODS["stf-release"])
    model.get_model().video_tower = copy.deepcopy(model.get_vision_tower())
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    quantized = {name for name in linear if should_convert_module(name, NOT_QUANTIZED)}
    assert quantized == {name for name in linear if name.startswith("model.layers.")}
