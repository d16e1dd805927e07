"""Scores in Triton against their definitions: on a CUDA device where there is one, else interpreted on the CPU."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_support import DEVICE, DTYPES, FULL_SIZE, MARKS, moved

from gossamer import Extent
from gossamer.backends import torch as definition
from gossamer.backends import triton
from gossamer.backends.triton import scores
from gossamer.call import AttentionCall
from gossamer.plan import Grid
from gossamer.testing import SITUATIONS, make_call

pytestmark = MARKS
every_situation = pytest.mark.parametrize("situation", SITUATIONS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())


def wide(call: AttentionCall) -> AttentionCall:
    """The values of the inputs in fp32, zeros for NaN: for a definition that does not round to the dtype."""
    q, k, v = (t.float().nan_to_num() for t in (call.q, call.k, call.values))
    return replace(call, q=q, k=k, v=v)


def assert_probes(call: AttentionCall, last: int, atol: float = 2e-6, rtol: float = 1e-5) -> None:
    ours, expected = triton.last_query_probe(call, last), definition.last_query_probe(wide(call), last)
    for mass, oracle in zip(ours, expected, strict=True):
        torch.testing.assert_close(mass, oracle, atol=atol, rtol=rtol)


@every_situation
@pytest.mark.parametrize(("length", "last", "groups"), [(1, 64, 1), (90, 40, 2)])
def test_probe(situation: str, length: int, last: int, groups: int) -> None:
    assert_probes(moved(make_call(situation, length=length * FULL_SIZE, heads=2, groups=groups, dim=20)), last)


@every_dtype
def test_probe_of_several_tiles_of_rows_and_splits_of_keys(monkeypatch, dtype: torch.dtype) -> None:
    """Small ones, so that a short prompt has them; the last split of one batch row is empty."""
    monkeypatch.setattr(scores, "_SPLIT_KEYS", 128)
    monkeypatch.setattr(scores, "_SPAN_TILES", 2)
    monkeypatch.setattr(scores, "_MERGE_TILE", 64)
    call = moved(make_call("padded chunk", length=200, heads=2, groups=1, dim=80, dtype=dtype))
    assert_probes(call, 80)
    assert_probes(replace(call, extent=bounded(call.extent, causal=False, limit=70)), 80)


def bounded(extent: Extent, *, causal: bool, limit: int | None) -> Extent:
    fields = (extent.query_start, extent.query_count, extent.key_start, extent.key_count)
    return Extent(*fields, causal=causal, limit=limit)


def test_probe_of_logits_that_overflow_an_exponential() -> None:
    call = moved(make_call("no padding", length=100, heads=2, groups=1, dim=16))
    assert_probes(replace(call, scale=100.0), 64, atol=1e-3, rtol=1e-3)  # logits of 1000 are exact to 1e-4


@every_situation
@pytest.mark.parametrize("block", [5, 64])
def test_means_of_blocks(situation: str, block: int) -> None:
    dtype = list(DTYPES.values())[(SITUATIONS.index(situation) + block) % 3]
    call = moved(make_call(situation, length=75 * FULL_SIZE, heads=2, groups=1, dim=72, dtype=dtype))
    grid = Grid(call.extent, block, block)
    for verb in ("pool_keys", "pool_queries"):
        expected = getattr(definition, verb)(wide(call), grid)
        torch.testing.assert_close(getattr(triton, verb)(call, grid), expected, atol=1e-6, rtol=1e-6)


def in_parts(verb: str, call: AttentionCall, grid: Grid, *inputs: Any) -> tuple[Tensor, Tensor]:
    """Ours, of three parts of the plan's rows, and the definition's of all of them, from the same means."""
    first, second = grid.query_blocks // 3, grid.query_blocks // 2
    parts = (range(first), range(first, second), range(second, grid.query_blocks))
    ours = [getattr(triton, verb)(call, grid, *inputs, part) for part in parts]
    inputs = tuple(x.float() if isinstance(x, Tensor) else x for x in inputs)
    expected = getattr(definition, verb)(wide(call), grid, *inputs, range(grid.query_blocks))
    return torch.cat(ours, dim=2), expected


@every_situation
@pytest.mark.parametrize(("length", "block_q", "block_k", "dim"), [(100, 16, 8, 20), (50, 5, 3, 144), (90, 80, 70, 20)])
def test_block_mass(situation: str, length: int, block_q: int, block_k: int, dim: int) -> None:
    """Of a given LSE; rows for which it is -inf do not count."""
    dtype = list(DTYPES.values())[(SITUATIONS.index(situation) + block_q) % 3]
    call = moved(make_call(situation, length=length * FULL_SIZE, heads=2, groups=1, dim=dim, dtype=dtype))
    grid = Grid(call.extent, block_q, block_k)
    lse = torch.linspace(2, 5, call.q[..., 0].numel(), device=DEVICE).view(call.q.shape[:3]).clone()
    lse[:, :, ::7] = -math.inf
    first = grid.query_blocks // 3
    parts = (range(first), range(first, grid.query_blocks))
    ours = torch.cat([triton.block_mass(call, lse, grid, part) for part in parts], dim=2)
    expected = definition.block_mass(wide(call), lse, grid, range(grid.query_blocks))
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=3e-5)


@every_situation
@pytest.mark.parametrize(("length", "block_q", "block_k", "dim"), [(100, 16, 8, 20), (50, 5, 3, 144)])
def test_pooled_scores(situation: str, length: int, block_q: int, block_k: int, dim: int) -> None:
    call = moved(make_call(situation, length=length * FULL_SIZE, heads=2, groups=1, dim=dim, dtype=torch.bfloat16))
    grid = Grid(call.extent, block_q, block_k)
    means = triton.pool_queries(call, grid), triton.pool_keys(call, grid)
    torch.testing.assert_close(*in_parts("pooled_scores", call, grid, *means), atol=1e-5, rtol=1e-5)


@every_situation
@pytest.mark.parametrize(("length", "block_q", "block_k", "groups"), [(1, 64, 128, 4), (90, 32, 16, 1), (70, 40, 3, 2)])
def test_row_block_energy(situation: str, length: int, block_q: int, block_k: int, groups: int) -> None:
    dtype = list(DTYPES.values())[groups % 3]
    call = moved(make_call(situation, length=length * FULL_SIZE, heads=4, groups=groups, dim=24, dtype=dtype))
    grid = Grid(call.extent, block_q, block_k)
    keys = triton.pool_keys(call, grid).to(dtype)
    torch.testing.assert_close(*in_parts("row_block_energy", call, grid, keys), atol=1e-6, rtol=2e-5)


@every_situation
def test_energies_of_one_head_and_of_blocks_that_ended(situation: str) -> None:
    call = moved(make_call(situation, length=90, heads=4, groups=2, dim=24))
    grid = Grid(call.extent, 32, 16)
    keys = triton.pool_keys(call, grid)
    for tiles in ({"per_head": True}, {"ended": True}, {"per_head": True, "ended": True}):
        ours, defined = (
            backend.row_block_energy(call, grid, keys, range(grid.query_blocks), **tiles)
            for backend in (triton, definition)
        )
        torch.testing.assert_close(ours, defined, atol=1e-6, rtol=2e-5)


def test_energies_of_more_blocks_than_a_tile_and_more_rows() -> None:
    """The largest logit changes from tile to tile, of keys and of rows."""
    call = moved(make_call("no padding", length=200, heads=8, groups=1, dim=16))
    call.k[:, :, 150:] *= 5
    for block_q in (17, 64):
        grid = Grid(call.extent, block_q, 4)
        keys = triton.pool_keys(call, grid)
        torch.testing.assert_close(*in_parts("row_block_energy", call, grid, keys), atol=1e-6, rtol=5e-5)


@every_dtype
def test_wide_heads(dtype: torch.dtype) -> None:
    """Head dimensions above 128 have tiles of their own."""
    call = moved(make_call("left padding", length=100, heads=2, groups=1, dim=144, dtype=dtype))
    assert_probes(call, 40)
    grid = Grid(call.extent, 32, 4)
    keys = triton.pool_keys(call, grid).to(dtype)
    torch.testing.assert_close(*in_parts("row_block_energy", call, grid, keys), atol=1e-6, rtol=2e-5)


@every_situation
@pytest.mark.parametrize(("block_q", "block_k", "stride", "dim"), [(32, 64, 16, 64), (24, 40, 8, 80), (4, 6, 2, 20)])
def test_antidiagonal_scores(situation: str, block_q: int, block_k: int, stride: int, dim: int) -> None:
    call = moved(make_call(situation, length=75 * FULL_SIZE, heads=2, groups=1, dim=dim))
    ours, expected = in_parts("antidiagonal_scores", call, Grid(call.extent, block_q, block_k), stride)
    torch.testing.assert_close(ours, expected, atol=2e-6, rtol=1e-5)


def test_blocks_of_more_cells_than_a_tile_has_are_scored_by_the_definition() -> None:
    call = moved(make_call("no padding", length=300, heads=1, groups=1, dim=16))
    grid = Grid(call.extent, 258, 64)
    ours = triton.antidiagonal_scores(call, grid, 2, range(grid.query_blocks))
    assert torch.equal(ours, definition.antidiagonal_scores(call, grid, 2, range(grid.query_blocks)))


def everything(call: AttentionCall) -> list[Tensor]:
    grid = Grid(call.extent, 16, 8)
    queries, keys, rows = triton.pool_queries(call, grid), triton.pool_keys(call, grid), range(grid.query_blocks)
    return [
        *triton.last_query_probe(call, 40),
        triton.pooled_scores(call, grid, queries, keys, rows),
        triton.row_block_energy(call, grid, keys.to(call.q.dtype), rows),
        triton.antidiagonal_scores(call, grid, 4, rows),
    ]


@every_dtype
def test_scores_repeat_and_do_not_depend_on_strides(dtype: torch.dtype) -> None:
    call = moved(make_call("left padding", length=70 * FULL_SIZE, heads=2, groups=1, dim=40, dtype=dtype))

    def spread(x: Tensor) -> Tensor:
        """Tokens before heads in memory, between rows of NaN, as projections leave them."""
        holder = torch.full((x.shape[0], x.shape[2], x.shape[1], x.shape[3] + 5), math.nan, dtype=dtype, device=DEVICE)
        holder[..., : x.shape[3]] = x.transpose(1, 2)
        return holder[..., : x.shape[3]].transpose(1, 2)

    expected = everything(call)
    for other in (call, replace(call, q=spread(call.q), k=spread(call.k))):
        assert all(torch.equal(*pair) for pair in zip(everything(other), expected, strict=True))


@pytest.mark.parametrize("situation", ["left padding", "right padding", "padded chunk", "bidirectional"])
def test_scores_depend_neither_on_padding_nor_on_companions(monkeypatch, situation: str) -> None:
    """Bit for bit, what a batch row has alone and without its dead rows and slots."""
    monkeypatch.setattr(scores, "_SPLIT_KEYS", 64)
    call = moved(make_call(situation, length=100, heads=2, groups=1, dim=16, dtype=torch.bfloat16))
    together, extent = everything(call), call.extent
    for b in range(call.batch):
        first, count = int(extent.first_query[b]), int(extent.query_count[b])
        start, keys = int(extent.key_start[b]), int(extent.key_count[b])
        own = Extent([int(extent.first_position[b])], [count], [0], [keys], causal=extent.causal)
        q, k = call.q[b : b + 1, :, first : first + count], call.k[b : b + 1, :, start : start + keys]
        for one, all_rows in zip(everything(AttentionCall(q, k, k, own)), together, strict=True):
            assert torch.equal(one[0], all_rows[b][tuple(slice(size) for size in one.shape[1:])])


def test_bad_input_is_named() -> None:
    call = moved(make_call("no padding", length=10, heads=2, groups=1, dim=8))
    grid = Grid(call.extent, 4, 4)
    keys = triton.pool_keys(call, grid)
    with pytest.raises(TypeError, match=r"float32, bfloat16 or float16, got torch.float64"):
        triton.last_query_probe(replace(call, q=call.q.double(), k=call.k.double(), v=None), 4)
    with pytest.raises(ValueError, match=r"shape \(1, 1, 3, 8\) for this call and grid, got torch.float32 \(1, 1, 2"):
        triton.row_block_energy(call, grid, keys[:, :, :2], range(1))
    with pytest.raises(ValueError, match=r"means must be torch\.float32"):
        triton.pooled_scores(call, grid, triton.pool_queries(call, grid), keys.half(), range(1))
    with pytest.raises(ValueError, match=r"consecutive rows of the 3 of the plan, got range\(0, 4\)"):
        triton.row_block_energy(call, grid, keys, range(4))
