"""The benchmarks' figures that depend on no machine."""

from __future__ import annotations

import pytest

from benchmarks.stf_flops import PROJECTORS, llm_flops, projector_flops


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
