"""Choices, lists and counts in Triton against their definitions: on a CUDA device, else interpreted on the CPU."""

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_support import DEVICE, MARKS

from gossamer import Extent, SparsePlan
from gossamer.backends import torch as definition
from gossamer.backends import triton
from gossamer.backends.triton import choose, device, pairs
from gossamer.plan import Grid
from gossamer.plan.count import count_pairs
from gossamer.rules import (
    Candidates,
    RelativeToMax,
    Rule,
    TopK,
    TopP,
    TopPBelow,
    TopPOfAllRows,
    TopPReaching,
)
from gossamer.testing import random_plan

pytestmark = MARKS


class Even(Rule):
    """A rule of somebody else, that only torch knows."""

    def select(self, scores: Tensor, forced: Tensor) -> Tensor:
        return (torch.arange(scores.shape[-1], device=scores.device) % 2 == 0).expand(scores.shape)


def candidates_of(batch: int, rows: int, width: int, seed: int, **fields: Any) -> Candidates:
    """Ranges anywhere, some empty, some beyond the last candidate."""
    generator = torch.Generator().manual_seed(seed)
    seen = torch.randint(0, width + 1, (batch, rows, 2), generator=generator).sort(dim=-1).values
    forced = torch.randint(-2, width + 3, (batch, rows, 2), generator=generator).sort(dim=-1).values
    return Candidates(seen, forced, **fields)


def scores_of(batch: int, heads: int, rows: int, width: int, seed: int) -> Tensor:
    """Few values, so that there are ties."""
    return torch.randint(0, 6, (batch, heads, rows, width), generator=torch.Generator().manual_seed(seed)).float()


def both(
    size: tuple[int, int, int, int],
    parts: list[range],
    candidates: list[Candidates],
    scores: list[Tensor] | None = None,
    rule: Rule | None = None,
) -> tuple[Tensor, ...]:
    """Row pointers and indices: ours, then the definition's."""
    built: list[Tensor] = []
    for backend, where in ((triton, DEVICE), (definition, torch.device("cpu"))):
        writer = backend.ListWriter(*size, where)
        for number, part in enumerate(parts):
            given = () if scores is None else (scores[number].to(where), rule)
            writer.choose(part, candidates[number], *given)
        built += [t.cpu() for t in writer.build()]
    return tuple(built)


def assert_same_lists(*arguments: Any) -> Tensor:
    """Returns the indices."""
    indptr, indices, expected_indptr, expected = both(*arguments)
    assert torch.equal(indptr, expected_indptr)
    assert torch.equal(indices, expected)
    return indices


RULES = [
    RelativeToMax(0.5), RelativeToMax(0.0), TopK(3), TopK([0, 5, 10_000]), TopP(0.6), TopP([0.1, 0.5, 1.0], True),
    TopPReaching(0.9), TopPBelow(0.5), TopPOfAllRows(0.5), Even(),
]  # fmt: skip


@pytest.mark.parametrize("width", [1, 33, 300])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_rules_with_ties(rule: Rule, width: int) -> None:
    rows, heads = 4, 3
    candidates = candidates_of(2, rows, width, width, first=2)
    scores = scores_of(2, heads, rows, width, 1)
    if isinstance(rule, TopPReaching):
        scores = scores / scores.sum(dim=-1, keepdim=True).clamp(min=1)
    assert_same_lists((2, heads, rows, width), [range(rows)], [candidates], [scores], rule)


@pytest.mark.parametrize("rule", [RelativeToMax(0.4), TopK(7)], ids=["relative", "best"])
def test_rows_of_several_tiles(monkeypatch, rule: Rule) -> None:
    """Both signs, both zeros, and -inf; a budget that ends among equals of two tiles."""
    monkeypatch.setattr(choose, "_ROW_TILE", 64)
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(-2, 4, (1, 2, 3, 150), generator=generator).float()
    scores = torch.where((scores == 0) & (torch.rand(scores.shape, generator=generator) < 0.5), -0.0, scores)
    scores = scores.clamp(min=0) if isinstance(rule, RelativeToMax) else scores.masked_fill(scores == -2, -math.inf)
    assert_same_lists((1, 2, 3, 150), [range(3)], [candidates_of(1, 3, 150, 3)], [scores], rule)


def test_long_rows_are_sorted_by_torch(monkeypatch) -> None:
    monkeypatch.setattr(choose, "_WIDEST_ROW", 100)
    scores = scores_of(2, 2, 1, 150, 0)
    assert_same_lists((2, 2, 1, 150), [range(1)], [candidates_of(2, 1, 150, 3)], [scores], TopK([9, 20]))


