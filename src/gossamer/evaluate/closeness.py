"""How near whole sparse runs are to dense ones, by kind of prompt: means over the prompts, with intervals over them.

Needs no transformers, so that a report does not either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gossamer.evaluate.metrics import Interval, bootstrap_interval, pooled_interval

__all__ = ["EVERY_KIND", "Closeness", "closeness_rows", "closeness_table", "kind_of"]

Record = dict[str, Any]
Mean = tuple[float, Interval | None]

EVERY_KIND = "all"


@dataclass(frozen=True)
class Closeness:
    """One method at one length on prompts of one kind, or of every kind.

    Fields (a mean over the prompts and its 95% interval, which a single prompt has none of; kinds are strata):
        kl, top1: of the predictions at all positions, beside those of the dense run: nats, and share of equal choices.
        nats: loss of the prompt's own tokens, less that of the dense run; None in old files.
        recall, oracle_recall, density: over layers and heads.
    """

    method: str
    length: int
    kind: str
    prompts: int
    kl: Mean
    top1: Mean
    nats: Mean | None
    recall: Mean
    oracle_recall: float
    density: float

    def to_dict(self) -> Record:
        return asdict(self)


def kind_of(record: Record) -> str:
    """The task that a line's prompt is of, or the name of the text."""
    return record.get("text") or record.get("task") or "prompts"


def closeness_rows(records: Iterable[Record]) -> list[Closeness]:
    """By length, kind and method, in the order of the records; where there are several kinds, all of them come first.

    ``records`` are lines of kind ``fidelity``, each prompt once; others are left out.
    """
    found: dict[tuple[int, str], dict[str, list[Record]]] = {}
    for record in records:
        if record["kind"] == "fidelity":
            by_kind = found.setdefault((record["length"], record["method"]), {})
            by_kind.setdefault(kind_of(record), []).append(record)
    kinds = list(dict.fromkeys(kind for by_kind in found.values() for kind in by_kind))
    rows = []
    for length in sorted({length for length, _ in found}):
        for kind in ([EVERY_KIND] if len(kinds) > 1 else []) + kinds:
            for (of_length, method), by_kind in found.items():
                groups = list(by_kind.values()) if kind == EVERY_KIND else [by_kind[kind]] if kind in by_kind else []
                if of_length == length and groups:
                    rows.append(_row(method, length, kind, groups))
    return rows


def _row(method: str, length: int, kind: str, groups: Sequence[Sequence[Record]]) -> Closeness:
    every = [record for group in groups for record in group]
    with_loss = all("nats" in record["logits"] for record in every)
    return Closeness(
        method=method,
        length=length,
        kind=kind,
        prompts=len(every),
        kl=_mean(groups, lambda record: record["logits"]["mean_kl"]),
        top1=_mean(groups, lambda record: record["logits"]["mean_top1"]),
        nats=_mean(groups, lambda r: r["logits"]["nats"] - r["logits"]["dense_nats"]) if with_loss else None,
        recall=_mean(groups, lambda record: record["mean"]["recall"]),
        oracle_recall=sum(record["mean"]["oracle_recall"] for record in every) / len(every),
        density=sum(record["density"] for record in every) / len(every),
    )


def _mean(groups: Sequence[Sequence[Record]], of: Callable[[Record], float]) -> Mean:
    values = [[of(record) for record in group] for group in groups]
    every = [value for group in values for value in group]
    mean = sum(every) / len(every)
    # One prompt of a kind says nothing of how prompts of it differ.
    return mean, pooled_interval(values, bootstrap_interval) if min(map(len, values)) > 1 else None


def closeness_table(rows: Sequence[Closeness]) -> list[list[str]]:
    """Header and cells, for a terminal."""
    table = [["method", "length", "prompts", "n", "density", "recall", "oracle", "KL", "top-1", "more nats"]]
    for row in rows:
        table.append(
            [
                row.method,
                str(row.length),
                row.kind,
                str(row.prompts),
                f"{row.density:.3f}",
                _shown(row.recall, ".3f"),
                f"{row.oracle_recall:.3f}",
                _shown(row.kl, ".4f"),
                _shown(row.top1, ".3f"),
                "-" if row.nats is None else _shown(row.nats, "+.4f"),
            ]
        )
    return table


def _shown(mean: Mean, form: str) -> str:
    value, interval = mean
    return f"{value:{form}}" + ("" if interval is None else f" [{interval[0]:{form}}, {interval[1]:{form}}]")
