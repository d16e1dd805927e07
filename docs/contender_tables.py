"""Tables of other programs beside gossamer and of linear layers, of `benchmarks/contenders.py` and `linear.py`."""

from collections.abc import Iterator
from typing import Any

Table = tuple[str, tuple[str, ...], list[tuple[Any, ...]]]
TIMES = (
    "tokens",
    "contender",
    "seconds to the first token",
    "rounds",
    "times sdpa",
    "same first tokens",
    "of it attention",
    "density",
    "KL",
    "top-1",
    "positions",
)
SHARES = ("tokens", "method", "density", "seconds", "linear layers", "attention", "rest")
VARIANTS = (
    "tokens",
    "linear layers",
    "their seconds",
    "times as fast",
    "seconds in all",
    "times as fast in all",
    "KL",
    "top-1",
    "rounds",
)


def contender_tables(found: dict[str, Any]) -> Iterator[Table]:
    """Seconds and losses, a table a length; then who could not take part."""
    versions = sorted({f"{name} {version}" for of in found["versions"].values() for name, version in of.items()})
    above = (
        f"**{found['model']['name']}**, {found['threads']} threads, float32 where the weights are not named otherwise"
    )
    lengths = sorted({row["length"] for row in found["rows"]})
    for length in lengths:
        rows = [_timed(row) for row in found["rows"] if row["length"] == length]
        yield f"{above}; {', '.join(versions)}." if length == lengths[0] else "", TIMES, rows
    if found["unavailable"]:
        yield "Not measured:", ("contender", "why"), [(f"`{n}`", why) for n, why in found["unavailable"].items()]


def _timed(row: dict[str, Any]) -> tuple[Any, ...]:
    def shown(name: str, form: str) -> str:
        return "" if row.get(name) is None else format(row[name], form)

    return (
        f"{row['length']:,}",
        f"`{row['contender']}`",
        shown("seconds", ".2f"),
        row.get("rounds", ""),
        shown("ratio", ".2f"),
        f"{row['same_first_tokens']} of {row['compared']}" if row.get("compared") else "",
        shown("attention_s", ".2f"),
        shown("density", ".2f"),
        divergence(row.get("kl")),
        shown("top1", ".3f"),
        row.get("positions", ""),
    )


def divergence(value: float | None) -> str:
    """Nats; what float32 itself may differ by is none."""
    if value is None:
        return ""
    return "< 0.00001" if value < 1e-5 else f"{value:.2g}" if value < 0.1 else f"{value:.2f}"


def shares_table(found: dict[str, Any]) -> Table | None:
    """What a prefill consists of."""
    if not found.get("shares"):
        return None
    rounds = sorted({row["rounds"] for row in found["shares"]})
    return (
        f"**{found['model']['name']}**, float32, {found['threads']} threads; medians of "
        f"{' to '.join(map(str, dict.fromkeys((rounds[0], rounds[-1]))))} rounds.",
        SHARES,
        [
            (
                f"{row['length']:,}",
                f"`{row['method']}`",
                f"{row['density']:.2f}",
                f"{row['total_s']:.2f}",
                *(f"{row[f'{part}_share']:.0%}" for part in ("linear", "attention", "rest")),
            )
            for row in found["shares"]
        ],
    )


def variants_table(found: dict[str, Any]) -> Table | None:
    """Other libraries' linear layers, the fastest first; those that do not run last."""
    if not found.get("variants"):
        return None
    run = [row for row in found["variants"] if "unavailable" not in row]
    run.sort(key=lambda row: (row["length"], -row["linear_ratio"]))
    cannot = [row for row in found["variants"] if "unavailable" in row]
    rows = [
        (
            f"{row['length']:,}",
            row["variant"],
            f"{row['linear_s']:.2f}",
            f"{row['linear_ratio']:.2f}",
            f"{row['total_s']:.2f}",
            f"{row['total_ratio']:.2f}",
            divergence(row["kl"]),
            f"{row['top1']:.3f}",
            row["rounds"],
        )
        for row in run
    ]
    rows += [(f"{row['length']:,}", row["variant"], "does not load", "", "", "", "", "", "") for row in cannot]
    return f"**{found['model']['name']}**, {found['threads']} threads.", VARIANTS, rows
