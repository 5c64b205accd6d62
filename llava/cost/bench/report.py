"""Tables of `llava bench`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llava.cost.bench.workload import PHASES

STEPS = ("forward", "backward", "optimizer")


def tables(result: Mapping[str, Any]) -> str:
    """Markdown: a table of times and one of ratios for each batch size, and one of causes.

    Args:
        result: of `llava.cost.bench.run.run`.
    """
    batches = dict.fromkeys(row["batch"] for row in result["rows"])
    parts = [_heading(result["setting"])]
    for batch in batches:
        rows = [row for row in result["rows"] if row["batch"] == batch]
        parts += [f"### batch {batch}", _times(rows), _ratios(rows)]
    explained = [row for row in result["rows"] if row["beyond"]]
    if explained:
        parts += [f"### where the time goes, batch {explained[0]['batch']}", _causes(explained)]
    return "\n\n".join(parts) + "\n"


def _heading(setting: Mapping[str, Any]) -> str:
    what = "answering" if setting["trains"] is None else f"a training step ({setting['trains']})"
    where = setting["device"] + ("" if setting["threads"] is None else f", {setting['threads']} threads")
    size = f"{setting['images']} images of {setting['tiles']} tiles and {setting['text_tokens']} tokens of text"
    return (
        f"{setting['model']}, {what}, {size}; {where}, {setting['dtype']}, {setting['attention']}; "
        f"median of {setting['rounds']} turns [quartiles], milliseconds"
    )


def _times(rows: Sequence[Mapping[str, Any]]) -> str:
    measured = rows[0]["measured"]
    trains = "step" in measured
    names = [*STEPS, "step"] if trains else [*PHASES, "first_token"]
    rate = "samples_per_second" if trains else "requests_per_second"
    more = ["peak_bytes"] if "peak_bytes" in measured else []
    more += [] if trains else ["cache_bytes"]
    header = [
        "method",
        "tokens",
        *(name.replace("_", " ") for name in names),
        rate.replace("_", " ").replace(" per second", "/s"),
    ]
    header += [name.removesuffix("_bytes") + ", MiB" for name in more]
    lines = []
    for row in rows:
        cells = [_time(row["measured"].get(name)) for name in names]
        sizes = [f"{row['measured'][name]['median'] / 2**20:.1f}" for name in more]
        lines.append(
            [row["method"], f"{row['image_tokens']:.1f}", *cells, f"{row['measured'][rate]['median']:.2f}", *sizes]
        )
    return _table(header, lines)


def _time(spread: Mapping[str, float] | None) -> str:
    if spread is None:
        return "-"
    median, low, high = (1000 * spread[key] for key in ("median", "low", "high"))
    return f"{median:.1f} [{low:.1f}, {high:.1f}]"


def _ratios(rows: Sequence[Mapping[str, Any]]) -> str:
    utilized = any(row["utilization"] for row in rows)
    header = ["method", "TFLOPs", "promised", "measured", "measured / promised", *(["MFU, %"] if utilized else [])]
    lines = []
    for row in rows:
        work = sum(value for part, value in row["flops"].items() if part != "decoding")
        cells = [f"{work / 1e12:.4f}", f"{row['promised']:.2f}", f"{row['speedup']:.2f}"]
        share = [f"{100 * row['utilization']:.1f}"] if utilized else []
        lines.append([row["method"], *cells, f"{row['speedup'] / row['promised']:.2f}", *share])
    return _table(header, lines)


def _causes(rows: Sequence[Mapping[str, Any]]) -> str:
    causes = list(rows[0]["causes"])
    header = ["method", *causes, *(f"{name} beyond" for name in causes)]
    lines = [
        [row["method"], *(f"{1000 * row[key][name]:.1f}" for key in ("causes", "beyond") for name in causes)]
        for row in rows
    ]
    note = "Milliseconds under the profiler. Beyond: more than the baseline's, times the ratio of the FLOPs."
    return f"{_table(header, lines)}\n\n{note}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
