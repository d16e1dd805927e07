"""Tables for the page on what heads of pretrained models do, from measured files; `tables.py` puts them in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

from gossamer.evaluate.closeness import EVERY_KIND, Closeness
from gossamer.evaluate.settings import ComparisonRow, bounds_of, comparison_rows
from gossamer.evaluate.summary import SummaryRow, closeness_of, summary_rows

Cells = tuple[str, tuple[str, ...], list[tuple[Any, ...]]]
Record = dict[str, Any]

PATTERNS = ("sink", "local", "vertical", "slash", "block")
_GROUPS = 6
# Share of the pairs that a setting of the table may compute.
_BUDGET = 0.3


def heads_table(records: Iterable[Record]) -> Cells:
    """What each pattern explains with a small budget, by groups of layers; means over heads and prompts."""
    lines = _heads_lines(records)
    heads = [head for line in lines for head in line["heads"]]
    layers = 1 + max(head["layer"] for head in heads)
    step = max(1, layers // _GROUPS)
    groups = [(first, min(first + step, layers)) for first in range(0, layers, step)]
    rows = [
        (
            f"{first} to {end - 1}" if end - first > 1 else str(first),
            *_explained(some),
            ", ".join(f"{name} {count / len(some):.0%}" for name, count in _named(some).most_common() if count),
        )
        for first, end in groups
        if (some := [head for head in heads if first <= head["layer"] < end])
    ]
    return _above(lines), ("layers", *PATTERNS, "first token alone", "heads by what explains the most"), rows


def kinds_table(records: Iterable[Record]) -> Cells:
    """The same for all layers, by kind of prompt and length."""
    lines = _heads_lines(records)
    rows = []
    for kind, length in sorted({(str(line["task"]), line["length"]) for line in lines}):
        here = [line for line in lines if (line["task"], line["length"]) == (kind, length)]
        rows.append((kind, f"{length:,}", len(here), *_explained([head for line in here for head in line["heads"]])))
    return "", ("prompts", "tokens", "n", *PATTERNS, "first token alone"), rows


def _heads_lines(records: Iterable[Record]) -> list[Record]:
    return [record for record in records if record["kind"] == "heads"]


def _explained(heads: Sequence[Record]) -> tuple[str, ...]:
    shares = [fmean(head["mass"][name] for head in heads) for name in PATTERNS]
    return tuple(f"{share:.2f}" for share in (*shares, fmean(head["first_token"] for head in heads)))


def _named(heads: Sequence[Record]) -> Counter[str]:
    return Counter(head["pattern"] for head in heads)


def _above(lines: Sequence[Record]) -> str:
    lengths = sorted({line["length"] for line in lines})
    budget = fmean(head["budget"] for line in lines for head in line["heads"])
    prompts = "one prompt" if len(lines) == 1 else f"{len(lines)} prompts"
    return (
        f"**{lines[0]['model']['name']}**, {prompts} of {' and '.join(f'{n:,}' for n in lengths)} tokens, all heads; "
        f"each pattern may choose {budget:.1%} of the pairs."
    )


def methods_table(records: Sequence[Record]) -> Cells:
    """Of each method the setting with the least error that computes at most so much, beside the best plans."""
    rows = comparison_rows(records)
    length = max(row.length for row in rows)
    best: dict[str, ComparisonRow] = {}
    for row in rows:
        name = row.method.partition("(")[0]
        if row.length == length and row.density <= _BUDGET and (name not in best or row.error < best[name].error):
            best[name] = row
    listed = [
        (f"`{row.method}`", f"{row.density:.3f}", f"{row.recall:.3f}", f"{row.error:.3f}", _kl(row), f"{row.time:.2f}")
        for row in sorted(best.values(), key=lambda row: row.error)
    ]
    for kind in ("blocks", "columns"):
        density, recall, error = [step for step in bounds_of(records)[length, kind] if step[0] <= _BUDGET][-1]
        listed.append((f"best plan of {kind}", f"{density:.3f}", f"{recall:.3f}", f"{error:.3f}", "", ""))
    run = next(record for record in records if record["kind"] == "run")
    above = (
        f"**{run['model']['name']}, {length:,} tokens**, {next(iter(best.values())).prompts} prompts; of each method "
        f"the setting with the least error among those that compute at most {_BUDGET:.0%} of the pairs. KL with its "
        "95% interval over prompts, where it was measured."
    )
    return above, ("setting", "density", "recall", "error", "KL", "time over dense"), listed


def _kl(row: ComparisonRow) -> str:
    if row.kl is None:
        return ""
    return f"{row.kl:.3f}" + ("" if row.kl_interval is None else " [{:.3f}, {:.3f}]".format(*row.kl_interval))


def closeness_tables(records: Sequence[Record]) -> list[Cells]:
    """For each length every setting on prompts of every kind, the nearest to dense first."""
    rows = closeness_of(records)
    kinds = list(dict.fromkeys(row.kind for row in rows if row.kind != EVERY_KIND))
    tables = []
    for length in sorted({row.length for row in rows}):
        here = {(row.method, row.kind): row for row in rows if row.length == length}
        methods = [method for method, kind in here if kind == EVERY_KIND]
        prompts = sorted({row.prompts for (_, kind), row in here.items() if kind != EVERY_KIND})
        above = (
            f"**{length:,} tokens**, {' or '.join(map(str, prompts))} prompts of each kind ({', '.join(kinds)}); "
            "intervals are over prompts."
        )
        header = ("setting", "density", "recall", "oracle", "KL", *(f"KL, {kind}" for kind in kinds), "top-1")
        methods.sort(key=lambda method: here[method, EVERY_KIND].kl[0])
        tables.append((above, header, [_near(method, here, kinds) for method in methods]))
    return tables


def _near(method: str, rows: dict[tuple[str, str], Closeness], kinds: Sequence[str]) -> tuple[Any, ...]:
    every = rows[method, EVERY_KIND]
    by_kind = (f"{rows[method, kind].kl[0]:.3f}" if (method, kind) in rows else "" for kind in kinds)
    return (
        f"`{method}`",
        f"{every.density:.3f}",
        f"{every.recall[0]:.3f}",
        f"{every.oracle_recall:.3f}",
        f"{every.kl[0]:.3f}" + ("" if every.kl[1] is None else f" [{every.kl[1][0]:.3f}, {every.kl[1][1]:.3f}]"),
        *by_kind,
        f"{every.top1[0]:.3f}",
    )


def answers_tables(records: Sequence[Record]) -> list[Cells]:
    """For each length the mean score of each task that has samples."""
    rows = [row for row in summary_rows(records) if row.samples]
    tables = []
    for length in sorted({row.length for row in rows}):
        here = [row for row in rows if row.length == length]
        names = list(dict.fromkeys(task for row in here for task in row.tasks))
        header = ("setting", *names, "less dense")
        tables.append((f"**{length:,} tokens**", header, [(f"`{row.method}`", *scores(row, names)) for row in here]))
    return tables


def scores(row: SummaryRow, names: Sequence[str]) -> tuple[str, ...]:
    """Of each task, and how many less than with dense attention on the same samples; with their intervals."""

    def shown(task: str) -> str:
        if task not in row.tasks:
            return ""
        mean, (low, high), samples = row.tasks[task]
        return f"{mean:.2f} [{low:.2f}, {high:.2f}] n {samples}"

    lost, interval = row.difference, row.difference_interval
    less = "" if lost is None or interval is None else f"{lost:+.2f} [{interval[0]:+.2f}, {interval[1]:+.2f}]"
    return (*map(shown, names), less)


# The tables of what `benchmarks/pretrained_eval.py` measures.
BESIDE_DENSE = (closeness_tables, answers_tables)
