"""What each method's fills are, by length and density, with intervals by text; and how much plans are the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from gossamer.evaluate.metrics import bootstrap_interval, difference_interval, score_interval, shown_interval
from gossamer.evaluate.records import cell_of

__all__ = [
    "FIGURES",
    "Figured",
    "FillRow",
    "OverlapRow",
    "StepCost",
    "fill_rows",
    "fill_table",
    "overlap_rows",
    "overlap_table",
    "paired",
    "same_seeds",
    "step_costs",
]

Record = dict[str, Any]
FIGURES = ("accuracy", "copied_accuracy", "rest_accuracy", "agreement", "copied_agreement", "top1", "kl")


@dataclass(frozen=True)
class Figured:
    """A mean over texts, and its 95% interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class FillRow:
    """One method on texts of one length.

    Fields:
        texts, fills: their number; a text is filled in with several masks.
        density: mean over the steps.
        figures: by `FIGURES`, of those that were measured.
        lost: by ``accuracy`` and ``copied_accuracy``, what dense attention has more on the same texts.
        seconds: of one sampling's model calls, mean over the lines that have it; None where none has.
    """

    method: str
    task: str
    length: int
    texts: int
    fills: int
    density: float
    figures: dict[str, Figured]
    lost: dict[str, Figured]
    seconds: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class OverlapRow:
    """How much what a method would choose is the same.

    Fields:
        chosen: the step that it chooses at.
        by_step: Jaccard of the choice at that step with those at each step, means over texts, layers and heads.
        later: of the steps after it; last: of the last.
        heads: of each layer and head, over later steps, mean over texts.
        seeds: with the same text under other masks; others: with other texts; None where there are none.
        chance: of blocks that are chosen at random.
    """

    method: str
    task: str
    length: int
    texts: int
    fills: int
    chosen: int
    by_step: list[float]
    later: Figured | None
    last: Figured
    heads: list[list[float]] = field(default_factory=list)
    seeds: float | None = None
    others: float | None = None
    chance: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class StepCost:
    """Processor seconds of a step of a method beside one of dense attention on our kernel, of the same texts and run.

    Fields:
        density: of the sparse steps.
        dense, chooses, sparse: of a dense step of the dense sampling; of the step that chooses; of a sparse step. Means
            over steps, then over texts.
    """

    method: str
    length: int
    texts: int
    density: float
    dense: float
    chooses: float
    sparse: float


def step_costs(records: Iterable[Record]) -> list[StepCost]:
    """Of each method that has sparse steps, where the dense sampling of the same text has processor seconds.

    The method's own dense steps are left out: before it needs a plan it runs on torch's kernel.
    """
    records = [record for record in records if record["kind"] == "fill" and _has_cpu(record)]
    dense = {_sampling(record): record for record in records if _is_dense(record)}
    found: dict[tuple[str, int], list[tuple[int, tuple[float, ...]]]] = {}
    for record in records:
        steps, beside = record["by_step"], dense.get(_sampling(record))
        first = next((n for n, step in enumerate(steps) if step["density"] < 1), 0)
        if beside is None or first == 0:
            continue
        sparse = [step for step in steps[first:] if step["density"] < 1]
        costs = (
            _over(sparse, "density"),
            _over(beside["by_step"], "cpu_s"),
            steps[first - 1]["cpu_s"],
            _over(sparse, "cpu_s"),
        )
        found.setdefault((record["method"], record["length"]), []).append((record["index"], costs))
    return [
        StepCost(
            *key, len({index for index, _ in own}), *(sum(x) / len(own) for x in zip(*(c for _, c in own), strict=True))
        )
        for key, own in sorted(found.items(), key=lambda item: item[0][1])
    ]


def _has_cpu(record: Record) -> bool:
    steps = record.get("by_step", ())
    return bool(steps) and all("cpu_s" in step for step in steps)


