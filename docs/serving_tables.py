"""Tables of vLLM's server with gossamer beside the stock one, and of a chunk over its pages.

From `benchmarks/serving.py` and `benchmarks/paged.py`.
"""

from collections.abc import Iterator
from typing import Any

Table = tuple[str, tuple[str, ...], list[tuple[Any, ...]]]
FIRST = (
    "tokens",
    "server",
    "seconds to the first token",
    "times as fast as stock",
    "attention s",
    "its attention times as fast",
    "share of all else",
    "same first tokens",
)
LOAD = ("requests", "prompts of", "server", "requests per second", "of stock's")

PAGED = (
    "tokens",
    "layout",
    "method",
    "density",
    "seconds with a copy",
    "in place",
    "times as fast",
    "peak MiB",
    "in place",
)


def serving_tables(found: dict[str, Any]) -> Iterator[Table]:
    """For each model the seconds to the first token, and what a mixed load gives where it was measured."""
    for name, section in found.items():
        above = f"**{name}**, {section['dtype']}, vLLM {section['vllm']}."
        if section["first_token"]:
            yield above, FIRST, [_first(row) for row in section["first_token"]]
        if section["load"]:
            yield "" if section["first_token"] else above, LOAD, [_load(row) for row in section["load"]]


def _first(row: dict[str, Any]) -> tuple[Any, ...]:
    return (
        f"{row['length']:,}",
        f"`{row['contender']}`",
        f"{row['seconds']:.2f}",
        f"{row['ratio']:.2f}",
        _number(row["attention_s"]),
        _number(row["attention_ratio"]),
        _number(row["rest_share"]),
        f"{row['same_first_tokens']} of {row['rounds']}",
    )


def _load(row: dict[str, Any]) -> tuple[Any, ...]:
    lengths = row["lengths"]
    return (
        row["requests"],
        f"{lengths[0]:,} to {lengths[-1]:,} tokens",
        f"`{row['contender']}`",
        f"{row['requests_per_s']:.2f}",
        f"{row['ratio']:.2f}",
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def paged_table(found: dict[str, Any]) -> Table:
    """A row for each length, layout and method."""
    return "", PAGED, [_paged(row) for row in sorted(found["rows"], key=lambda row: (row["length"], row["dtype"]))]


def _paged(row: dict[str, Any]) -> tuple[Any, ...]:
    copied, in_place = (row["ways"][way] for way in ("copied", "in place"))
    return (
        f"{row['length']:,}",
        f"{row['layout']}, {row['dtype']}",
        f"`{row['method']}`",
        f"{row['density']:.2f}",
        f"{copied['median_s']:.2f}",
        f"{in_place['median_s']:.2f}",
        f"{row['ratio']:.2f}",
        copied["peak_mib"],
        in_place["peak_mib"],
    )
