"""What `gossamer compare` found, in tables: each setting at each length, and the best that plans can do.

Needs no transformers, so that a report does not either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from gossamer.evaluate.metrics import Interval, bootstrap_interval, shown_interval
from gossamer.methods import Method

__all__ = ["ComparisonRow", "bounds_of", "bounds_table", "comparison_rows", "comparison_table", "pareto", "settings_of"]

Record = dict[str, Any]
_BOUNDS = ("blocks", "columns")


def settings_of(method: type[Method]) -> list[Method]:
    """What a method's class says is worth comparing (`Method.settings`), or its defaults."""
    return [method.from_fields(dict(fields)) for fields in method.settings or ({},)]


@dataclass(frozen=True)
class ComparisonRow:
    """One setting at one length: means over the prompts, with 95% intervals over them where there are several.

    Fields:
        density, recall, error: see `gossamer.evaluate.frontier.Point`.
        time: seconds of planning and attention over those of dense attention on our kernel; plan: the planning's share
            of the seconds.
        over_sdpa: the same seconds over those of torch's attention.
        kl, top1: of the logits, where they were measured.
        front: no other setting has both less time and less error.
        prompts: how many there are.
    """

    method: str
    length: int
    density: float
    recall: float
    error: float
    error_interval: Interval | None
    time: float
    plan: float
    over_sdpa: float
    kl: float | None
    kl_interval: Interval | None
    top1: float | None
    front: bool
    prompts: int

    def to_dict(self) -> Record:
        return asdict(self)


def comparison_rows(records: Sequence[Record]) -> list[ComparisonRow]:
    """By length, then by time. Figures are of the prompts that all settings at a length have, those of logits likewise.

    Of several lines for one setting and prompt the last one counts.
    """
    points = _by_length(records, "point")
    logits = _by_length(records, "logits")
    rows = []
    for length, here in sorted(points.items()):
        times = {label: fmean(_seconds(r) / r["dense_s"] for r in some) for label, some in here.items()}
        errors = {label: fmean(r["error"] for r in some) for label, some in here.items()}
        labels = list(here)
        front = {labels[i] for i in pareto([(times[label], errors[label]) for label in labels])}
        for label in sorted(labels, key=lambda label: times[label]):
            some, of_model = here[label], logits.get(length, {}).get(label, [])
            total = sum(map(_seconds, some))
            rows.append(
                ComparisonRow(
                    method=label,
                    length=length,
                    density=fmean(r["density"] for r in some),
                    recall=fmean(r["recall"] for r in some),
                    error=errors[label],
                    error_interval=_interval([r["error"] for r in some]),
                    time=times[label],
                    plan=sum(r["plan_s"] for r in some) / total if total else 0.0,
                    over_sdpa=total / seconds if (seconds := sum(r["sdpa_s"] for r in some)) else 0.0,
                    kl=fmean(r["kl"] for r in of_model) if of_model else None,
                    kl_interval=_interval([r["kl"] for r in of_model]),
                    top1=fmean(r["top1"] for r in of_model) if of_model else None,
                    front=label in front,
                    prompts=len(some),
                )
            )
    return rows


def _seconds(record: Record) -> float:
    return record["plan_s"] + record["attend_s"]


def _by_length(records: Iterable[Record], kind: str) -> dict[int, dict[str, list[Record]]]:
    """By length and label, a line for each prompt that all labels there have; nothing where they share none."""
    found: dict[int, dict[str, dict[Any, Record]]] = {}
    for record in records:
        if record["kind"] == kind:
            prompt = record["task"], record["index"], record.get("text_sha256")
            found.setdefault(record["length"], {}).setdefault(record["method"], {})[prompt] = record
    rows: dict[int, dict[str, list[Record]]] = {}
    for length, by_label in found.items():
        every = list(by_label.values())
        common = [prompt for prompt in every[0] if all(prompt in some for some in every)]
        if common:
            rows[length] = {label: [some[prompt] for prompt in common] for label, some in by_label.items()}
    return rows


def _interval(values: Sequence[float]) -> Interval | None:
    return bootstrap_interval(values) if len(values) > 1 else None


def pareto(costs: Sequence[tuple[float, float]]) -> list[int]:
    """Which points no other beats in both numbers, by the first of them. Of equal points the first one stays."""
    best, front = float("inf"), []
    for index in sorted(range(len(costs)), key=lambda index: (costs[index], index)):
        if costs[index][1] < best:
            best = costs[index][1]
            front.append(index)
    return front


def comparison_table(rows: Sequence[ComparisonRow]) -> list[list[str]]:
    """Header first; a star before what no other beats."""
    table = [["setting", "length", "density", "recall", "error", "time", "plan", "of torch's", "KL", "top-1"]]
    for row in rows:
        table.append(
            [
                f"{'* ' if row.front else '  '}{row.method}",
                f"{row.length:,}",
                f"{row.density:.3f}",
                f"{row.recall:.3f}",
                f"{row.error:.4f}" + shown_interval(row.error_interval),
                f"{row.time:.3f}",
                f"{row.plan:.0%}",
                f"{row.over_sdpa:.3f}",
                "-" if row.kl is None else f"{row.kl:.4f}" + shown_interval(row.kl_interval),
                "-" if row.top1 is None else f"{row.top1:.3f}",
            ]
        )
    return table


def bounds_of(records: Iterable[Record]) -> dict[tuple[int, str], list[tuple[float, float, float]]]:
    """Density, recall and error of the best plans, by length and kind; means over the prompts."""
    found: dict[tuple[int, str], dict[Any, Record]] = {}
    for record in records:
        if record["kind"] == "bounds":
            for kind in _BOUNDS:
                prompt = record["task"], record["index"], record.get("text_sha256")
                found.setdefault((record["length"], kind), {})[prompt] = record[kind]
    return {key: _means(list(lines.values())) for key, lines in found.items()}


def _means(lines: Sequence[Record]) -> list[tuple[float, float, float]]:
    steps = min(len(line["density"]) for line in lines)
    mean: Callable[[str, int], float] = lambda name, step: fmean(line[name][step] for line in lines)  # noqa: E731
    return [(mean("density", step), mean("recall", step), mean("error", step)) for step in range(steps)]


def bounds_table(records: Sequence[Record]) -> list[list[str]]:
    """Header first; empty where no bounds were measured."""
    bounds = bounds_of(records)
    if not bounds:
        return []
    table = [["best plans of", "length", "density", "recall", "error"]]
    for (length, kind), steps in sorted(bounds.items()):
        for density, recall, error in steps:
            table.append([kind, f"{length:,}", f"{density:.3f}", f"{recall:.3f}", f"{error:.4f}"])
    return table
