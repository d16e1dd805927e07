"""How long a simulated NPU stands still, from `examples/chunk_schedule.py`."""

from typing import Any

Table = tuple[str, tuple[str, ...], list[tuple[Any, ...]]]
ORDERS = {"in order": "in order", "first ready": "first ready", "greedy": "the paper's rule"}


def schedule_table(found: dict[str, Any]) -> Table:
    """Idle shares by number of chunks and speed of the CPU."""
    above = f"Share of the time in which the NPU stands still; chunks of {found['chunk']} tokens, simulated."
    header = ("chunks", "CPU's work beside the NPU's", *ORDERS.values(), "no order below")
    rows = [
        (
            row["chunks"],
            f"{row['cpu_work']:.2f}",
            *(f"{row[name]['bubbles']:.1%}" for name in ORDERS),
            f"{row['least']:.1%}",
        )
        for row in found["rows"]
    ]
    return above, header, rows


def optimum_table(found: dict[str, Any]) -> Table:
    """How far each order is from the optimum of small graphs."""
    about = found["random"]
    above = f"{about['graphs']} random graphs of {about['chunks']} chunks and {about['stages']} stages, seeds from 0."
    rows = [
        (title, f"{about[name]['mean']:.3f}", f"{about[name]['worst']:.3f}", f"{about[name]['optimal']:.0%}")
        for name, title in ORDERS.items()
    ]
    return above, ("order", "times the optimum, mean", "at worst", "optimal"), rows
