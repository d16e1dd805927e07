"""A batch row's scores and output are the same bits whatever its padding and its companions, on every instruction set.

Verb by verb; `tests/methods/test_invariances.py` asks the same of whole methods.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cpu_checks import every_kernel, needs_kernels, poisoned, same_on_threads
from torch import Tensor

from gossamer import AttentionCall, Extent, SparsePlan
from gossamer.backends import cpu
from gossamer.plan import Grid

pytestmark = [needs_kernels, poisoned]
HEADS, GROUPS, DIM = 4, 2, 48
BLOCK_Q, BLOCK_K = 32, 64


@pytest.fixture(autouse=True)
def force(monkeypatch, request):
    monkeypatch.setenv(cpu.ENVIRONMENT, request.getfixturevalue("isa"))


@dataclass(frozen=True)
class Row:
    """A prompt of which the last queries are asked for: its padding, and all that is drawn for it."""

    seed: int
    length: int
    queries: int
    left: int = 0
    right: int = 0

    def drawn(self, heads: int, tokens: int, what: int) -> Tensor:
        generator = torch.Generator().manual_seed(10 * self.seed + what)
        return torch.randn(heads, tokens, DIM, generator=generator)

    def chosen(self, heads: int, rows: int, width: int, what: int, share: float) -> Tensor:
        generator = torch.Generator().manual_seed(10 * self.seed + what)
        return torch.rand(heads, rows, width, generator=generator) < share


# Query by query as alone: (rows, spare slots); the first row is the one that is compared.
BATCHES: dict[str, tuple[list[dict[str, int]], int]] = {
    "left padding": ([{"left": 70}], 0),
    "right padding": ([{"right": 45}], 0),
    "spare slots": ([{}], 100),
    "a longer companion": ([{"left": 5}, {"seed": 2, "length": 470, "queries": 300}], 0),
    "shorter companions": ([{"right": 3}, {"seed": 3, "length": 20, "queries": 20}, {"seed": 4, "queries": 0}], 9),
}
# Many queries, a chunk that begins inside a block, a few tokens across the border of two blocks, one token.
QUERIES = [(300, 300), (300, 107), (323, 6), (300, 1)]


def make_batch(rows: list[Row], spare: int, dtype: torch.dtype, **rules: Any) -> AttentionCall:
    query_len = max(row.queries + row.left + row.right for row in rows)
    key_len = max(row.left + row.length + row.right for row in rows) + spare
    tensors = [torch.full((len(rows), n, size, DIM), math.nan) for n, size in
               ((HEADS, query_len), (GROUPS, key_len), (GROUPS, key_len))]  # fmt: skip
    starts = []
    for b, row in enumerate(rows):
        # Only the whole of a prompt can have its padding before it.
        before = row.left if row.queries == row.length else 0
        tensors[0][b, :, before : before + row.queries] = row.drawn(HEADS, row.length, 0)[:, row.length - row.queries :]
        for n in (1, 2):
            tensors[n][b, :, row.left : row.left + row.length] = row.drawn(GROUPS, row.length, n)
        starts.append(row.length - row.queries - before)
    counts = [[row.queries for row in rows], [row.left for row in rows], [row.length for row in rows]]
    q, k, v = (x.to(dtype) for x in tensors)
    return AttentionCall(q, k, v, Extent(starts, *counts, **rules))


def plan_of(
    call: AttentionCall, rows: list[Row], *, heads: int, shared_columns: bool, share: float, alone: bool = False
) -> SparsePlan:
    """Blocks, columns and a narrow band: each row's are drawn for it alone. Or blocks alone, with both attributes."""
    grid = Grid(call.extent, BLOCK_Q, BLOCK_K)
    many = grid.query_blocks
    group = max(1, many) if shared_columns else 1
    mask = torch.zeros(len(rows), heads, many, grid.key_blocks, dtype=torch.bool)
    columns = torch.zeros(len(rows), heads, -(-many // group), call.extent.longest, dtype=torch.bool)
    for b, row in enumerate(rows):
        own, width = int(grid.row_blocks[b]), -(-row.length // BLOCK_K)
        lists = min(own, 1) if shared_columns else own
        mask[b, :, :own, :width] = row.chosen(heads, own, width, 3, 0.3)
        columns[b, :, :lists, : row.length] = row.chosen(heads, lists, row.length, 4, share)
    counts = columns.sum(-1).flatten()
    return SparsePlan.from_block_mask(
        mask,
        call.query_len,
        call.key_len,
        extent=call.extent,
        block_q=BLOCK_Q,
        block_k=BLOCK_K,
        column_group=group,
        column_indptr=torch.nn.functional.pad(counts.cumsum(0), (1, 0)),
        column_indices=columns.flatten(0, 2).nonzero()[:, 1].to(torch.int32),
        window=0 if alone else 7,
        pruned_mean=alone,
        skip=0.5 if alone else None,
    )


def situations(length: int, queries: int, dtype: torch.dtype, **rules: Any):
    """The row alone, then beside others and in padding: rows and the call."""
    base = {"seed": 1, "length": length, "queries": queries}
    rows = [Row(**base)]
    yield rows, make_batch(rows, 0, dtype, **rules)
    for others, spare in BATCHES.values():
        rows = [Row(**{**base, **other}) for other in others]
        yield rows, make_batch(rows, spare, dtype, **rules)


def live(call: AttentionCall, x: Tensor) -> Tensor:
    first, count = int(call.extent.first_query[0]), int(call.extent.query_count[0])
    return x[0, :, first : first + count]


@every_kernel
@pytest.mark.parametrize("kind", ["shared columns", "many shared columns", "own columns", "per kv head", "attributes"])
@pytest.mark.parametrize(("length", "queries"), QUERIES)
def test_attention(isa: str, dtype: torch.dtype, length: int, queries: int, kind: str) -> None:
    """Many shared columns take more room than the keys, and are gathered by each block."""
    options: dict[str, Any] = {
        "heads": GROUPS if kind == "per kv head" else HEADS,
        "shared_columns": kind != "own columns",
        "share": {"many shared columns": 0.9, "attributes": 0.0}.get(kind, 0.3),
        "alone": kind == "attributes",
    }
    expected: list[Tensor] = []
    for rows, call in situations(length, queries, dtype):
        plan = plan_of(call, rows, **options)
        got = [live(call, x) for x in cpu.attend(call, plan)]
        expected = expected or got
        assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


@every_kernel
def test_permuted_attention(isa: str, dtype: torch.dtype) -> None:
    """Dead tokens may stand anywhere in an order, here behind the live ones."""
    expected: list[Tensor] = []
    for rows, call in situations(300, 300, dtype):
        orders = [torch.arange(n).repeat(len(rows), HEADS, 1) for n in (call.query_len, call.key_len)]
        for what, order in enumerate(orders):
            for b, row in enumerate(rows):
                live_ones = (row.queries, row.length)[what]
                order[b, :, :live_ones] = row.drawn(HEADS, live_ones, 5 + what)[..., 0].argsort(-1)
        blocks = [-(-call.query_len // BLOCK_Q), -(-call.key_len // BLOCK_K)]
        mask = torch.zeros(len(rows), HEADS, *blocks, dtype=torch.bool)
        mask[0, :, :10, :5] = rows[0].chosen(HEADS, 10, 5, 3, 0.5)
        sizes = {"extent": call.extent, "block_q": BLOCK_Q, "block_k": BLOCK_K, "window": 7}
        plan = SparsePlan.from_block_mask(
            mask, call.query_len, call.key_len, **sizes, q_order=orders[0].int(), k_order=orders[1].int()
        )
        got = [live(call, x) for x in cpu.attend(call, plan)]
        expected = expected or got
        assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


def scores_of(call: AttentionCall) -> list[Tensor]:
    """Of the first row, as far as it reaches."""
    grid = Grid(call.extent, BLOCK_Q, BLOCK_K)
    every, keys = range(grid.query_blocks), int(call.extent.key_count[0])
    own, width = int(grid.row_blocks[0]), -(-keys // BLOCK_K)
    queries, means = cpu.pool_queries(call, grid), cpu.pool_keys(call, grid)
    by_block = [
        cpu.pooled_scores(call, grid, queries, means, every),
        cpu.row_block_energy(call, grid, means.to(call.q.dtype), every),
        cpu.antidiagonal_scores(call, grid, 8, every),
    ]
    for scores in by_block:
        assert bool((scores[0, :, own:] == 0).all())
        assert bool((scores[0, :, :, width:] == 0).all())
    return [
        *(mass[0, :, :keys] for mass in cpu.last_query_probe(call, 64)),
        queries[0, :, :own],
        means[0, :, :width],
        *(scores[0, :, :own, :width] for scores in by_block),
    ]


@every_kernel
@pytest.mark.parametrize("rules", [{}, {"causal": False}, {"limit": 90}], ids=["causal", "both ways", "model window"])
@pytest.mark.parametrize(("length", "queries"), QUERIES)
def test_scores(isa: str, dtype: torch.dtype, length: int, queries: int, rules: dict[str, Any]) -> None:
    expected: list[Tensor] = []
    for _, call in situations(length, queries, dtype, **rules):
        got = scores_of(call)
        expected = expected or got
        assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


@every_kernel
def test_threads(isa: str, dtype: torch.dtype) -> None:
    rows = [Row(1, 300, 107, left=3, right=20), Row(2, 200, 5), Row(3, 60, 60)]
    call = make_batch(rows, 7, dtype)
    plan = plan_of(call, rows, heads=HEADS, shared_columns=True, share=0.3)
    same_on_threads(lambda: [*cpu.attend(call, plan), *scores_of(call)])
