"""The benchmark of calibrated profiles: what it lays over other models, and the means that it prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from gossamer.methods import AShape
from gossamer.profiles import Profile


def test_a_profile_of_another_model_is_laid_over_by_depth_and_order(script) -> None:
    profile = Profile([[AShape(layer, 1 + head) for head in range(4)] for layer in range(6)])
    laid = script("calibration").stretched(profile, 3, 2)
    assert [[(method.sink, method.window) for method in layer] for layer in laid.layers] == [
        [(0, 1), (0, 3)],
        [(2, 1), (2, 3)],
        [(4, 1), (4, 3)],
    ]


def point(mode: str, prompt: int, seconds: float, error: float) -> dict:
    figures = {"density": 0.5, "plan_s": 0.25 * seconds, "attend_s": 0.75 * seconds, "dense_s": 4.0, "error": error}
    return {"kind": "point", "direction": "first", "rival": "r", "mode": mode, "prompt": prompt} | figures


def test_ratios_are_taken_prompt_by_prompt(script, tmp_path: Path) -> None:
    lines = script("calibration_rows").Lines(tmp_path / "lines.jsonl", {"length": 64})
    for mode in ("rival", "global"):
        lines.add({"kind": "setting", "direction": "first", "rival": "r", "mode": mode, "budget": None})
    for prompt, (theirs, mine) in enumerate([(0.4, 0.1), (0.1, 0.1)]):
        lines.add(point("rival", prompt, 1.0, theirs))
        lines.add(point("global", prompt, 2.0, mine))
    rival, mine = script("calibration_rows").summary(lines)
    assert rival["time"] == pytest.approx([0.25, 0.25, 0.25, 2])
    assert mine["time over the rival's"] == pytest.approx([2, 2, 2, 2])
    assert mine["error over the rival's"][0] == pytest.approx((0.25 + 1.0) / 2)
    assert rival["error"][0] == pytest.approx(0.25)
    assert "kl" not in mine


def test_lines_go_on_only_with_the_same(script, tmp_path: Path) -> None:
    rows = script("calibration_rows")
    rows.Lines(tmp_path / "lines.jsonl", {"length": 64}).add({"kind": "setting", "direction": "first"})
    again = rows.Lines(tmp_path / "lines.jsonl", {"length": 64})
    assert len(again.find(kind="setting")) == 1
    with pytest.raises(SystemExit, match="something else"):
        rows.Lines(tmp_path / "lines.jsonl", {"length": 65})
