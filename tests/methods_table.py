"""The methods' options for the tests that run every method: a new method needs its row in `METHODS`, and no other.

The options suit a vision tower of 3 blocks and 4 x 4 patches, and a language model of 4 layers or more.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from llava.model.language_model.families import LlavaLlamaForCausalLM
from llava.reduction import available, build
from llava.reduction.registry import method_class, site_of
from llava.reduction.selection import BudgetedReducer
from tests.tiny_world import make_readable, make_tiny_world

Method = dict[str, Any]
DEPTH, SELECTED = 3, 2  # blocks of the tower, and those that lead to what is read

METHODS: dict[str, tuple[dict[str, Any], ...]] = {
    # tower
    "tome": ({"tokens": 7}, {"per_block": 3, "variant": "lightcompress"}),
    "evit": ({"blocks": [0, 1], "keep": 0.5}, {"tokens": 7}, {"keep": 0.6, "fuse": False, "variant": "paper"}),
    "ats": ({"blocks": [0, 1]}, {}, {"at_most": 9, "variant": "paper"}),
    "resize": ({"tokens": 4}, {"tokens": 9}),
    # encoder; those with `ratio` and `tokens` run adaptive, where they can, and with either
    "prumerge": ({}, {"variant": "paper"}),
    "prumerge_plus": ({"variant": "paper"}, {}),
    "trim": ({"text": "conversation"}, {"variant": "paper"}),
    "sequential": ({},),
    "spatial": ({"rows": 1, "columns": 2}, {}),
    "random": ({},),
    "divprune": ({},),
    "visionzip": ({"dominant": 3, "contextual": 2}, {"tokens": 5}, {"tokens": 5, "variant": "paper"}),
    "fastervlm": ({"tokens": 4},),
    "vispruner": ({"tokens": 4},),
    "vscan": ({"tokens": 6},),
    "cdpruner": ({"tokens": 4},),
    "mmtok": ({"tokens": 4},),
    "holov": ({"tokens": 4}, {"tokens": 4, "variant": "paper"}),
    # projector
    "stf": (
        {"mbtf": 1},
        {"mbtf": 3, "variant": "paper", "tokens_out": 2},
        {"mbtf": None},
        {"kernel": 1, "mbtf": [2, 1]},
    ),
    "avgpool": ({},),
    "token_concat": ({}, {"kernel": 4}),
    "tokenpacker": ({"scale": 2}, {"scale": 4, "heads": 2}),
    "mqt": ({"tokens": 5}, {"tokens": 7, "draws": True}),
    "m3": ({"tokens": 4, "scales": [1, 4]}, {"tokens": 4}, {"scales": [1, 16]}),
    # decoder
    "pyramiddrop": (
        {"layers": [1], "ratios": [0.25]},
        {"layers": [1, 2, 3], "ratios": [0.6, 0.4, 0.2], "pool": "sample"},
        {"lambda": 0.7, "stages": 3},
    ),
    "fastv": ({"layer": 1, "ratio": 0.75}, {"layer": 2, "tokens": 3}),
    "dart": (
        {"layer": 1, "tokens": 8, "image_pivots": 2, "text_pivots": 2},
        {"layer": 1, "ratio": 0.5, "image_pivots": 1, "text_pivots": 2, "variant": "paper"},
    ),
    "sparsevlm": (
        {"tokens": 4},
        {"layers": [0, 1, 2], "keep": [9, 6, 3]},
        {"version": "2.0", "layers": [1, 2], "keep": [10, 4], "heads": 2},
        {"layers": [1, 2], "keep": [12, 5], "pool": "sample"},
    ),
    "vscan_drop": ({"layers": [1], "keep": [2]}, {"layers": [1, 3], "keep": [5, 2], "pool": "sample"}),
}
"""By name, the options of each of its runs; the first one also goes through training runs and with other methods."""


NAMES = [name for names in available().values() for name in names]
"""Of all methods, those of the tower first."""


def model_that_suits(root: Path) -> Any:
    """A tiny random LLaVA whose tower and language model the options suit, with texts that its CLIP tells apart."""
    world = make_tiny_world(root, llm_layers=4)
    make_readable(world.clip)
    torch.manual_seed(0)
    model = LlavaLlamaForCausalLM.from_pretrained(str(world.llm))
    args = {"vision_tower": str(world.clip), "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2}
    model.get_model().initialize_vision_modules(type("Args", (), args))
    model.tokenizer = AutoTokenizer.from_pretrained(world.llm)
    return model


def runs(name: str) -> list[Method]:
    """Each run of a method: its options, and a method of `BudgetedReducer` adaptive, with a ratio and with a number."""
    found = []
    for options in METHODS[name]:
        wants_count = issubclass(method_class(name), BudgetedReducer) and not {"tokens", "ratio", "rows"} & set(options)
        counts: list[dict[str, Any]] = [{"tokens": 5}, {"ratio": 0.3}] if wants_count else [{}]
        if wants_count and is_adaptive(name, options):
            counts.insert(0, {})
        found += [{"name": name, **options, **count} for count in counts]
    return found


def is_adaptive(name: str, options: dict[str, Any]) -> bool:
    """Whether the method finds its count itself where the options name none."""
    try:
        return build(name, **options).is_adaptive
    except ValueError:
        return False


def first(name: str) -> Method:
    """The first run."""
    return runs(name)[0]


def flag(name: str) -> str:
    """The first run as the value of `--reduction`."""
    return json.dumps(first(name))


def beside_a_budget(name: str) -> dict[str, Any]:
    """What the first run's options leave of them where a `budget` says how many tokens stay."""
    cls = method_class(name)
    choices = cls.budget_choices(576)
    taken = {*cls.budget_conflicts, *(choices[0] if choices else ())}
    return {option: value for option, value in METHODS[name][0].items() if option not in taken}


