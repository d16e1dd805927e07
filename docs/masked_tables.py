"""Tables of what a masked language model fills in, from lines of `gossamer eval-masked`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from marked import markdown

from gossamer.evaluate.masked.summary import (
    Figured,
    FillRow,
    OverlapRow,
    StepCost,
    fill_rows,
    overlap_rows,
    paired,
    same_seeds,
    step_costs,
)
from gossamer.evaluate.summary import read_results

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
NOT_MEASURED = "Not measured yet."
Table = tuple[str, tuple[str, ...], list[tuple[Any, ...]]]
# What each variant is called in the tables.
NAMES = {
    "window": "window and first block",
    "random": "random blocks",
    "joint": "joint, once",
    "best": "joint, at each step (oracle)",
    "fresh": "isolated, at each step",
    "isolated": "isolated, once",
}


def called(row: FillRow | StepCost) -> str:
    """A method in words: SparseD's rule, or what is held beside it, with the share."""
    name, _, inside = row.method.partition("(")
    parts = (part.partition("=") for part in inside.removesuffix(")").split(","))
    fields = {name: value for name, _, value in parts}
    if name == "dense":
        return "dense" if "kernel" in fields else "dense, torch's kernel"
    what = "`sparsed`" if name == "sparsed" else NAMES[fields.get("choice", "isolated")]
    span = fields.get("span", "")
    return f"{what}, {fields.get('share', '0.3')}" + (f", {span} half of the steps" if span else "")


def shown(found: Figured | None, form: str = "{:.3f}") -> str:
    if found is None:
        return ""
    return f"{form.format(found.mean)} ({form.format(found.low)} to {form.format(found.high)})"


def is_span(row: FillRow) -> bool:
    return "span=" in row.method


def fills_of(rows: list[FillRow]) -> list[Table]:
    """For each length, methods that are sparse after the first steps, and dense attention."""
    made = []
    for length in dict.fromkeys(row.length for row in rows):
        here = [row for row in rows if row.length == length and not is_span(row)]
        above = f"{length:,} tokens, `{here[0].task}`."
        header = (
            "method, share",
            "texts",
            "fills",
            "density",
            "copied right",
            "others right",
            "as dense",
            "top-1",
            "KL, nats",
            "lost",
        )
        body = []
        for row in sorted(here, key=lambda row: (row.method.startswith("sparsed"), share_of(row))):
            figures = (shown(row.figures.get(name)) for name in ("copied_accuracy", "rest_accuracy", "agreement"))
            near = shown(row.figures.get("top1")), shown(row.figures.get("kl"), "{:.2g}")
            lost = shown(row.lost.get("copied_accuracy"), "{:+.3f}")
            if called(row) == "dense":  # the yardstick, which is as itself
                figures, near = (*list(figures)[:2], ""), ("", "")
            body.append((called(row), row.texts, row.fills, f"{row.density:.3f}", *figures, *near, lost))
        made.append((above, header, body))
    return made


def share_of(row: FillRow) -> str:
    """So that rows of one budget stand together."""
    return next((part for part in row.method.split(",") if "share=" in part), "").rpartition("share=")[2].rstrip(")")


def spans_of(rows: list[FillRow]) -> list[Table]:
    """Sparse in the first or in the last half of the steps."""
    made = []
    for length in dict.fromkeys(row.length for row in rows if is_span(row)):
        here = [row for row in rows if row.length == length and is_span(row)]
        above = f"{length:,} tokens."
        header = (
            "blocks, share, sparse steps",
            "texts",
            "fills",
            "density",
            "copied right",
            "others right",
            "as dense",
        )
        body = []
        for row in here:
            figures = (shown(row.figures.get(name)) for name in ("copied_accuracy", "rest_accuracy", "agreement"))
            body.append((called(row), row.texts, row.fills, f"{row.density:.3f}", *figures))
        made.append((above, header, body))
    return made


def overlaps_of(rows: list[OverlapRow]) -> list[Table]:
    """How much of a choice stays over steps, masks and texts."""
    header = ("tokens", "texts", "fills", "chosen at", "of steps", "later steps", "last step")
    body = []
    for row in rows:
        numbers = ("" if x is None else f"{x:.3f}" for x in (row.seeds, row.others, row.chance))
        counts = f"{row.length:,}", row.texts, row.fills, row.chosen, len(row.by_step)
        body.append((*counts, shown(row.later), shown(row.last), *numbers))
    return [("", (*header, "other masks", "other texts", "by chance"), body)] if body else []


