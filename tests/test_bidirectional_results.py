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


def test_what_the_page_says_of_planning() -> None:
    tables = script("docs/bidirectional_tables.py")
    for row in FOUND["steps"]:
        if row["method"] not in ("torch", "dense"):
            assert tables.planning(tables.later(row)) < 0.02, row["method"]
        if row["method"] in SEARCHES:
            same = (row["tokens"], row["dtype"], "dense")
            (dense,) = [one for one in FOUND["steps"] if (one["tokens"], one["dtype"], one["method"]) == same]
            assert row["steps"][0]["seconds"] > dense["steps"][0]["seconds"]
            assert 0.3 < tables.planning(row["steps"][0]) < 0.75
