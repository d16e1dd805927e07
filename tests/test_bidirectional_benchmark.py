"""benchmarks/bidirectional.py times kernels and denoising steps without causality, and the page shows what it wrote."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from repository import script as loaded

from gossamer import SparsePlan
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


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("wrong", [None, "dense", ("blocks", 0.3), ("ordered", 0.2), ("flex", 0.2)])
def test_a_contender_that_is_off_is_not_timed(script: Any, wrong: Any, dtype: str) -> None:
    """By a query block that loses a key block."""
    benchmark = script("bidirectional")
    case = benchmark.Case(2, 16, 16, 32, dtype)
    call = case.draw(0)
    plans = {(kind, d): case.blocks(d, ordered=kind == "ordered") for kind in ("blocks", "ordered") for d in (0.2, 0.3)}
    runs: dict[Any, Any] = {"sdpa": benchmark.sdpa, "dense": partial(benchmark.attended, case.dense())}
    runs |= {name: partial(benchmark.attended, plan) for name, plan in plans.items()}
    runs["flex", 0.2] = partial(benchmark.attended, plans["blocks", 0.2])
    if wrong is None:
        benchmark.check_kernels(runs, plans, call)
        return
    plan = case.dense() if wrong == "dense" else runs[wrong].args[0]
    mask = torch.ones(1, 4, 8, 8, dtype=torch.bool) if wrong == "dense" else plan.block_mask()
    mask[0, 0, 2, mask[0, 0, 2].nonzero()[0]] = False
    less = {"extent": plan.extent, "block_q": 64, "block_k": 64, "q_order": plan.q_order, "k_order": plan.k_order}
    runs[wrong] = partial(benchmark.attended, SparsePlan.from_block_mask(mask, 512, 512, **less))
    with pytest.raises(AssertionError, match=f"{wrong if wrong == 'dense' else wrong[0]} .*off what is expected"):
        benchmark.check_kernels(runs, plans, call)


def test_what_the_compiler_raises_is_written_and_a_mismatch_is_raised(script: Any, monkeypatch: Any) -> None:
    benchmark = script("bidirectional")
    monkeypatch.setattr(benchmark, "CASES", (benchmark.Case(2, 16, 16, 32, "fp32"),))
    given = argparse.Namespace(quick=False, tokens=None)

    def refused(_: SparsePlan) -> Any:
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(benchmark, "flex_of", refused)
    monkeypatch.setattr(benchmark, "rounds_of", lambda _: 1)
    assert {row["no_flex"] for row in benchmark.kernels(given)} == {"RuntimeError: no compiler"}
    monkeypatch.setattr(benchmark, "flex_of", lambda _: benchmark.sdpa)
    with pytest.raises(AssertionError, match=r"flex of 0\.[23] is"):
        next(benchmark.kernels(given))


def test_new_rows_stand_in_the_place_of_old_ones(script: Any) -> None:
    merged = script("bidirectional").merged
    rows = [{"tokens": n, "dtype": "bf16", "method": name, "x": 1} for n in (9, 4) for name in ("a", "b")]
    new = merged(rows, [{"tokens": 4, "dtype": "bf16", "method": "b", "x": 2}])
    found = [(row["tokens"], row["method"], row["x"]) for row in new]
    assert found == [(4, "a", 1), (4, "b", 2), (9, "a", 1), (9, "b", 1)]
