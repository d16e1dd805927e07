"""Tables of training that computes less: examples/graph_blocks.py, adapt_forward_only.py, estimated_gradients.py."""

import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from marked import markdown

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
NOT_MEASURED = "Not measured yet."
Table = tuple[str, tuple[str, ...], list[tuple[Any, ...]]]
MIB = 1 << 20
# What each kind of memory is called in the table.
GROWN = {
    "step": "a step of P-RGE",
    "reading": "reading as many rows",
    "reading one copy": "reading the reviews once",
    "backpropagation": "backpropagation, the reviews once",
    "backpropagation of as many rows": "backpropagation, as many rows",
}


def mean_and_range(values: list[float], form: str = "{:.3f}") -> str:
    mean, low, high = (form.format(value) for value in (statistics.fmean(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low} to {high})"


def cosines_of(found: dict[str, Any], folder: str) -> Table:
    """A row a budget: cosines of sampled gradients to exact ones, by allocation."""
    rows = []
    for budget in dict.fromkeys(row["budget"] for row in found["cosines"]):
        cells = []
        for how in ("greedy", "uniform"):
            mine = [row for row in found["cosines"] if (row["budget"], row["allocation"]) == (budget, how)]
            cells += [mean_and_range([row[what] for row in mine]) for what in ("fresh", "later")]
            cells.append(f"{statistics.fmean(row['share'] for row in mine):.3f}")
        rows.append((budget, *cells))
    setting = found["setting"]
    above = (
        f"{found['machine']['processor']} (`{folder}`); {setting['nodes']:,} nodes, three layers; means and ranges over"
        f" {seeds_of(found['cosines'])} seeds and epochs {', '.join(map(str, found['at']))}. *Later*: {found['later']} "
        "steps after the scores were taken."
    )
    header = ("budget", "greedy", "later", "multiplied", "uniform", "later", "multiplied")
    return above, header, rows


def trainings_of(found: dict[str, Any], folder: str) -> Table:
    """A row a training: accuracy, and what its backward products multiplied."""
    rows, kinds = [], ("training", "budget", "allocation", "exact_from")
    for key in dict.fromkeys(tuple(row.get(kind) for kind in kinds) for row in found["trainings"]):
        mine = [row for row in found["trainings"] if tuple(row.get(kind) for kind in kinds) == key]
        _, budget, allocation, end = key
        accuracy = mean_and_range([row["accuracy"] for row in mine])
        if allocation is None:
            rows.append(("exact", "", "", accuracy, "1.000"))
            continue
        last = f"from {end:.0%} of the epochs" if end < 1 else "never"
        rows.append((budget, allocation, last, accuracy, mean_and_range([row["multiplied"] for row in mine])))
    above = f"{found['setting']['epochs']} epochs; means and ranges of {seeds_of(found['trainings'])} seeds."
    return above, ("budget", "allocation", "exact", "accuracy", "multiplied"), rows


def times_of(found: dict[str, Any], folder: str) -> Table:
    """Of the backward product, as ratios: the machine had other work."""
    by = {row["what"]: row for row in found["times"]}
    own = by["torch"]["median_s"]
    rows = [
        (name, f"{by[what]['entries'] / by['torch']['entries']:.3f}", f"{own / by[what]['median_s']:.2f}")
        for what, name in times_named(by).items()
    ]
    return "", ("gradient of one product", "entries", "times as fast as torch's"), rows


def times_named(by: dict[Any, Any]) -> dict[Any, str]:
    budgets = {what: f"sampled, budget {what}" for what in by if isinstance(what, float)}
    return {"torch": "torch's own", **budgets, "cutting": "cutting a sample of budget 0.1"}


def seeds_of(rows: list[dict[str, Any]]) -> int:
    return len({row["seed"] for row in rows})


def adapted_of(found: dict[str, Any], folder: str) -> Table:
    """What was held out, before and after, by step."""
    rows = [(point["step"], f"{point['loss']:.3f}", f"{point['accuracy']:.2f}") for point in found["curve"]]
    merged = found["merged_dense"]
    rows.append(("merged, dense attention", f"{merged['loss']:.3f}", f"{merged['accuracy']:.2f}"))
    above = (
        f"`{found['model']}` in {found['dtype']}, {found['machine']['processor']} (`{folder}`), one seed; "
        f"{found['trained_numbers']:,} trained numbers; {found['rows']} reviews of about {found['tokens']} tokens and "
        f"{found['queries']} queries a step, so {2 * found['queries'] * found['rows']} rows; attention computes "
        f"{found['density']:.0%} of the pairs."
    )
    return above, ("steps", "loss of held-out answers, nats", "accuracy"), rows


def memory_of(found: dict[str, Any], folder: str) -> Table:
    """How far memory grows beyond the model."""
    grown, rows = found["memory_bytes"], 2 * found["queries"] * found["rows"]
    counts = dict.fromkeys(GROWN, rows) | {"reading one copy": found["rows"], "backpropagation": found["rows"]}
    return (
        f"`{found['model']}` in {found['dtype']}; reviews of {found['tokens']} tokens.",
        ("what", "rows", "memory, MiB"),
        [(name, counts[kind], f"{grown[kind] / MIB:.0f}") for kind, name in GROWN.items()],
    )


def estimates_of(found: dict[str, Any], folder: str) -> Table:
    """Cosines of estimated gradients, a row for each number of trained numbers."""
    queries = list(dict.fromkeys(row["queries"] for row in found["rows"]))
    rows = []
    for numbers in dict.fromkeys(row["numbers"] for row in found["rows"]):
        mine = {row["queries"]: row for row in found["rows"] if row["numbers"] == numbers}
        cells = (f"{statistics.fmean(mine[q]['cosines']):.3f} ({mine[q]['expected']:.3f})" for q in queries)
        rows.append((f"{numbers:,}", *cells))
    above = f"Means over {found['seeds']} seeds, and in brackets what is expected."
    return above, ("trained numbers", *(f"{q} {'query' if q == 1 else 'queries'}" for q in queries)), rows


def shown(file: str, make: Callable[[dict[str, Any], str], Table]) -> str:
    """Of each machine that has the file."""
    paths = sorted(RESULTS.glob(f"*/{file}"))
    made = [make(json.loads(path.read_text(encoding="utf-8")), path.parent.name) for path in paths]
    return "\n\n".join(markdown(*table) for table in made) or NOT_MEASURED


TABLES = {
    "rsc_cosines": partial(shown, "graph_blocks.json", cosines_of),
    "rsc_trainings": partial(shown, "graph_blocks.json", trainings_of),
    "rsc_times": partial(shown, "graph_blocks.json", times_of),
    "prge_adapted": partial(shown, "adapt_forward_only.json", adapted_of),
    "prge_memory": partial(shown, "forward_only_memory.json", memory_of),
    "prge_estimates": partial(shown, "estimated_gradients.json", estimates_of),
}
