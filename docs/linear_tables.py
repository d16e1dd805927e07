"""Tables of what packed linear layers cost, from `benchmarks/linear_decode.py`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from marked import markdown

BASE = "bf16"


def above(row: dict[str, Any], threads: int, what: str) -> str:
    others = f"other programs used {row['used_by_others'] or 0:.0%} of the machine"
    return f"{what}; {threads} threads, medians of {row['rounds']} rounds; {others}."


def steps(found: dict[str, Any], _: Path | None = None) -> str | None:
    """All linear layers of a decode step: what is read, tokens a second, and times bf16."""
    rows = found.get("steps")
    if not rows:
        return None
    made = [
        (
            row["model"],
            name,
            f"{own['bytes'] / 1e6:,.0f}",
            f"{own['tokens_per_s']:.1f}",
            f"{own['speedup']:.2f}",
            f"{row['contenders'][BASE]['bytes'] / own['bytes']:.2f}",
        )
        for row in rows
        for name, own in row["contenders"].items()
    ]
    header = ("shapes of", "weights", "MB read", "tokens/s", "times bf16", "bf16's bytes over its own")
    return markdown(above(rows[0], found["threads"], "All linear layers of a step, one token"), header, made)


def layers(found: dict[str, Any], _: Path | None = None) -> str | None:
    """One layer of each shape: times bf16."""
    rows = found.get("layers")
    if not rows:
        return None
    names = list(rows[0]["contenders"])
    made = [
        (
            row["model"],
            f"{row['shape'][1]:,} to {row['shape'][0]:,}",
            f"{1e6 * row['contenders'][BASE]['seconds']:,.0f}",
            *(f"{row['contenders'][name]['speedup']:.2f}" for name in names if name != BASE),
        )
        for row in rows
    ]
    header = ("layer of", "features", "bf16, µs", *(name for name in names if name != BASE))
    what = "One layer and one token, microseconds in bf16 and how many times as fast the others are"
    return markdown(above(rows[0], found["threads"], what), header, made)


def prompts(found: dict[str, Any], _: Path | None = None) -> str | None:
    """One layer and many tokens: times bf16."""
    rows = found.get("prompts")
    if not rows:
        return None
    made = [
        (
            f"{row['shape'][1]:,} to {row['shape'][0]:,}",
            name,
            f"{1e3 * own['seconds']:.2f}",
            f"{own['speedup']:.2f}",
        )
        for row in rows
        for name, own in row["contenders"].items()
    ]
    what = f"One layer and {rows[0]['tokens']} tokens"
    return markdown(above(rows[0], found["threads"], what), ("features", "weights", "ms", "times bf16"), made)


MAKERS: dict[str, Callable[[dict[str, Any], Path], str | None]] = {
    "linear_steps": steps,
    "linear_layers": layers,
    "linear_prompts": prompts,
}
