"""What ``gossamer bench`` timed, as one picture: seconds by length with the break-even, and the share of planning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gossamer.calibrate.bench import Row, break_even
from gossamer.evaluate.records import label_of
from gossamer.policy import Policy
from gossamer.report.figure import Style, label_styles, short_length
from gossamer.report.latency import faster_from
from gossamer.report.svg import Panel, number, stacked

__all__ = ["timings"]

_WIDE, _LINE = 720, 16
_LEAST = 1e-9  # seconds; axes are logarithmic
_DENSE = Style("#222", "circle", "5 4")
Lines = Mapping[str, Mapping[int, float]]
"""By label, then by length."""


def timings(rows: Sequence[Row], about: str) -> Panel:
    """Dense attention and each method at each length.

    Above, medians of seconds, planning included, both axes logarithmic; a dotted line where a method breaks even with
    dense attention on the same kernel. Below, planning's share of a method's seconds.

    Args:
        about: what was timed, for the title.
    """
    seconds: dict[str, dict[int, float]] = {"dense": {row.length: max(row.dense_s, _LEAST) for row in rows}}
    shares: dict[str, dict[int, float]] = {}
    for row in rows:
        label = label_of(Policy(row.method))
        seconds.setdefault(label, {})[row.length] = max(row.seconds, _LEAST)
        shares.setdefault(label, {})[row.length] = row.planning
    styles = label_styles(seconds) | {"dense": _DENSE}
    lengths = sorted(seconds["dense"])
    points = {label: _break_even(seconds["dense"], by) for label, by in seconds.items() if label != "dense"}
    above = _seconds(seconds, lengths, styles, points)
    below = Panel(_WIDE, 230, "share of planning")
    below.axes(_ends(lengths), (0.0, 1.0), ("tokens", "share of planning"), (True, False), _ticks(lengths))
    _draw(below, shares, styles, ".0%")
    words = {label: f"faster than dense from: {faster_from(points[label], sorted(seconds[label]))}" for label in points}
    title = f"Seconds of attention by length: {about}"
    return stacked([_line(title), above, below, *_legend(styles, words)], title)


def _break_even(dense: Mapping[int, float], by: Mapping[int, float]) -> float | None:
    shared = sorted(by)
    return break_even(shared, [dense[n] for n in shared], [by[n] for n in shared])


def _seconds(
    seconds: Lines, lengths: Sequence[int], styles: Mapping[str, Style], points: Mapping[str, float | None]
) -> Panel:
    panel = Panel(_WIDE, 380, "seconds of attention")
    values = [value for by in seconds.values() for value in by.values()]
    low, high = min(values) * 0.8, max(values) * 1.25
    panel.axes(_ends(lengths), (low, high), ("tokens", "seconds"), (True, True), _ticks(lengths))
    inside = [(label, point) for label, point in points.items() if point is not None and point > lengths[0]]
    for rank, (label, point) in enumerate(inside):
        style = styles[label]
        panel.line([panel.place(point, low), panel.place(point, high)], style.colour, 1.2, "1 3")
        x, y = panel.place(point, high)
        panel.text(x + 3, y + 12 * (1 + rank % 8), f"{number(point / 1024)}K", "start", style.colour, 10)
    _draw(panel, seconds, styles, ".4g")
    return panel


def _draw(panel: Panel, lines: Lines, styles: Mapping[str, Style], form: str) -> None:
    for label, by in lines.items():
        style, lengths = styles[label], sorted(by)
        panel.line([panel.place(n, by[n]) for n in lengths], style.colour, 1.5, style.dash)
        for n in lengths:
            hint = f"{label}: {by[n]:{form}} at {short_length(n)} tokens"
            panel.marker(*panel.place(n, by[n]), style.marker, style.colour, hint, 0.8)


def _ends(lengths: Sequence[int]) -> tuple[float, float]:
    return lengths[0] * 0.9, lengths[-1] * 1.1


def _ticks(lengths: Sequence[int]) -> list[float]:
    return [float(length) for length in lengths]


def _legend(styles: Mapping[str, Style], words: Mapping[str, str]) -> list[Panel]:
    """A line for each: how it is drawn, its name, and what is said of it."""
    made = []
    for label, style in styles.items():
        said = words.get(label)
        made.append(_line(f"{label}; {said}" if said else label, 56))
        made[-1].line([(20, _LINE / 2), (48, _LINE / 2)], style.colour, 1.8, style.dash)
        made[-1].marker(34, _LINE / 2, style.marker, style.colour, scale=0.8)
    return [*made, Panel(_WIDE, 8, "")]


def _line(text: str, x: float = 12) -> Panel:
    panel = Panel(_WIDE, _LINE, text)
    panel.text(x, _LINE - 4, text, "start")
    return panel
