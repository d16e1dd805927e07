"""What decode steps and caches cost, and what of the answers is left."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gossamer.evaluate.summary import SummaryRow
from gossamer.report.figure import Figure, Style, Table, family, family_styles, legend, short_length
from gossamer.report.html import Html
from gossamer.report.svg import Panel, number

__all__ = ["decoding"]

_NOTE = (
    "Of each policy that was run with a method for decode steps or a cache of its own: accuracy with its 95% interval "
    "against what a step reads (of what the cache holds at the end, and of what is kept beside it to choose by), "
    "against what the cache holds at the end, and against the time of a token. Left is cheaper; settings of one method "
    "are joined. The dashed line is dense attention on a whole cache."
)
_MIB = 2.0**20


def decoding(rows: Sequence[SummaryRow]) -> Figure:
    """Accuracy against bytes that a step reads, bytes of the cache, and milliseconds of a token, a row a length."""
    table: Table = [
        [
            *("length", "method", "read", "step MiB", "cache MiB", "peak MiB", "token ms"),
            *("accuracy", "low", "high", "samples"),
        ]
    ]
    shown = [row for row in rows if row.accuracy is not None and row.cache_bytes]
    styles = family_styles(row.method for row in shown)
    panels: list[tuple[str, Html]] = []
    for length in sorted({row.length for row in shown}):
        here = [row for row in shown if row.length == length]
        whole = next((row for row in rows if row.length == length and row.method == "dense"), None)
        for row in here:
            step = _step_mib(row)
            held = (row.cache_bytes or 0) / _MIB
            peak = None if row.cache_peak_bytes is None else row.cache_peak_bytes / _MIB
            cost = [row.length, row.method, row.read, step, held, peak, _token_ms(row)]
            table.append([*cost, row.accuracy, *(row.interval or (None, None)), row.samples])
        for what, unit, value in (
            ("what a step reads", "MiB", _step_mib),
            ("what the cache holds", "MiB", lambda row: (row.cache_bytes or 0) / _MIB),
            ("time of a token", "ms", _token_ms),
        ):
            svg = _drawn(here, whole, styles, f"{what}, {unit}", value)
            if svg is not None:
                panels.append((f"{short_length(length)} tokens: accuracy against {what}", svg))
    return Figure("decoding", "Decode steps and caches", _NOTE, panels, table, "three", legend(styles))


def _step_mib(row: SummaryRow) -> float:
    return (row.step_bytes or 0.0) / _MIB


def _token_ms(row: SummaryRow) -> float | None:
    return None if row.token_s is None else 1e3 * row.token_s


def _drawn(
    rows: Sequence[SummaryRow],
    whole: SummaryRow | None,
    styles: dict[str, Style],
    name: str,
    value: Callable[[SummaryRow], float | None],
) -> Html | None:
    """Nothing where fewer than two policies have the figure: there is nothing to compare."""
    known = [(row, x) for row in rows if (x := value(row))]
    if len(known) < 2:
        return None
    low = min(row.interval[0] if row.interval else row.accuracy or 0.0 for row, _ in known)
    ends = min(x for _, x in known) * 0.85, max(x for _, x in known) * 1.18
    panel = Panel(380, 280, f"accuracy against {name}")
    ticks = [m * 10.0**e for e in range(-4, 7) for m in (1, 2, 5) if ends[0] <= m * 10.0**e <= ends[1]]
    panel.axes(ends, (max(0.0, low - 0.03), 1.02), (name, "accuracy"), (True, False), ticks)
    if whole is not None and whole.accuracy is not None:
        panel.line([panel.place(end, whole.accuracy) for end in ends], "var(--axis)", 1.2, "5 4")
    for kind, style in styles.items():
        group = sorted(((row, x) for row, x in known if family(row.method) == kind), key=lambda pair: pair[1])
        panel.line([panel.place(x, row.accuracy or 0.0) for row, x in group], style.colour, 1.2)
        for row, x in group:
            place = panel.place(x, row.accuracy or 0.0)
            hint = f"{row.method}: {row.accuracy or 0.0:.3f} at {number(x)}"
            if row.interval:
                panel.line([(place[0], panel.place(x, end)[1]) for end in row.interval], style.colour, 1.0)
                hint += f" [{row.interval[0]:.3f}, {row.interval[1]:.3f}]"
            panel.marker(*place, style.marker or "circle", style.colour, hint, scale=0.9)
    return panel.render(scale=1.2)
