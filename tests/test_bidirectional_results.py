"""What the page on diffusers says of speed is what `benchmarks/bidirectional.py` measured."""

from __future__ import annotations

import json
from typing import Any

from repository import ROOT, script

FILE = ROOT / "benchmarks" / "results" / "amd-epyc-zen5-2-cores-avx512-bf16" / "bidirectional.json"
FOUND: dict[str, Any] = json.loads(FILE.read_text())
SEARCHES = ("adaspa", "paro", "paro, an order a head")


def efficiencies(dtype: str, tokens: int, dims: tuple[int, ...] = (64, 128)) -> list[float]:
    rows = [row for row in FOUND["kernels"] if (row["dtype"], row["tokens"]) == (dtype, tokens) and row["dim"] in dims]
    return [row[kind]["efficiency"] for row in rows for kind in ("blocks", "ordered")]


def test_the_tables_have_a_row_for_each_measurement() -> None:
    tables = script("docs/bidirectional_tables.py")
    for made, rows in ((tables.kernels_table, FOUND["kernels"]), (tables.steps_table, FOUND["steps"])):
        above, _, *lines = made(FOUND).splitlines()
        assert above.startswith("2 threads, medians of ")
        assert len(lines) == 2 + len(rows)
    page = (ROOT / "docs" / "diffusers.md").read_text(encoding="utf-8")
    shown = script("docs/tables.py").on_page_markdown(page)
    assert tables.kernels_table(FOUND) in shown
    assert tables.steps_table(FOUND) in shown


def test_efficiencies_are_those_of_the_rows() -> None:
    for row in FOUND["kernels"]:
        for kind in ("blocks", "ordered"):
            expected = row["dense"]["median_s"] * row["density"] / row[kind]["median_s"]
            assert abs(row[kind]["efficiency"] - expected) < 2e-3
        assert abs(row["density"] - row["wanted"]) < 2e-3


def test_which_cases_reach_the_efficiency_that_was_meant() -> None:
    assert min(efficiencies("fp32", 32768)) >= 0.85
    for tokens in (16384, 32768):
        missed = [found < 0.85 for found in efficiencies("bf16", tokens)]
        assert sum(missed) > len(missed) / 2
    assert min(efficiencies("fp32", 16384, (128,))) >= 0.85 > max(efficiencies("fp32", 16384, (64,)))
    assert all(row["ordered"]["times_blocks"] > 0.95 for row in FOUND["kernels"])


def of(tokens: int, dtype: str) -> dict[str, dict[str, Any]]:
    """By method."""
    return {row["method"]: row for row in FOUND["steps"] if (row["tokens"], row["dtype"]) == (tokens, dtype)}


def test_what_the_page_says_of_steps() -> None:
    later = script("docs/bidirectional_tables.py").later
    seconds = {name: round(later(row)["seconds"], 1) for name, row in of(16384, "bf16").items()}
    assert (seconds.pop("torch"), seconds.pop("dense")) == (11.5, 2.8)
    assert len(seconds) == 5
    assert set(seconds.values()) == {1.1}
    for dtype in ("bf16", "fp32"):
        sparse = [later(row) for name, row in of(4096, dtype).items() if name not in ("torch", "dense")]
        assert all(step["plan_s"] + step["attention_s"] < step["seconds"] / 3 for step in sparse)


def test_what_the_page_says_of_planning() -> None:
    tables = script("docs/bidirectional_tables.py")
    for tokens, dtype in ((4096, "bf16"), (4096, "fp32"), (16384, "bf16")):
        rows = of(tokens, dtype)
        for name in rows.keys() - {"torch", "dense"}:
            assert tables.planning(tables.later(rows[name])) < 0.015, name
        low, high = (0.4, 0.66) if tokens == 4096 else (0.6, 0.81)
        for name in SEARCHES:
            assert rows[name]["steps"][0]["seconds"] > rows["dense"]["steps"][0]["seconds"]
            assert low < tables.planning(rows[name]["steps"][0]) < high, (name, tokens)
