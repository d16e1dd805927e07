"""What ``gossamer calibrate`` chose: methods by layer and head, what budgets buy, and how the choice holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gossamer.calibrate.summary import summary_figures, summary_table
from gossamer.report.figure import Figure, Record, Style, Table, family_styles, legend
from gossamer.report.html import Html
from gossamer.report.svg import PALETTE, Panel, number

__all__ = ["budgets", "chosen_methods", "held_out"]

_MODES = {"fixed": Style(PALETTE[1], "square", "5 3"), "global": Style(PALETTE[0], "circle")}
_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
_LEAST = 1e-4


def _of(records: Sequence[Record]) -> list[Record]:
    return [record for record in records if record["kind"] == "calibration"]


def _name(record: Record) -> str:
    """Of a calibration, among others: the profile's name, which older lines lack, and how it was chosen."""
    return f"{record['profile']}, {record['mode']}" if record.get("profile") else str(record["mode"])


def chosen_methods(records: Sequence[Record]) -> Figure:
    """The map of methods and their costs."""
    table: Table = [["profile", "layer", "head", "method", "fields", "cost", "error", "recall"]]
    found = _of(records)
    styles = family_styles(str(head["method"]) for record in found for layer in record["heads"] for head in layer)
    panels = []
    for record in found:
        panels.append((f"{_name(record)}: layers down, heads across", _map(record, styles)))
        for i, layer in enumerate(record["layers"]):
            for head, method in enumerate(record["heads"][i]):
                figures = [record["calibration"][name][i][head] for name in ("cost", "error", "recall")]
                table.append([_name(record), layer, head, method["method"], _fields(method), *figures])
    note = (
        "The colour is the method; the number is what the head costs in percent of its dense attention, mean over the "
        "prompts of the calibration. The fields stand in the CSV, and where the pointer rests."
    )
    return Figure(
        "methods", "Methods by layer and head", note, panels, table, "wide", legend({**styles}) if styles else Html()
    )


def _map(record: Record, styles: dict[str, Style]) -> Html:
    wide, high = 30, 20
    panel = Panel(44 + wide * len(record["heads"][0]), 12 + high * len(record["layers"]), "methods by layer and head")
    for i, layer in enumerate(record["layers"]):
        panel.text(36, 20 + high * i, f"L{layer}", "end")
        for head, method in enumerate(record["heads"][i]):
            cost, error = (record["calibration"][name][i][head] for name in ("cost", "error"))
            hint = f"{method['method']} {_fields(method)}: cost {cost:.3f}, error {error:.4f}"
            panel.rect(40 + wide * head, 6 + high * i, wide - 2, high - 2, styles[method["method"]].colour, hint)
            panel.text(39 + wide * (head + 0.5), 19 + high * i, f"{100 * cost:.0f}", fill="#000", size=10)
    return panel.render()


def _fields(method: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in method.items() if name != "method")


def budgets(records: Sequence[Record]) -> Figure:
    """What a choice minimises against cost, for a budget of each head and for one that all share."""
    table: Table = [["profile", "mode", "budget", "cost", "minimised", "error", "held-out error", "from", "to"]]
    panels = []
    for record in _of(records):
        for p in record["frontier"]:
            interval = p.get("held_out_interval") or (None, None)
            errors = [_minimised(p), p["error"], p.get("held_out")]
            table.append([_name(record), p["mode"], p["budget"], p["cost"], *errors, *interval])
        # Axes are logarithmic.
        points = [p | {"cost": max(p["cost"], _LEAST), "loss": max(_minimised(p), _LEAST)} for p in record["frontier"]]
        if points:
            panels.append((f"{_name(record)}: budgets tried", _frontier(points)))
    note = (
        "What was minimised, the mean relative error of the heads' outputs as the calibration's objective counts it, "
        "against their mean cost, on the calibration's prompts. Further left "
        "is cheaper, further down is better. With a fixed budget heads that nothing fits run dense, so that its points "
        "lie at what they cost, not at the budget."
    )
    return Figure("budgets", "What budgets buy", note, panels, table, legend=legend(_MODES) if panels else Html())


def _minimised(point: Record) -> float:
    """Of a point of the frontier; older lines have the error alone."""
    return point.get("loss", point["error"])


def _frontier(points: Sequence[Record]) -> Html:
    panel = Panel(440, 340, "error against cost")
    costs, errors = [p["cost"] for p in points], [p["loss"] for p in points]
    ends = max(min(costs), _LEAST) * 0.85, max(costs) * 1.18
    ticks = [tick for tick in _TICKS if ends[0] <= tick <= ends[1]]
    panel.axes(ends, (min(errors) * 0.8, max(errors) * 1.25), ("cost", "relative error"), (True, True), ticks)
    for mode, style in _MODES.items():
        mine = sorted((p for p in points if p["mode"] == mode), key=lambda p: p["cost"])
        places = [panel.place(p["cost"], p["loss"]) for p in mine]
        panel.line(places, style.colour, 1.4, style.dash)
        for p, place in zip(mine, places, strict=True):
            hint = f"{mode} {number(p['budget'])}: cost {p['cost']:.3f}, error {p['loss']:.4f}"
            panel.marker(*place, style.marker, style.colour, hint)
    return panel.render(scale=1.4)


def held_out(records: Sequence[Record]) -> Figure:
    """Each head's error on prompts that did not choose, against that on those that did."""
    table: Table = [["profile", "layer", "head", "method", "calibration error", "held-out error"]]
    panels, words = [], []
    for record in (record for record in _of(records) if "held_out" in record):
        points = []
        for i, layer in enumerate(record["layers"]):
            for head, method in enumerate(record["heads"][i]):
                pair = [record[part]["error"][i][head] for part in ("calibration", "held_out")]
                table.append([_name(record), layer, head, method["method"], *pair])
                points.append((method["method"], layer, head, max(pair[0], _LEAST), max(pair[1], _LEAST)))
        panel = Panel(440, 340, "held-out against calibration error")
        values = [value for point in points for value in point[3:]]
        ends = min(values) * 0.8, max(values) * 1.25
        ticks = [t for t in (1e-4, 1e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0) if ends[0] <= t <= ends[1]]
        panel.axes(ends, ends, ("calibration error", "held-out error"), (True, True), ticks)
        panel.line([panel.place(end, end) for end in ends], "var(--axis)", 1.2, "5 4")
        styles = family_styles(point[0] for point in points)
        for method, layer, head, mine, other in points:
            hint = f"layer {layer}, head {head}, {method}: {mine:.4f}, held out {other:.4f}"
            marker = styles[method].marker or "circle"
            panel.marker(*panel.place(mine, other), marker, styles[method].colour, hint, 0.7)
        panels.append((f"{_name(record)}: a point a head", panel.render(scale=1.4)))
    summed = [record for record in _of(records) if "summary" in record]
    names = summary_figures([record["summary"] for record in summed])
    for record in summed:
        header, *rows = summary_table(record["summary"], names)
        words += [] if words else [["profile", *header]]
        words += [[_name(record), *row] for row in rows]
    note = (
        "On the dashed line a head loses as much on prompts that it was not chosen by; above it, more. Below, means "
        "over all heads, with 95% intervals over the prompts."
    )
    return Figure("held-out", "Held-out against calibration error", note, panels, table, words=words)
