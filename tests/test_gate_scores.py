"""Scores and rules of learned gates, against loops over positions and sorted lists."""

from __future__ import annotations

import math

import pytest
import torch
from definitions import call_in, everywhere, rows_of
from torch import Tensor

from gossamer import scores
from gossamer.plan import Grid
from gossamer.rules import Above, TopKOfRows

pytestmark = pytest.mark.usefixtures("constants")


@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bounds_of_keys_are_those_of_live_keys(situation: str, dtype: torch.dtype) -> None:
    call = call_in(situation, length=37, dtype=dtype)
    grid = Grid(call.extent, 6, 4)
    low, high = scores.pool_key_bounds(call, grid)
    assert low.dtype == high.dtype == torch.float32
    for b, row in enumerate(rows_of(call.extent)):
        for n in range(grid.key_blocks):
            keys = [j for j in row.live_keys() if (j - row.key_start) // 4 == n]
            for g in range(call.groups):
                expected: tuple[Tensor, Tensor] = torch.zeros(4), torch.zeros(4)
                if keys:
                    own = call.k[b, g, keys].float()
                    expected = own.amin(0), own.amax(0)
                assert torch.equal(low[b, g, n], expected[0])
                assert torch.equal(high[b, g, n], expected[1])


@everywhere
@pytest.mark.parametrize("heads", [2, 4], ids=["by key/value head", "by query head"])
def test_block_attention_is_a_softmax_of_what_is_seen(situation: str, heads: int) -> None:
    call = call_in(situation, length=37)
    grid = Grid(call.extent, 6, 4)
    generator = torch.Generator().manual_seed(2)
    queries = torch.randn(call.batch, 4, grid.query_blocks, 3, generator=generator)
    keys = torch.randn(call.batch, heads, grid.key_blocks, 3, generator=generator)
    parts = list(scores.block_attention(call, grid, queries, keys, 1.7))
    assert [m for part, _ in parts for m in part] == (list(range(grid.query_blocks)) if grid.key_blocks else [])
    for part, shares in parts:
        assert shares.shape == (call.batch, 4, len(part), grid.key_blocks)
        for b, row in enumerate(rows_of(call.extent)):
            first = max(row.query_start, 0) // 6
            for m in part:
                mine = [p for p in row.positions() if p // 6 - first == m]
                seen = {j // 4 for j in range(row.key_count) if any(row.allows(i, j) for i in mine)}
                for h in range(4):
                    key = keys[b, h * heads // 4]
                    weights = {n: math.exp(1.7 * float(queries[b, h, m] @ key[n])) for n in seen}
                    expected = [weights.get(n, 0.0) / max(sum(weights.values()), 1e-9) for n in range(grid.key_blocks)]
                    got = shares[b, h, m - part.start]
                    torch.testing.assert_close(got, torch.tensor(expected), atol=1e-5, rtol=1e-4)


def test_above_a_threshold() -> None:
    row = torch.tensor([0.0, 0.25, 0.5, 0.25, 0.75]).view(1, 1, 1, -1).expand(1, 2, 1, -1)
    nothing = torch.zeros(5, dtype=torch.bool)
    for threshold, chosen in ((0.25, [2, 4]), (0.2, [1, 2, 3, 4]), (0.75, []), (0.0, [0, 1, 2, 3, 4])):
        got = Above(threshold).select(row, nothing)
        assert got[0, 0, 0].nonzero().flatten().tolist() == chosen
    by_head = Above([0.5, 0.0]).select(row, nothing)
    assert by_head.sum(-1).flatten().tolist() == [1, 5]


def test_a_number_for_each_row() -> None:
    rows = torch.tensor([[3.0, 1.0, 3.0, 2.0], [1.0, 1.0, 1.0, -math.inf]]).view(1, 1, 2, 4).expand(2, 3, 2, 4)
    counts = torch.tensor([[[1, 2]], [[3, 9]]])
    got = TopKOfRows(counts).select(rows, torch.zeros(4, dtype=torch.bool))
    for h in range(3):
        chosen = [[got[b, h, m].nonzero().flatten().tolist() for m in range(2)] for b in range(2)]
        assert chosen == [[[0], [0, 1]], [[0, 2, 3], [0, 1, 2]]]
