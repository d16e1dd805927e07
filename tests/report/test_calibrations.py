"""Pictures of what `gossamer calibrate` chose, where older lines stand beside newer ones."""

from __future__ import annotations

from typing import Any

import pytest
from every_line import LINES

from gossamer.report.calibration import held_out

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
