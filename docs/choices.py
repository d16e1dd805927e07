"""Tables for the page on choosing a method, from measured files; `tables.py` puts them in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gossamer.evaluate.settings import ComparisonRow, comparison_rows
from gossamer.evaluate.summary import SummaryRow, summary_rows

Cells = tuple[str, tuple[str, ...], list[tuple[Any, ...]]]

OWN_DENSE = "dense(kernel=gossamer)"
# Plans of benchmarks/cpu.py, by what the page calls them.
PLANS = {
    "half of the blocks": "50% in 64x128",
    "a fifth": "20% in 64x128",
    "a tenth": "10% in 64x128",
    "a twentieth": "5% in 64x128",
    "a fiftieth": "2% in 64x128",
    "1000 columns and 32 slashes": "1000 columns, 32 slashes of 64",
    "a window of 4,096": "sink 128, window 4096",
}


def asked_inside(record: dict[str, Any]) -> bool:
    """Whether a sample's question is part of the prompt that the method reads."""
    return record["task_fields"].get("turns", 1) == 1


def kept_tables(records: Sequence[dict[str, Any]]) -> list[Cells]:
    """For each length, the longest first, what each method keeps of dense attention's answers, and what it gains."""
    runs = [record for record in records if record["kind"] == "run"]
    samples = [record for record in records if record["kind"] == "sample"]
    fidelity = [record for record in records if record["kind"] == "fidelity"]
    inside = summary_rows([*runs, *filter(asked_inside, samples), *fidelity])
    after = {
        (row.method, row.length): row for row in summary_rows([*runs, *(r for r in samples if not asked_inside(r))])
    }
    tables = []
    for length in sorted({row.length for row in inside}, reverse=True):
        rows = [row for row in inside if row.length == length]
        own = next(row.prefill_s for row in rows if row.method == OWN_DENSE)
        machine = runs[0]["machine"]
        above = (
            f"**{length:,} tokens** ({machine['processor']}, {machine['threads']} threads, bfloat16; "
            f"{max(row.samples for row in rows)} questions inside the prompt)"
        )
        header = (
            "method",
            "density",
            "recall",
            "inside: less dense",
            "may lose up to",
            "after: less dense",
            "times dense",
            "times dense on our kernel",
        )
        tables.append((above, header, [_kept(row, after.get((row.method, length)), own) for row in rows]))
    return tables


def _kept(row: SummaryRow, after: SummaryRow | None, own: float | None) -> tuple[Any, ...]:
    lost, interval = row.difference, row.difference_interval
    followed = None if after is None else after.difference
    return (
        f"`{row.method}`",
        "" if row.density is None else f"{row.density:.3f}",
        "" if row.recall is None else f"{row.recall:.2f}",
        "" if lost is None else f"{lost:+.2f}",
        "" if interval is None else f"{max(0.0, -interval[0]):.2f}",
        "" if followed is None else f"{followed:+.2f}",
        "" if row.speedup is None else f"{row.speedup:.1f}",
        f"{own / row.prefill_s:.2f}" if own and row.prefill_s else "",
    )


def front_tables(records: Sequence[dict[str, Any]]) -> list[Cells]:
    """For each length the settings that no other beats, from the cheapest on."""
    run = next(record for record in records if record["kind"] == "run")
    header = ("setting", "time over dense", "error", "density", "recall", "KL", "top-1", "planning")
    tables = []
    rows = comparison_rows(records)
    for length in sorted({row.length for row in rows}):
        here = [row for row in rows if row.length == length]
        layers = next(r["observed"] for r in records if r["kind"] == "point" and r["length"] == length)
        model, machine = run["model"], run["machine"]
        above = (
            f"**{model['name']}, {length:,} tokens** ({machine['processor']}, {machine['threads']} threads, "
            f"{model['dtype']}; {here[0].prompts} prompts, {len(layers)} of {model['layers']} layers)"
        )
        tables.append((above, header, [_of_front(row) for row in here if row.front]))
    return tables


def _of_front(row: ComparisonRow) -> tuple[Any, ...]:
    figures = (f"{row.time:.3f}", f"{row.error:.3f}", f"{row.density:.3f}", f"{row.recall:.2f}")
    kl, top1 = ("" if value is None else f"{value:.3f}" for value in (row.kl, row.top1))
    return (f"`{row.method}`", *figures, kl, top1, f"{row.plan:.0%}")


def lengths_table(section: dict[str, Any] | None) -> Cells | None:
    """How much faster ready-made plans are than every pair on the same kernel, by length."""
    rows = [row for row in (section or {"rows": []})["rows"] if (row["dtype"], row["dim"]) == ("bf16", 128)]
    seconds = {(row["length"], row["what"]): row["median_s"] for row in rows}
    lengths = sorted({length for length, what in seconds if what == "dense"})
    if section is None or not lengths:
        return None

    def times(length: int, what: str) -> str:
        own = seconds.get((length, what))
        return "" if own is None else f"{seconds[length, 'dense'] / own:.1f}"

    over_sdpa = {row["length"]: f"{row['speedup']:.1f}" for row in rows if row["what"] == "dense"}
    above = f"bfloat16, head dimension 128, {section['threads']} threads, torch {section['machine']['torch']}."
    header = ("tokens", "every pair, over torch's kernel", *PLANS)
    return above, header, [(f"{n:,}", over_sdpa[n], *(times(n, what) for what in PLANS.values())) for n in lengths]


def planning_table(found: dict[str, Any]) -> Cells | None:
    """What planning costs beside running the plan."""
    rows = [
        (
            f"`{row['method']}`",
            f"{row['length']:,}",
            row.get("topics") or "all differ",
            f"{row['density']:.3f}",
            f"{row['cpp_s']['total']:.2f}",
            f"{row['execute_s']:.2f}",
            f"{row['cpp_share']:.0%}",
            f"{row['cpp_s']['total'] / row['execute_s']:.0%}",
        )
        for row in found["rows"]
    ]
    header = (
        "method",
        "tokens",
        "topics",
        "density",
        "planning s",
        "running s",
        "of both, planning",
        "planning over running",
    )
    return ("", header, rows) if rows else None


def gains_table(report: dict[str, Any]) -> Cells | None:
    """What a sparse plan gains in attention, and what is left of it in a whole layer or model."""
    what = {"layers": "an 8B-shaped layer", "reference": "the reference model"}
    cells = []
    for part in (part for part in what if part in report):
        rows = report[part]["rows"]
        dense = {_inputs(row): row for row in rows if row["method"] == OWN_DENSE}
        cells += [
            (
                what[part],
                _inputs(row)[1],
                f"{row['length']:,}",
                f"`{row['method']}`",
                f"{row['density']:.3f}",
                f"{dense[_inputs(row)]['attention_s'] / row['attention_s']:.2f}",
                f"{dense[_inputs(row)]['total_s'] / row['total_s']:.2f}",
            )
            for row in rows
            if not row["method"].startswith("dense") and _inputs(row) in dense
        ]
    above = "Times every pair on our kernel: in attention, planning included, and in everything."
    header = ("what", "inputs", "tokens", "method", "density", "attention", "everything")
    return (above, header, cells) if cells else None


def _inputs(row: dict[str, Any]) -> tuple[int, str]:
    """What rows have in common that may be compared."""
    return row["length"], row.get("inputs", "random" if "hidden" in row else "text")
