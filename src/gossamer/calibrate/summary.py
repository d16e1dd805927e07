"""How a choice of methods holds, in words: on the prompts that chose, and on those that were held out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gossamer.evaluate.metrics import shown_interval

__all__ = ["held_out_words", "summary_figures", "summary_table"]

Summary = Mapping[str, Mapping[str, Any]]
"""As `gossamer.calibrate.search.Found.summary`."""
_COLUMNS = {"cost": "cost", "error": "error", "last_error": "of the last queries", "recall": "recall"}


def summary_figures(summaries: Sequence[Summary]) -> list[str]:
    """What any of them has to show: older ones know no ``last_error``."""
    return [name for name in _COLUMNS if any(name in part for summary in summaries for part in summary.values())]


def summary_table(summary: Summary, names: Sequence[str] | None = None) -> list[list[str]]:
    """Header first; means over the heads with 95% intervals over the prompts.

    Args:
        names: of `summary_figures`, so that several have the same columns; empty where one has none.
    """
    names = summary_figures([summary]) if names is None else names
    rows = [["on", "prompts", *(_COLUMNS[name] for name in names)]]
    for part, figures in summary.items():
        shown = (_shown(figures, name) if name in figures else "" for name in names)
        rows.append([part.replace("_", " "), str(figures["prompts"]), *shown])
    return rows


def held_out_words(summary: Summary) -> str:
    """By how much the choice holds on prompts that did not choose."""
    if "held_out" not in summary:
        return "no prompts were held out"
    mine, others = summary["calibration"], summary["held_out"]
    return (
        f"error {_shown(others, 'error')} on {others['prompts']} held-out prompts, {_shown(mine, 'error')} on the "
        f"{mine['prompts']} that chose"
    )


def _shown(figures: Mapping[str, Any], name: str) -> str:
    return f"{figures[name]:.4f}" + shown_interval(figures.get("intervals", {}).get(name), "{:.4f}")
