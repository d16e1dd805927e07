"""benchmarks/modules.py times every layer and says how its cost grows."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.filterwarnings("ignore:gossamer runs its torch reference path:RuntimeWarning")


def test_the_benchmark_writes_rows_and_what_follows(script: Any, monkeypatch: Any, tmp_path: Path, capsys: Any) -> None:
    modules, out = script("modules"), tmp_path / "modules.json"
    given = ["modules.py", "--lengths", "64,128", "--modules", "window", "--rounds", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", given)
    assert modules.main() == 0
    found = json.loads(out.read_text())
    assert {"cpu", "isas", "torch"} <= found["machine"].keys()
    kinds = {(row["module"], row["what"], row["length"]) for row in found["rows"]}
    assert kinds == {(m, w, n) for m in ("dense", "window") for w in ("forward", "step") for n in (64, 128)}
    assert all(row["median_s"] > 0 for row in found["rows"])
    assert [(row["module"], row["longest"]) for row in found["summary"]] == [("dense", 128), ("window", 128)] * 2
    assert len(capsys.readouterr().out.splitlines()) == 12


def test_every_layer_runs_forward_and_backward(script: Any) -> None:
    modules = script("modules")
    for make in modules.MODULES.values():
        layer, given = make(64), modules.inputs(64, 0)
        modules.forward(layer.eval(), given)
        modules.step(layer.train(), given)
        with torch.no_grad():
            assert layer(given[0]).shape == given[0].shape


def test_layers_decode_after_a_cache_of_the_length(script: Any) -> None:
    modules = script("modules")
    rows = list(modules.measured(["dense", *modules.DECODERS], 64, 1))
    assert [row["module"] for row in rows if row["what"] == "decode"] == list(modules.DECODERS)
    layer, (x, token) = modules.MODULES["dense"](64), modules.inputs(64, 0)
    with torch.no_grad():
        out = modules.decode_dense(layer, x)(token[:, :1])
        torch.testing.assert_close(out, layer(torch.cat([x, token[:, :1]], 1))[:, -1:])


def test_layers_that_hold_all_pairs_stop_early(script: Any, monkeypatch: Any) -> None:
    modules = script("modules")
    monkeypatch.setitem(modules.LONGEST, "sparsifiner", 32)
    rows = list(modules.measured(["dense", "sparsifiner"], 64, 1))
    assert {(row["module"], row["what"]) for row in rows} == {("dense", "forward"), ("dense", "step")}


def test_a_layer_without_causality_stands_beside_a_dense_one_without(script: Any) -> None:
    modules = script("modules")
    rows = list(modules.measured(["dense", "sparsifiner", "seqboat"], 64, 1))
    seconds = {(row["module"], row["what"]): row["median_s"] for row in rows}
    (one,) = [row for row in rows if (row["module"], row["what"]) == ("sparsifiner", "step")]
    beside = seconds["dense_bidirectional", "step"] / seconds["sparsifiner", "step"]
    assert one["times_dense"] == pytest.approx(beside, rel=0.05)
    found = {(row["module"], row["what"]): row for row in modules.summary(rows)}
    assert found["sparsifiner", "step"]["beside"] == "dense_bidirectional"
    assert found["seqboat", "step"]["beside"] == "dense"
    assert found["seqboat", "step"]["times_gossamer"] is None
    shares = [row["active"] for row in rows if row["module"] == "seqboat" and row["what"] != "decode"]
    assert len(shares) == 2
    assert 0 < min(shares) <= max(shares) <= 1
    assert "active" not in one


def test_keys_of_a_dynamic_mask_are_no_window(script: Any) -> None:
    assert bool(script("modules").DynamicMask().layer.A.any())


def test_exponents_and_break_even_by_hand(script: Any) -> None:
    modules = script("modules")
    square = [(n, 1e-6 * n**2) for n in (1024, 2048, 4096)]
    assert modules.exponent(square) == pytest.approx(2.0)
    assert modules.exponent(square[:1]) is None
    straight = [(n, 3e-3 * n) for n in (1024, 2048, 4096)]
    # Equal at 3,000 tokens, and there seconds are on straight lines of logarithms.
    assert modules.break_even(straight, square) == 3000
    assert modules.break_even([(n, s / 10) for n, s in straight], square) == 1024
    assert modules.break_even([(n, s * 10) for n, s in straight], square) is None
    late = [(1024, 0.1), (2048, 100.0), (4096, 0.1)]
    assert 2048 < modules.break_even(late, square) < 4096


def test_spans_are_near_the_root(script: Any) -> None:
    assert [script("modules").root(n) for n in (1024, 2048, 4096, 32768)] == [32, 64, 64, 256]