def _sampling(record: Record) -> tuple[Any, ...]:
    """Which text under which masks, in which run: a machine is not as fast in all of them."""
    return record.get("run"), record["task"], record["length"], record["index"], record["seed"]


def _over(steps: Sequence[Record], name: str) -> float:
    return sum(step[name] for step in steps) / len(steps)


def same_seeds(records: Iterable[Record]) -> list[Record]:
    """Lines ``fill`` of the seeds that all methods of their task and length have; and all other lines."""
    records = list(records)
    seeds: dict[tuple[Any, ...], dict[str, set[int]]] = {}
    for record in records:
        if record["kind"] == "fill":
            of = seeds.setdefault((record["task"], record["length"]), {})
            of.setdefault(record["method"], set()).add(record["seed"])
    shared = {key: set.intersection(*of.values()) for key, of in seeds.items()}
    return [r for r in records if r["kind"] != "fill" or r["seed"] in shared[r["task"], r["length"]]]


def fill_rows(records: Iterable[Record]) -> list[FillRow]:
    """A row for each length, task and method, in the order of length and of the lines, of lines ``fill``."""
    groups = _groups(records, "fill")
    dense = {key[:2]: lines for key, lines in groups.items() if _is_dense(lines[0])}
    rows = [_fill_row(lines, dense.get(key[:2], [])) for key, lines in groups.items()]
    return sorted(rows, key=lambda row: row.length)


def overlap_rows(records: Iterable[Record]) -> list[OverlapRow]:
    """A row for each length, task and method, of lines ``overlap``."""
    return sorted(map(_overlap_row, _groups(records, "overlap").values()), key=lambda row: row.length)


def _groups(records: Iterable[Record], kind: str) -> dict[tuple[Any, ...], list[Record]]:
    """Lines by task, length and method, each once."""
    found: dict[tuple[Any, ...], dict[Any, Record]] = {}
    for record in records:
        if record["kind"] == kind:
            key = record["task"], record["length"], record["method"]
            found.setdefault(key, {}).setdefault(cell_of(record), record)
    return {key: list(lines.values()) for key, lines in found.items()}


def _is_dense(record: Record) -> bool:
    """What other lines are held beside: not dense attention on torch's kernel, which rounds otherwise."""
    fields = record.get("method_fields", {"method": record["method"]})
    return fields.get("method") == "dense" and fields.get("kernel") != "torch"


def _by_text(lines: Sequence[Record], value: Callable[[Record], float | None]) -> dict[int, float]:
    """Means over the seeds of each text."""
    found: dict[int, list[float]] = {}
    for line in lines:
        if (number := value(line)) is not None:
            found.setdefault(line["index"], []).append(number)
    return {index: sum(numbers) / len(numbers) for index, numbers in found.items()}


def _figured(values: Sequence[float], interval: Callable[[Sequence[float]], tuple[float, float]]) -> Figured:
    return Figured(sum(values) / len(values), *interval(values))


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _fill_row(lines: list[Record], dense: list[Record]) -> FillRow:
    figures, lost = {}, {}
    for name in FIGURES:
        values = _by_text(lines, lambda line, name=name: line.get(name))
        if values:
            interval = bootstrap_interval if name == "kl" else score_interval
            figures[name] = _figured([*values.values()], interval)
    if not _is_dense(lines[0]):
        # On the same texts under the same masks alone.
        made = {(line["index"], line["seed"]) for line in lines}
        beside = [line for line in dense if (line["index"], line["seed"]) in made]
        for name in ("accuracy", "copied_accuracy"):
            mine, theirs = (_by_text(part, lambda line, name=name: line.get(name)) for part in (lines, beside))
            if both := sorted(mine.keys() & theirs.keys()):
                lost[name] = _figured([theirs[index] - mine[index] for index in both], difference_interval)
    return FillRow(
        method=lines[0]["method"],
        task=lines[0]["task"],
        length=lines[0]["length"],
        texts=len({line["index"] for line in lines}),
        fills=len(lines),
        density=sum(line["density"] for line in lines) / len(lines),
        figures=figures,
        lost=lost,
        seconds=_mean([line["seconds"] for line in lines if "seconds" in line]),
    )


