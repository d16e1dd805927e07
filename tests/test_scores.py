"""Scores against loops over positions, written from the formulas in their docstrings."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from definitions import Row, call_in, everywhere, products, rows_of, set_planner
from torch import Tensor

from gossamer import AttentionCall, Extent, scores
from gossamer.backends import backend_of
from gossamer.plan import Grid


@pytest.fixture(autouse=True, params=["torch", "torch in the smallest pieces", "cpu in the smallest pieces"])
def planner(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    set_planner(request, monkeypatch)


# No block ends where another does, where a chunk begins, or where padding ends.
BLOCKS: dict[str, int] = {"block_q": 6, "block_k": 4}
# Sums of up to 90 products in fp32.
TOLERANCE: dict[str, Any] = {"atol": 2e-5, "rtol": 2e-5}


def grid_of(call: AttentionCall, **blocks: int) -> Grid:
    return Grid(call.extent, **BLOCKS | blocks)


def joined(parts: Iterator[tuple[range, Tensor]]) -> Tensor:
    """All parts, which come in order and leave nothing out."""
    listed = list(parts)
    rows = [row for part, _ in listed for row in part]
    assert rows == list(range(len(rows)))
    assert all(part_scores.shape[2] == len(part) for part, part_scores in listed)
    return torch.cat([part_scores for _, part_scores in listed], dim=2)


def by_block(positions: list[int], block: int) -> dict[int, list[int]]:
    blocks: dict[int, list[int]] = {}
    for position in positions:
        blocks.setdefault(position // block, []).append(position)
    return blocks


def means(x: Tensor, b: int, indices: list[int]) -> Tensor:
    """Of some tokens of a batch row, for each head: fp64 ``[heads, D]``."""
    return x[b, :, indices].double().mean(dim=1)


# Probe


def naive_probe(call: AttentionCall, last: int) -> tuple[Tensor, Tensor]:
    width, raw = call.extent.longest, products(call)
    columns, diagonals = torch.zeros(2, call.batch, call.heads, width, dtype=torch.float64)
    for b, row in enumerate(rows_of(call.extent)):
        for i in row.live_queries()[max(0, row.query_count - last) :]:
            query = row.query_start + i
            seen = [j for j in row.live_keys() if row.allowed(i, j)]
            for h in range(call.heads):
                weights = {j - row.key_start: math.exp(raw[b][h][i][j] * call.scale) for j in seen}
                for key, weight in weights.items():
                    columns[b, h, key] += weight / sum(weights.values())
                    if abs(query - key) < row.key_count:
                        diagonals[b, h, abs(query - key)] += weight / sum(weights.values())
    return columns, diagonals


@everywhere
@pytest.mark.parametrize(("length", "last"), [(70, 5), (20, 64), (5, 3)])
def test_the_probe_sums_softmax_rows_by_key_and_by_distance(situation: str, length: int, last: int) -> None:
    call = call_in(situation, length=length, heads=2, groups=1)
    columns, diagonals = scores.last_query_probe(call, last)
    expected_columns, expected_diagonals = naive_probe(call, last)
    assert columns.dtype == diagonals.dtype == torch.float32
    torch.testing.assert_close(columns.double(), expected_columns, **TOLERANCE)
    torch.testing.assert_close(diagonals.double(), expected_diagonals, **TOLERANCE)


def test_the_probe_takes_the_last_64_queries_unless_told_otherwise() -> None:
    call = call_in("no padding", length=80)
    for given, default in zip(scores.last_query_probe(call, 64), scores.last_query_probe(call), strict=True):
        assert torch.equal(given, default)


def test_distances_beyond_a_rows_own_keys_count_for_no_row() -> None:
    rows = Extent([0, 0], [9, 9], [0, 2], [7, 3], causal=False)
    call = AttentionCall(torch.randn(2, 2, 9, 4), torch.randn(2, 1, 7, 4), extent=rows)
    _, diagonals = scores.last_query_probe(call, 9)
    assert (diagonals[0] > 0).all()
    assert (diagonals[1, :, :3] > 0).all()
    assert not diagonals[1, :, 3:].any()


# Means


@everywhere
def test_pooled_keys_are_means_of_live_keys(situation: str) -> None:
    call = call_in(situation, length=37)
    pooled = scores.pool_keys(call, grid_of(call))
    expected = torch.zeros(call.batch, call.groups, grid_of(call).key_blocks, 4, dtype=torch.float64)
    for b, row in enumerate(rows_of(call.extent)):
        for n, keys in by_block(list(range(row.key_count)), 4).items():
            expected[b, :, n] = means(call.k, b, [key + row.key_start for key in keys])
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled.double(), expected, **TOLERANCE)


@everywhere
def test_pooled_queries_are_means_of_live_queries(situation: str) -> None:
    call = call_in(situation, length=37)
    pooled = scores.pool_queries(call, grid_of(call))
    expected = torch.zeros(call.batch, call.heads, grid_of(call).query_blocks, 4, dtype=torch.float64)
    for b, row in enumerate(rows_of(call.extent)):
        for m, queries in local_blocks(row).items():
            expected[b, :, m] = means(call.q, b, [query - row.query_start for query in queries])
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled.double(), expected, **TOLERANCE)


def local_blocks(row: Row, block_q: int = BLOCKS["block_q"]) -> dict[int, list[int]]:
    """Positions of live queries by row of the plan."""
    first = max(row.query_start, 0) // block_q
    return {block - first: queries for block, queries in by_block(row.positions(), block_q).items()}


def test_means_of_16_bits_are_taken_in_32() -> None:
    call = call_in("left padding", length=37, dtype=torch.bfloat16)
    wide = replace(call, q=call.q.float(), k=call.k.float(), v=None)
    assert torch.equal(scores.pool_keys(call, grid_of(call)), scores.pool_keys(wide, grid_of(call)))
    assert torch.equal(scores.pool_queries(call, grid_of(call)), scores.pool_queries(wide, grid_of(call)))


# Scores of blocks


def naive_pooled_scores(call: AttentionCall, grid: Grid) -> Tensor:
    expected = torch.zeros(call.batch, call.heads, grid.query_blocks, grid.key_blocks, dtype=torch.float64)
    for b, row in enumerate(rows_of(call.extent)):
        for m, queries in local_blocks(row).items():
            for n, keys in by_block(list(range(row.key_count)), 4).items():
                if any(row.allows(query, key) for query in queries for key in keys):
                    q = means(call.q, b, [query - row.query_start for query in queries])
                    k = means(call.k, b, [key + row.key_start for key in keys])
                    expected[b, :, m, n] = (q * k.repeat_interleave(call.share, dim=0)).sum(dim=-1)
    return expected


@everywhere
def test_pooled_scores_are_products_of_means(situation: str) -> None:
    call = call_in(situation, length=37)
    grid = grid_of(call)
    got = joined(scores.pooled_scores(call, grid))
    torch.testing.assert_close(got.double(), naive_pooled_scores(call, grid), **TOLERANCE)


@everywhere
def test_pooled_mass_is_their_softmax_over_what_is_seen(situation: str) -> None:
    call = call_in(situation, length=37)
    grid = grid_of(call)
    products, got = naive_pooled_scores(call, grid) * call.scale, joined(scores.pooled_mass(call, grid))
    for b, row in enumerate(rows_of(call.extent)):
        for m in range(grid.query_blocks):
            queries = local_blocks(row).get(m, [])
            seen = sorted({key // 4 for key in range(row.key_count) if any(row.allows(q, key) for q in queries)})
            expected = torch.zeros_like(products[b, :, m])
            expected[:, seen] = products[b, :, m, seen].softmax(dim=-1)
            torch.testing.assert_close(got[b, :, m].double(), expected, **TOLERANCE)


@pytest.mark.parametrize("before", [None, [0, 3]])
def test_block_sums_are_of_positions_in_blocks(before: list[int] | None) -> None:
    mass = torch.arange(2 * 2 * 10).view(2, 2, 10).float()
    got = scores.block_sums(mass, 4, None if before is None else torch.tensor(before))
    for b in range(2):
        for n in range(got.shape[-1]):
            own = [j for j in range(10) if (j + (before or [0, 0])[b]) // 4 == n]
            assert got[b, :, n].tolist() == mass[b, :, own].sum(dim=-1).tolist()
    assert torch.equal(got.sum(dim=-1), mass.sum(dim=-1))


@everywhere
@pytest.mark.parametrize("last", [3, 64])
def test_probed_blocks_are_shares_of_the_last_queries(situation: str, last: int) -> None:
    call = call_in(situation, length=37)
    grid = grid_of(call)
    exact, by_means = scores.probed_blocks(call, grid, scores.last_query_probe(call, last)[0], last)
    columns = scores.last_query_probe(call, last)[0].double()
    for b, row in enumerate(rows_of(call.extent)):
        queries = row.positions()[-last:]
        for n in range(grid.key_blocks):
            own = columns[b, :, 4 * n : 4 * n + 4].sum(dim=-1) / columns[b].sum(dim=-1).clamp(min=1e-9)
            torch.testing.assert_close(exact[b, :, n].double(), own, **TOLERANCE)
        logits = {}
        for n, keys in by_block(list(range(row.key_count)), 4).items():
            if any(row.allows(query, key) for query in queries for key in keys):
                q = means(call.q, b, [query - row.query_start for query in queries])
                k = means(call.k, b, [key + row.key_start for key in keys])
                logits[n] = (q * k.repeat_interleave(call.share, dim=0)).sum(dim=-1) * call.scale
        expected = torch.zeros(call.heads, grid.key_blocks, dtype=torch.float64)
        if logits:
            expected[:, list(logits)] = torch.stack(list(logits.values()), dim=-1).softmax(dim=-1)
        torch.testing.assert_close(by_means[b].double(), expected, **TOLERANCE)


def naive_energy(call: AttentionCall, grid: Grid, together: int, ended: bool = False) -> Tensor:
    """Of tiles of ``together`` heads."""
    lists = call.heads // together
    expected = torch.zeros(call.batch, lists, grid.query_blocks, grid.key_blocks, dtype=torch.float64)
    for b, row in enumerate(rows_of(call.extent)):
        for m, queries in local_blocks(row).items():
            for g in range(lists):
                heads = slice(g * together, (g + 1) * together)
                x: dict[int, list[float]] = {}
                for n, keys in by_block(list(range(row.key_count)), 4).items():
                    if row.causal and (n + 1) * 4 - 1 > max(queries):
                        continue
                    pooled = means(call.k, b, [key + row.key_start for key in keys])[heads.start // call.share]
                    pooled = pooled.to(call.q.dtype).double()
                    dots = (call.q[b, heads].double() @ pooled).tolist()
                    x[n] = [
                        dot[query - row.query_start] * call.scale
                        for dot in dots
                        for query in queries
                        if any(row.allows(query, key) for key in keys)
                        and not (ended and row.causal and (n + 1) * 4 - 1 > query)
                    ]
                top = max((value for values in x.values() for value in values), default=0.0)
                for n, values in x.items():
                    expected[b, g, m, n] = sum(math.exp(value - top) for value in values)
    return expected


@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_block_energy_sums_all_rows_of_a_group(situation: str, dtype: torch.dtype) -> None:
    call = call_in(situation, length=25, heads=4, groups=2, dtype=dtype)
    grid = grid_of(call)
    got = joined(scores.row_block_energy(call, grid))
    # A mean that lies between two numbers of 16 bits may be rounded to either.
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got.double(), naive_energy(call, grid, 2), atol=tolerance, rtol=tolerance)


@everywhere
@pytest.mark.parametrize("ended", [False, True])
@pytest.mark.parametrize("per", ["head", "kv_head"])
def test_row_block_energy_of_one_head_and_of_blocks_that_ended(situation: str, per: Any, ended: bool) -> None:
    call = call_in(situation, length=25, heads=4, groups=2)
    grid = grid_of(call)
    got = joined(scores.row_block_energy(call, grid, per=per, ended=ended))
    expected = naive_energy(call, grid, 1 if per == "head" else 2, ended)
    torch.testing.assert_close(got.double(), expected, atol=2e-5, rtol=2e-5)


def naive_antidiagonals(call: AttentionCall, grid: Grid, stride: int) -> Tensor:
    expected = torch.zeros(call.batch, call.heads, grid.query_blocks, grid.key_blocks, dtype=torch.float64)
    raw = products(call)
    for b, row in enumerate(rows_of(call.extent)):
        first = max(row.query_start, 0) // grid.block_q
        key_cells = by_block(list(range(row.key_count)), stride)
        for t, queries in by_block(row.positions(), stride).items():
            seen = [
                u for u, keys in key_cells.items() if any(row.allows(query, key) for query in queries for key in keys)
            ]
            for h in range(call.heads):
                logits = {}
                for u in seen:
                    pairs = [((t + 1) * stride - 1 - offset, u * stride + offset) for offset in range(stride)]
                    logits[u] = (call.scale / stride) * sum(
                        raw[b][h][query - row.query_start][key + row.key_start]
                        for query, key in pairs
                        if query in queries and key in key_cells[u]
                    )
                total = sum(math.exp(logit) for logit in logits.values())
                for u, logit in logits.items():
                    m, n = t * stride // grid.block_q - first, u * stride // grid.block_k
                    expected[b, h, m, n] += math.exp(logit) / total
    return expected


@everywhere
@pytest.mark.parametrize(("stride", "blocks"), [(4, (8, 12)), (1, (3, 4)), (5, (5, 10))])
def test_antidiagonal_scores_are_softmax_sums_of_cells(situation: str, stride: int, blocks: tuple[int, int]) -> None:
    call = call_in(situation, length=29, heads=2, groups=1)
    grid = Grid(call.extent, *blocks)
    got = joined(scores.antidiagonal_scores(call, grid, stride))
    torch.testing.assert_close(got.double(), naive_antidiagonals(call, grid, stride), **TOLERANCE)


def test_cells_have_8_tokens_unless_told_otherwise() -> None:
    call = call_in("no padding", length=37)
    grid = Grid(call.extent, 16, 8)
    default, given = scores.antidiagonal_scores(call, grid), scores.antidiagonal_scores(call, grid, 8)
    assert torch.equal(joined(default), joined(given))


@pytest.mark.parametrize("stride", [0, 4, 6])
def test_a_stride_that_does_not_divide_the_blocks_is_named(stride: int) -> None:
    call = call_in("no padding")
    with pytest.raises(ValueError, match=f"stride must divide block_q and block_k, got {stride} for blocks 6 and 4"):
        next(scores.antidiagonal_scores(call, grid_of(call), stride))


# All of them

BY_BLOCK: dict[str, Callable[[AttentionCall, Grid], Iterator[tuple[range, Tensor]]]] = {
    "pooled": scores.pooled_scores,
    "energy": scores.row_block_energy,
    "antidiagonal": lambda call, grid: scores.antidiagonal_scores(call, grid, 2),
}
every_block_score = pytest.mark.parametrize("name", BY_BLOCK)


@every_block_score
def test_chunks_that_end_at_blocks_have_the_scores_of_one_piece(name: str) -> None:
    whole = call_in("left padding", length=37)
    extent = whole.extent
    expected = joined(BY_BLOCK[name](whole, grid_of(whole)))
    row = 24 + int(extent.first_query[0])  # a border of batch row 0
    chunk = replace(
        whole, q=whole.q[:1, :, row:], k=whole.k[:1], v=None, extent=extent.of_queries(row, 37).of_rows(slice(0, 1))
    )
    got = joined(BY_BLOCK[name](chunk, grid_of(chunk)))
    rows, keys = got.shape[2:]
    torch.testing.assert_close(got, expected[:1, :, 4 : 4 + rows, :keys], **TOLERANCE)


@every_block_score
def test_sinks_and_soft_cap_enter_no_block_score(name: str) -> None:
    call = call_in("chunk", length=37)
    other = replace(call, sinks=torch.ones(4), softcap=1.0)
    grid = grid_of(call)
    assert torch.equal(joined(BY_BLOCK[name](call, grid)), joined(BY_BLOCK[name](other, grid)))


def test_sinks_and_soft_cap_do_not_enter_the_probe() -> None:
    call = call_in("chunk", length=37)
    other = scores.last_query_probe(replace(call, sinks=torch.ones(4), softcap=1.0))
    for one, another in zip(scores.last_query_probe(call), other, strict=True):
        assert torch.equal(one, another)


@every_block_score
def test_parts_hold_as_many_rows_as_fit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call = call_in("left padding", length=37)
    grid = grid_of(call)
    heads = call.groups if name == "energy" else call.heads
    monkeypatch.setattr(backend_of(call, "pooled_scores"), "PART_BYTES", 2 * 4 * call.batch * heads * grid.key_blocks)
    parts = [part for part, _ in BY_BLOCK[name](call, grid)]
    assert parts == [range(0, 2), range(2, 4), range(4, 6), range(6, 7)]


@pytest.mark.parametrize(("batch", "query_len", "key_len"), [(0, 7, 7), (1, 0, 7), (2, 0, 0), (1, 7, 0)])
def test_nothing_has_no_scores(batch: int, query_len: int, key_len: int) -> None:
    row = [0] * batch
    extent = Extent(row, [query_len] * batch, row, [key_len] * batch)
    call = AttentionCall(torch.ones(batch, 4, query_len, 8), torch.ones(batch, 2, key_len, 8), extent=extent)
    for mass in scores.last_query_probe(call):
        assert torch.equal(mass, torch.zeros(batch, 4, extent.longest))
    for score in BY_BLOCK.values():
        assert all(part_scores.numel() == 0 for _, part_scores in score(call, grid_of(call)))


def test_a_negative_scale_turns_the_sign_of_products_of_means() -> None:
    """The order of logits is what methods choose by."""
    call = call_in("no padding", length=37)
    turned = AttentionCall(-call.q, call.k, extent=call.extent, scale=-0.25)
    for (part, expected), (same, got) in zip(
        scores.pooled_scores(call, grid_of(call)), scores.pooled_scores(turned, grid_of(call)), strict=True
    ):
        assert part == same
        assert torch.equal(got, expected)