@pytest.mark.parametrize("rule", [TopK(12), RelativeToMax(0.2)], ids=["best", "relative"])
def test_nan_is_not_chosen(rule: Rule) -> None:
    """It takes from a budget, and makes a share of the largest undefined."""
    scores = torch.randn(1, 1, 4, 40, generator=torch.Generator().manual_seed(0))
    scores[..., 0, 3:8] = math.nan
    scores[..., 1, :30] = -math.nan
    scores[..., 2, :] = math.nan
    everything = torch.tensor([0, 40]).expand(1, 4, 2)
    assert_same_lists((1, 1, 4, 40), [range(4)], [Candidates(everything, everything * 0)], [scores], rule)


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("width", [1, 40, 100])
def test_forced_ranges_and_diagonals(width: int, mirrored: bool) -> None:
    generator = torch.Generator().manual_seed(width)
    fields = {
        "forced_heads": torch.tensor([[True, False], [False, True]], device=DEVICE),
        "diagonals": (torch.rand(2, 2, 9, generator=generator) < 0.3).to(DEVICE),
        "mirrored": mirrored,
        "first": 3,
    }
    parts = [range(3, 5), range(0, 3)]
    candidates = [
        candidates_of(2, len(p), width, p.start, origin=torch.randint(-3, width, (2, len(p))), **fields) for p in parts
    ]
    assert_same_lists((2, 2, 5, width), parts, candidates)


@pytest.mark.parametrize("rule", [None, TopK(3), RelativeToMax(0.5)], ids=["forced", "best", "relative"])
def test_candidates_everywhere_and_heads_without_a_rule(rule: Rule | None) -> None:
    everywhere = (torch.rand(2, 2, 40, generator=torch.Generator().manual_seed(0)) < 0.3).to(DEVICE)
    ruled = torch.tensor([[True, False], [False, True]], device=DEVICE)
    candidates = candidates_of(2, 3, 40, 0, everywhere=everywhere, ruled_heads=ruled)
    scores = None if rule is None else [scores_of(2, 2, 3, 40, 0)]
    assert_same_lists((2, 2, 3, 40), [range(3)], [candidates], scores, rule)


def test_parts_in_any_order_and_rows_that_never_come() -> None:
    parts = [range(5, 7), range(0, 2), range(3, 3), range(3, 4)]
    candidates = [candidates_of(2, len(part), 70, part.start) for part in parts]
    scores = [scores_of(2, 3, len(part), 70, part.start) for part in parts]
    assert assert_same_lists((2, 3, 8, 70), parts, candidates, scores, TopK(5)).numel() > 50


def test_a_row_twice_is_refused() -> None:
    writer = triton.ListWriter(1, 1, 6, 10, DEVICE)
    writer.choose(range(2, 4), candidates_of(1, 2, 10, 0))
    with pytest.raises(ValueError, match=r"rows 3 to 5 overlap rows 2 to 3, which are chosen already"):
        writer.choose(range(3, 6), candidates_of(1, 3, 10, 0))


def test_bad_input_is_named() -> None:
    writer = triton.ListWriter(1, 2, 6, 10, DEVICE)
    with pytest.raises(ValueError, match=r"consecutive rows of the 6 of the lists, got range\(4, 7\)"):
        writer.choose(range(4, 7), candidates_of(1, 3, 10, 0))
    with pytest.raises(ValueError, match=r"scores must be \[1, 2, 1, 10\] for these rows, got \(1, 1, 1, 10\)"):
        writer.choose(range(1), candidates_of(1, 1, 10, 0), torch.zeros(1, 1, 1, 10, device=DEVICE), TopK(1))
    with pytest.raises(ValueError, match="take CUDA tensors, got meta"):
        triton.ListWriter(1, 1, 1, 1, torch.device("meta"))


def written(backend: Any, where: torch.device, plan: SparsePlan) -> tuple[Any, Any]:
    """Writers that hold a plan's blocks and columns."""
    writers = []
    for mask in (plan.block_mask(), plan.column_mask()):
        writer = backend.ListWriter(*mask.shape, where)
        rows, width = mask.shape[2:]
        everything = torch.tensor([0, width]).expand(plan.batch, rows, 2)
        writer.choose(range(rows), Candidates(everything, everything * 0), mask.float().to(where), RelativeToMax(0.5))
        writers.append(writer)
    return tuple(writers)


