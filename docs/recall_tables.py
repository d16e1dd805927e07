"""Tables of what trainable layers recall (`gossamer mqar`) and cost by length (`benchmarks/modules.py`)."""

import json
from pathlib import Path
from typing import Any

from marked import markdown

from gossamer.evaluate.mqar.summary import RecallRow, near_and_far, recall_rows
from gossamer.evaluate.summary import read_results

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
NOT_MEASURED = "Not measured yet."
Table = tuple[str, tuple[str, ...], list[tuple[Any, ...]]]


def recall_tables(path: Path) -> list[Table]:
    """Of each setting and task in a file, a row for each mixer and width."""
    records = read_results(path)
    machine = next(record for record in records if record["kind"] == "run")["machine"]
    rows = recall_rows(records)
    made: list[Table] = []
    for group in dict.fromkeys((row.settings, row.task) for row in rows):
        here = [row for row in rows if (row.settings, row.task) == group]
        edges = sorted({edge for row in here for edge, _ in near_and_far(row)})
        above = f"Setting `{', '.join(group[0])}`, `{group[1]}`; {machine['processor']} (`{path.parent.name}`)."
        header = ("layers", "width", "accuracy", "worst to best", "seeds", *(f"to {edge}" for edge in edges))
        made.append((above, (*header, "state", "logits", "of dense"), [recall_row(row, edges) for row in here]))
    return made


def recall_row(row: RecallRow, edges: list[int]) -> tuple[Any, ...]:
    far = dict(near_and_far(row))
    shares = (f"{far[edge]:.2f}" if edge in far else "" for edge in edges)
    said = (f"`{row.mixer}`", row.width, f"{row.accuracy:.3f}", f"{row.low:.3f} to {row.high:.3f}", row.seeds)
    return (*said, *shares, f"{row.state:,}", f"{row.reads:.1f}", f"{row.share:.0%}")


def recall_table() -> str:
    made = [table for path in sorted(RESULTS.glob("*/mqar.jsonl")) for table in recall_tables(path)]
    return "\n\n".join(markdown(*table) for table in made) or NOT_MEASURED


WHAT = {"forward": "forward", "step": "step", "decode": "decoding"}


def costs_of(found: dict[str, Any]) -> Table:
    """A row for each layer: how its time grows, forward, in a step and where it decodes, and from where it is faster
    than dense."""
    by = {(row["module"], row["what"]): row for row in found["summary"]}
    kinds = [what for what in WHAT if any(row["what"] == what for row in found["summary"])]
    longest = max(row["longest"] for row in found["summary"])
    rows = []
    for name in dict.fromkeys(row["module"] for row in found["summary"]):
        cells: list[Any] = [f"`{name}`"]
        for what in kinds:
            row = by.get((name, what))
            if row is None:
                cells += [""] * 4
                continue
            even = "" if name == "dense" else "never" if row["break_even"] is None else f"{row['break_even']:,}"
            times = _number(row["times_dense"]) + ("" if row["longest"] == longest else f" at {row['longest']:,}")
            cells += [_number(row["exponent"]), _number(row["last_exponent"]), even, times]
        rows.append(tuple(cells))
    each = ("exponent", "of the last doubling", "faster from", f"times dense at {longest:,}")
    tokens = f" Decoding is of {found['decoded_tokens']} tokens, one by one." if "decode" in kinds else ""
    above = (
        f"{found['machine']['cpu']}, {found['threads']} threads, fp32, width {found['width']}, {found['heads']} heads; "
        f"medians of {found['rounds']} rounds. A step is a forward and a backward pass.{tokens}"
    )
    return above, ("layer", *(f"{WHAT[what]}: {name}" for what in kinds for name in each)), rows


def costs_table() -> str:
    made = [costs_of(json.loads(path.read_text())) for path in sorted(RESULTS.glob("*/modules*.json"))]
    return "\n\n".join(markdown(*table) for table in made) or NOT_MEASURED


def characters_of(found: dict[str, Any]) -> Table:
    """A row for each kind of attention of `examples/character_model.py`."""
    rows = []
    for kind in dict.fromkeys(one["kind"] for one in found["rows"]):
        mine = [one for one in found["rows"] if one["kind"] == kind]
        bits, seconds = [one["bits"] for one in mine], [one["seconds"] for one in mine]
        said = (f"{sum(bits) / len(bits):.3f}", f"{min(bits):.3f} to {max(bits):.3f}", len(mine))
        rows.append((f"`{kind}`", *said, f"{mine[0]['reads']:.0f}", f"{sum(seconds) / len(seconds):.0f}"))
    above = f"{found['machine']['cpu']}, {found['threads']} threads; {found['rows'][0]['steps']} steps."
    return above, ("attention", "bits a character", "best to worst", "seeds", "keys a query", "seconds"), rows


def characters_table() -> str:
    made = [characters_of(json.loads(path.read_text())) for path in sorted(RESULTS.glob("*/characters*.json"))]
    return "\n\n".join(markdown(*table) for table in made) or NOT_MEASURED


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


TABLES = {"recall": recall_table, "module_costs": costs_table, "characters": characters_table}
