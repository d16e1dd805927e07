"""benchmarks/bidirectional.py times kernels and denoising steps without causality, and the page shows what it wrote."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from repository import script as loaded

from gossamer.backends import cpu

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason="needs the C++ kernels")
needs_diffusers = pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="needs diffusers")


@pytest.mark.slow
@needs_diffusers
def test_it_writes_rows_that_the_page_shows(script: Any, monkeypatch: Any, tmp_path: Path) -> None:
    benchmark, out = script("bidirectional"), tmp_path / "bidirectional.json"
    monkeypatch.setattr(sys, "argv", ["bidirectional.py", "--quick", "--out", str(out)])
    assert benchmark.main() == 0
    found = json.loads(out.read_text())
    assert {"cpu", "isas", "torch"} <= found["machine"].keys()
    assert [row["wanted"] for row in found["kernels"]] == [0.2, 0.3]
    assert all(row["ordered"]["median_s"] > 0 and row["no_flex"] for row in found["kernels"])
    assert {row["method"] for row in found["steps"]} == {"torch", *benchmark.METHODS}
    by_method = {row["method"]: row["steps"] for row in found["steps"]}
    assert [len(by_method[name]) for name in ("torch", "dense", "paro")] == [1, 1, 4]
    for name in set(benchmark.METHODS) - {"dense"}:
        assert by_method[name][-1]["density"] < 1.0, name
        assert by_method[name][0]["plan_s"] > by_method[name][-1]["plan_s"], name
    tables = loaded("docs/bidirectional_tables.py")
    assert len(tables.kernels_table(found).splitlines()) == 4 + 2
    assert len(tables.steps_table(found).splitlines()) == 4 + 1 + len(benchmark.METHODS)


def test_orders_differ_by_head_and_blocks_do_not(script: Any) -> None:
    case = script("bidirectional").QUICK_CASES[0]
    plain, ordered = (case.blocks(0.3, ordered=given) for given in (False, True))
    assert torch.equal(plain.block_indices, ordered.block_indices)
    orders = ordered.q_order[0]
    assert torch.equal(orders.sort(dim=-1).values, torch.arange(512).expand(4, -1).int())
    assert len({tuple(order.tolist()) for order in orders}) == 4
    assert plain.density() == pytest.approx(0.3, abs=0.08)


def test_efficiency_is_the_dense_time_times_the_density_over_the_sparse_one(script: Any) -> None:
    benchmark = script("bidirectional")
    case = benchmark.QUICK_CASES[0]
    plans = {("blocks", 0.2): case.blocks(0.2, ordered=False)}
    seconds = {"sdpa": 3.0, "dense": 2.0, ("blocks", 0.2): 0.5, ("ordered", 0.2): 1.0, ("flex", 0.2): 0.75}
    row = benchmark.compared({name: benchmark.Series([s], [s]) for name, s in seconds.items()}, plans, 0.2, None)
    assert row["blocks"]["efficiency"] == round(2.0 * row["density"] / 0.5, 3)
    assert (row["blocks"]["times_sdpa"], row["blocks"]["times_flex"]) == (6.0, 1.5)
    assert (row["ordered"]["times_dense"], row["ordered"]["times_blocks"]) == (2.0, 0.5)


def test_new_rows_stand_in_the_place_of_old_ones(script: Any) -> None:
    merged = script("bidirectional").merged
    rows = [{"tokens": n, "dtype": "bf16", "method": name, "x": 1} for n in (9, 4) for name in ("a", "b")]
    new = merged(rows, [{"tokens": 4, "dtype": "bf16", "method": "b", "x": 2}])
    found = [(row["tokens"], row["method"], row["x"]) for row in new]
    assert found == [(4, "a", 1), (4, "b", 2), (9, "a", 1), (9, "b", 1)]