def fields_of(plan: SparsePlan) -> dict[str, Any]:
    names = ("heads", "query_len", "key_len", "extent", "block_q", "block_k", "column_group", "sink", "window")
    return {name: getattr(plan, name) for name in names}


@pytest.mark.parametrize("which", ["both", "blocks", "columns", "neither"])
def test_finished_plans_wait_once(monkeypatch, which: str) -> None:
    waits = []
    plan = random_plan(14, batch=2, heads=2, query_len=90, key_len=120, block_q=32, block_k=16, padded=True)
    assert plan.block_indices.numel() * plan.column_indices.numel() > 0
    blocks, columns = written(triton, DEVICE, plan)
    monkeypatch.setattr(choose, "fetch", lambda numbers: waits.append(numbers) or device.fetch(numbers))
    blocks = blocks if which in ("both", "blocks") else None
    columns = columns if which in ("both", "columns") else None
    made = triton.finish(blocks, columns, **fields_of(plan))
    assert len(waits) == (which != "neither")
    nothing = torch.empty(0, dtype=torch.int32)
    expected = replace(
        plan,
        block_indptr=plan.block_indptr if blocks else None,
        block_indices=plan.block_indices if blocks else nothing,
        column_indptr=plan.column_indptr if columns else None,
        column_indices=plan.column_indices if columns else nothing,
    )
    for name in ("block_indptr", "block_indices", "column_indptr", "column_indices", "sink", "window"):
        assert torch.equal(getattr(made, name).cpu(), getattr(expected, name)), name
    assert made.device == (DEVICE if writers_given(blocks, columns) else torch.device("cpu"))
    assert torch.equal(made.count_pairs(), expected.to_mask().sum(dim=(2, 3)))


def writers_given(*writers: Any) -> bool:
    return any(writer is not None for writer in writers)


def test_nothing_to_choose() -> None:
    """No keys, no rows, no batch."""
    for batch, query_len, key_len in ((1, 4, 0), (1, 0, 5), (0, 4, 5)):
        extent = Extent.full(batch, query_len, key_len, causal=False)
        grid = Grid(extent, 4, 4)
        writer = triton.ListWriter(batch, 2, grid.query_blocks, grid.key_blocks, DEVICE)
        writer.choose(range(grid.query_blocks), Candidates(grid.seen, grid.own()))
        sizes = {"heads": 2, "query_len": query_len, "key_len": key_len, "extent": extent, "block_q": 4, "block_k": 4}
        plan = triton.finish(writer, None, **sizes)
        assert torch.equal(plan.count_pairs(), plan.to_mask().sum(dim=(2, 3)).cpu())


@pytest.mark.parametrize(
    ("seed", "causal", "limit"),
    [(seed, *case) for seed, case in enumerate(itertools.product((True, False), (None, 1, 50)))]
    + [(seed, seed % 2 == 0, None) for seed in range(6, 12)],
)
def test_counted_pairs(seed: int, causal: bool, limit: int | None) -> None:
    plan = random_plan(
        seed,
        batch=2,
        heads=2,
        query_len=50 + 7 * seed,
        key_len=70 + 7 * seed,
        block_q=[32, 64, 17][seed % 3],
        block_k=[16, 64, 40, 100][seed % 4],
        padded=seed % 3 > 0,
        causal=causal,
        limit=limit,
    )
    assert torch.equal(triton.count(plan.to(DEVICE)), plan.to_mask().sum(dim=(2, 3)))


def test_counts_of_more_key_blocks_than_a_program_looks_at(monkeypatch) -> None:
    """And edges of several tiles."""
    monkeypatch.setattr(pairs, "_KEY_BLOCKS", 32)
    monkeypatch.setattr(pairs, "_EDGE", 16)
    plan = random_plan(3, batch=2, heads=2, query_len=100, key_len=200, block_q=32, block_k=4)
    wide = random_plan(4, batch=1, heads=2, query_len=100, key_len=200, block_q=32, block_k=40, limit=30)
    for made in (plan, wide):
        assert torch.equal(triton.count(made.to(DEVICE)), made.to_mask().sum(dim=(2, 3)))


@pytest.mark.parametrize("reason", ["permuted", "large"])
def test_other_plans_are_counted_by_the_definition(monkeypatch, reason: str) -> None:
    if reason == "large":
        monkeypatch.setattr(pairs, "_BITMAP_BYTES", 10)
    plan = random_plan(1, batch=1, heads=2, query_len=50, key_len=50, permuted=reason == "permuted", block_q=32)
    assert not pairs.countable(plan)
    assert torch.equal(triton.count(plan.to(DEVICE)), count_pairs(plan))
