"""Scores in Triton: see `gossamer.backends.torch.scores`, the definitions. Nothing here waits for the device.

Logits of bf16 and fp16 inputs stay in fp32.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gossamer.backends import torch as definition
from gossamer.backends.torch.mass import check_lse
from gossamer.backends.triton.config import power_of_two
from gossamer.backends.triton.device import check_call, extent_on, integers_on, kernels, run
from gossamer.call import AttentionCall
from gossamer.plan import Grid, ceil_div

__all__ = [
    "PART_BYTES",
    "antidiagonal_scores",
    "block_mass",
    "last_query_probe",
    "pool_keys",
    "pool_queries",
    "pooled_scores",
    "row_block_energy",
]

# Scores of a part that is handed out at once: a part costs launches, and nothing else grows with it.
PART_BYTES = 64 << 20

_LOG2_E = math.log2(math.e)
_SPLIT_KEYS = 2048  # of the probe's first pass, a program
_SPAN_TILES = 8  # of its second pass
_PROBE_TILE = 64  # its rows and keys: a tile of twice the keys would not fit the registers when it is skewed
_FP32_ROWS = 32  # of a tile of a product without tensor cores, which is unrolled and has to fit the registers
_MERGE_TILE = 1024
_MOST_ROWS = 256  # of a tile of energies
_CELLS = 64  # rows and columns of a tile of antidiagonal cells, where a block has no more
_MOST_CELLS = 128


def last_query_probe(call: AttentionCall, last: int) -> tuple[Tensor, Tensor]:
    """See `gossamer.backends.torch.last_query_probe`."""
    check_call(call)
    width, extent = call.extent.longest, call.extent
    columns = torch.zeros(call.batch, call.heads, width, device=call.device)
    diagonals = torch.zeros_like(columns)
    rows = min(last, int(extent.query_count.max())) if call.batch else 0
    if rows < 1 or width == 0:
        return columns, diagonals
    q, k = _dense_rows(call.q), _dense_rows(call.k)
    row_tile, key_tile, mass_tile = _probe_tiles(q)
    row_tile = min(row_tile, power_of_two(last))
    row_tiles, tiles = ceil_div(rows, row_tile), ceil_div(width, mass_tile)
    steps = max(1, _SPLIT_KEYS // key_tile)
    splits, spans = ceil_div(width, steps * key_tile), ceil_div(tiles, _SPAN_TILES)
    positions, every = extent_on(extent, call.device), kernels()
    top = torch.empty(call.batch, call.heads, splits, row_tiles * row_tile, device=call.device)
    total = torch.empty_like(top)
    lse = torch.empty_like(top[:, :, 0])
    strides, scale = (*q.stride()[:3], *k.stride()[:3]), call.scale * _LOG2_E
    tile = dict(SHARE=call.share, ROW_TILES=row_tiles, ROWS=row_tile) | _operands(q)
    narrow = q.element_size() > 2 or q.shape[-1] > 128
    run(
        every.probe_sums, call.batch * call.heads * splits * row_tiles, q, k, top, total, *strides, positions,
        call.groups, last, splits, scale, KEYS=key_tile, STEPS=steps, **tile,
        num_warps=4, num_stages=1 if narrow else 3,
    )  # fmt: skip
    run(
        every.merge_sums, call.batch * call.heads, top, total, lse, splits, row_tiles * row_tile,
        TILE=power_of_two(row_tiles * row_tile),
    )  # fmt: skip
    partial = torch.zeros(call.batch, call.heads, row_tiles, tiles, mass_tile + row_tile, device=call.device)
    run(
        every.probe_mass, call.batch * call.heads * spans, q, k, lse, columns, partial, *strides, positions,
        call.groups, width, last, tiles, spans, scale, KEYS=mass_tile, STEPS=_SPAN_TILES, **tile,
        num_warps=4, num_stages=1 if narrow else 2,
    )  # fmt: skip
    pieces = ceil_div(width, _MERGE_TILE)
    run(
        every.merge_diagonals, call.batch * call.heads * pieces, partial, diagonals, positions, call.heads,
        width, last, tiles, pieces, ROW_TILES=row_tiles, ROWS=row_tile, KEYS=mass_tile, TILE=_MERGE_TILE,
    )  # fmt: skip
    return columns, diagonals


def _probe_tiles(q: Tensor) -> tuple[int, int, int]:
    """Rows, keys of the first pass, and keys of the second: no fewer than rows, since a diagonal crosses two tiles."""
    if q.element_size() > 2:
        return _FP32_ROWS, 32 if q.shape[-1] <= 64 else 16, _FP32_ROWS
    return _PROBE_TILE, _PROBE_TILE if q.shape[-1] > 128 else 2 * _PROBE_TILE, _PROBE_TILE


def pool_keys(call: AttentionCall, grid: Grid) -> Tensor:
    """See `gossamer.backends.torch.pool_keys`."""
    check_call(call)
    extent = call.extent
    tokens = torch.stack([extent.key_start, extent.key_count, torch.zeros_like(extent.key_count)], dim=1)
    return block_means(call.k, tokens, grid.block_k, grid.key_blocks)


def pool_queries(call: AttentionCall, grid: Grid) -> Tensor:
    """See `gossamer.backends.torch.pool_queries`."""
    check_call(call)
    extent = call.extent
    offset = extent.first_position - grid.first_block * grid.block_q
    tokens = torch.stack([extent.first_query, extent.query_count, offset], dim=1)
    return block_means(call.q, tokens, grid.block_q, grid.query_blocks)


def block_means(x: Tensor, tokens: Tensor, block: int, blocks: int) -> Tensor:
    """Means over blocks, fp32 ``[B, heads, blocks, dim]``; ``tokens`` as the kernel of this name reads them."""
    batch, heads, _, dim = x.shape
    means = torch.empty(batch, heads, blocks, dim, device=x.device)
    x, block_d = _dense_rows(x), power_of_two(dim)
    run(
        kernels().block_means, batch * heads * blocks, x, integers_on(tokens, x.device), means, *x.stride()[:3],
        heads, blocks, block, DIM=dim, BLOCK_D=block_d, TILE=min(64, power_of_two(block), 8192 // block_d), num_warps=4,
    )  # fmt: skip
    return means


def pooled_scores(call: AttentionCall, grid: Grid, queries: Tensor, keys: Tensor, part: range) -> Tensor:
    """See `gossamer.backends.torch.pooled_scores`. Products are exact fp32, whatever torch is told about its own."""
    check_call(call)
    dim = call.q.shape[-1]
    _check_means(queries, (call.batch, call.heads, grid.query_blocks, dim), torch.float32)
    _check_means(keys, (call.batch, call.groups, grid.key_blocks, dim), torch.float32)
    _check_part(part, grid)
    scores = torch.empty(call.batch, call.heads, len(part), grid.key_blocks, device=call.device)
    seen = integers_on(grid.seen[:, part.start : part.stop], call.device)
    tile_m, tile_n, warps = _FP32_ROWS, 16 if dim > 128 else 32, 4
    pieces = ceil_div(grid.key_blocks, tile_n)
    run(
        kernels().mean_products, call.batch * call.heads * ceil_div(len(part), tile_m) * pieces,
        queries.contiguous(), keys.contiguous(), seen, scores, call.heads, grid.query_blocks, grid.key_blocks,
        part.start, len(part), pieces, SHARE=call.share, TILE_M=tile_m, TILE_N=tile_n, DIM=dim,
        BLOCK_D=power_of_two(dim), num_warps=warps, num_stages=1,
    )  # fmt: skip
    return scores


def row_block_energy(
    call: AttentionCall, grid: Grid, keys: Tensor, part: range, *, per_head: bool = False, ended: bool = False
) -> Tensor:
    """See `gossamer.backends.torch.row_block_energy`."""
    check_call(call)
    batch, rows, key_blocks = call.batch, len(part), grid.key_blocks
    heads, share = (call.heads, 1) if per_head else (call.groups, call.share)
    _check_means(keys, (batch, call.groups, key_blocks, call.q.shape[-1]), call.q.dtype)
    _check_part(part, grid)
    tile_m, tile_n, warps = _energy_tiles(call.q, grid.block_q * share)
    tiles, parts = ceil_div(key_blocks, tile_n), ceil_div(grid.block_q * share, tile_m)
    energy = torch.zeros(batch, heads, rows, parts, key_blocks, device=call.device)
    if energy.numel() == 0:
        return energy[:, :, :, 0]
    q, keys = _dense_rows(call.q), _dense_rows(keys)
    narrow = q.element_size() > 2 or q.shape[-1] > 128
    top = torch.empty(batch, heads, rows, parts, device=q.device)
    reference = torch.full((*top.shape, tiles), float("-inf"), device=q.device)
    run(
        kernels().row_energies, top.numel(), q, keys, energy, reference, top, *q.stride()[:3], *keys.stride()[:3],
        extent_on(call.extent, q.device), call.groups, key_blocks, part.start, rows, tiles, call.scale * _LOG2_E,
        SHARE=share, BLOCK_Q=grid.block_q, BLOCK_K=grid.block_k, TILE_M=tile_m, PARTS=parts, TILE_N=tile_n,
        CAUSAL=call.extent.causal, ENDED=ended, LISTS=heads // call.groups, **_operands(q), num_warps=warps,
        num_stages=1 if narrow else 3,
    )  # fmt: skip
    out = energy[:, :, :, 0] if parts == 1 else torch.empty(batch, heads, rows, key_blocks, device=q.device)
    pieces = ceil_div(key_blocks, _MERGE_TILE)
    run(
        kernels().merge_energies, batch * heads * rows * pieces, energy, reference, top, out, key_blocks, tiles,
        pieces, PARTS=parts, TILE_N=tile_n, TILE=_MERGE_TILE,
    )  # fmt: skip
    return out


def block_mass(call: AttentionCall, lse: Tensor, grid: Grid, part: range) -> Tensor:
    """See `gossamer.backends.torch.block_mass`, which serves calls with a soft-cap, too."""
    if call.softcap is not None:
        return definition.block_mass(call, lse, grid, part)
    check_call(call)
    check_lse(call, lse)
    _check_part(part, grid)
    mass = torch.zeros(call.batch, call.heads, len(part), grid.key_blocks, device=call.device)
    if mass.numel() == 0:
        return mass
    q, k = _dense_rows(call.q), _dense_rows(call.k)
    tile_m, tile_n, warps = _energy_tiles(q, grid.block_q)
    run(
        kernels().block_mass, call.batch * call.heads * len(part), q, k, (lse.float() * _LOG2_E).contiguous(), mass,
        *q.stride()[:3], *k.stride()[:3], extent_on(call.extent, q.device), call.heads, call.query_len,
        grid.key_blocks, part.start, len(part), call.scale * _LOG2_E, SHARE=call.share, BLOCK_Q=grid.block_q,
        BLOCK_K=grid.block_k, TILE_M=min(tile_m, 64), TILE_N=min(tile_n, power_of_two(grid.block_k)), **_operands(q),
        num_warps=warps, num_stages=1,
    )  # fmt: skip
    return mass


def _energy_tiles(q: Tensor, rows: int) -> tuple[int, int, int]:
    """Rows, means of keys and warps for query blocks of ``rows`` rows."""
    wide = q.shape[-1] > 128
    if q.element_size() > 2:
        return min(64, power_of_two(rows)), 16 if wide else 32, 8 if wide else 4
    tile_m = min(64 if wide else _MOST_ROWS, power_of_two(rows))
    return tile_m, 32 if wide else 64, 8 if tile_m >= 128 else 4


def antidiagonal_scores(call: AttentionCall, grid: Grid, stride: int, part: range) -> Tensor:
    """See `gossamer.backends.torch.antidiagonal_scores`, which serves blocks of more than 128 cells."""
    if max(grid.block_q, grid.block_k) > _MOST_CELLS * stride:
        return definition.antidiagonal_scores(call, grid, stride, part)
    check_call(call)
    _check_part(part, grid)
    q, k = _dense_rows(call.q), _dense_rows(call.k)
    row_cells, key_cells = grid.block_q // stride, grid.block_k // stride
    row_lanes, key_lanes = (1 << (cells - 1).bit_length() for cells in (row_cells, key_cells))
    cells = _cells(q)
    row_blocks, tile_blocks = max(1, cells // row_lanes), max(1, cells // key_lanes)
    row_groups = ceil_div(len(part), row_blocks)
    mass = torch.zeros(call.batch, call.heads, len(part), grid.key_blocks, device=call.device)
    run(
        kernels().antidiagonal_mass, call.batch * call.heads * row_groups, q, k, mass, *q.stride()[:3],
        *k.stride()[:3], extent_on(call.extent, q.device), call.heads, grid.key_blocks, part.start,
        len(part), row_groups, call.scale * _LOG2_E / stride, SHARE=call.share, STRIDE=stride, ROW_CELLS=row_cells,
        ROW_BLOCKS=row_blocks, ROW_LANES=row_lanes, KEY_CELLS=key_cells, KEY_BLOCKS=tile_blocks, KEY_LANES=key_lanes,
        **_operands(q), num_warps=4, num_stages=2 if q.element_size() == 2 else 1,
    )  # fmt: skip
    return mass


def _cells(q: Tensor) -> int:
    return _FP32_ROWS if q.element_size() > 2 else _CELLS


def _operands(q: Tensor) -> dict[str, Any]:
    """Constants of kernels that multiply q with keys."""
    return {"DIM": q.shape[-1], "BLOCK_D": power_of_two(q.shape[-1])}


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _check_means(means: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(means.shape) != shape or means.dtype != dtype:
        raise ValueError(
            f"means must be {dtype} of shape {shape} for this call and grid, got {means.dtype} {tuple(means.shape)}"
        )


def _check_part(part: range, grid: Grid) -> None:
    if part.step != 1 or not 0 <= part.start <= part.stop <= grid.query_blocks:
        raise ValueError(f"a part must be consecutive rows of the {grid.query_blocks} of the plan, got {part}")
