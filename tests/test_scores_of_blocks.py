"""Scores that single methods choose by, against loops over positions, written from the formulas in their docstrings."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from definitions import Row, call_in, everywhere, products, rows_of, set_planner
from torch import Tensor

from gossamer import AttentionCall, Extent, scores
from gossamer.plan import Grid

TOLERANCE: dict[str, Any] = {"atol": 2e-5, "rtol": 2e-5}


@pytest.fixture(autouse=True, params=["torch", "cpu in the smallest pieces"])
def planner(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    set_planner(request, monkeypatch)


def joined(parts: Iterator[tuple[range, Tensor]]) -> Tensor:
    """All parts, which come in order and leave nothing out."""
    listed = list(parts)
    rows = [row for part, _ in listed for row in part]
    assert rows == list(range(len(rows)))
    return torch.cat([part_scores for _, part_scores in listed], dim=2)


def in_blocks(positions: list[int], block: int) -> dict[int, list[int]]:
    blocks: dict[int, list[int]] = {}
    for position in positions:
        blocks.setdefault(position // block, []).append(position)
    return blocks


def query_blocks(row: Row, block: int) -> dict[int, list[int]]:
    """Positions of live queries by row of the plan."""
    first = max(row.query_start, 0) // block
    return {n - first: queries for n, queries in in_blocks(row.positions(), block).items()}


def empty(call: AttentionCall, grid: Grid) -> Tensor:
    return torch.zeros(call.batch, call.heads, grid.query_blocks, grid.key_blocks, dtype=torch.float64)


@everywhere
@pytest.mark.parametrize("scale", [0.9, -2.0])
def test_pooled_mass_is_a_softmax_of_means_over_what_is_seen(situation: str, scale: float) -> None:
    call = replace(call_in(situation, length=37), scale=scale)
    grid = Grid(call.extent, 6, 4)
    excluded = torch.rand(call.batch, call.heads, grid.key_blocks, generator=torch.Generator().manual_seed(1)) < 0.3
    expected, whole = empty(call, grid), empty(call, grid)
    for b, row in enumerate(rows_of(call.extent)):
        for m, queries in query_blocks(row, 6).items():
            keys = in_blocks(list(range(row.key_count)), 4)
            seen = {n: own for n, own in keys.items() if any(row.allows(i, j) for i in queries for j in own)}
            for h in range(call.heads):
                q = call.q[b, h, [i - row.query_start for i in queries]].double().mean(0)
                k = {n: call.k[b, h // call.share, [j + row.key_start for j in own]] for n, own in seen.items()}
                weight = {n: math.exp(scale * float(q @ own.double().mean(0))) for n, own in k.items()}
                for n in weight:
                    whole[b, h, m, n] = weight[n] / sum(weight.values())
                weight = {n: one for n, one in weight.items() if not excluded[b, h, n]}
                for n in weight:
                    expected[b, h, m, n] = weight[n] / sum(weight.values())
    torch.testing.assert_close(joined(scores.pooled_mass(call, grid)).double(), whole, **TOLERANCE)
    got = joined(scores.pooled_mass(call, grid, excluded=excluded))
    torch.testing.assert_close(got.double(), expected, **TOLERANCE)


def test_pooled_mass_takes_what_was_made_of_the_means() -> None:
    call = call_in("left padding", length=37)
    grid = Grid(call.extent, 6, 4)
    queries, keys = scores.pool_queries(call, grid), scores.pool_keys(call, grid)
    doubled = joined(scores.pooled_mass(replace(call, scale=2 * call.scale), grid))
    assert torch.equal(joined(scores.pooled_mass(call, grid, 2 * queries, keys)), doubled)
    assert torch.equal(joined(scores.pooled_mass(call, grid, queries, 2 * keys)), doubled)


def mean_cosine(x: Tensor) -> float:
    unit = [row / max(float(row.norm()), 1e-12) for row in x.double()]
    return sum(float(a @ b) for a in unit for b in unit) / len(unit) ** 2


@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_similarity_is_the_mean_cosine_of_a_blocks_tokens(situation: str, dtype: torch.dtype) -> None:
    call = call_in(situation, length=37, dtype=dtype)
    grid = Grid(call.extent, 6, 4)
    of_queries = torch.zeros(call.batch, call.heads, grid.query_blocks, dtype=torch.float64)
    of_keys = torch.zeros(call.batch, call.groups, grid.key_blocks, dtype=torch.float64)
    for b, row in enumerate(rows_of(call.extent)):
        for m, queries in query_blocks(row, 6).items():
            for h in range(call.heads):
                of_queries[b, h, m] = mean_cosine(call.q[b, h, [i - row.query_start for i in queries]])
        for g in range(call.groups):
            centre = call.k[b, g, row.live_keys()].double().mean(0)
            for n, keys in in_blocks(list(range(row.key_count)), 4).items():
                own = call.k[b, g, [j + row.key_start for j in keys]].double() - centre
                of_keys[b, g, n] = mean_cosine(own) if row.key_count > 1 else 0.0
    torch.testing.assert_close(scores.query_similarity(call, grid).double(), of_queries, **TOLERANCE)
    torch.testing.assert_close(scores.key_similarity(call, grid).double(), of_keys, atol=1e-4, rtol=1e-4)


def test_tokens_of_length_zero_are_like_none() -> None:
    call = AttentionCall(torch.zeros(1, 1, 8, 4), torch.zeros(1, 1, 8, 4))
    grid = Grid(call.extent, 4, 4)
    assert not scores.query_similarity(call, grid).any()
    assert not scores.key_similarity(call, grid).any()


def cell_logits(call: AttentionCall, b: int, row: Row, stride: int) -> Iterator[tuple[int, int, dict[int, float]]]:
    """Head, row of cells, and the logits of the cells that count."""
    raw, keys = products(call)[b], in_blocks(list(range(row.key_count)), stride)
    for t, queries in in_blocks(row.positions(), stride).items():
        seen = [u for u, own in keys.items() if any(row.allows(i, j) for i in queries for j in own)]
        for h in range(call.heads):
            logits = {}
            for u in seen:
                pairs = [((t + 1) * stride - 1 - offset, u * stride + offset) for offset in range(stride)]
                logits[u] = (call.scale / stride) * sum(
                    raw[h][i - row.query_start][j + row.key_start] for i, j in pairs if i in queries and j in keys[u]
                )
            yield h, t, logits


@everywhere
@pytest.mark.parametrize(("stride", "blocks"), [(4, (8, 12)), (1, (3, 4))])
def test_antidiagonal_means_are_means_of_the_cells_that_count(
    situation: str, stride: int, blocks: tuple[int, int]
) -> None:
    call = call_in(situation, length=29, heads=4, groups=2)
    grid = Grid(call.extent, *blocks)
    cells = -(-call.extent.longest // stride)
    bonus = torch.rand(call.batch, call.groups, cells, generator=torch.Generator().manual_seed(2))
    sums, with_bonus, counts = empty(call, grid), empty(call, grid), empty(call, grid)
    for b, row in enumerate(rows_of(call.extent)):
        for h, t, logits in cell_logits(call, b, row, stride):
            m = t * stride // grid.block_q - max(row.query_start, 0) // grid.block_q
            for u, logit in logits.items():
                n = u * stride // grid.block_k
                sums[b, h, m, n] += logit
                with_bonus[b, h, m, n] += logit + bonus[b, h // call.share, u]
                counts[b, h, m, n] += 1
    counts = counts.clamp(min=1)
    got = joined(scores.antidiagonal_means(call, grid, stride))
    torch.testing.assert_close(got.double(), sums / counts, **TOLERANCE)
    got = joined(scores.antidiagonal_means(call, grid, stride, bonus))
    torch.testing.assert_close(got.double(), with_bonus / counts, **TOLERANCE)


@everywhere
@pytest.mark.parametrize(("stride", "blocks", "near"), [(4, (8, 12), 0.7), (5, (5, 10), 0.999)])
def test_antidiagonal_peaks_are_largest_cells_beside_their_rows(
    situation: str, stride: int, blocks: tuple[int, int], near: float
) -> None:
    call = call_in(situation, length=29, heads=4, groups=2)
    grid = Grid(call.extent, *blocks)
    expected, attained = empty(call, grid), empty(call, grid).bool()
    for b, row in enumerate(rows_of(call.extent)):
        for h, t, logits in cell_logits(call, b, row, stride):
            m = t * stride // grid.block_q - max(row.query_start, 0) // grid.block_q
            peaks: dict[int, float] = {}
            for u, logit in logits.items():
                n = u * stride // grid.block_k
                peaks[n] = max(peaks.get(n, -math.inf), logit)
            for n, peak in peaks.items():
                beside = math.exp(peak - max(peaks.values()))
                expected[b, h, m, n] += beside
                attained[b, h, m, n] |= beside >= near
    parts = list(scores.antidiagonal_peaks(call, grid, stride, near))
    got = joined((part, scored) for part, scored, _ in parts)
    torch.testing.assert_close(got.double(), expected, **TOLERANCE)
    assert torch.equal(joined((part, flags) for part, _, flags in parts), attained)


def test_cells_have_8_tokens_and_peaks_are_near_within_a_thousandth() -> None:
    call = call_in("no padding", length=37)
    grid = Grid(call.extent, 16, 8)
    means = scores.antidiagonal_means(call, grid), scores.antidiagonal_means(call, grid, 8)
    assert torch.equal(*(joined(one) for one in means))
    default, given = scores.antidiagonal_peaks(call, grid), scores.antidiagonal_peaks(call, grid, 8, 0.999)
    for (_, *one), (_, *other) in zip(default, given, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("score", [scores.antidiagonal_means, scores.antidiagonal_peaks])
def test_a_stride_that_does_not_divide_the_blocks_is_named(score) -> None:
    call = call_in("no padding")
    with pytest.raises(ValueError, match="stride must divide block_q and block_k, got 4 for blocks 6 and 4"):
        next(score(call, Grid(call.extent, 6, 4), 4))


@everywhere
@pytest.mark.parametrize("stride", [4, 50])
def test_the_value_bonus_is_a_standard_score_cut_at_zero(situation: str, stride: int) -> None:
    call = call_in(situation, length=37)
    expected = torch.zeros(call.batch, call.groups, -(-call.extent.longest // stride), dtype=torch.float64)
    for b, row in enumerate(rows_of(call.extent)):
        for g in range(call.groups):
            cells = in_blocks(list(range(row.key_count)), stride)
            logs = [
                math.log(max(float(call.values[b, g, j + row.key_start].double().norm()) for j in own) + 1e-6)
                for own in cells.values()
            ]
            if len(logs) < 2:
                continue
            mean = sum(logs) / len(logs)
            deviation = math.sqrt(sum((x - mean) ** 2 for x in logs) / (len(logs) - 1))
            for u, x in enumerate(logs):
                expected[b, g, u] = max(0.0, (x - mean) / (deviation + 1e-6))
    torch.testing.assert_close(scores.value_bonus(call, stride).double(), expected, atol=1e-4, rtol=1e-4)


@everywhere
@pytest.mark.parametrize("scale", [0.3, -0.3])
def test_products_of_the_last_query_are_summed_over_heads_and_not_scaled(situation: str, scale: float) -> None:
    call = replace(call_in(situation, length=20), scale=scale)
    expected = torch.zeros(call.batch, call.extent.longest, dtype=torch.float64)
    raw = products(call)
    for b, row in enumerate(rows_of(call.extent)):
        for i in row.live_queries()[-1:]:
            for j in row.live_keys():
                total = sum(raw[b][h][i][j] for h in range(call.heads))
                expected[b, j - row.key_start] = math.copysign(1.0, scale) * total
    torch.testing.assert_close(scores.last_query_products(call).double(), expected, **TOLERANCE)


def test_products_that_16_bits_cannot_hold_are_finite() -> None:
    x = torch.full((1, 1, 8, 8), 300.0, dtype=torch.float16)
    call = AttentionCall(x, x, x)
    grid = Grid(call.extent, 4, 4)
    assert (scores.last_query_products(call) == 8 * 300.0**2).all()
    assert (joined(scores.pooled_mass(call, grid))[0, 0, 1] == 0.5).all()
    assert (joined(scores.antidiagonal_means(call, grid, 2))[0, 0, 1] == call.scale * 8 * 300.0**2).all()
    peaks = joined((part, peaks) for part, peaks, _ in scores.antidiagonal_peaks(call, grid, 2))
    assert (peaks[0, 0, 1] == 2).all()
    torch.testing.assert_close(scores.query_similarity(call, grid), torch.ones(1, 1, 2))


@pytest.mark.parametrize(("batch", "query_len", "key_len"), [(0, 7, 7), (1, 0, 7), (2, 0, 0), (1, 7, 0)])
def test_nothing_has_no_scores(batch: int, query_len: int, key_len: int) -> None:
    row = [0] * batch
    extent = Extent(row, [query_len] * batch, row, [key_len] * batch)
    k = torch.ones(batch, 2, key_len, 8)
    call = AttentionCall(torch.ones(batch, 4, query_len, 8), k, k, extent=extent)
    grid = Grid(extent, 4, 4)
    assert all(part.numel() == 0 for _, part in scores.pooled_mass(call, grid))
    assert all(part.numel() == 0 for _, part in scores.antidiagonal_means(call, grid, 2))
    assert all(part.numel() == 0 for _, part, _ in scores.antidiagonal_peaks(call, grid, 2))
    assert scores.query_similarity(call, grid).shape == (batch, 4, grid.query_blocks)
    assert scores.key_similarity(call, grid).shape == (batch, 2, grid.key_blocks)
    assert not scores.last_query_products(call).any()
    assert not scores.value_bonus(call, 2).any()


def test_chunks_that_end_at_blocks_have_the_scores_of_one_piece() -> None:
    whole = call_in("left padding", length=37)
    extent = whole.extent
    row = 24 + int(extent.first_query[0])  # a border of batch row 0
    chunk = replace(
        whole, q=whole.q[:1, :, row:], k=whole.k[:1], v=None, extent=extent.of_queries(row, 37).of_rows(slice(0, 1))
    )
    for score in (
        scores.pooled_mass,
        lambda call, grid: scores.antidiagonal_means(call, grid, 2),
        lambda call, grid: ((part, peaks) for part, peaks, _ in scores.antidiagonal_peaks(call, grid, 2)),
    ):
        expected, got = joined(score(whole, Grid(extent, 6, 4))), joined(score(chunk, Grid(chunk.extent, 6, 4)))
        rows, keys = got.shape[2:]
        torch.testing.assert_close(got, expected[:1, :, 4 : 4 + rows, :keys], **TOLERANCE)
