"""Error and KL against time, and error against density, from the lines of ``gossamer compare``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from gossamer.evaluate.settings import ComparisonRow, bounds_of, comparison_rows
from gossamer.report.figure import Figure, Record, Style, Table, family, family_styles, legend, short_length
from gossamer.report.html import Html
from gossamer.report.svg import Panel, number

__all__ = ["frontier"]

_LEAST_ERROR = 1e-3
_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_BOUND_STYLES = {"blocks": Style("var(--text)", "", "7 3"), "columns": Style("var(--text)", "", "2 3")}
Bounds = Mapping[str, Sequence[tuple[float, float, float]]]


def frontier(records: Sequence[Record]) -> Figure:
    """Panels of each length: what a setting costs on this machine, and what it computes, against what it loses."""
    rows = comparison_rows(records)
    header = ["length", "method", "density", "recall", "error", "seconds over dense", "share of planning"]
    table: Table = [[*header, "seconds over torch's", "kl", "top-1", "not beaten", "prompts"]]
    table += [
        [
            r.length,
            r.method,
            r.density,
            r.recall,
            r.error,
            r.time,
            r.plan,
            r.over_sdpa,
            r.kl,
            r.top1,
            r.front,
            r.prompts,
        ]
        for r in rows
    ]
    styles = family_styles(row.method for row in rows)
    bounds = bounds_of(records)
    panels, words = [], []
    for length in sorted({row.length for row in rows}):
        here = [row for row in rows if row.length == length]
        best = {kind: steps for (at, kind), steps in bounds.items() if at == length}
        name = short_length(length)
        panels.append((f"{name} tokens: error against time", _drawn(here, styles, lambda row: row.time, "time", {})))
        panels.append((f"{name} tokens: error against density", _drawn(here, styles, _density, "density", best)))
        if known := [row for row in here if row.kl is not None]:
            panels.append((f"{name} tokens: KL of the predictions against time", _divergence(known, styles)))
        words += [_words(row) for row in here if row.front]
    note = (
        "Relative error of the attention output, mean over layers, heads and prompts; inputs are those of the dense "
        "run. Time is planning and attention over those of dense attention on the same kernel. Further left is "
        "cheaper, further down is better; settings of one method are joined, and what no other setting beats is large. "
        "Black lines are the best that plans of blocks (dashed) or single keys (dotted) can do. KL is of the "
        "predictions of the whole model, for the settings that it was measured for, with 95% intervals over prompts."
    )
    head = ["not beaten in time and error", "length", "time", "error", "density", "KL"]
    return Figure(
        "frontier",
        "What each setting costs and loses",
        note,
        panels,
        table,
        legend=legend(styles | ({f"best {kind}": style for kind, style in _BOUND_STYLES.items()} if bounds else {})),
        words=[head, *words] if words else [],
    )


def _density(row: ComparisonRow) -> float:
    return row.density


def _drawn(
    rows: Sequence[ComparisonRow],
    styles: Mapping[str, Style],
    cost: Callable[[ComparisonRow], float],
    name: str,
    bounds: Bounds,
) -> Html:
    panel = Panel(440, 340, f"error against {name}")
    of_bounds = [step for steps in bounds.values() for step in steps]
    costs = [max(cost(row), 1e-3) for row in rows] + [step[0] for step in of_bounds]
    errors = [max(row.error, _LEAST_ERROR) for row in rows] + [max(step[2], _LEAST_ERROR) for step in of_bounds]
    ends = min(costs) * 0.85, max(costs) * 1.18
    ticks = [tick for tick in _TICKS if ends[0] <= tick <= ends[1]]
    panel.axes(ends, (min(errors) * 0.8, max(errors) * 1.25), (name, "relative error"), (True, True), ticks)
    for kind, steps in bounds.items():
        style = _BOUND_STYLES[kind]
        panel.line([panel.place(x, max(error, _LEAST_ERROR)) for x, _, error in steps], style.colour, 1.4, style.dash)
    for method, style in styles.items():
        group = sorted((row for row in rows if family(row.method) == method), key=cost)
        places = [panel.place(max(cost(row), 1e-3), max(row.error, _LEAST_ERROR)) for row in group]
        panel.line(places, style.colour, 1.3, style.dash)
        for row, place in zip(group, places, strict=True):
            hint = f"{row.method}: error {row.error:.4f}, time {row.time:.3f}, density {row.density:.3f}"
            panel.marker(*place, style.marker or "circle", style.colour, hint, scale=1.5 if row.front else 0.8)
    return panel.render(scale=1.4)


def _divergence(rows: Sequence[ComparisonRow], styles: Mapping[str, Style]) -> Html:
    panel = Panel(440, 340, "KL against time")
    costs = [max(row.time, 1e-3) for row in rows]
    losses = [max(end, _LEAST_ERROR) for row in rows for end in (row.kl or 0.0, *(row.kl_interval or ()))]
    ends = min(costs) * 0.85, max(costs) * 1.18
    ticks = [tick for tick in _TICKS if ends[0] <= tick <= ends[1]]
    panel.axes(ends, (min(losses) * 0.8, max(losses) * 1.25), ("time", "KL (nats)"), (True, True), ticks)
    for method, style in styles.items():
        group = sorted((row for row in rows if family(row.method) == method), key=lambda row: row.time)
        places = [panel.place(max(row.time, 1e-3), max(row.kl or 0.0, _LEAST_ERROR)) for row in group]
        panel.line(places, style.colour, 1.3, style.dash)
        for row, place in zip(group, places, strict=True):
            hint = f"{row.method}: KL {row.kl:.4f}, time {row.time:.3f}"
            if row.kl_interval is not None:
                low, high = (panel.place(1.0, max(end, _LEAST_ERROR))[1] for end in row.kl_interval)
                panel.line([(place[0], low), (place[0], high)], style.colour, 1.0)
            panel.marker(*place, style.marker or "circle", style.colour, hint, scale=1.5 if row.front else 0.8)
    return panel.render(scale=1.4)


def _words(row: ComparisonRow) -> list[str]:
    kl = "-" if row.kl is None else number(row.kl)
    return [row.method, f"{row.length:,}", f"{row.time:.3f}", f"{row.error:.4f}", f"{row.density:.3f}", kl]
