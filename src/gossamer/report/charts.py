"""The pictures of a report, each with the numbers that it shows."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from typing import Any

from gossamer.evaluate.summary import SummaryRow
from gossamer.report.png import grey_png
from gossamer.report.svg import MARKERS, PALETTE, Panel, colour_of, number, text_on

__all__ = ["Figure", "break_even", "figures"]

Record = dict[str, Any]
Table = list[list[Any]]


@dataclass(frozen=True)
class Figure:
    """One picture, of one or more panels.

    Fields:
        name: identifier, and stem of its CSV.
        title, note: what it shows and how to read it; plain text.
        panels: (caption, HTML) of each.
        table: header and rows; what the CSV holds.
    """

    name: str
    title: str
    note: str
    panels: list[tuple[str, str]] = field(default_factory=list)
    table: Table = field(default_factory=list)


def figures(records: Sequence[Record], rows: Sequence[SummaryRow]) -> list[Figure]:
    """All pictures that there is data for."""
    made = [
        needle_maps(records),
        accuracy_by_density(records, rows),
        recall_maps(records),
        latency(rows),
        logits_by_position(records),
        head_patterns(records),
        plan_maps(records),
    ]
    return [figure for figure in made if figure.panels]


def _styles(rows: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each method: those with the same name share them."""
    names = list(dict.fromkeys(label.partition("(")[0] for label in rows if not label.startswith("dense")))
    return {name: (PALETTE[i % len(PALETTE)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(names)}


def _style(styles: dict[str, tuple[str, str]], label: str) -> tuple[str, str]:
    return styles.get(label.partition("(")[0], ("var(--axis)", "circle"))


def _grid(cells: dict[tuple[int, int], float], rows: list[str], columns: list[str], title: str, hints: Any) -> str:
    """A heat map with the number in each cell."""
    left, top, wide, high = 46, 8, max(34, min(64, 300 // max(1, len(columns)))), 26
    panel = Panel(left + wide * len(columns) + 8, top + high * len(rows) + 22, title)
    for r, row in enumerate(rows):
        panel.text(left - 6, top + high * r + 17, row, "end")
        for c in range(len(columns)):
            x, y = left + wide * c, top + high * r
            value = cells.get((r, c))
            if value is None:
                panel.rect(x, y, wide - 1, high - 1, "none", "nothing was measured", 'stroke="var(--grid)"')
                panel.text(x + wide / 2, y + 17, "·")
            else:
                panel.rect(x, y, wide - 1, high - 1, colour_of(value), hints(r, c))
                panel.text(
                    x + wide / 2, y + 17, f"{value:.2f}".replace("0.", ".") if value < 1 else "1", fill=text_on(value)
                )
    for c, column in enumerate(columns):
        panel.text(left + wide * (c + 0.5), top + high * len(rows) + 15, column)
    return panel.render()


def _length(tokens: int) -> str:
    return f"{tokens / 1024:g}K" if tokens % 256 == 0 else str(tokens)


def needle_maps(records: Sequence[Record], bins: int = 5) -> Figure:
    """Accuracy by depth and length, for each task whose answers lie in one place."""
    found: dict[tuple[str, str], dict[tuple[int, int], list[float]]] = {}
    for record in records:
        if record["kind"] == "sample":
            for turn in record["turns"]:
                if turn.get("depth") is not None:
                    cell = (min(bins - 1, int(turn["depth"] * bins)), record["length"])
                    found.setdefault((record["task"], record["method"]), {}).setdefault(cell, []).append(turn["score"])
    table: Table = [["task", "method", "depth from", "depth to", "length", "accuracy", "answers"]]
    panels = []
    rows = [f"{100 * i // bins}%" for i in range(bins)]
    for (task, method), cells in found.items():
        lengths = sorted({length for _, length in cells})
        values = {(d, lengths.index(n)): sum(s) / len(s) for (d, n), s in cells.items()}
        counts = {(d, lengths.index(n)): len(s) for (d, n), s in cells.items()}
        title = f"{task}, {method}"
        svg = _grid(values, rows, [_length(n) for n in lengths], title, lambda r, c, k=counts: f"{k[r, c]} answers")
        panels.append((title, svg))
        for (d, n), scores in sorted(cells.items()):
            table.append([task, method, d / bins, (d + 1) / bins, n, sum(scores) / len(scores), len(scores)])
    note = "Depth of the answer in the context (down, from the start) by length (across); a dot was not measured."
    return Figure("needles", "Where answers are found", note, panels, table)


def accuracy_by_density(records: Sequence[Record], rows: Sequence[SummaryRow]) -> Figure:
    """Mean accuracy against density with intervals, a panel a length; budgets of one method are joined."""
    table: Table = [["length", "method", "density", "accuracy", "low", "high", "samples"]]
    panels = []
    styles = _styles([row.method for row in rows])
    for length in sorted({row.length for row in rows}):
        here = [row for row in rows if row.length == length and row.accuracy is not None and row.density]
        sparse = [row for row in here if not row.method.startswith("dense")]
        if not sparse:
            continue
        lowest = min(row.density or 1.0 for row in here)
        panel = Panel(380, 280, f"accuracy against density at {_length(length)}")
        ticks = [t for t in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0) if t >= lowest * 0.9]
        bottom = min(row.interval[0] for row in here if row.interval)
        panel.axes((lowest * 0.9, 1.05), (max(0.0, bottom - 0.05), 1.02), ("density", "accuracy"), (True, False), ticks)
        for row in here:
            if row.method.startswith("dense") and row.accuracy is not None:
                ends = [panel.place(x, row.accuracy) for x in (lowest * 0.9, 1.05)]
                panel.line(ends, "var(--axis)", 1.2, "5 4")
                break
        for name in styles:
            group = sorted((r for r in sparse if r.method.partition("(")[0] == name), key=lambda r: r.density or 0)
            colour, marker = styles[name]
            panel.line([panel.place(r.density or 1, r.accuracy or 0) for r in group], colour)
            for row in group:
                assert row.accuracy is not None
                assert row.interval is not None
                low, high = row.interval
                panel.line([panel.place(row.density or 1, low), panel.place(row.density or 1, high)], colour, 1.2)
                hint = f"{row.method}: {row.accuracy:.3f} [{low:.3f}, {high:.3f}] at density {row.density:.3f}"
                panel.marker(*panel.place(row.density or 1, row.accuracy), marker, colour, hint)
        panels.append((f"{_length(length)} tokens", panel.render()))
        table += [[r.length, r.method, r.density, r.accuracy, *(r.interval or ()), r.samples] for r in here]
    if panels:
        panels[-1] = (panels[-1][0], panels[-1][1] + _legend(styles))
    note = "Further left is cheaper, further up is better. The dashed line is dense attention; bars are 95% intervals."
    return Figure("density", "Accuracy against density", note, panels, table)


def _legend(styles: dict[str, tuple[str, str]]) -> str:
    entries = []
    for name, (colour, shape) in styles.items():
        mark = Panel(14, 14, "")
        mark.marker(7, 7, shape, colour)
        sign = mark.render().replace("<svg ", '<svg width="14" height="14" aria-hidden="true" ', 1)
        entries.append(f"<span>{sign} {escape(name)}</span>")
    return f'<div class="legend">{"".join(entries)}</div>'


def recall_maps(records: Sequence[Record]) -> Figure:
    """Attention mass in the plan, by layer and head, and what the best block plan of as many blocks would keep."""
    table: Table = [
        ["method", "length", "prompt", "layer", "head", "density", "recall", "oracle recall", "relative l2"]
    ]
    panels = []
    seen = set()
    for record in records:
        if record["kind"] != "fidelity":
            continue
        for layer, heads in enumerate(record["recall"]):
            for head, value in enumerate(heads):
                more = (record[name][layer][head] for name in ("oracle_recall", "relative_l2"))
                density = record["head_density"][layer][head]
                table.append([record["method"], record["length"], record["index"], layer, head, density, value, *more])
        key = (record["method"], record["length"])
        if key in seen or len(record["recall"]) * len(record["recall"][0]) > 1100:
            continue
        seen.add(key)
        layers = [f"L{i}" for i in range(len(record["recall"]))]
        columns = [f"H{i}" for i in range(len(record["recall"][0]))]
        for name, title in (("recall", "plan"), ("oracle_recall", "oracle")):
            cells = {(i, j): v for i, row in enumerate(record[name]) for j, v in enumerate(row)}
            caption = f"{record['method']} at {_length(record['length'])}: {title}"
            densities = record["head_density"]
            svg = _grid(cells, layers, columns, caption, lambda r, c, d=densities: f"density {d[r][c]:.3f}")
            panels.append((caption, svg))
    note = (
        "Share of the attention mass that the plan keeps, and (oracle) the best plan of as many whole blocks. "
        " One prompt of each length; all inputs are those of the dense run."
    )
    return Figure("recall", "Attention mass kept, by layer and head", note, panels, table)


def break_even(lengths: Sequence[int], dense: Sequence[float], sparse: Sequence[float]) -> float | None:
    """The length from which sparse is faster than dense up to the longest one, interpolated in logarithms.

    None if it is not faster at the longest length. The shortest length if it is faster everywhere.
    """
    gains = [math.log(d / s) for d, s in zip(dense, sparse, strict=True)]
    if not gains or gains[-1] <= 0:
        return None
    for i in range(len(gains) - 1, 0, -1):
        if gains[i - 1] <= 0:
            share = -gains[i - 1] / (gains[i] - gains[i - 1])
            return math.exp(math.log(lengths[i - 1]) + share * math.log(lengths[i] / lengths[i - 1]))
    return float(lengths[0])


def latency(rows: Sequence[SummaryRow]) -> Figure:
    """Seconds of prefill against length, and where each method breaks even with dense."""
    table: Table = [["method", "length", "prefill seconds", "speed-up"]]
    timed = [row for row in rows if row.prefill_s]
    table += [[row.method, row.length, row.prefill_s, row.speedup] for row in timed]
    lengths = sorted({row.length for row in timed})
    note = "Median seconds of the prefill, planning included; both axes are logarithmic. "
    if len(lengths) < 2:
        return Figure("latency", "Latency against length", note, [], table)
    seconds = {row.method: {} for row in timed}
    for row in timed:
        seconds[row.method][row.length] = row.prefill_s or 1.0
    labels = list(seconds)
    base = next(
        (label for label in labels if label == "dense"), next((x for x in labels if x.startswith("dense")), None)
    )
    panel = Panel(380, 300, "prefill seconds against length")
    values = [value for by in seconds.values() for value in by.values()]
    spread = (min(values) * 0.8, max(values) * 1.25)
    panel.axes(
        (lengths[0] * 0.9, lengths[-1] * 1.1), spread, ("tokens", "seconds"), (True, True), [float(n) for n in lengths]
    )
    styles = _styles(labels)
    words = []
    for label, by in seconds.items():
        colour, marker = _style(styles, label)
        points = [panel.place(n, by[n]) for n in sorted(by)]
        panel.line(points, colour, 2.0 if label == base else 1.4, "5 4" if label == base else "")
        for n in sorted(by):
            panel.marker(*panel.place(n, by[n]), marker, colour, f"{label}: {by[n]:.2f} s at {_length(n)}")
        if base is not None and label != base:
            shared = sorted(set(by) & set(seconds[base]))
            point = break_even(shared, [seconds[base][n] for n in shared], [by[n] for n in shared])
            if point is None:
                words.append(f"{label} is not faster than {base} at {_length(shared[-1])}.")
            elif point <= shared[0]:
                words.append(f"{label} is faster than {base} at all of these lengths.")
            else:
                words.append(f"{label} breaks even with {base} at about {number(point / 1024)}K tokens.")
    return Figure(
        "latency", "Latency against length", note + " ".join(words), [("", panel.render() + _legend(styles))], table
    )


def logits_by_position(records: Sequence[Record]) -> Figure:
    """Top-1 agreement with dense by position in the prompt, a panel a length."""
    table: Table = [["method", "length", "prompt", "from", "to", "kl", "top-1"]]
    by_length: dict[int, list[Record]] = {}
    for record in records:
        if record["kind"] == "fidelity":
            by_length.setdefault(record["length"], []).append(record)
            logits = record["logits"]
            for i, (kl, top1) in enumerate(zip(logits["kl"], logits["top1"], strict=True)):
                where = [logits["edges"][i], logits["edges"][i + 1]]
                table.append([record["method"], record["length"], record["index"], *where, kl, top1])
    panels = []
    styles = _styles([record["method"] for some in by_length.values() for record in some])
    for length, some in sorted(by_length.items()):
        panel = Panel(380, 280, f"top-1 agreement at {_length(length)}")
        lowest = min(min(record["logits"]["top1"]) for record in some)
        edges = some[0]["logits"]["edges"]
        panel.axes(
            (edges[1] / 2, edges[-1]),
            (max(0.0, lowest - 0.05), 1.01),
            ("position", "same choice as dense"),
            (True, False),
            [float(e) for e in edges[1:-1]],
        )
        for record in some:
            if record["index"] == min(r["index"] for r in some):
                colour, marker = _style(styles, record["method"])
                places = [math.sqrt(max(a, 32) * b) for a, b in pairwise(edges)]
                points = [panel.place(x, y) for x, y in zip(places, record["logits"]["top1"], strict=True)]
                panel.line(points, colour)
                for point, value in zip(points, record["logits"]["top1"], strict=True):
                    panel.marker(*point, marker, colour, f"{record['method']}: {value:.1%}")
        panels.append((f"{_length(length)} tokens", panel.render()))
    if panels:
        panels[-1] = (panels[-1][0], panels[-1][1] + _legend(styles))
    note = "Share of positions where the whole sparse run chooses the same next token as the dense run."
    return Figure("logits", "Predictions by position", note, panels, table)


_LETTERS = {"sink": "S", "local": "L", "vertical": "V", "slash": "/", "block": "B", "diffuse": "·"}


def head_patterns(records: Sequence[Record]) -> Figure:
    """What each head does under dense attention."""
    kinds = ("sink", "local", "vertical", "slash", "block")
    table: Table = [["task", "length", "layer", "head", "pattern", *kinds]]
    panels = []
    for record in records:
        if record["kind"] != "heads":
            continue
        heads = record["heads"]
        for head in heads:
            mass = [head["mass"].get(kind) for kind in kinds]
            table.append(
                [record.get("task"), record.get("length"), head["layer"], head["head"], head["pattern"], *mass]
            )
        wide = 30
        panel = Panel(
            40 + wide * (1 + max(h["head"] for h in heads)), 26 + 24 * (1 + max(h["layer"] for h in heads)), "patterns"
        )
        for layer in sorted({head["layer"] for head in heads}):
            panel.text(32, 22 + 24 * layer, f"L{layer}", "end")
        for head in heads:
            x, y = 38 + wide * head["head"], 6 + 24 * head["layer"]
            place = list(_LETTERS).index(head["pattern"]) if head["pattern"] in _LETTERS else 5
            masses = ", ".join(f"{name} {value:.2f}" for name, value in head["mass"].items())
            panel.rect(x, y, wide - 2, 22, PALETTE[place], f"{head['pattern']}: {masses}")
            panel.text(x + wide / 2 - 1, y + 16, _LETTERS.get(head["pattern"], "?"), fill="#fff", size=13)
        key = ", ".join(f"{letter} {name}" for name, letter in _LETTERS.items())
        panels.append((f"{_length(record.get('length') or 0)} tokens: {key}", panel.render()))
    note = (
        "The pattern that explains most of a head's attention at an equal budget of pairs; layers down, heads across."
    )
    return Figure("heads", "What the heads do", note, panels, table)


def plan_maps(records: Sequence[Record]) -> Figure:
    """Plans of a few heads, beside the attention itself where that was drawn."""
    table: Table = [["kind", "method", "length", "layer", "head", "row", "share in plan, by column"]]
    panels = []
    seen = set()
    for record in records:
        if record["kind"] not in ("fidelity", "heads"):
            continue
        label = record.get("method", "attention itself")
        for drawn in record.get("maps", []):
            size = drawn["size"]
            pixels = base64.b64decode(drawn["data"])
            caption = f"{label}, layer {drawn['layer']}, head {drawn['head']}, {_length(record.get('length') or 0)}"
            if caption in seen:
                continue
            seen.add(caption)
            inverted = bytes(255 - p for p in pixels)
            image = f'<img class="map" alt="{escape(caption)}" src="{grey_png(inverted, size, size)}">'
            panels.append((caption, image))
            for row in range(size):
                shares = " ".join(str(p) for p in pixels[row * size : (row + 1) * size])
                where = [record.get("length"), drawn["layer"], drawn["head"], row]
                table.append([record["kind"], label, *where, shares])
    note = "Queries down, keys across; black tiles are computed whole, grey ones in part (or: black is most attention)."
    return Figure("maps", "Plans and attention, drawn", note, panels, table)
