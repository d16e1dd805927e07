"""What benchmarks/calibration.py measured: lines of a file, and the means over them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from gossamer.evaluate.metrics import bootstrap_interval

Row = dict[str, Any]


class Lines:
    """Results, a line a setting and prompt.

    Args:
        about: what a file must be of to be gone on with; of names that its first line lacks, nothing is known.
    """

    def __init__(self, path: Path, about: Row) -> None:
        self.path = path
        self.rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        if not self.rows:
            self.add({"kind": "about"} | about)
        first = self.rows[0]
        other = [name for name in about if name != "machine" and first.get(name, about[name]) != about[name]]
        if first.get("kind") != "about" or other:
            what = f"another {', '.join(other)}" if other else "something else"
            sys.exit(f"{path} holds results of {what}; give another --out")

    def find(self, **wanted: Any) -> list[Row]:
        return [row for row in self.rows if all(row.get(name) == value for name, value in wanted.items())]

    def add(self, row: Row) -> None:
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def summary(lines: Lines) -> Iterator[Row]:
    """Means over the prompts with intervals; time, error and KL also over those of the rival on the same prompts."""
    for setting in lines.find(kind="setting"):
        of = {name: setting[name] for name in ("direction", "rival", "mode")}
        beside = of | {"mode": "rival"}
        way = "" if of["mode"] == "rival" else of["direction"]
        figures: Row = {}
        points, rival_points = lines.find(kind="point", **of), lines.find(kind="point", **beside)
        logits, rival_logits = lines.find(kind="logits", **of), lines.find(kind="logits", **beside)
        for name, value in {
            "density": [row["density"] for row in points],
            "time": [_seconds(row) / row["dense_s"] for row in points],
            "time over the rival's": _ratios(points, rival_points, _seconds),
            "error": [row["error"] for row in points],
            "error over the rival's": _ratios(points, rival_points, lambda row: row["error"]),
            "kl": [row["kl"] for row in logits],
            "kl over the rival's": _ratios(logits, rival_logits, lambda row: row["kl"]),
            "last kl": [row["last_kl"] for row in logits if "last_kl" in row],
            "top1": [row["top1"] for row in logits],
            "score": [row["score"] for row in lines.find(kind="answer", **(of | {"direction": way}))],
        }.items():
            if value:
                figures[name] = [sum(value) / len(value), *bootstrap_interval(value), len(value)]
        yield of | {"budget": setting["budget"]} | figures
    for rival in dict.fromkeys(row["rival"] for row in lines.find(kind="answer")):
        scores = [row["score"] for row in lines.find(kind="answer", rival=rival, mode="dense")]
        interval = [sum(scores) / len(scores), *bootstrap_interval(scores), len(scores)]
        yield {"direction": "", "rival": rival, "mode": "dense", "budget": None, "score": interval}


def _seconds(point: Row) -> float:
    return point["plan_s"] + point["attend_s"]


def _ratios(mine: Sequence[Row], theirs: Sequence[Row], of: Callable[[Row], float]) -> list[float]:
    by_prompt = {row["prompt"]: of(row) for row in theirs}
    return [of(row) / by_prompt[row["prompt"]] for row in mine if row["prompt"] in by_prompt]
