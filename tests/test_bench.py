"""`llava bench`: what is timed, in which order, and how the causes of the rest are read off a profile."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from llava import cli
from llava.cost.bench.causes import Causes, causes_on_cpu, causes_on_gpu, find_causes, is_product
from llava.cost.bench.run import Plan, run
from llava.cost.bench.subject import open_subject
from llava.cost.bench.timing import Clock, Phases, Spread, by_turns
from llava.cost.bench.workload import Workload
from llava.cost.presets import CLIP, MODELS, TOWERS

METHODS = ("prumerge", "trim", "mmtok", "avgpool", "stf", "fastv")
STF = {"name": "stf", "mbtf": 3}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config.json of a small LLaVA-1.5."""
    heads = {"num_attention_heads": 2}
    vision = {**TOWERS[CLIP]["mm_vision_config"], "hidden_size": 32, "intermediate_size": 48, "image_size": 56, **heads}
    text = {**TOWERS[CLIP]["mm_text_config"], "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    llm = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "vocab_size": 64, **heads}
    vision["num_hidden_layers"] = 12
    file = tmp_path_factory.mktemp("small") / "config.json"
    content = {**MODELS["llava-1.5-7b"], **llm, "mm_vision_config": vision, "mm_text_config": {**text, **heads}}
    file.write_text(json.dumps(content))
    return file


@pytest.fixture(scope="module")
def answers(small: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    methods = {name: STF if name == "stf" else name for name in METHODS}
    work = Workload(new_tokens=3, text_tokens=40)
    trace = tmp_path_factory.mktemp("trace")
    found = run(Plan(model=str(small), methods=methods, batches=(1, 2), rounds=2, work=work, trace=trace))
    assert sorted(file.stem for file in trace.glob("*.json")) == sorted(["none", *METHODS])
    assert "traceEvents" in json.loads((trace / "none.json").read_text())
    return found


def test_every_phase_of_an_answer_is_timed(answers: dict[str, Any]) -> None:
    assert [(row["method"], row["batch"]) for row in answers["rows"]] == [
        (name, batch) for batch in (1, 2) for name in ("none", *METHODS)
    ]
    for row in answers["rows"]:
        seconds = {name: spread["median"] for name, spread in row["measured"].items()}
        assert {"tower", "projector", "prefill", "decode", "first_token"} <= seconds.keys()
        assert ("reduction" in seconds) == (row["method"] in ("prumerge", "trim", "mmtok"))
        parts = sum(seconds.get(name, 0) for name in ("tower", "reduction", "projector", "splice", "prefill"))
        assert 0.5 < parts / seconds["first_token"] < 1.5  # medians of different turns
        assert all(spread["number"] == 2 for spread in row["measured"].values())


def test_promises_stand_beside_measurements(answers: dict[str, Any]) -> None:
    rows = {(row["method"], row["batch"]): row for row in answers["rows"]}
    base = rows["none", 1]
    assert (base["promised"], base["speedup"], base["image_tokens"]) == (1, 1, 16)
    assert rows["avgpool", 1]["image_tokens"] == rows["stf", 1]["image_tokens"] == 4
    assert rows["fastv", 1]["image_tokens"] == 16
    assert all(rows[name, 1]["promised"] > 1 for name in ("prumerge", "avgpool", "fastv"))
    assert rows["none", 2]["flops"]["prefill"] == pytest.approx(2 * base["flops"]["prefill"])
    # Keys and values of 4 layers of 32 channels, 16 + 40 tokens and the two that were decoded, 4 bytes each.
    assert base["measured"]["cache_bytes"]["median"] == 2 * 4 * 32 * (16 + 40 + 2) * 4
    assert rows["fastv", 1]["measured"]["cache_bytes"]["median"] < base["measured"]["cache_bytes"]["median"]
    assert base["beyond"] == pytest.approx({"products": 0, "traffic": 0, "waits": 0, "launches": 0})
    assert rows["prumerge", 2]["causes"] is None


@pytest.mark.parametrize("trains", ["lora", "all"])
def test_a_training_step_is_timed(small: Path, trains: str) -> None:
    work = Workload(text_tokens=40)
    found = run(
        Plan(model=str(small), methods={"prumerge": "prumerge"}, batches=(2,), rounds=1, work=work, trains=trains)
    )
    for row in found["rows"]:
        seconds = {name: spread["median"] for name, spread in row["measured"].items()}
        assert seconds["step"] == pytest.approx(sum(seconds[n] for n in ("forward", "backward", "optimizer")), rel=0.2)
        assert row["flops"]["layers"] > 0


def test_the_command(small: Path, tmp_path: Path) -> None:
    shape = ["--text-tokens", "40", "--new-tokens", "2", "--rounds", "1", "--batch", "1"]
    command = ["bench", str(small), "--method", "prumerge", "--method", "{name: fastv, layer: 1}", *shape]
    result = CliRunner().invoke(cli.app, command)
    assert result.exit_code == 0, result.exception
    assert "| prumerge |" in result.stdout and "measured / promised" in result.stdout
    file = tmp_path / "bench.json"
    result = CliRunner().invoke(cli.app, [*command, "--format", "json", "--output", str(file)])
    assert result.exit_code == 0, result.exception
    assert [row["method"] for row in json.loads(file.read_text())["rows"]][:2] == ["none", "prumerge"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--batch", "1,x"], "batch='1,x'"),
        (["--batch", "0"], "sizes of at least 1"),
        (["--method", "prumerg"], "prumerge"),
        (["--method", "stf"], "method stf"),
        (["--train", "some"], "choose lora or all"),
        (["--format", "csv"], "markdown, json"),
        (["--text-tokens", "3"], "more than the system prompt"),
    ],
)
def test_wrong_values_are_named(small: Path, wrong: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CliRunner().invoke(cli.app, ["bench", str(small), *wrong], catch_exceptions=False)


def test_a_lora_folder_is_to_be_merged_first(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="llava merge it first"):
        open_subject(str(tmp_path), [], torch.device("cpu"), torch.float32)


def test_candidates_run_by_turns() -> None:
    order: list[str] = []

    def candidate(name: str) -> Any:
        return lambda: order.append(name) or {"value": float(len(order))}

    found = by_turns({name: candidate(name) for name in "abc"}, rounds=3)
    assert "".join(order) == "cab" + "abc" + "bca" + "cab"
    assert found["a"]["value"] == [4, 9, 11]


def test_phases_add_the_calls_of_a_module() -> None:
    phases = Phases(Clock(torch.device("cpu")))
    layer = torch.nn.Linear(4, 4)
    with phases.watch({"layer": layer, "absent": None}), phases.phase("both"):
        layer(torch.ones(1, 4))
        layer(torch.ones(1, 4))
    layer(torch.ones(1, 4))
    seconds = phases.seconds()
    assert set(seconds) == {"layer", "both"}
    assert 0 < seconds["layer"] <= seconds["both"]
    assert phases.seconds() == {}


def test_spread() -> None:
    assert Spread.of([3.0]) == Spread(3, 3, 3, 1)
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 5.0]) == Spread(3, 2, 4, 5)


