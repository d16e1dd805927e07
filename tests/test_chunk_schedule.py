"""The committed schedules of chunks are what the simulator gives, and the page says what they show."""

from __future__ import annotations

import json
from typing import Any

import pytest
from repository import ROOT, script

(PATH,) = (ROOT / "benchmarks" / "results").glob("*/chunk_schedule.json")


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return json.loads(PATH.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def example() -> Any:
    return script("examples/chunk_schedule.py")


def test_the_file_is_what_the_simulator_gives(found: dict[str, Any], example: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(example, "CHUNKS", (2, 4))
    rows = example.model_rows()
    assert [row["chunks"] for row in rows] == [2, 2, 2, 4, 4, 4]
    for row, committed in zip(rows, found["rows"], strict=False):
        assert row.keys() == committed.keys()
        for name, value in row.items():
            assert committed[name] == pytest.approx(value, rel=1e-9)
    for name, value in example.random_row(found["random"]["graphs"]).items():
        assert found["random"][name] == pytest.approx(value, rel=1e-9)


def test_stages_are_a_models(example: Any) -> None:
    """Their seconds are those of the counted multiplications at the assumed speeds."""
    graph = example.decoder(4)
    assert len(graph.stages) == 24 * 6  # as many as the paper has, of which one a layer attends
    assert sum(stage.attends for stage in graph.stages) == 24
    tokens = 4 * example.CHUNK
    assert tokens / graph.work("npu") == pytest.approx(example.TOKENS_A_SECOND)
    pairs = sum(example.CHUNK * example.CHUNK * (chunk + 1) for chunk in range(4))
    attention = 24 * 2 * 2048 * pairs / example.CPU_SPEED
    assert graph.work("cpu") == pytest.approx(attention + 24 * 4 * 2 * example.NORM)
    assert example.decoder(4, 2.0).work("cpu") == pytest.approx(graph.work("cpu") / 2)


def test_the_page_says_what_the_file_shows(found: dict[str, Any]) -> None:
    def bubbles(chunks: int, speed: float, name: str) -> float:
        (row,) = (row for row in found["rows"] if (row["chunks"], row["cpu_speed"]) == (chunks, speed))
        return row[name]["bubbles"]

    assert bubbles(4, 1.0, "in order") == pytest.approx(0.37, abs=0.005)
    assert bubbles(4, 1.0, "first ready") < bubbles(4, 1.0, "greedy")
    assert found["random"]["first ready"]["mean"] < found["random"]["greedy"]["mean"]
    for chunks, speed in ((4, 0.5), (4, 2.0), (8, 0.5), (8, 1.0), (8, 2.0)):
        assert bubbles(chunks, speed, "greedy") < bubbles(chunks, speed, "first ready")
    assert all(bubbles(2, speed, "greedy") == bubbles(2, speed, "first ready") for speed in (0.5, 1.0, 2.0))
    for row in found["rows"]:
        assert row["least"] <= min(row[name]["bubbles"] for name in ("in order", "first ready", "greedy"))
        assert min(row["first ready"]["bubbles"], row["greedy"]["bubbles"]) > 2 * 0.007


def test_the_tables_show_the_file(found: dict[str, Any]) -> None:
    shown = script("docs/schedule_tables.py").chunk_schedule_table()
    row = found["rows"][4]
    cells = (f"{row[name]['bubbles']:.1%}" for name in ("in order", "first ready", "greedy"))
    assert f"| 4 | {row['cpu_work']:.2f} | {' | '.join(cells)} | {row['least']:.1%} |" in shown
    rule = found["random"]["greedy"]
    assert f"| the paper's rule | {rule['mean']:.3f} | {rule['worst']:.3f} | {rule['optimal']:.0%} |" in shown
