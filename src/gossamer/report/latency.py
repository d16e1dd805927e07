"""Seconds against length, and from which length on a method is worth it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gossamer.calibrate.bench import break_even
from gossamer.evaluate.summary import SummaryRow
from gossamer.report.figure import Figure, Style, Table, family, label_styles, legend, short_length
from gossamer.report.html import Html
from gossamer.report.svg import Panel, number

__all__ = ["break_even", "dense_labels", "faster_from", "latency"]

Seconds = Mapping[int, float]


def dense_labels(labels: Sequence[str]) -> list[str]:
    """What methods are compared with, the baseline first: ``dense``, then dense attention on other kernels."""
    return sorted((label for label in labels if family(label) == "dense"), key=lambda label: label != "dense")


def latency(rows: Sequence[SummaryRow]) -> Figure:
    """Seconds of prefill against length, and where each method breaks even with each dense attention."""
    seconds: dict[str, dict[int, float]] = {}
    for row in rows:
        if row.prefill_s:
            seconds.setdefault(row.method, {})[row.length] = row.prefill_s
    plain = dense_labels(list(seconds))
    table: Table = [["method", "length", "prefill seconds", *(f"times as fast as {label}" for label in plain)]]
    for label, by in seconds.items():
        for length, value in by.items():
            gains = [seconds[base][length] / value if length in seconds[base] else None for base in plain]
            table.append([label, length, value, *gains])
    lengths = sorted({length for by in seconds.values() for length in by})
    note = "Median seconds of the prefill, planning included; both axes are logarithmic."
    styles = label_styles(seconds)
    panels = [("", _drawn(seconds, lengths, styles))] if len(lengths) > 1 else []
    words = _words(seconds, plain) if panels else []
    if len(plain) > 1:
        note += (
            f" {plain[1]} computes every pair on another kernel: what it gains over {plain[0]} is the kernel's doing, "
            "and what a method gains over it is that of sparsity."
        )
    return Figure("latency", "Latency against length", note, panels, table, "wide", legend(styles), words)


def _drawn(seconds: Mapping[str, Seconds], lengths: Sequence[int], styles: Mapping[str, Style]) -> Html:
    panel = Panel(380, 320, "prefill seconds against length")
    values = [value for by in seconds.values() for value in by.values()]
    ticks = [float(length) for length in lengths]
    ends = (lengths[0] * 0.9, lengths[-1] * 1.1)
    panel.axes(ends, (min(values) * 0.8, max(values) * 1.25), ("tokens", "seconds"), (True, True), ticks)
    for label, style in styles.items():
        by = seconds[label]
        panel.line([panel.place(n, by[n]) for n in sorted(by)], style.colour, 1.5, style.dash)
        for n in sorted(by):
            hint = f"{label}: {by[n]:.2f} s at {short_length(n)}"
            panel.marker(*panel.place(n, by[n]), style.marker, style.colour, hint)
    return panel.render(scale=1.7)


def _words(seconds: Mapping[str, Seconds], plain: Sequence[str]) -> list[list[str]]:
    """A row for each method that is not dense: the break-even length and the gain at the longest, for each dense."""
    header = ["method"]
    for base in plain:
        header += [f"faster than {base} from", f"times as fast at {short_length(max(seconds[base]))}"]
    table = [header]
    for label, by in seconds.items():
        if label in plain:
            continue
        cells = [label]
        for base in plain:
            shared = sorted(set(by) & set(seconds[base]))
            point = break_even(shared, [seconds[base][n] for n in shared], [by[n] for n in shared])
            cells.append(faster_from(point, shared))
            last = max(seconds[base])
            cells.append(f"{seconds[base][last] / by[last]:.2f}" if last in by else "-")
        table.append(cells)
    return table if plain and len(table) > 1 else []


def faster_from(point: float | None, shared: Sequence[int]) -> str:
    """A break-even in words, for a cell of a table."""
    if not shared:
        return "-"
    if point is None:
        return f"not up to {short_length(shared[-1])}"
    if point <= shared[0]:
        return f"{short_length(shared[0])}, the shortest"
    return f"about {number(point / 1024)}K"
