"""The table of what a decode step's attention takes, from `benchmarks/decoding.py`."""

from typing import Any

Table = tuple[str, tuple[str, ...], list[tuple[Any, ...]]]
HEADER = ("dtype", "tokens", "read by", "of the cache", "ms", "times as fast as all of it", "planning")


def decoding_table(found: dict[str, Any]) -> Table:
    """A row for each contender at a length."""
    rows = [
        (
            row["dtype"],
            f"{row['length']:,}",
            {"dense": "gossamer, all", "sdpa": "torch, all"}.get(row["contender"], f"`{row['contender']}`"),
            f"{row['read']:.1%}",
            f"{1e3 * row['seconds']:.2f}",
            f"{row['ratio']:.2f}",
            f"{row['plan_share']:.0%}" if row["plan_s"] else "",
        )
        for row in found["rows"]
    ]
    return f"{found['threads']} threads, medians of {found['rounds']} rounds.", HEADER, rows
