"""Pictures of what `gossamer calibrate` chose, where older lines stand beside newer ones."""

from __future__ import annotations

from typing import Any

import pytest
from every_line import LINES

from gossamer.report.calibration import budgets, held_out

OLD: dict[str, Any] = next(line for line in LINES if line["kind"] == "calibration")
NEW = OLD | {"summary": {part: found | {"last_error": 0.7} for part, found in OLD["summary"].items()}}


@pytest.mark.parametrize("records", [[OLD, NEW], [NEW, OLD], [NEW, NEW], [OLD, OLD]])
def test_figures_that_older_lines_lack_shift_no_others(records: list[dict[str, Any]]) -> None:
    header, *rows = held_out(records).words
    assert [row[1] for row in rows] == ["calibration", "held out"] * 2
    assert ("of the last queries" in header) == (NEW in records)
    for number, row in enumerate(rows):
        record, shown = records[number // 2], dict(zip(header, row, strict=True))
        assert (shown["cost"], shown["recall"], shown["prompts"]) == ("0.3000", "0.8000", "3")
        assert shown.get("of the last queries", "") == ("0.7000" if record is NEW else "")


def test_budgets_are_drawn_by_what_was_minimised() -> None:
    (point,) = OLD["frontier"]
    newer = OLD | {"frontier": [point | {"loss": 0.45}]}
    old, new = (budgets([record]) for record in (OLD, newer))
    assert [dict(zip(*figure.table, strict=True))["minimised"] for figure in (old, new)] == [point["error"], 0.45]
    assert f"error {point['error']:.4f}" in str(old.panels[0][1])
    assert "error 0.4500" in str(new.panels[0][1])
