"""Comparisons: figures against the full matrix, bounds against a search of all plans, the front, going on."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from test_fidelity import one_call, weights
from test_runner import job, subject

from gossamer import AttentionCall, Extent, Policy, methods
from gossamer.evaluate import frontier
from gossamer.evaluate.comparison import compare
from gossamer.evaluate.frontier import DENSITIES, measure
from gossamer.evaluate.records import read_lines
from gossamer.evaluate.results import ResultsFile, make_header
from gossamer.evaluate.settings import bounds_table, comparison_rows, comparison_table, pareto, settings_of
from gossamer.methods.registry import class_of
from gossamer.oracle import log_sum_exp
from gossamer.report.frontier import frontier as drawn

SPARSE = Policy(methods.create("a_shape", sink=4, window=64), min_tokens=0, max_density=2.0)
SPARSER = Policy(methods.create("a_shape", sink=2, window=20), min_tokens=0, max_density=2.0)


@pytest.mark.parametrize("limit", [None, 90])
def test_figures_equal_those_of_the_full_matrix(limit: int | None) -> None:
    observed, lse = one_call(limit)
    call = observed.call
    plan = methods.create("a_shape", sink=3, window=40).plan(call)
    run = frontier._Run(Policy(methods.create("a_shape", sink=3, window=40), min_tokens=0, max_density=2.0))
    out, kept = run(call)
    density, recall, error = frontier._figures(observed, plan, out, kept - lse)
    full, mask = weights(call), plan.to_mask()[0].repeat_interleave(4 // plan.heads, dim=0)
    v = call.values.double()[0].repeat_interleave(2, dim=0)
    inside = full.masked_fill(~mask, 0.0)
    sparse, dense = inside / inside.sum(-1, keepdim=True) @ v, full @ v
    expected = (sparse - dense).norm(dim=(1, 2)) / dense.norm(dim=(1, 2))
    assert density == pytest.approx(mask.sum().item() / (4 * int(call.extent.count_allowed())))
    assert recall == pytest.approx(inside.sum(-1).mean().item(), abs=1e-5)
    assert error == pytest.approx(expected.mean().item(), abs=1e-4)


@pytest.mark.parametrize("causal", [True, False])
def test_no_columns_of_as_many_pairs_hold_more_than_the_best_of_one_column(monkeypatch, causal: bool) -> None:
    """Of columns that cost the same, those with the most mass are taken; where cost differs, mass for each pair."""
    monkeypatch.setattr(frontier, "_BLOCK", 4)
    monkeypatch.setattr(frontier, "DENSITIES", (0.3, 0.6))
    generator = torch.Generator().manual_seed(0)
    q, k = (3 * torch.randn(1, 1, 12, 8, generator=generator) for _ in range(2))
    call = AttentionCall(q, k, k, Extent.full(1, 12, 12, causal=causal))
    lse = log_sum_exp(call)
    mass = (q[0, 0] @ k[0, 0].mT * call.scale - lse[0, 0, :, None]).exp()
    allowed = call.extent.allowed(torch.arange(12), 12)[0]
    mass = mass.masked_fill(~allowed, 0.0)
    worth, cost = mass.sum(0) / allowed.sum(0), allowed.sum(0)
    for density, plan in zip((0.3, 0.6), frontier._best_columns(call, lse), strict=True):
        chosen = plan.column_mask()[0, 0, 0]
        assert torch.as_tensor(plan.window).tolist() == [4]
        assert int(cost[chosen].sum()) <= density * int(allowed.sum())
        worst = worth[chosen].min()
        left = [n for n in range(12) if not chosen[n] and worth[n] > worst]
        # A better column is left out only where it no longer fits.
        assert all(int(cost[chosen & (worth > worth[n])].sum() + cost[n]) > density * int(allowed.sum()) for n in left)


def test_the_best_blocks_hold_more_than_any_other_choice(monkeypatch) -> None:
    monkeypatch.setattr(frontier, "_BLOCK", 4)
    monkeypatch.setattr(frontier, "DENSITIES", (0.5,))
    generator = torch.Generator().manual_seed(1)
    q, k = (2 * torch.randn(1, 1, 16, 8, generator=generator) for _ in range(2))
    call = AttentionCall(q, k, k)
    lse = log_sum_exp(call)
    mass = (q[0, 0] @ k[0, 0].mT * call.scale - lse[0, 0, :, None]).exp().tril()
    blocks = mass.unflatten(0, (4, 4)).unflatten(2, (4, 4)).sum(dim=(1, 3))
    (plan,) = frontier._best_blocks(call, lse)
    mask = plan.block_mask()[0, 0]
    assert int(mask.sum()) == 5
    others = [(m, n) for m in range(4) for n in range(m)]
    best = max(sum(float(blocks[cell]) for cell in some) for some in itertools.combinations(others, 1))
    assert float(blocks[mask].sum()) == pytest.approx(float(blocks.diagonal().sum()) + best)


def test_measure_looks_at_every_layer_and_errors_do_not_add_up() -> None:
    model = subject()
    tokens = torch.arange(3, 303)[None]
    seen: list[int] = []
    found = measure(model, tokens, [SPARSE, Policy.of("dense")], rounds=2, progress=seen.append)
    assert seen == found.layers == [0, 1]
    sparse, dense = found.points
    assert all(0 < error < 1 for error in sparse.error)
    assert all(0 < density < 1 for density in sparse.density)
    assert dense.error == [0.0, 0.0]
    assert dense.density == [1.0, 1.0]
    assert len(sparse.plan_s) == len(sparse.attend_s) == 2
    assert found.dense_s > 0
    assert found.sdpa_s > 0
    for bound in found.bounds.values():
        errors = bound.to_dict()["error"]
        assert len(errors) == len(DENSITIES)
        assert errors[-1] < errors[0]
    only = measure(model, tokens, [SPARSE], layers=[1], rounds=1, bounds=False)
    assert only.layers == [1]
    assert only.points[0].error == [pytest.approx(sparse.error[1])]
    assert only.bounds == {}
    with pytest.raises(ValueError, match="in layers 7"):
        measure(model, tokens, [SPARSE], layers=[7])


def test_short_prompts_run_dense_and_are_counted() -> None:
    found = measure(subject(), torch.arange(3, 103)[None], [Policy.of("a_shape")], rounds=1, bounds=False)
    assert found.points[0].dense_because == {"short prompt": 2}
    assert found.points[0].error == [0.0, 0.0]


def run(path: Path, stop_after: int | None = None, every: bool = False, **changes: Any) -> list[dict[str, Any]]:
    of, work = subject(), job(methods=(SPARSE, SPARSER), lengths=(300,), samples=1, fidelity=0, **changes)
    with ResultsFile(path, make_header(of, work)) as results:
        for done, _ in enumerate(compare(of, work, results, rounds=1, every_logits=every), 1):
            if done == stop_after:
                break
    return read_lines(path.read_bytes(), path)


def cells(records: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [(r["kind"], r.get("method"), r["task"], r["length"], r["index"]) for r in records if r["kind"] != "run"]


def test_an_interrupted_comparison_ends_with_the_same_lines(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole.jsonl")
    kinds = [record["kind"] for record in whole]
    assert kinds.count("bounds") == 3  # two tasks and the text
    assert kinds.count("point") == 6
    assert kinds.count("logits") in (3, 6)
    run(tmp_path / "cut.jsonl", stop_after=4)
    cut = run(tmp_path / "cut.jsonl")
    # Which settings are on the front depends on the time that was taken.
    for kind in ("bounds", "point"):
        assert [c for c in cells(cut) if c[0] == kind] == [c for c in cells(whole) if c[0] == kind]
    figures = [[(r["method"], r["error"], r["recall"]) for r in some if r["kind"] == "point"] for some in (whole, cut)]
    assert figures[0] == figures[1]
    before = (tmp_path / "cut.jsonl").read_bytes()
    run(tmp_path / "cut.jsonl")
    assert (tmp_path / "cut.jsonl").read_bytes() == before


def test_every_setting_may_run_through_the_whole_model(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    points = [cell for cell in cells(run(path)) if cell[0] == "point"]
    kinds = [cell[0] for cell in cells(run(path, every=True))]
    assert kinds.count("logits") == kinds.count("point") == len(points) == 6


def point(method: str, plan: float, attend: float, error: float, **more: Any) -> dict[str, Any]:
    figures = {"density": 0.5, "recall": 0.9, "error": error, "plan_s": plan, "attend_s": attend}
    where = {"task": "text", "length": 1024, "index": 0}
    return {"kind": "point", "method": method, **where, **figures, "dense_s": 2.0, "sdpa_s": 4.0} | more


def test_rows_are_means_over_prompts_and_the_front_is_what_no_other_beats() -> None:
    records = [
        point("fast", 0.1, 0.1, 0.4),
        point("fast", 0.3, 0.1, 0.2, index=1),
        point("good", 0.5, 0.5, 0.1),
        point("good", 0.5, 0.5, 0.1, index=1),
        point("beaten", 0.5, 0.6, 0.35),
        point("beaten", 0.5, 0.6, 0.35, index=1),
        {"kind": "logits", "method": "fast", "task": "text", "length": 1024, "index": 0, "kl": 0.2, "top1": 0.5},
        {"kind": "logits", "method": "fast", "task": "text", "length": 1024, "index": 1, "kl": 0.4, "top1": 0.7},
    ]
    rows = comparison_rows([*records, records[0]])  # a line that occurs twice counts once
    assert [(row.method, row.front, row.prompts) for row in rows] == [
        ("fast", True, 2),
        ("good", True, 2),
        ("beaten", False, 2),
    ]
    fast = rows[0]
    assert fast.time == pytest.approx((0.1 + 0.2) / 2)
    assert fast.plan == pytest.approx(0.4 / 0.6)
    assert fast.over_sdpa == pytest.approx(0.6 / 8)
    assert fast.error == pytest.approx(0.3)
    assert fast.kl == pytest.approx(0.3)
    assert fast.top1 == pytest.approx(0.6)
    assert rows[1].kl is None
    shown = comparison_table(rows)
    assert [row[0] for row in shown[1:]] == ["* fast", "* good", "  beaten"]
    assert bounds_table(records) == []
    figure = drawn(records)
    assert [row[1] for row in figure.table[1:]] == ["fast", "good", "beaten"]
    assert [caption.partition(": ")[2] for caption, _ in figure.panels] == [
        "error against time",
        "error against density",
        "KL of the predictions against time",
    ]
    assert "fast: KL 0.3000, time 0.150" in figure.panels[2][1]
    assert "good" not in figure.panels[2][1]
    assert len(drawn(records[:6]).panels) == 2
    assert drawn([]).panels == []


def test_settings_are_compared_on_the_prompts_that_all_of_them_have() -> None:
    """One prompt is harder than the others: a mean with it and one without it say nothing of two settings."""
    head = {"kind": "logits", "task": "text", "length": 1024, "top1": 0.5}
    records = [
        point("fast", 0.1, 0.1, 0.4),
        point("fast", 0.1, 0.1, 0.0, index=1),
        point("good", 0.5, 0.5, 0.1),
        head | {"method": "fast", "index": 0, "kl": 0.2},
        head | {"method": "fast", "index": 1, "kl": 0.0},
        head | {"method": "good", "index": 0, "kl": 0.1},
    ]
    rows = comparison_rows(records)
    assert [(row.method, row.prompts, row.error, row.kl) for row in rows] == [
        ("fast", 1, 0.4, 0.2),
        ("good", 1, 0.1, 0.1),
    ]
    assert comparison_rows([point("fast", 0.1, 0.1, 0.4), point("good", 0.5, 0.5, 0.1, index=1)]) == []


def test_pareto() -> None:
    costs = [(1.0, 5.0), (2.0, 5.0), (3.0, 1.0), (0.5, 9.0), (3.0, 1.0), (4.0, 0.5)]
    assert pareto(costs) == [3, 0, 2, 5]
    assert pareto([]) == []


@pytest.mark.parametrize("name", methods.available())
def test_settings_are_methods_from_the_sparsest_on(name: str) -> None:
    kind = class_of(name)
    if not kind.settings:
        return
    made = settings_of(kind)
    assert len(set(made)) == len(made) >= 2
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, n, 3000, 16, generator=generator) for n in (4, 2))
    # Blocks whose tokens are alike, so that means stand for them.
    means = (3 * torch.randn(1, n, 24, 16, generator=generator) for n in (4, 2))
    q, k = (x + mean.repeat_interleave(128, 2)[:, :, :3000] for x, mean in zip((q, k), means, strict=True))
    call = AttentionCall(q, k, k, layer=40)
    if made[0].lacks(call) is None:
        densities = [method.plan(call).density() for method in made]
        if name != "auto":  # whose next plan, where a cheap one fails, may have fewer pairs
            assert densities == sorted(densities)
        assert densities[0] < densities[-1]
