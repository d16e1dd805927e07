"""Associative recall: accuracy against width, and against what decoding holds, as Zoology draws it (2312.04927)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gossamer.evaluate.mqar.summary import RecallRow, recall_rows, recall_table
from gossamer.report.figure import Figure, Record, Style, Table, label_styles, legend
from gossamer.report.html import Html
from gossamer.report.svg import Panel, number

__all__ = ["recall"]

_NOTE = (
    "Share of the values that a model of two layers gives right, of the learning rate that each seed did best with: "
    "the mean over seeds, and bars from the worst to the best. State is how many numbers a step of decoding needs of "
    "the tokens before it, logits how many a query computes; what it costs to choose is not counted. Columns to 8, to "
    "16 and so on: the share of right values that stand so many tokens before the question. Guess: the share that a "
    "model has which knows a sequence's values and not which key has which."
)


def recall(records: Sequence[Record]) -> Figure:
    """A panel of widths and one of states for each task; the table says what each recalls at which cost."""
    rows = recall_rows(records)
    header = ["task", "mixer", "width", "accuracy", "low", "high", "seeds", "rate", "state", "logits", "share of dense"]
    table: Table = [[*header, "steps"]]
    styles = label_styles(row.mixer for row in rows)
    panels: list[tuple[str, Html]] = []
    for task in dict.fromkeys(row.task for row in rows):
        here = [row for row in rows if row.task == task]
        for what, value in (("width", lambda row: row.width), ("state", lambda row: row.state)):
            panels.append((f"{task}: accuracy against {what}", _drawn(here, styles, what, value)))
        table += [
            [r.task, r.mixer, r.width, r.accuracy, r.low, r.high, r.seeds, r.rate, r.state, r.reads, r.share, r.steps]
            for r in here
        ]
    words = recall_table(rows) if rows else []
    return Figure("mqar", "What each recalls, and at which cost", _NOTE, panels, table, "", legend(styles), words)


def _drawn(rows: Sequence[RecallRow], styles: dict[str, Style], name: str, value: Callable[[RecallRow], int]) -> Html:
    places = sorted({max(1, value(row)) for row in rows})
    ends = places[0] * 0.8, places[-1] * 1.25
    panel = Panel(380, 280, f"accuracy against {name}")
    powers = [2.0**n for n in range(64) if ends[0] <= 2.0**n <= ends[1]]
    panel.axes(ends, (0.0, 1.02), (name, "accuracy"), (True, False), powers[:: max(1, -(-len(powers) // 7))])
    for label, style in styles.items():
        group = sorted((row for row in rows if row.mixer == label), key=value)
        panel.line([panel.place(max(1, value(row)), row.accuracy) for row in group], style.colour, 1.4, style.dash)
        for row in group:
            x = max(1, value(row))
            panel.line([panel.place(x, row.low), panel.place(x, row.high)], style.colour, 1.0)
            hint = f"{label}, width {row.width}: {row.accuracy:.3f} at {number(x)}"
            panel.marker(*panel.place(x, row.accuracy), style.marker, style.colour, hint)
    return panel.render()
