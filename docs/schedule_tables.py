"""How long a simulated NPU stands still, from `examples/chunk_schedule.py`."""

import json
from pathlib import Path
from typing import Any

from marked import markdown

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
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


def chunk_schedule_table() -> str:
    """How long a simulated NPU stands still; the same on every machine."""
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*/chunk_schedule.json"))]
    made = (markdown(*make(found[0])) for make in (schedule_table, optimum_table)) if found else ("Not measured yet.",)
    return "\n\n".join(made)
