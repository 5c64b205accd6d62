"""The benchmarks: figures that depend on no machine, and that they run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import all_methods
from benchmarks.stf_flops import PROJECTORS, llm_flops, projector_flops
from llava.reduction import available

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(("tokens", "teraflops"), [(576, 7.6), (144, 1.9), (288, 3.8)])
def test_visual_tokens_cost_what_the_paper_says(tokens: int, teraflops: float) -> None:
    """Tables 2 and 4 of https://arxiv.org/abs/2506.07138."""
    assert round(llm_flops(tokens) / 1e12, 1) == teraflops


def test_cost_of_the_fusion_modules() -> None:
    """A linear layer of n rows from a to b channels: 2 n a b."""
    c, d = 1024, 4096
    fusion = 2 * 576 * (8 * c * 4 * c + 4 * c * c)
    assert projector_flops(PROJECTORS["mlp2x_gelu"]) == (576, 0, 2 * 576 * (c * d + d * d))
    assert projector_flops(PROJECTORS["stf"]) == (144, fusion, 2 * 144 * (4 * c * 16 * c + 16 * c * d))
    paper = 2 * 144 * (4 * c * 4 * c + 4 * c * 16 * c + 16 * c * d)
    assert projector_flops(PROJECTORS["stf, paper"]) == (144, fusion, paper)


def test_all_methods_at_one_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every registered method is in the table, or refused with a reason."""
    small = json.loads((ROOT / "benchmarks" / "small.json").read_text(encoding="utf-8"))
    small.update(hidden_size=32, intermediate_size=64, num_hidden_layers=8, vocab_size=256, num_attention_heads=4)
    small["mm_vision_config"].update(
        hidden_size=32, intermediate_size=64, image_size=112, num_attention_heads=4, num_hidden_layers=18
    )
    config = tmp_path / "config.json"
    config.write_text(json.dumps(small), encoding="utf-8")
    all_methods.main(["--budget", "16", "--model", str(config), "--timed", str(config), "--rounds", "1"])
    said = capsys.readouterr().out
    rows = {line.split("`")[1]: line.split(" | ") for line in said.splitlines() if line.startswith("| `")}
    refused = {line.split("`")[1] for line in said.splitlines() if line.startswith("- `")}
    names = {name for methods in available().values() for name in methods}
    assert rows.keys() == {"none", *names - refused}
    assert refused <= names
    assert {"visionzip", "divprune", "tome", "avgpool"} <= rows.keys()
    assert all(abs(float(row[2]) - 16) <= 0.05 * 16 for name, row in rows.items() if name != "none")
    assert "tokens=16" in rows["visionzip"]
