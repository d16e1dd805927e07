"""The exact oracle against the whole softmax matrix in fp64, in every situation a call can be in."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gossamer import AttentionCall, Extent, SparsePlan, methods, oracle
from gossamer.plan import Grid
from gossamer.testing import SITUATIONS, make_call, random_plan

pytestmark = pytest.mark.filterwarnings("ignore:gossamer runs its torch reference path:RuntimeWarning")

HEADS, GROUPS, DIM = 4, 2, 16
# Odd blocks, so that no block ends where a tile or the prompt does.
BLOCKS: dict[str, Any] = {"block_q": 16, "block_k": 24}
# fp32 logits of this size carry errors of 1e-6; a mass sums up to 130 weights.
TOLERANCE: dict[str, Any] = {"rtol": 2e-5, "atol": 2e-5}

in_every_situation = pytest.mark.parametrize("situation", SITUATIONS)


def call_in(situation: str, length: int, dtype: torch.dtype = torch.float32) -> AttentionCall:
    """Whatever is dead is NaN."""
    return make_call(situation, length=length, heads=HEADS, groups=GROUPS, dim=DIM, dtype=dtype, seed=length)


def grid_of(call: AttentionCall) -> Grid:
    return Grid(call.extent, **BLOCKS)


def softmax_matrix(call: AttentionCall) -> Tensor:
    """fp64 ``[B, H, S, T]``: all weights of pairs that are allowed, 0 elsewhere."""
    allowed = call.extent.allowed(torch.arange(call.query_len), call.key_len)[:, None]
    q, k = call.q.double().nan_to_num(), call.k.double().nan_to_num()
    logits = q @ k.repeat_interleave(call.share, 1).transpose(-1, -2) * call.scale
    if call.softcap is not None:
        logits = call.softcap * torch.tanh(logits / call.softcap)
    logits = logits.masked_fill(~allowed, float("-inf"))
    lse = logits.logsumexp(-1)
    if call.sinks is not None:
        lse = torch.logaddexp(lse, call.sinks.double()[:, None])
    return (logits - lse[..., None]).exp().masked_fill(~allowed, 0.0)


def by_position(call: AttentionCall, matrix: Tensor) -> Tensor:
    """From query rows and key slots to positions, from 0 on; what is dead is dropped."""
    extent = call.extent
    queries = int((extent.first_position + extent.query_count).max())
    out = torch.zeros(*matrix.shape[:2], queries, extent.longest, dtype=matrix.dtype)
    for b in range(call.batch):
        rows = extent.live_queries(call.query_len)[b].nonzero()[:, 0]
        keys = extent.live_keys(call.key_len)[b].nonzero()[:, 0]
        live = matrix[b][:, rows][:, :, keys]
        first = int(extent.first_position[b])
        out[b, :, first : first + len(rows), : len(keys)] = live
    return out


def blocks_of(call: AttentionCall, matrix: Tensor, block_q: int, block_k: int) -> Tensor:
    positions = by_position(call, matrix)
    rows, keys = -positions.shape[2] % block_q, -positions.shape[3] % block_k
    padded = torch.nn.functional.pad(positions, (0, keys, 0, rows))
    every = padded.unflatten(3, (-1, block_k)).sum(-1).unflatten(2, (-1, block_q)).sum(3)
    grid = Grid(call.extent, block_q, block_k)
    index = grid.first_block[:, None] + torch.arange(grid.query_blocks)
    inside = (index < every.shape[2])[:, None, :, None]
    index = index.clamp(max=max(0, every.shape[2] - 1))[:, None, :, None].expand(*every.shape[:2], -1, every.shape[3])
    return torch.where(inside, every.gather(2, index), 0)


def assert_masses_are_those_of_the_whole_matrix(call: AttentionCall) -> None:
    matrix = softmax_matrix(call)
    got = oracle.exact_masses(call, **BLOCKS)
    positions = by_position(call, matrix)
    distance = (torch.arange(positions.shape[2])[:, None] - torch.arange(positions.shape[3])).abs()
    diagonals = torch.zeros(*positions.shape[:2], max(positions.shape[2:]), dtype=torch.float64)
    diagonals.scatter_add_(2, distance.expand(positions.shape).flatten(2), positions.flatten(2))
    torch.testing.assert_close(got.columns.double(), positions.sum(2), **TOLERANCE)
    torch.testing.assert_close(got.diagonals.double(), diagonals[..., : positions.shape[3]], **TOLERANCE)
    torch.testing.assert_close(got.blocks.double(), blocks_of(call, matrix, **BLOCKS), **TOLERANCE)
    assert torch.equal(got.rows, call.extent.query_count)


@in_every_situation
@pytest.mark.parametrize("length", [1, 63, 130])
def test_masses_are_those_of_the_whole_matrix(length: int, situation: str) -> None:
    assert_masses_are_those_of_the_whole_matrix(call_in(situation, length))


@in_every_situation
@pytest.mark.usefixtures("smallest_constants")
def test_masses_in_the_smallest_tiles_are_those_of_the_whole_matrix(situation: str) -> None:
    assert_masses_are_those_of_the_whole_matrix(call_in(situation, 27))


@in_every_situation
@pytest.mark.usefixtures("smallest_constants")
def test_block_mass_in_the_smallest_tiles_is_that_of_the_whole_matrix(situation: str) -> None:
    call = call_in(situation, 27)
    got = oracle.block_mass(call, oracle.log_sum_exp(call), grid_of(call))
    torch.testing.assert_close(got.double(), blocks_of(call, softmax_matrix(call), **BLOCKS), **TOLERANCE)


@pytest.mark.usefixtures("smallest_constants")
@pytest.mark.parametrize("situation", ["padded chunk", "bidirectional"])
def test_recall_in_the_smallest_pieces_is_the_mass_inside_the_plan(situation: str) -> None:
    call = call_in(situation, 27)
    check_recall(call, block_plan(call, GROUPS, 0.3))


@in_every_situation
def test_block_mass_is_that_of_the_whole_matrix(situation: str) -> None:
    call = call_in(situation, 130)
    got = oracle.block_mass(call, oracle.log_sum_exp(call), grid_of(call))
    torch.testing.assert_close(got.double(), blocks_of(call, softmax_matrix(call), **BLOCKS), **TOLERANCE)


@in_every_situation
@pytest.mark.usefixtures("constants")
def test_block_peaks_are_those_of_the_whole_matrix(situation: str) -> None:
    call = call_in(situation, 27)
    grid, whole = grid_of(call), softmax_matrix(call)
    got = oracle.block_peaks(call, oracle.log_sum_exp(call), grid)
    expected = torch.zeros_like(got)
    for b, h, i, j in whole.nonzero().tolist():
        query, key = i + int(call.extent.query_start[b]), j - int(call.extent.key_start[b])
        m, n = query // grid.block_q - int(grid.first_block[b]), key // grid.block_k
        expected[b, h, m, n] = max(float(expected[b, h, m, n]), float(whole[b, h, i, j]))
    torch.testing.assert_close(got, expected, **TOLERANCE)


def test_a_row_of_blocks_sums_to_its_live_rows() -> None:
    call = call_in("left padding", 130)
    grid = grid_of(call)
    got = oracle.block_mass(call, oracle.log_sum_exp(call), grid)
    rows = grid.queries.diff(dim=-1)[..., 0].float()
    torch.testing.assert_close(got.sum(3), rows[:, None].expand(-1, HEADS, -1), **TOLERANCE)


def test_tiles_smaller_and_larger_than_blocks_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    call = call_in("padded chunk", 500)
    whole = oracle.exact_masses(call, block_q=100, block_k=150)
    monkeypatch.setattr("gossamer.backends.torch.tiles.TILE_BYTES", 1 << 10)
    small = oracle.exact_masses(call, block_q=100, block_k=150)
    for name in ("columns", "diagonals", "blocks", "rows"):
        torch.testing.assert_close(getattr(small, name), getattr(whole, name), **TOLERANCE)


@in_every_situation
def test_samples_of_all_offsets_add_up_to_the_whole(situation: str) -> None:
    call = call_in(situation, 250)
    whole = oracle.exact_masses(call, **BLOCKS)
    parts = [oracle.exact_masses(call, step=3, offset=offset, **BLOCKS) for offset in range(3)]
    for name in ("columns", "diagonals", "rows"):
        torch.testing.assert_close(sum(getattr(part, name) for part in parts), getattr(whole, name), **TOLERANCE)
    for part in parts:
        torch.testing.assert_close(part.blocks, whole.blocks[:, :, list(part.query_blocks)], **TOLERANCE)


@pytest.mark.parametrize(("step", "offset"), [(0, None), (2, 2), (2, -1)])
def test_a_step_out_of_range_is_an_error(step: int, offset: int | None) -> None:
    with pytest.raises(ValueError, match=f"step={step}, offset={offset}"):
        oracle.exact_masses(call_in("no padding", 63), step=step, offset=offset)


def test_an_lse_of_another_shape_is_an_error() -> None:
    call = call_in("no padding", 63)
    with pytest.raises(ValueError, match=r"\(1, 4, 63\), got \(1, 4, 62\)"):
        oracle.block_mass(call, torch.zeros(1, 4, 62), grid_of(call))


def test_bfloat16_is_computed_in_float32() -> None:
    call = call_in("chunk", 130, torch.bfloat16)
    wide = replace(call, q=call.q.float(), k=call.k.float(), v=call.values.float())
    torch.testing.assert_close(oracle.log_sum_exp(call), oracle.log_sum_exp(wide), rtol=0, atol=0)
    got = oracle.exact_masses(call, **BLOCKS)
    torch.testing.assert_close(got.blocks.double(), blocks_of(call, softmax_matrix(wide), **BLOCKS), **TOLERANCE)


@in_every_situation
def test_visible_pairs_are_counted_block_by_block(situation: str) -> None:
    call = call_in(situation, 130)
    allowed = call.extent.allowed(torch.arange(call.query_len), call.key_len)[:, None].long()
    grid = grid_of(call)
    assert torch.equal(oracle.visible_pairs(grid), blocks_of(call, allowed, **BLOCKS)[:, 0])
    some = range(1, grid.query_blocks, 2)
    assert torch.equal(oracle.visible_pairs(grid, some), oracle.visible_pairs(grid)[:, list(some)])


@in_every_situation
@pytest.mark.parametrize("name", [name for name in methods.available() if name != "per_head"])
def test_plan_recall_is_the_mass_inside_the_plan(name: str, situation: str) -> None:
    small: dict[str, dict[str, Any]] = {
        "a_shape": {"sink": 3, "window": 20},
        "tri_shape": {"sink": 3, "window": 20, "last": 9},
        "vertical_slash": {"vertical_size": 9, "slash_size": 20},
        "minference": {"vertical_size": 9, "slash_size": 20},
        "block_sparse": {"blocks": 1},
        "moa": {"alphas": [[40, 60, 80, 30]], "betas": [[0.0] * 4], "sink": 4, "least": 4, "block": 16},
        "duo_attention": {"gates": [[0.0, 1.0]], "sink": 3, "recent": 20},
        "lserve": {"gates": [[0.0, 1.0]], "sink": 3, "local": 20},
    }
    call = replace(call_in(situation, 130), layer=0)
    check_recall(call, methods.create(name, **small.get(name, {})).plan(call))


@pytest.mark.parametrize("seed", range(6))
def test_plan_recall_of_random_plans(seed: int) -> None:
    call = call_in("chunk", 130)
    size: dict[str, Any] = {"query_len": call.query_len, "key_len": call.key_len}
    plan = random_plan(seed, batch=1, heads=(2, 4)[seed % 2], permuted=seed % 3 == 0, **size, **BLOCKS)
    check_recall(replace(call, sinks=torch.tensor([-1.0, 0.5, 2.0, 4.0])), plan)


def check_recall(call: AttentionCall, plan: SparsePlan) -> None:
    matrix = softmax_matrix(call)
    inside = (matrix * plan.to_mask().repeat_interleave(HEADS // plan.heads, 1)).sum(-1)
    counted = (call.extent.allowed(torch.arange(call.query_len), call.key_len)).any(-1)[:, None]
    sink = counted.double() - matrix.sum(-1)
    expected = ((inside + sink) * counted).sum(-1) / counted.sum(-1)
    got = oracle.plan_recall(call, plan, oracle.log_sum_exp(call))
    torch.testing.assert_close(got.double(), expected, **TOLERANCE)


def block_plan(call: AttentionCall, heads: int, share: float) -> SparsePlan:
    """Blocks by chance, and the diagonal ones."""
    grid = grid_of(call)
    own = oracle.visible_pairs(grid, limit=1) > 0
    shape = (call.batch, heads, grid.query_blocks, grid.key_blocks)
    chosen = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < share
    mask = chosen | own[:, None]
    return SparsePlan.from_block_mask(mask, call.query_len, call.key_len, extent=call.extent, **BLOCKS)


@in_every_situation
@pytest.mark.parametrize("heads", [GROUPS, HEADS])
def test_the_oracle_beats_a_plan_with_as_many_blocks(heads: int, situation: str) -> None:
    call = call_in(situation, 250)
    plan, lse, grid = block_plan(call, heads, 0.2), oracle.log_sum_exp(call), grid_of(call)
    mass, counts = oracle.block_mass(call, lse, grid), oracle.block_counts(plan)
    mask = oracle.oracle_blocks(mass, counts, grid)
    assert torch.equal(mask.sum((2, 3)), counts)
    own = oracle.visible_pairs(grid, limit=1) > 0
    assert bool((mask | ~own[:, None]).all())

    best = oracle.oracle_recall(mass, mask, call.extent.query_count)
    recall = oracle.plan_recall(call, plan, lse)
    # A plan that is shared by a group is judged by the group.
    assert bool((best.unflatten(1, (heads, -1)).mean(2) >= recall.unflatten(1, (heads, -1)).mean(2)).all())
    ours = SparsePlan.from_block_mask(mask, call.query_len, call.key_len, extent=call.extent, **BLOCKS)
    torch.testing.assert_close(oracle.plan_recall(call, ours, lse), best, **TOLERANCE)


SQUARE = Grid(Extent.full(1, 64, 64), 16, 16)


def test_the_oracle_picks_the_heaviest_blocks() -> None:
    mass = torch.tensor([[4.0, 0, 0, 0], [3.0, 1, 0, 0], [2.9, 3.1, 0, 0], [0, 0, 3.2, 0]])[None, None]
    mask = oracle.oracle_blocks(mass, torch.tensor([[6]]), SQUARE)
    assert mask[0, 0].nonzero().tolist() == [[0, 0], [1, 1], [2, 1], [2, 2], [3, 2], [3, 3]]


def test_more_blocks_than_there_are_give_them_all() -> None:
    grid = Grid(Extent.full(1, 130, 130), **BLOCKS)
    mask = oracle.oracle_blocks(torch.rand(1, HEADS, 9, 6), torch.full((1, HEADS), 1000), grid)
    assert torch.equal(mask, (oracle.visible_pairs(grid) > 0)[:, None].expand(1, HEADS, 9, 6))


def test_counts_for_another_number_of_heads_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"a divisor of 4, got \(1, 3\)"):
        oracle.oracle_blocks(torch.rand(1, 4, 4, 4), torch.ones(1, 3, dtype=torch.int64), SQUARE)


def test_mass_of_another_block_size_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"\(2, 2\) blocks.*has \(4, 4\)"):
        oracle.oracle_blocks(torch.rand(1, 4, 2, 2), torch.ones(1, 4, dtype=torch.int64), SQUARE)


def test_a_plan_of_bands_is_worth_the_blocks_that_its_pairs_fill() -> None:
    plan = SparsePlan(1, 256, 256, Extent.full(1, 256, 256), block_q=64, block_k=64, window=[129])
    diagonal = 4 * (64 * 65 // 2)
    full = (int(plan.count_pairs()) - diagonal) // (64 * 64)
    assert full > 0
    assert oracle.block_counts(plan).tolist() == [[4 + full]]


def test_a_batch_row_without_queries_has_recall_one() -> None:
    q, k = torch.randn(2, HEADS, 40, DIM), torch.randn(2, GROUPS, 40, DIM)
    call = AttentionCall(q, k, k, Extent([-40, 0], [0, 40], [40, 0], [0, 40]))
    got = oracle.plan_recall(call, SparsePlan(GROUPS, 40, 40, call.extent, window=5), oracle.log_sum_exp(call))
    assert bool((got[0] == 1).all())
    assert bool((got[1] < 1).all())
