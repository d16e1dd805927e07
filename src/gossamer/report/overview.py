"""What a person came for, on the first screen: one picture, a few lines in words, one small table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from gossamer.evaluate.metrics import Interval
from gossamer.evaluate.summary import SummaryRow
from gossamer.report.figure import Figure, Style, Table, family, family_styles, legend, short_length
from gossamer.report.html import Html
from gossamer.report.latency import dense_labels
from gossamer.report.svg import Panel, number

__all__ = ["in_words", "overview", "short_table"]

_TICKS = tuple(m * 10.0**e for e in range(-3, 4) for m in (1, 2, 5))
_LEAST = 1e-4
# Rows of the table: what computes every pair, and so many others.
_MOST_ROWS = 5


class _Cost(NamedTuple):
    """What settings are compared by: a figure of a row, its name on an axis, its unit, and in short."""

    of: Callable[[SummaryRow], float | None]
    axis: str
    unit: str
    short: str


_PREFILL = _Cost(lambda row: row.prefill_s, "seconds of the prefill", "s", "seconds")
_TOKEN = _Cost(lambda row: row.token_s and 1e3 * row.token_s, "milliseconds of a token", "ms", "time of a token")


def decodes(rows: Sequence[SummaryRow]) -> bool:
    """Whether what is compared is how steps read a cache, or what caches keep, after prompts that are read alike."""
    sparse = [row for row in rows if not _is_dense(row)]
    return bool(sparse) and all(row.token_s and row.cache_bytes and row.density == 1.0 for row in sparse)


def overview(rows: Sequence[SummaryRow]) -> Figure:
    """Accuracy and predictions against seconds, and what plans keep beside the best ones, at the longest length.

    Where only steps differ, against the time of a token.
    """
    rows = _longest(rows)
    cost = _TOKEN if decodes(rows) else _PREFILL
    styles = family_styles(row.method for row in rows)
    panels = [
        (caption, drawn)
        for caption, drawn in (
            (f"Answers: accuracy against {cost.short}", _accuracy(rows, styles, cost)),
            ("Predictions: KL from dense against seconds", _divergence(rows, styles)),
            ("Attention mass lost against density", _lost_mass(rows, styles)),
        )
        if drawn is not None
    ]
    table: Table = [
        ["method", "prefill seconds", "density", "accuracy", "low", "high", "kl", "recall", "oracle recall"]
    ]
    table += [
        [r.method, r.prefill_s, r.density, r.accuracy, *(r.interval or (None, None)), r.kl, r.recall, r.oracle_recall]
        for r in rows
    ]
    where = f" at {short_length(rows[0].length)} tokens" if rows else ""
    note = f"All{where}; settings of one method are joined, bars are 95% intervals. Left is cheaper. "
    note += "Dashed lines are dense attention."
    if any(row.oracle_recall is not None for row in rows):
        note += " On the right a line leads from each plan down to the oracle: the best plan of as many blocks."
    return Figure("overview", "At a glance", note, panels, table, "three", legend(styles) if panels else Html())


def _longest(rows: Sequence[SummaryRow]) -> list[SummaryRow]:
    longest = max((row.length for row in rows), default=0)
    return [row for row in rows if row.length == longest]


def _is_dense(row: SummaryRow) -> bool:
    return family(row.method) == "dense"


def _accuracy(rows: Sequence[SummaryRow], styles: dict[str, Style], cost: _Cost) -> Html | None:
    shown = [row for row in rows if row.accuracy is not None and cost.of(row)]
    if not any(not _is_dense(row) for row in shown):
        return None
    low = min(row.interval[0] for row in shown if row.interval)
    panel = _panel(shown, "accuracy", (max(0.0, low - 0.03), 1.02), cost, log=False)
    plain = next((row for row in rows if _is_dense(row) and row.accuracy is not None), None)
    if plain is not None:
        _across(panel, shown, plain.accuracy or 0.0, cost)
    _draw(panel, shown, styles, cost, lambda row: row.accuracy or 0.0, lambda row: row.interval)
    return panel.render(scale=1.2)


def _divergence(rows: Sequence[SummaryRow], styles: dict[str, Style]) -> Html | None:
    timed = [row for row in rows if row.prefill_s]
    shown = [row for row in timed if row.kl is not None]
    if not shown:
        return None
    ends = [end for row in shown for end in (row.kl or _LEAST, *(row.kl_interval or ()))]
    plain = [row for row in timed if _is_dense(row)]
    y = max(_LEAST, min(ends)) * 0.7, max(ends) * 1.4
    panel = _panel([*shown, *plain], "KL from dense (nats)", y, _PREFILL, log=True)
    assert panel.y is not None
    for row in plain:  # nothing is lost there, which a logarithm cannot show
        x = panel.place(row.prefill_s or 1.0, panel.y.low)[0]
        panel.line([(x, panel.y.picture[0]), (x, panel.y.picture[1])], "var(--axis)", 1.2, "5 4")
    _draw(panel, shown, styles, _PREFILL, lambda row: max(row.kl or 0.0, _LEAST), lambda row: row.kl_interval)
    return panel.render(scale=1.2)


def _lost_mass(rows: Sequence[SummaryRow], styles: dict[str, Style]) -> Html | None:
    shown = [row for row in rows if row.recall is not None and row.oracle_recall is not None and row.density]
    if not shown:
        return None

    def lost(recall: float | None) -> float:
        return max(_LEAST, 1.0 - (recall or 0.0))

    ends = [lost(value) for row in shown for value in (row.recall, row.oracle_recall)]
    panel = Panel(380, 280, "attention mass lost against density")
    low, high = min(row.density or 1.0 for row in shown) * 0.85, 1.1
    ticks = [tick for tick in _TICKS if low <= tick <= high]
    panel.axes((low, high), (min(ends) * 0.7, max(ends) * 1.4), ("density", "mass lost"), (True, True), ticks)
    for row in shown:
        style = styles[family(row.method)]
        plan, best = (panel.place(row.density or 1.0, lost(value)) for value in (row.recall, row.oracle_recall))
        panel.line([plan, best], style.colour, 1.2)
        panel.line([(best[0] - 4, best[1]), (best[0] + 4, best[1])], style.colour, 2.0)
        hint = f"{row.method}: loses {lost(row.recall):.4f}, its oracle {lost(row.oracle_recall):.4f}"
        panel.marker(*plan, style.marker, style.colour, hint, scale=0.9)
    return panel.render(scale=1.2)


def _panel(rows: Sequence[SummaryRow], name: str, y: tuple[float, float], cost: _Cost, *, log: bool) -> Panel:
    costs = [cost.of(row) or 1.0 for row in rows]
    ends = min(costs) * 0.85, max(costs) * 1.18
    panel = Panel(380, 280, f"{name} against {cost.short}")
    ticks = [tick for tick in _TICKS if ends[0] <= tick <= ends[1]]
    panel.axes(ends, y, (cost.axis, name), (True, log), ticks)
    return panel


def _across(panel: Panel, rows: Sequence[SummaryRow], value: float, cost: _Cost) -> None:
    ends = min(cost.of(row) or 1.0 for row in rows), max(cost.of(row) or 1.0 for row in rows)
    panel.line([panel.place(end, value) for end in ends], "var(--axis)", 1.2, "5 4")


def _draw(
    panel: Panel,
    rows: Sequence[SummaryRow],
    styles: dict[str, Style],
    cost: _Cost,
    value: Callable[[SummaryRow], float],
    interval: Callable[[SummaryRow], Interval | None],
) -> None:
    for name, style in styles.items():
        group = sorted((row for row in rows if family(row.method) == name), key=lambda row: cost.of(row) or 0.0)
        places = [panel.place(cost.of(row) or 1.0, value(row)) for row in group]
        if name != "dense":
            panel.line(places, style.colour, 1.2)
        for row, place in zip(group, places, strict=True):
            hint = f"{row.method}: {value(row):.3f} in {cost.of(row):.2f} {cost.unit}"
            if ends := interval(row):
                low, high = (panel.place(cost.of(row) or 1.0, max(end, _LEAST))[1] for end in ends)
                panel.line([(place[0], low), (place[0], high)], style.colour, 1.0)
                hint += f" [{ends[0]:.3f}, {ends[1]:.3f}]"
            panel.marker(*place, style.marker or "circle", style.colour, hint, scale=0.9)


def in_words(rows: Sequence[SummaryRow]) -> list[str]:
    """Five lines at most, from the figures at the longest length alone."""
    rows = _longest(rows)
    sparse = [row for row in rows if not _is_dense(row)]
    lines = [_about_dense(rows), *_about_answers(sparse), _about_predictions(sparse), _about_plans(sparse)]
    return [line for line in lines if line]


def _about_dense(rows: Sequence[SummaryRow]) -> str:
    dense = [row for row in rows if _is_dense(row)]
    labels = dense_labels([row.method for row in dense])
    said = []
    for label in labels:
        row = next(row for row in dense if row.method == label)
        took = f" takes {row.prefill_s:.2f} s" if row.prefill_s else ""
        scored = "" if row.accuracy is None else f"{' and' if took else ''} scores {row.accuracy:.3f}"
        said.append(f"{label}{took}{scored}")
    if not said:
        return ""
    most = max(row.samples for row in dense)
    count = f" ({most} samples)" if most else ""
    return f"At {rows[0].length:,} tokens{count} {'; '.join(said)}."


def _about_answers(rows: Sequence[SummaryRow]) -> list[str]:
    judged = [row for row in rows if row.difference is not None and row.difference_interval is not None]
    if not judged:
        return []
    losing = [row for row in judged if (row.difference_interval or (0, 0))[1] < 0]
    keeping = [row for row in judged if row not in losing]
    steps = decodes(rows)
    cost = _TOKEN if steps else _PREFILL
    lines = []
    if keeping:
        fastest = min(keeping, key=lambda row: cost.of(row) or float("inf"))
        may = max(0.0, -(fastest.difference_interval or (0.0, 0.0))[0])
        gain = f" {fastest.speedup:.1f} times as fast as dense," if fastest.speedup and not steps else ""
        if steps:
            gain = f" {cost.of(fastest):.1f} ms a token," + (
                "" if fastest.read is None else f" which read {fastest.read:.1%} of the cache,"
            )
        lines.append(
            f"{len(keeping)} of {len(judged)} settings lose no answers that these samples could show. The fastest of "
            f"them is {fastest.method},{gain} which may still lose up to {may:.2f}."
        )
    if losing:
        named = ", ".join(dict.fromkeys(family(row.method) for row in losing))
        worst = min(losing, key=lambda row: row.difference or 0.0)
        lines.append(
            f"{len(losing)} lose measurably ({named}); the most {worst.method}, {-(worst.difference or 0):.2f} of "
            "accuracy."
        )
    return lines


def _about_predictions(rows: Sequence[SummaryRow]) -> str:
    known = sorted((row for row in rows if row.kl is not None), key=lambda row: row.kl or 0.0)
    if not known:
        return ""
    near, far = known[0], known[-1]
    last = f", farthest {far.method} (KL {number(far.kl or 0)})." if far is not near else "."
    return (
        f"Nearest to the predictions of dense is {near.method} (KL {number(near.kl or 0)}, {near.top1 or 0:.1%} the "
        f"same choice){last}"
    )


def _about_plans(rows: Sequence[SummaryRow]) -> str:
    known = [row for row in rows if row.recall is not None and row.oracle_recall is not None and row.density]
    if not known:
        return ""
    best = min(known, key=lambda row: (row.oracle_recall or 0) - (row.recall or 0))
    return (
        f"Nearest to the best plan of as many blocks is that of {best.method}: with {best.density:.0%} of the pairs it "
        f"keeps {best.recall:.1%} of the attention mass, the best {best.oracle_recall:.1%}."
    )


def short_table(rows: Sequence[SummaryRow]) -> list[list[str]]:
    """Header and cells: what computes every pair, and the fastest settings; first those that lose no answers."""
    rows = [row for row in _longest(rows) if row.prefill_s]
    dense = [row for row in rows if _is_dense(row)]
    steps = decodes(rows)
    cost = _TOKEN if steps else _PREFILL

    def rank(row: SummaryRow) -> tuple[bool, float]:
        loses = row.difference_interval is not None and row.difference_interval[1] < 0
        return loses, cost.of(row) or 0.0

    chosen = sorted((row for row in rows if not _is_dense(row)), key=rank)[:_MOST_ROWS]
    if steps:
        return _table_of_steps([*dense, *chosen])
    table = [["method", "seconds", "times as fast", "density", "less dense", "KL"]]
    for row in [*dense, *chosen]:
        table.append(
            [
                row.method,
                f"{row.prefill_s:.2f}",
                "-" if row.speedup is None else f"{row.speedup:.1f}",
                "-" if row.density is None else f"{row.density:.3f}",
                _less_dense(row),
                "-" if row.kl is None else number(row.kl),
            ]
        )
    return table if chosen else []


def _table_of_steps(rows: Sequence[SummaryRow]) -> list[list[str]]:
    table = [["method", "ms a token", "of the cache read", "MiB held", "less dense"]]
    for row in rows:
        table.append(
            [
                row.method,
                "-" if row.token_s is None else f"{1e3 * row.token_s:.1f}",
                "-" if row.read is None else f"{row.read:.3f}",
                "-" if row.cache_bytes is None else f"{row.cache_bytes / 2**20:.1f}",
                _less_dense(row),
            ]
        )
    return table


def _less_dense(row: SummaryRow) -> str:
    if row.difference is None:
        return "-"
    low, high = row.difference_interval or (0.0, 0.0)
    return f"{row.difference:+.2f} [{low:+.2f}, {high:+.2f}]"
