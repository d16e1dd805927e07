"""The pictures of a report, each with the numbers that it shows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

from gossamer.evaluate.summary import SummaryRow
from gossamer.report.calibration import budgets, chosen_methods, held_out
from gossamer.report.figure import Figure, Record, Table, family, family_styles, label_styles, legend, short_length
from gossamer.report.frontier import frontier
from gossamer.report.heads import attention_maps, head_patterns, plan_maps
from gossamer.report.html import Html
from gossamer.report.latency import latency
from gossamer.report.masked import fills, overlaps
from gossamer.report.mqar import recall
from gossamer.report.svg import Panel, colour_of, text_on
from gossamer.report.videos import clip_frames, clip_frontier, clip_modes, clip_steps

__all__ = ["figures"]

Cell = tuple[int, int]


def figures(records: Sequence[Record], rows: Sequence[SummaryRow]) -> list[Figure]:
    """All pictures that there is data for."""
    made = [
        recall(records),
        clip_frontier(records),
        clip_frames(records),
        clip_steps(records),
        clip_modes(records),
        fills(records),
        overlaps(records),
        frontier(records),
        chosen_methods(records),
        budgets(records),
        held_out(records),
        needle_maps(records),
        accuracy_by_density(records, rows),
        recall_maps(records),
        latency(rows),
        logits_by_position(records),
        head_patterns(records),
        attention_maps(records),
        plan_maps(records),
    ]
    return [figure for figure in made if figure.panels]


def _grid(
    cells: Mapping[Cell, float],
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    hint: Callable[[Cell], str],
    counts: Mapping[Cell, int] | None = None,
) -> Html:
    """A heat map with the number in each cell, and below it of how many answers it is the mean."""
    left, top, wide, high = 46, 8, max(34, min(64, 300 // max(1, len(columns)))), 26 if counts is None else 35
    panel = Panel(left + wide * len(columns) + 8, top + high * len(rows) + 22, title)
    for r, row in enumerate(rows):
        panel.text(left - 6, top + high * r + high / 2 + 4, row, "end")
        for c in range(len(columns)):
            x, y = left + wide * c, top + high * r
            value = cells.get((r, c))
            if value is None:
                panel.rect(x, y, wide - 1, high - 1, "none", "nothing was measured", stroke="var(--grid)")
                panel.text(x + wide / 2, y + high / 2 + 4, "·")
                continue
            panel.rect(x, y, wide - 1, high - 1, colour_of(value), hint((r, c)))
            shown = f"{value:.2f}".replace("0.", ".") if value < 1 else "1"
            panel.text(x + wide / 2, y + 17, shown, fill=text_on(value))
            if counts is not None:
                panel.text(x + wide / 2, y + 29, f"n {counts[r, c]}", fill=text_on(value), size=9)
    for c, column in enumerate(columns):
        panel.text(left + wide * (c + 0.5), top + high * len(rows) + 15, column)
    return panel.render()


def needle_maps(records: Sequence[Record], bins: int = 5) -> Figure:
    """Accuracy by depth and length, for each task whose answers lie in one place."""
    found: dict[tuple[str, str], dict[tuple[int, int], list[float]]] = {}
    for record in records:
        if record["kind"] == "sample":
            for turn in record.get("turns", ()):
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
        columns = [short_length(n) for n in lengths]
        svg = _grid(values, rows, columns, title, lambda cell, k=counts: f"{k[cell]} answers", counts)
        panels.append((title, svg))
        for (d, n), scores in sorted(cells.items()):
            table.append([task, method, d / bins, (d + 1) / bins, n, sum(scores) / len(scores), len(scores)])
    note = (
        "Depth of the answer in the context (down, from the start) by length (across), and n, how many answers each "
        "share is of: a share of few says little. A dot was not measured."
    )
    return Figure("needles", "Where answers are found", note, panels, table)


def accuracy_by_density(records: Sequence[Record], rows: Sequence[SummaryRow]) -> Figure:
    """Mean accuracy against density with intervals, a panel a length; budgets of one method are joined."""
    table: Table = [["length", "method", "density", "accuracy", "low", "high", "samples"]]
    panels = []
    styles = family_styles(row.method for row in rows)
    for length in sorted({row.length for row in rows}):
        here = [row for row in rows if row.length == length and row.accuracy is not None and row.density]
        sparse = [row for row in here if family(row.method) != "dense"]
        if not sparse:
            continue
        lowest = min(row.density or 1.0 for row in here)
        panel = Panel(380, 280, f"accuracy against density at {short_length(length)}")
        ticks = [t for t in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0) if t >= lowest * 0.9]
        bottom = min(row.interval[0] for row in here if row.interval)
        panel.axes((lowest * 0.9, 1.05), (max(0.0, bottom - 0.05), 1.02), ("density", "accuracy"), (True, False), ticks)
        for row in here:
            if family(row.method) == "dense" and row.accuracy is not None:
                ends = [panel.place(x, row.accuracy) for x in (lowest * 0.9, 1.05)]
                panel.line(ends, styles["dense"].colour, 1.2, styles["dense"].dash)
                break
        for name, style in styles.items():
            group = sorted((r for r in sparse if family(r.method) == name), key=lambda r: r.density or 0)
            if group:
                panel.line([panel.place(r.density or 1, r.accuracy or 0) for r in group], style.colour)
            for row in group:
                assert row.accuracy is not None
                assert row.interval is not None
                low, high = row.interval
                panel.line([panel.place(row.density or 1, low), panel.place(row.density or 1, high)], style.colour, 1.2)
                hint = f"{row.method}: {row.accuracy:.3f} [{low:.3f}, {high:.3f}] at density {row.density:.3f}"
                panel.marker(*panel.place(row.density or 1, row.accuracy), style.marker, style.colour, hint)
        panels.append((f"{short_length(length)} tokens", panel.render()))
        table += [[r.length, r.method, r.density, r.accuracy, *(r.interval or ()), r.samples] for r in here]
    note = "Further left is cheaper, further up is better. The dashed line is dense attention; bars are 95% intervals."
    return Figure("density", "Accuracy against density", note, panels, table, legend=legend(styles))


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
            caption = f"{record['method']} at {short_length(record['length'])}: {title}"
            densities = record["head_density"]
            svg = _grid(cells, layers, columns, caption, lambda at, d=densities: f"density {d[at[0]][at[1]]:.3f}")
            panels.append((caption, svg))
    note = (
        "Share of the attention mass that the plan keeps, and (oracle) the best plan of as many whole blocks. "
        " One prompt of each length; all inputs are those of the dense run."
    )
    return Figure("recall", "Attention mass kept, by layer and head", note, panels, table)


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
    styles = label_styles(record["method"] for some in by_length.values() for record in some)
    for length, some in sorted(by_length.items()):
        panel = Panel(380, 280, f"top-1 agreement at {short_length(length)}")
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
                style = styles[record["method"]]
                places = [math.sqrt(max(a, 32) * b) for a, b in pairwise(edges)]
                points = [panel.place(x, y) for x, y in zip(places, record["logits"]["top1"], strict=True)]
                panel.line(points, style.colour, 1.5, style.dash)
                for point, value in zip(points, record["logits"]["top1"], strict=True):
                    panel.marker(*point, style.marker, style.colour, f"{record['method']}: {value:.1%}")
        panels.append((f"{short_length(length)} tokens", panel.render()))
    note = "Share of positions where the whole sparse run chooses the same next token as the dense run."
    return Figure("logits", "Predictions by position", note, panels, table, legend=legend(styles))