def seconds_of(rows: list[StepCost]) -> list[Table]:
    """Processor time of a step: of dense samplings, of the step that chooses, and of sparse steps."""
    body = []
    for row in rows:
        cells = (f"{row.length:,}", called(row), row.texts, f"{row.density:.3f}")
        costs = (f"{1000 * seconds:.0f}" for seconds in (row.dense, row.chooses, row.sparse))
        body.append((*cells, *costs, f"{row.dense / row.sparse:.2f}"))
    header = ("tokens", "method, share", "texts", "density of sparse steps", "dense step, ms", "step that chooses, ms")
    return [("", (*header, "sparse step, ms", "dense over sparse"), body)] if body else []


def rows_of_fills(records: list[dict[str, Any]]) -> list[FillRow]:
    """Rows of the same masks alone: some methods were also run under other masks of their texts."""
    return fill_rows(same_seeds(records))


# What is held beside `sparsed` of the same share, and what of it: the claim, the two, and the figure.
CLAIMS = (
    ("more as dense than the window", "sparsed", "window", "agreement"),
    ("more as dense than random blocks", "sparsed", "random", "agreement"),
    ("more copied than by the window", "sparsed", "window", "copied_accuracy"),
    ("more copied than by random blocks", "sparsed", "random", "copied_accuracy"),
    ("isolated: more as dense than joint, once", "sparsed", "joint", "agreement"),
    ("isolated: less KL than joint, once", "joint", "sparsed", "kl"),
    ("oracle: more as dense than `sparsed`", "best", "sparsed", "agreement"),
    ("oracle: less KL than `sparsed`", "sparsed", "best", "kl"),
)


def label(what: str, share: str, span: str = "") -> str:
    """Of the file's lines."""
    if what == "sparsed":
        return f"sparsed(share={share},block=32,min_tokens=0)"
    choice = "" if what == "isolated" else f",choice={what}"
    return f"sparsed_variant(share={share},block=32{choice}{span and f',span={span}'})"


def told(found: Figured) -> str:
    return "shows" if found.low > 0 else "the other way round" if found.high < 0 else "not told apart"


def claims_of(records: list[dict[str, Any]]) -> list[Table]:
    """Differences text by text, and whether the interval is on one side of none."""
    rows = [row for row in fill_rows(records) if row.method.startswith("sparsed(")]
    rows.sort(key=lambda row: (row.length, share_of(row)))
    header, body = ("claim", "tokens", "share", "texts", "difference", ""), []

    def add(claim: str, length: int, share: str, more: str, less: str, figure: str) -> None:
        found = paired(records, more, less, length, figure)
        if found is not None:
            difference, texts = found
            body.append((claim, f"{length:,}", share, texts, shown(difference, "{:+.3f}"), told(difference)))

    for claim, more, less, figure in CLAIMS:
        for row in rows:
            share = share_of(row)
            add(claim, row.length, share, label(more, share), label(less, share), figure)
    for choice, name in (("isolated", "kept plans"), ("fresh", "plans of each step")):
        for row in rows:
            share = share_of(row)
            first, last = label(choice, share, "first"), label(choice, share, "last")
            what = f"early steps fragile, {name}: less as dense"
            add(what, row.length, share, last, first, "agreement")
            add(f"early steps fragile, {name}: less copied", row.length, share, last, first, "copied_accuracy")
    return [("", header, body)] if body else []


def table(make: Callable[[list[Any]], list[Table]], rows_of: Callable[[list[dict[str, Any]]], list[Any]]) -> str:
    """Of each machine's file."""
    parts = []
    for path in sorted(RESULTS.glob("*/masked.jsonl")):
        records = read_results(path)
        machine = next(record for record in records if record["kind"] == "run")["machine"]
        made = make(rows_of(records))
        if made:
            parts.append(f"{machine['processor']} (`{path.parent.name}`)")
            parts += [markdown(*one) for one in made]
    return "\n\n".join(parts) or NOT_MEASURED


TABLES: dict[str, Callable[[], str]] = {
    "masked_fills": lambda: table(fills_of, rows_of_fills),
    "masked_claims": lambda: table(claims_of, list),
    "masked_spans": lambda: table(spans_of, rows_of_fills),
    "masked_overlaps": lambda: table(overlaps_of, overlap_rows),
    "masked_seconds": lambda: table(seconds_of, step_costs),
}
