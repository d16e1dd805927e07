"""What each mixer recalls, and at which cost: the best rate of each seed, and means over seeds."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["RecallRow", "guess", "near_and_far", "recall_rows", "recall_table"]

Record = dict[str, Any]
# Distances up to here are counted together in a table.
_NEAREST = 8


@dataclass(frozen=True)
class RecallRow:
    """One mixer of one width on one task.

    Fields:
        task: its label.
        length: T.
        accuracy, low, high: mean, least and largest over ``seeds``, of the rate that each seed did best with.
        rate: that of most seeds.
        state: numbers that a step of decoding needs of the tokens before it.
        reads, share: logits that a query computes, and what that is of dense attention's.
        steps: of the trainings that count, the mean.
        by_distance: [up to, right, asked], over all seeds.
        settings: names of the settings.
    """

    mixer: str
    task: str
    length: int
    width: int
    accuracy: float
    low: float
    high: float
    seeds: int
    rate: float
    state: int
    reads: float
    share: float
    steps: float
    by_distance: tuple[tuple[int, int, int], ...]
    settings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def recall_rows(records: Iterable[Record]) -> list[RecallRow]:
    """A row for each task, mixer and width, in the order of the records; of lines of another kind nothing.

    Lines of several settings or trainings stand in rows of their own.
    """
    groups: dict[tuple[Any, ...], dict[int, Record]] = {}
    for record in records:
        if record["kind"] != "mqar":
            continue
        training = json.dumps(record.get("training"), sort_keys=True)
        seeds = groups.setdefault((record["task"], training, record["mixer"], record["width"]), {})
        best = seeds.get(record["seed"])
        if best is None or record["accuracy"] > best["accuracy"]:
            seeds[record["seed"]] = record
    tasks = list(dict.fromkeys(key[:2] for key in groups))
    return [_row(list(seeds.values())) for key in tasks for other, seeds in groups.items() if other[:2] == key]


def _row(best: Sequence[Record]) -> RecallRow:
    first, scores = best[0], [record["accuracy"] for record in best]
    rates = [record["rate"] for record in best]
    length = first["length"]
    counts: dict[int, list[int]] = {}
    for record in best:
        for edge, right, asked in record.get("by_distance", ()):
            total = counts.setdefault(edge, [0, 0])
            total[0], total[1] = total[0] + right, total[1] + asked
    return RecallRow(
        mixer=first["mixer"],
        task=first["task"],
        length=length,
        width=first["width"],
        accuracy=sum(scores) / len(scores),
        low=min(scores),
        high=max(scores),
        seeds=len(best),
        rate=max(rates, key=rates.count),
        state=first["state"],
        reads=first["reads"],
        share=first["reads"] / ((length + 1) / 2),
        steps=sum(record.get("steps", 0) for record in best) / len(best),
        by_distance=tuple((edge, right, asked) for edge, (right, asked) in sorted(counts.items())),
        settings=tuple(dict.fromkeys(str(record.get("setting", "")) for record in best)),
    )


def guess(row: RecallRow) -> float | None:
    """How often a model is right that knows the values of a sequence and not which key has which; None of a task whose
    label names no pairs."""
    found = re.search(r"\bpairs=([1-9][0-9]{0,8})\b", row.task)
    return 1 / int(found[1]) if found else None


def near_and_far(row: RecallRow) -> list[tuple[int, float]]:
    """Share of right answers by distance: up to 8, to 16, to 32 and so on."""
    merged: dict[int, list[int]] = {}
    for edge, right, asked in row.by_distance:
        total = merged.setdefault(max(edge, _NEAREST), [0, 0])
        total[0], total[1] = total[0] + right, total[1] + asked
    return [(edge, right / asked) for edge, (right, asked) in sorted(merged.items()) if asked]


def recall_table(rows: Sequence[RecallRow]) -> list[list[str]]:
    """What each can recall at which cost, header first."""
    edges = sorted({edge for row in rows for edge, _ in near_and_far(row)})
    several = len({row.task for row in rows}) > 1
    header = ["mixer", *(["task"] if several else []), "width", "accuracy", "of seeds", "seeds"]
    header += [f"to {edge}" for edge in edges] + ["guess", "state", "logits", "of dense", "steps"]
    table = [header]
    for row in rows:
        far = dict(near_and_far(row))
        cells = [row.mixer, *([row.task] if several else []), str(row.width), f"{row.accuracy:.3f}"]
        cells += [f"{row.low:.3f}-{row.high:.3f}", str(row.seeds)]
        cells += [f"{far[edge]:.2f}" if edge in far else "" for edge in edges]
        by_chance = guess(row)
        cells.append("" if by_chance is None else f"{by_chance:.3g}")
        table.append([*cells, f"{row.state:,}", f"{row.reads:.1f}", f"{row.share:.0%}", f"{row.steps:.0f}"])
    return table
