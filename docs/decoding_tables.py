"""Tables of what a decode step's attention takes and loses, from `benchmarks/decoding.py`."""

from pathlib import Path
from typing import Any

from marked import markdown

Table = tuple[str, tuple[str, ...], list[tuple[Any, ...]]]
TIMED = ("dtype", "tokens", "read by", "of the pairs", "MB read", "ms", "times as fast as all of it", "planning")
COMPARED = ("model", "tokens", "read by", "of the cache", "KL to dense steps", "same predictions", "nats a token")
ALL = {"dense": "gossamer, all", "sdpa": "torch, all"}


def steps(found: dict[str, Any], _: Path) -> str | None:
    return (made := steps_table(found)) and markdown(*made)


def losses(found: dict[str, Any], _: Path) -> str | None:
    return (made := losses_table(found)) and markdown(*made)


def steps_table(found: dict[str, Any]) -> Table | None:
    """Of one layer: a row for each contender at a length."""
    setting, rows = found["setting"], [row for row in found["rows"] if row["section"] == "attention"]
    above = (
        f"One layer of {setting['heads']} query heads on {setting['groups']} with {setting['dim']} channels, "
        f"{setting['threads']} threads, medians of {setting['rounds']} rounds."
    )
    made = [
        (
            row["dtype"],
            f"{row['length']:,}",
            ALL.get(row["method"], f"`{row['method']}`"),
            f"{row['density']:.1%}",
            f"{row['bytes'] / 1e6:.0f}",
            f"{1e3 * row['median_s']:.2f}",
            f"{row['ratio']:.2f}",
            f"{row['planning_share']:.0%}" if row["planning_share"] else "",
        )
        for row in rows
    ]
    return (above, TIMED, made) if made else None


def losses_table(found: dict[str, Any]) -> Table | None:
    """Of models: a row for each method at a length."""
    made = [
        (
            row["model"],
            f"{row['length']:,}",
            "all" if row["method"] == "dense" else f"`{row['method']}`",
            f"{row['read']:.1%}",
            f"{row['kl']:.4f}",
            f"{row['top1']:.3f}",
            f"{row['nats']:.3f}",
        )
        for row in found["rows"]
        if row["section"] == "model"
    ]
    texts = {(row["texts"], row["steps"]) for row in found["rows"] if row["section"] == "model"}
    above = "; ".join(f"means over {steps} steps of each of {count} texts" for count, steps in sorted(texts))
    return (f"{above[:1].upper()}{above[1:]}.", COMPARED, made) if made else None