def _overlap_row(lines: list[Record]) -> OverlapRow:
    first, steps = lines[0], len(lines[0]["by_step"])
    alike = [line for line in lines if (line["chosen"], len(line["by_step"])) == (first["chosen"], steps)]
    at = first["chosen"]
    later = _by_text(alike, lambda line: _mean(line["by_step"][at + 1 :]))
    last = _by_text(alike, lambda line: line["by_step"][-1])
    heads = [line["by_head"] for line in alike if line.get("by_head")]
    shape = [len(row) for row in heads[0]] if heads else []
    heads = [table for table in heads if [len(row) for row in table] == shape]
    means = [[sum(table[r][c] for table in heads) / len(heads) for c in range(width)] for r, width in enumerate(shape)]
    return OverlapRow(
        method=first["method"],
        task=first["task"],
        length=first["length"],
        texts=len({line["index"] for line in alike}),
        fills=len(alike),
        chosen=at,
        by_step=[sum(line["by_step"][step] for line in alike) / len(alike) for step in range(steps)],
        later=_figured([*later.values()], score_interval) if later else None,
        last=_figured([*last.values()], score_interval),
        heads=means,
        seeds=_mean([x for line in alike for x in line.get("seeds", ())]),
        others=_mean([x for line in alike for x in line.get("texts", ())]),
        chance=sum(line["chance"] for line in alike) / len(alike),
    )


def paired(records: Iterable[Record], more: str, less: str, length: int, figure: str) -> tuple[Figured, int] | None:
    """What one method has more than another of a figure, text by text, on the same masks; and of how many texts.

    Args:
        more, less: labels of the two methods.

    Returns:
        None where there is no such text.
    """
    found: dict[str, dict[tuple[int, int, str], Record]] = {more: {}, less: {}}
    for record in records:
        if record["kind"] == "fill" and record["length"] == length and record["method"] in found:
            found[record["method"]].setdefault((record["index"], record["seed"], record["task"]), record)
    differences: dict[int, list[float]] = {}
    for key in found[more].keys() & found[less].keys():
        one, other = (found[label][key].get(figure) for label in (more, less))
        if one is not None and other is not None:
            differences.setdefault(key[0], []).append(one - other)
    values = [sum(own) / len(own) for _, own in sorted(differences.items())]
    if not values:
        return None
    return _figured(values, bootstrap_interval if figure == "kl" else difference_interval), len(values)


def fill_table(rows: Sequence[FillRow]) -> list[list[str]]:
    """Header first."""
    names = {"copied_accuracy": "copied right", "rest_accuracy": "others right", "agreement": "as dense"}
    names |= {"top1": "top-1 as dense", "kl": "KL, nats"}
    table = [["method", "length", "texts", "fills", "density", *names.values(), "s"]]
    for row in rows:
        cells = [row.method, f"{row.length:,}", str(row.texts), str(row.fills), f"{row.density:.3f}"]
        for name in names:
            found = row.figures.get(name)
            cells.append(
                "" if found is None else f"{found.mean:.4g}{shown_interval((found.low, found.high), '{:.3g}')}"
            )
        table.append([*cells, "" if row.seconds is None else f"{row.seconds:.2f}"])
    return table


def overlap_table(rows: Sequence[OverlapRow]) -> list[list[str]]:
    """Header first."""
    table = [["method", "length", "texts", "later steps", "last step", "other masks", "other texts", "by chance"]]
    for row in rows:
        cells = [row.method, f"{row.length:,}", str(row.texts)]
        for found in (row.later, row.last):
            cells.append("" if found is None else f"{found.mean:.3f}{shown_interval((found.low, found.high))}")
        for number in (row.seeds, row.others, row.chance):
            cells.append("" if number is None else f"{number:.3f}")
        table.append(cells)
    return table
