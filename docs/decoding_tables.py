"""Tables of what a decode step's attention takes and loses, from `benchmarks/decoding.py`."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from marked import markdown
from pretrained_tables import scores

from gossamer.evaluate.summary import summary_rows

Table = tuple[str, tuple[str, ...], list[tuple[Any, ...]]]
TIMED = ("dtype", "tokens", "read by", "of the pairs", "MB read", "ms", "times as fast as all of it", "planning")
COMPARED = (
    *("model", "tokens", "read by", "of the cache", "mass read", "best mass"),
    *("KL to dense steps", "same predictions", "nats a token"),
)
TIERED = ("read by", "of the keys", "found in memory", "MB in memory", "MB in the file", "ms a step", "times as fast")
SERVED = ("model", "dtype", "tokens", "read by", "of the cache", "ms a token", "tokens/s", "over sdpa")
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
            *(f"{row[name]:.3f}" if row.get(name) is not None else "" for name in ("recall", "oracle_recall")),
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


def tokens(found: dict[str, Any], _: Path) -> str | None:
    """Of models: tokens a second, a row for each contender."""
    rows = [row for row in found["rows"] if row["section"] == "tokens"]
    named = {"sdpa": "transformers, sdpa", "dense": "gossamer, all"}
    made = [
        (
            row["model"],
            row["dtype"],
            f"{row['length']:,}",
            named.get(row["method"], f"`{row['method']}`"),
            f"{row['read']:.1%}",
            f"{1e3 * row['median_s']:.0f}",
            f"{row['tokens_per_s']:.2f}",
            f"{row['ratio']:.2f}",
        )
        for row in rows
    ]
    return (
        markdown(f"Medians of {rows[0]['rounds']} rounds of {rows[0]['steps']} steps.", SERVED, made) if made else None
    )


def tiers(found: dict[str, Any], _: Path) -> str:
    """Steps on a cache in a file."""
    setting, first = found["setting"], found["rows"][0]
    above = (
        f"{first['layers']} layers of {setting['heads']} query heads on {setting['groups']} with {setting['dim']} "
        f"channels, {first['dtype']}, {first['length']:,} tokens, one in {setting['share']} of them in memory."
    )
    named = {"memory": "all, in memory", "whole": "all, from the file"}
    made = [
        (
            named.get(row["method"], f"`{row['method']}`"),
            f"{row['density']:.1%}",
            f"{row['found_in_memory']:.0%}" if row["found_in_memory"] else "",
            f"{row['memory_bytes'] / 1e6:.0f}",
            f"{row['file_bytes'] / 1e6:.0f}" if row["file_bytes"] else "",
            f"{1e3 * row['mean_s']:.0f}",
            f"{row['ratio']:.1f}" if row["ratio"] else "",
        )
        for row in found["rows"]
    ]
    return markdown(above, TIERED, made)


def kept(found: dict[str, Any], _: Path) -> str | None:
    """What caches that drop or encode tokens lose."""
    if not found["rows"]:
        return None
    first = found["rows"][0]
    named = ("model", "tokens", "cache", "bytes of a whole one", "KL to a whole one", "same predictions")
    made = [
        (
            row["model"],
            f"{row['length']:,}",
            f"`{row['cache']}`",
            f"{row['share']:.1%}",
            f"{row['kl']:.4f}",
            f"{row['top1']:.3f}",
        )
        for row in found["rows"]
    ]
    return markdown(
        f"Means over {first['steps']} steps of each of {first['texts']} texts, {first['dtype']}.", named, made
    )


def encoded(found: dict[str, Any], _: Path) -> str | None:
    """What a step on codes takes."""
    rows = found.get("steps", [])
    named = ("dtype", "tokens", "cache", "bytes of a plain one", "ms a step", "times as fast as on a plain one")
    made = [
        (
            row["dtype"],
            f"{row['length']:,}",
            f"`{row['cache']}`",
            f"{row['share']:.1%}",
            f"{1e3 * row['median_s']:.1f}",
            f"{row['ratio']:.2f}",
        )
        for row in rows
    ]
    return markdown("One layer of 32 query heads on 8 with 128 channels.", named, made) if made else None


def answers(records: Sequence[dict[str, Any]]) -> list[Table]:
    """For each length the settings in the order of their answers, dense first."""
    rows = [row for row in summary_rows(records) if row.samples]
    named = next(record["model"]["name"] for record in records if record["kind"] == "run")
    model = re.sub("-[0-9a-f]{16}$", "", named)  # of a folder that a GGUF file was converted into
    made = []
    for length in sorted({row.length for row in rows}):
        here = sorted((r for r in rows if r.length == length), key=lambda r: ("+" in r.method, -(r.accuracy or 0)))
        names = list(dict.fromkeys(task for row in here for task in row.tasks))
        named = ("setting", "of the cache read", "MiB a step", "MiB held", "all", *names, "less dense")
        cells = [
            (
                f"`{row.method.partition('+')[2] or 'dense'}`",
                "" if row.read is None else f"{row.read:.1%}",
                "" if row.step_bytes is None else f"{row.step_bytes / 2**20:.1f}",
                "" if row.cache_bytes is None else f"{row.cache_bytes / 2**20:.0f}",
                f"{row.accuracy:.2f}",
                *scores(row, names),
            )
            for row in here
        ]
        made.append((f"**{model}, {length:,} tokens**", named, cells))
    return made


TABLES = {
    "decode_caches": ("caches.json", kept),
    "decode_codes": ("caches.json", encoded),
    "decode_steps": ("decoding.json", steps),
    "decode_losses": ("decoding.json", losses),
    "decode_tokens": ("decoding.json", tokens),
    "decode_tiers": ("tiers.json", tiers),
}