@pytest.mark.parametrize(
    ("name", "product"),
    [
        ("aten::addmm", True),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", True),
        ("sm90_xmma_gemm_bf16bf16_bf16f32", True),
        ("void cutlass::Kernel2<cutlass_80_wmma>", True),
        ("flash_fwd_kernel", True),
        ("aten::convolution", True),
        ("void at::native::vectorized_elementwise_kernel<4, gemm_like>", False),
        ("aten::to", False),
        ("convert_element_type", False),
        ("aten::sum", False),
        ("aten::common", False),
    ],
)
def test_products_are_told_by_their_names(name: str, product: bool) -> None:
    assert is_product(name) is product


def event(name: str, start: float, end: float, cuda: bool = True) -> Any:
    kind = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    return SimpleNamespace(name=name, device_type=kind, time_range=SimpleNamespace(start=start, end=end))


def test_gaps_of_a_gpu_are_told_apart() -> None:
    events = [
        event("gemm", 0, 10),
        event("copy", 10, 14),
        event("gemm", 20, 30),  # the host waited until 15: a gap of 6
        event("cudaStreamSynchronize", 5, 15, cuda=False),
        event("norm", 25, 33),  # beside the product until 30
        event("gemm", 35, 36),  # a gap of 2: nothing had been launched
        event("cudaMemcpyAsync", 33, 34, cuda=False),
    ]
    found = causes_on_gpu(reversed(events))
    assert found == Causes(*(pytest.approx(value / 1e6) for value in (21, 7, 6, 2)))
    assert found.total == pytest.approx(36e-6)


def test_causes_on_the_cpu_add_up() -> None:
    averages = [("aten::mm", 5e5), ("aten::add", 2e5), ("ProfilerStep", 9e5)]
    rows = [SimpleNamespace(key=key, self_cpu_time_total=own) for key, own in averages]
    assert causes_on_cpu(rows, 1.0) == Causes(0.5, 0.2, 0.0, pytest.approx(0.3))
    matrix = torch.randn(256, 256)
    found = find_causes(lambda: matrix @ matrix, torch.device("cpu"))
    assert found.products > found.traffic


def test_time_beyond_the_promise() -> None:
    base, method = Causes(8, 2, 0, 2), Causes(4, 2, 1, 2)
    assert method.beyond(base, 0.5) == {"products": 0, "traffic": 1, "waits": 1, "launches": 1}
