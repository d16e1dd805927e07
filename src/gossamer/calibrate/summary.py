"""How a choice of methods holds, in words: on the prompts that chose, and on those that were held out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gossamer.evaluate.metrics import shown_interval

__all__ = ["held_out_words", "summary_table"]

Summary = Mapping[str, Mapping[str, Any]]
"""As `gossamer.calibrate.search.Found.summary`."""
_COLUMNS = {"cost": "cost", "error": "error", "last_error": "of the last queries", "recall": "recall"}


def summary_table(summary: Summary) -> list[list[str]]:
    """Header first; means over the heads with 95% intervals over the prompts."""
    names = [name for name in _COLUMNS if all(name in figures for figures in summary.values())]
    rows = [["on", "prompts", *(_COLUMNS[name] for name in names)]]
    for part, figures in summary.items():
        rows.append([part.replace("_", " "), str(figures["prompts"]), *(_shown(figures, name) for name in names)])
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