def together(*names: str) -> dict[str, Method]:
    """The first runs of methods of different sites as one reduction."""
    return {site_of(method_class(name)): first(name) for name in names}


def composes(one: str, other: str) -> bool:
    """Whether two methods may work together, on a tower of `DEPTH` blocks.

    A projector's method fuses a grid, which what comes before must keep. What a method after the tower reads of a
    block must be of the tokens that a method in the tower leaves, as many of each picture.
    """
    sites = {site_of(method_class(name)): name for name in (one, other)}
    before = sites.get("tower") or sites.get("encoder")
    if len(sites) < 2:
        return False
    if "projector" in sites:
        return before is None or getattr(method_class(before), "keeps_grid", False)
    if sites.keys() == {"tower", "encoder"}:
        if is_adaptive(sites["tower"], METHODS[sites["tower"]][0]):
            return False
        needs = build(**first(sites["encoder"])).needs
        places = {"early": DEPTH * 5 // 24, "selected": SELECTED - 1, "last": DEPTH - 1}
        read = [*needs.hidden, *(places[place] if isinstance(place, str) else place for place in needs.places)]
        return min(read, default=DEPTH) > max(build(**first(sites["tower"])).blocks(DEPTH, SELECTED), default=-1)
    return True


def pairwise() -> list[tuple[str, ...]]:
    """Few combinations of methods that hold every pair that may work together."""
    sites = available()
    order = [(site, name) for site, names in sites.items() for name in names]
    open_pairs = {(a, b) for i, (_, a) in enumerate(order) for _, b in order[i + 1 :] if composes(a, b)}
    found: list[tuple[str, ...]] = []
    for pair in sorted(open_pairs):
        if pair not in open_pairs:
            continue
        chosen = dict(zip((site_of(method_class(name)) for name in pair), pair, strict=True))
        for site, names in sites.items():
            gains = {
                name: sum((a, name) in open_pairs or (name, a) in open_pairs for a in chosen.values())
                for name in names
                if site not in chosen and all(composes(name, a) for a in chosen.values())
            }
            best = max(gains, key=gains.__getitem__, default=None)
            if best is not None and gains[best]:
                chosen[site] = best
        combination = tuple(chosen[site] for site in sites if site in chosen)
        open_pairs -= {(a, b) for i, a in enumerate(combination) for b in combination[i + 1 :]}
        found.append(combination)
    return found
