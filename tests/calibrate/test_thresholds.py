"""Thresholds for each head: the profiler's rule and the search, against their formulas."""

from __future__ import annotations

import itertools

import pytest
import torch
from definitions import attention, rows_of
from torch import Tensor

from gossamer import AttentionCall
from gossamer.calibrate.thresholds import (
    cover_thresholds,
    search_thresholds,
    threshold_levels,
    threshold_quality,
    with_thresholds,
)
from gossamer.methods import XAttention
from gossamer.plan import Grid
from gossamer.scores import antidiagonal_scores
from gossamer.testing import SITUATIONS, make_call

METHOD = XAttention(0.9, stride=4, block=8)


def exact_mass(call: AttentionCall, b: int, h: int) -> dict[int, dict[int, float]]:
    """Attention mass of each block pair that is seen, from logits in Python."""
    row, mass = rows_of(call.extent)[b], {}
    for i in row.live_queries():
        position = row.query_start + i
        keys = [j for j in row.live_keys() if row.allowed(i, j)]
        if keys:
            weights = (call.q[b, h, i].double() @ call.k[b, h // call.share, keys].double().T * call.scale).softmax(-1)
            cells = mass.setdefault(position // 8, {})
            for j, weight in zip(keys, weights.tolist(), strict=True):
                n = (j - row.key_start) // 8
                cells[n] = cells.get(n, 0.0) + weight
    return mass


def naive_threshold(call: AttentionCall, b: int, h: int, coverage: float) -> float:
    grid = Grid(call.extent, 8, 8)
    estimate = torch.cat([part for _, part in antidiagonal_scores(call, grid, 4)], dim=2)[b, h].tolist()
    above = total = 0.0
    for block, row in exact_mass(call, b, h).items():
        scores = estimate[block - int(grid.first_block[b])]
        needed, held = [], 0.0
        for n in sorted(row, key=lambda n: (-row[n], n)):
            if held >= coverage * sum(row.values()):
                break
            needed.append(n)
            held += row[n]
        bar = min(scores[n] for n in needed)
        above += sum(score for score in scores if score >= bar)
        total += sum(scores)
    return above / total


@pytest.mark.parametrize("situation", [name for name in SITUATIONS if "soft-cap" not in name])
@pytest.mark.parametrize("coverage", [0.5, 0.9])
def test_coverage_is_the_rule_of_the_profiler(situation: str, coverage: float) -> None:
    calls = [make_call(situation, length=70, heads=2, groups=1, dim=8, seed=seed) for seed in range(2)]
    found = cover_thresholds(calls, METHOD, coverage)
    for h in range(2):
        expected = max(naive_threshold(call, b, h, coverage) for call in calls for b in range(call.batch))
        assert float(found[h]) == pytest.approx(expected, abs=1e-5)
    assert coverage > 0.5 or bool((found < 1).all())


def test_coverage_needs_a_call() -> None:
    with pytest.raises(ValueError, match="at least one captured call"):
        cover_thresholds([], METHOD)


def test_all_mass_needs_all_scores() -> None:
    call = make_call("no padding", length=70, heads=2, groups=1, dim=8)
    assert cover_thresholds([call], METHOD, 1.0).tolist() == pytest.approx([1.0, 1.0])


def test_levels_fall_by_a_tenth() -> None:
    assert threshold_levels(2).tolist() == pytest.approx([0.9, 0.81, 0.729])
    assert threshold_levels(1, 0.5, 0.5).tolist() == [0.5, 0.25]


def test_quality_is_minus_the_relative_error() -> None:
    call = make_call("left padding", length=70, heads=2, groups=1, dim=8)
    found = threshold_quality(call, METHOD, torch.tensor([1.0, 0.3]))
    pairs = [XAttention(p, stride=4, block=8).plan(call).to_mask() for p in (1.0, 0.3)]
    dense, sparse = (attention(call, mask)[0] for mask in pairs)
    expected = (sparse - dense).square().sum((0, 2, 3)) / dense.square().sum((0, 2, 3))
    assert found[:, 0].tolist() == pytest.approx([0.0, 0.0], abs=1e-9)
    assert (-found[:, 1]).tolist() == pytest.approx(expected.tolist(), rel=1e-3)
    assert bool((expected > 1e-3).all())


def best_by_trying(quality: Tensor, adjustments: int) -> float:
    heads, levels = quality.shape
    return max(
        sum(float(quality[h, s]) for h, s in enumerate(steps))
        for steps in itertools.product(range(levels), repeat=heads)
        if sum(steps) == adjustments
    )


@pytest.mark.parametrize("levels", [2, 3])
def test_the_search_finds_the_best_of_all(levels: int) -> None:
    generator = torch.Generator().manual_seed(levels)
    quality = -torch.rand(5, levels, generator=generator, dtype=torch.float64)
    for adjustments in range(5 * (levels - 1) + 1):
        steps = search_thresholds(quality, adjustments)
        assert int(steps.sum()) == adjustments
        found = sum(float(quality[h, s]) for h, s in enumerate(steps.tolist()))
        assert found == pytest.approx(best_by_trying(quality, adjustments))


def papers_table(performance: Tensor, adjustments: int) -> Tensor:
    """D[h][m] as printed, with P(h, m) one step of head h relative to D[h - 1][m - 1]."""
    heads = len(performance)
    table = torch.full((heads + 1, adjustments + 1), float("-inf"), dtype=torch.float64)
    table[0, 0] = 0.0
    for h, m in itertools.product(range(1, heads + 1), range(adjustments + 1)):
        lowered = table[h - 1, m - 1] + performance[h - 1, 1] if m else table[0, 1:].new_tensor(float("-inf"))
        table[h, m] = torch.maximum(table[h - 1, m] + performance[h - 1, 0], lowered)
    return table


def test_with_one_step_a_head_it_is_the_papers_recurrence() -> None:
    quality = torch.tensor([[0.0, -3.0], [0.0, -1.0], [0.0, -2.0], [0.0, -1.0]], dtype=torch.float64)
    for adjustments in range(5):
        steps = search_thresholds(quality, adjustments)
        held = sum(float(quality[h, s]) for h, s in enumerate(steps.tolist()))
        assert held == float(papers_table(quality, adjustments)[-1, adjustments])
    assert search_thresholds(quality, 1).tolist() == [0, 1, 0, 0]  # of two that cost the same the first


@pytest.mark.parametrize("adjustments", [-1, 5])
def test_adjustments_that_there_are_not_are_named(adjustments: int) -> None:
    with pytest.raises(ValueError, match=f"2 heads with 2 adjustments each allow 0 to 4 of them, got {adjustments}"):
        search_thresholds(torch.zeros(2, 3), adjustments)


def test_a_table_becomes_a_method() -> None:
    method = with_thresholds(METHOD, torch.tensor([[0.9, 0.25], [0.5, 0.75]], dtype=torch.float64))
    assert method.layers == (
        (XAttention(0.9, 4, 8), XAttention(0.25, 4, 8)),
        (XAttention(0.5, 4, 8), XAttention(0.75, 4, 8)),
    )
