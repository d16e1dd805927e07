"""Tables of attention without causality, and of denoising steps, from `benchmarks/bidirectional.py`."""

from typing import Any

from marked import markdown

KERNELS = (
    *("tokens", "dtype", "head dim", "density", "SDPA, s", "own dense, s", "blocks, s", "efficiency"),
    *("in orders of axes, s", "efficiency", "times SDPA", "times FlexAttention"),
)
STEPS = (
    *("tokens", "dtype", "attention", "first step, s", "planning of it", "later step, s", "planning of it"),
    *("density", "times torch", "times own dense"),
)


def kernels_table(found: dict[str, Any], _: object = None) -> str | None:
    """A row for each case and density; times SDPA and FlexAttention are those of blocks."""
    rows = found.get("kernels")
    if not rows:
        return None
    cells = []
    for row in rows:
        blocks, ordered = row["blocks"], row["ordered"]
        flex = f"{blocks['times_flex']:.1f}" if "times_flex" in blocks else ""
        cells.append(
            (
                *(f"{row['tokens']:,}", row["dtype"], row["dim"], f"{row['density']:.2f}"),
                *(f"{row[name]['median_s']:.2f}" for name in ("sdpa", "dense")),
                *(f"{blocks['median_s']:.3f}", f"{blocks['efficiency']:.2f}"),
                *(f"{ordered['median_s']:.3f}", f"{ordered['efficiency']:.2f}"),
                *(f"{blocks['times_sdpa']:.1f}", flex),
            )
        )
    return markdown(circumstances(rows) + f" {rows[0]['heads']} heads.", KERNELS, cells)


def circumstances(rows: list[dict[str, Any]]) -> str:
    """Under which they were measured."""
    rounds = sorted({row["rounds"] for row in rows})
    others = max(row["used_by_others"] or 0 for row in rows)
    said = f"{rounds[0]}" if len(rounds) == 1 else f"{rounds[0]} to {rounds[-1]}"
    return (
        f"{rows[0]['threads']} threads, medians of {said} rounds; other programs used up to {others:.0%} of the "
        "machine."
    )


def later(row: dict[str, Any]) -> dict[str, Any]:
    """The last step that was timed: one that uses plans again, or what is dense in every step."""
    return row["steps"][-1]


def planning(step: dict[str, Any]) -> float:
    """Its share of the step."""
    return step["plan_s"] / step["seconds"]


def steps_table(found: dict[str, Any], _: object = None) -> str | None:
    """A row for each clip and attention."""
    rows = found.get("steps")
    if not rows:
        return None
    cells = []
    for row in rows:
        same = {one["method"]: one for one in rows if (one["tokens"], one["dtype"]) == (row["tokens"], row["dtype"])}
        step, first = later(row), row["steps"][0]
        cells.append(
            (
                *(f"{row['tokens']:,}", row["dtype"], f"`{row['method']}`", f"{first['seconds']:.2f}"),
                *(
                    f"{planning(first):.0%}",
                    f"{step['seconds']:.2f}",
                    f"{planning(step):.1%}",
                    f"{step['density']:.2f}",
                ),
                *(f"{later(same[name])['seconds'] / step['seconds']:.2f}" for name in ("torch", "dense")),
            )
        )
    return markdown(circumstances(rows), STEPS, cells)
