"""Results of `gossamer eval` in one table: each method at each length, beside dense attention."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gossamer.evaluate.metrics import bootstrap_interval

__all__ = ["SummaryRow", "main_table", "read_results", "summary_rows", "task_table"]

Record = dict[str, Any]
Interval = tuple[float, float]


@dataclass(frozen=True)
class SummaryRow:
    """One method at one length. None where nothing was measured.

    Fields:
        samples: samples of all tasks; each weighs the same.
        accuracy: mean score, with its 95% bootstrap interval over samples.
        difference: accuracy less that of dense on the same samples, with its interval (paired).
        tasks: mean score of each task, its interval, and the number of samples. Where all samples score alike the
            bootstrap's interval has no width: Wilson's for shares of 1 and 0 then says more.
        recall, oracle_recall: attention mass in the plan, and in the best plan of as many whole blocks.
        kl, top1: logits against those of the dense run: nats, and share of equal choices.
        density: share of the pairs that was computed.
        prefill_s: median seconds; speedup: dense's median over it.
        nats: mean loss of a token of text.
    """

    method: str
    length: int
    samples: int
    accuracy: float | None
    interval: Interval | None
    difference: float | None
    difference_interval: Interval | None
    tasks: dict[str, tuple[float, Interval, int]]
    recall: float | None
    oracle_recall: float | None
    kl: float | None
    top1: float | None
    density: float | None
    prefill_s: float | None
    speedup: float | None
    nats: float | None

    def to_dict(self) -> Record:
        return asdict(self)


def read_results(path: Path) -> list[Record]:
    """All lines of a results file; a line that was cut off at the end is left out.

    Raises:
        ValueError: the file cannot be read, is empty, or holds something else.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}; give a file that `gossamer eval` wrote") from error
    records = []
    for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), 1):
        try:
            record = json.loads(line)
            record["kind"]
        except (ValueError, TypeError, KeyError):
            raise ValueError(
                f"{path}, line {number}, is not a JSON object with a kind; give a file that `gossamer eval` wrote"
            ) from None
        records.append(record)
    if not any(record["kind"] != "run" for record in records):
        raise ValueError(f"{path} holds no results; run `gossamer eval` with --out {path}")
    return records


def summary_rows(records: Iterable[Record]) -> list[SummaryRow]:
    """A row for each length and method, in order of length; dense first, then in the order of the records."""
    records = [record for record in records if "method" in record and "length" in record]
    order: dict[str, int] = {}
    for record in records:
        order.setdefault(record["method"], len(order) + 1)
    plain = [label for label in order if label.startswith("dense")]
    baseline = "dense" if "dense" in order else next(iter(plain), None)
    rank = {label: (label != baseline, label not in plain, place) for label, place in order.items()}
    lengths = sorted({record["length"] for record in records})
    rows = []
    for length in lengths:
        here = [record for record in records if record["length"] == length]
        dense = [record for record in here if record["method"] == baseline]
        for label in sorted(order, key=rank.__getitem__):
            mine = [record for record in here if record["method"] == label]
            if mine:
                rows.append(_row(label, length, mine, dense if label != baseline else []))
    return rows


def _row(label: str, length: int, mine: list[Record], dense: list[Record]) -> SummaryRow:
    samples = _of_kind(mine, "sample")
    scores = [record["score"] for record in samples]
    baseline = {(r["task"], r["index"]): r["score"] for r in _of_kind(dense, "sample")}
    pairs = [r["score"] - baseline[key] for r in samples if (key := (r["task"], r["index"])) in baseline]
    by_task: dict[str, list[float]] = {}
    for record in samples:
        by_task.setdefault(record["task"], []).append(record["score"])
    fidelity = _of_kind(mine, "fidelity")
    prefill, dense_prefill = _seconds(mine), _seconds(dense)
    return SummaryRow(
        method=label,
        length=length,
        samples=len(samples),
        accuracy=_mean(scores),
        interval=bootstrap_interval(scores) if scores else None,
        difference=_mean(pairs),
        difference_interval=bootstrap_interval(pairs) if pairs else None,
        tasks={
            task: (sum(values) / len(values), bootstrap_interval(values), len(values))
            for task, values in by_task.items()
        },
        recall=_mean([r["mean"]["recall"] for r in fidelity]),
        oracle_recall=_mean([r["mean"]["oracle_recall"] for r in fidelity]),
        kl=_mean([r["logits"]["mean_kl"] for r in fidelity]),
        top1=_mean([r["logits"]["mean_top1"] for r in fidelity]),
        density=_mean([r["density"] for r in samples or _of_kind(mine, "perplexity") or fidelity]),
        prefill_s=prefill,
        speedup=dense_prefill / prefill if prefill and dense_prefill else None,
        nats=_mean([r["nats"] for r in _of_kind(mine, "perplexity")]),
    )


def _of_kind(records: list[Record], kind: str) -> list[Record]:
    return [record for record in records if record["kind"] == kind]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _seconds(records: list[Record]) -> float | None:
    """Median prefill of the tasks (of the perplexity windows where there are none)."""
    values = sorted(r["prefill_s"] for r in _of_kind(records, "sample") or _of_kind(records, "perplexity"))
    return (values[(len(values) - 1) // 2] + values[len(values) // 2]) / 2 if values else None


def main_table(rows: Sequence[SummaryRow]) -> list[list[str]]:
    """Header and cells, for a terminal. Columns that nothing was measured for are left out."""
    columns: list[tuple[str, list[str]]] = [
        ("method", [row.method for row in rows]),
        ("length", [str(row.length) for row in rows]),
        ("n", [str(row.samples) for row in rows]),
        ("accuracy", [_with_interval(row.accuracy, row.interval) for row in rows]),
        ("less dense", [_with_interval(row.difference, row.difference_interval, "+") for row in rows]),
        ("recall", [_number(row.recall, ".3f") for row in rows]),
        ("oracle", [_number(row.oracle_recall, ".3f") for row in rows]),
        ("top-1", [_number(row.top1, ".1%") for row in rows]),
        ("density", [_number(row.density, ".3f") for row in rows]),
        ("nats", [_number(row.nats, ".3f") for row in rows]),
        ("prefill s", [_number(row.prefill_s, ".2f") for row in rows]),
        ("speed-up", [_number(row.speedup, ".2f") for row in rows]),
    ]
    shown = [(name, cells) for name, cells in columns if any(cell != "-" for cell in cells)]
    return [[name for name, _ in shown], *map(list, zip(*(cells for _, cells in shown), strict=True))]


def task_table(rows: Sequence[SummaryRow]) -> list[list[str]]:
    """Header and cells: the accuracy of each task, with its interval."""
    tasks = list(dict.fromkeys(task for row in rows for task in row.tasks))
    table = [["method", "length", *tasks]]
    for row in rows:
        cells = [_with_interval(*row.tasks[task][:2]) if task in row.tasks else "-" for task in tasks]
        table.append([row.method, str(row.length), *cells])
    return table


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _with_interval(value: float | None, interval: Interval | None, sign: str = "") -> str:
    if value is None or interval is None:
        return "-"
    low, high = interval
    return f"{value:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"
