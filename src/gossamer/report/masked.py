"""Fills of masked language models: what is right and what is as in dense runs, against density; plans over steps."""

from __future__ import annotations

from collections.abc import Sequence

from gossamer.evaluate.masked.summary import FillRow, OverlapRow, fill_rows, fill_table, overlap_rows, overlap_table
from gossamer.report.figure import Figure, Record, Style, Table, label_styles, legend
from gossamer.report.html import Html
from gossamer.report.svg import PALETTE, Panel

__all__ = ["SHOWN", "fills", "kind_of", "overlap_panel", "overlaps", "panel_of", "styles_of"]

SHOWN = {
    "copied_accuracy": "right, of what the prompt has said before",
    "rest_accuracy": "right, of all else",
    "agreement": "filled in as by dense attention",
}
_FILLS = (
    "The last quarter of each text has masks, and a part of it says again what stands before. Means over texts, with "
    "95% intervals over texts. Density is over all steps, the dense ones too."
)
_OVERLAPS = (
    "Jaccard index of the blocks that are chosen at the step that chooses and of those that the same rule would choose "
    "at each; means over texts, layers and heads. Dashed: what blocks at random would have in common."
)


def kind_of(label: str) -> str:
    """A method without its budget, so that budgets are one line of a picture: ``sparsed_variant(choice=window)``.

    The policy's bounds go too; all else tells settings apart.
    """
    name, _, inside = label.partition("(")
    left_out = ("share=", "min_tokens=", "max_density=")
    kept = [part for part in inside.removesuffix(")").split(",") if part and not part.startswith(left_out)]
    return f"{name}({','.join(kept)})" if kept else name


def panel_of(rows: Sequence[FillRow], figure: str, styles: dict[str, Style], size: tuple[int, int]) -> Panel:
    """One figure of rows of one length against density; budgets of one kind are joined."""
    bounds = [bound for row in rows if figure in row.figures for bound in _ends(row, figure)]
    low = max(0.0, min(bounds, default=0.0) - 0.03)
    panel = Panel(*size, f"{SHOWN.get(figure, figure)} against density")
    panel.axes(
        (0.0, 1.05), (low, 1.02), ("density", SHOWN.get(figure, figure)), (False, False), [0, 0.25, 0.5, 0.75, 1]
    )
    for kind, style in styles.items():
        own = [row for row in rows if kind_of(row.method) == kind and figure in row.figures]
        own.sort(key=lambda row: row.density)
        if not style.marker and own:
            y = own[0].figures[figure].mean
            panel.line([panel.place(0.0, y), panel.place(1.05, y)], style.colour, 1.2, style.dash)
            continue
        panel.line([panel.place(row.density, row.figures[figure].mean) for row in own], style.colour, 1.4, style.dash)
        for row in own:
            found = row.figures[figure]
            panel.line([panel.place(row.density, y) for y in (found.low, found.high)], style.colour, 0.8)
            hint = f"{row.method}, {row.texts} texts: {found.mean:.3f} at density {row.density:.3f}"
            panel.marker(*panel.place(row.density, found.mean), style.marker, style.colour, hint)
    return panel


def _ends(row: FillRow, figure: str) -> tuple[float, float]:
    return row.figures[figure].low, row.figures[figure].high


def styles_of(rows: Sequence[FillRow]) -> dict[str, Style]:
    """By `kind_of`; dense attention is a line without a marker."""
    styles = label_styles(kind_of(row.method) for row in rows)
    lines = {kind: kind.partition("(")[0] == "dense" for kind in styles}
    return {kind: Style(s.colour, "", s.dash) if lines[kind] else s for kind, s in styles.items()}


def fills(records: Sequence[Record]) -> Figure:
    """Panels for each length; the table has every figure."""
    rows = fill_rows(records)
    styles = styles_of(rows)
    panels: list[tuple[str, Html]] = []
    groups = dict.fromkeys((row.length, row.task) for row in rows)
    for length, task in groups:
        here = [row for row in rows if (row.length, row.task) == (length, task)]
        several = sum(other == length for other, _ in groups) > 1
        for figure, title in SHOWN.items():
            if any(figure in row.figures for row in here):
                drawn = panel_of(here, figure, styles, (380, 280)).render()
                panels.append((f"{length:,} tokens{f', {task}' if several else ''}: {title}", drawn))
    table: Table = [["length", "task", "method", "texts", "fills", "density", "figure", "mean", "low", "high"]]
    for row in rows:
        named = {**row.figures, **{f"lost {name}": found for name, found in row.lost.items()}}
        of = [row.length, row.task, row.method, row.texts, row.fills, row.density]
        table += [[*of, name, found.mean, found.low, found.high] for name, found in named.items()]
    words = fill_table(rows) if rows else []
    return Figure("fills", "What is filled in under masks", _FILLS, panels, table, "", legend(styles), words)


def overlap_panel(row: OverlapRow, size: tuple[int, int]) -> Panel:
    """Jaccard by step."""
    panel = Panel(*size, f"blocks in common by step, {row.length:,} tokens")
    last = len(row.by_step) - 1
    ticks = sorted({0, row.chosen, last // 2, last})
    panel.axes((0.0, max(1.0, float(last))), (0.0, 1.02), ("step", "Jaccard"), (False, False), [*map(float, ticks)])
    panel.line([panel.place(0.0, row.chance), panel.place(float(last), row.chance)], "var(--axis)", 1.0, "5 4")
    points = [panel.place(float(step), y) for step, y in enumerate(row.by_step)]
    panel.line(points, PALETTE[0], 1.6)
    for step, (x, y) in enumerate(points):
        shape = "square" if step == row.chosen else "circle"
        panel.marker(x, y, shape, PALETTE[0], f"step {step}: {row.by_step[step]:.3f}")
    return panel


def overlaps(records: Sequence[Record]) -> Figure:
    """A panel for each length and setting."""
    rows = overlap_rows(records)
    panels = [(f"{row.method}, {row.length:,} tokens", overlap_panel(row, (380, 280)).render()) for row in rows]
    table: Table = [["length", "task", "method", "texts", "chosen", "step", "jaccard", "chance"]]
    for row in rows:
        of = [row.length, row.task, row.method, row.texts, row.chosen]
        table += [[*of, step, value, row.chance] for step, value in enumerate(row.by_step)]
    words = overlap_table(rows) if rows else []
    return Figure("overlaps", "Whether plans stay the same", _OVERLAPS, panels, table, "", Html(), words)
