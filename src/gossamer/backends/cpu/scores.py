"""Scores in C++. The definitions are in `gossamer.backends.torch.scores`, with the same names and signatures.

Scores agree with torch's up to the order of fp32 sums and the rounding of exponentials. On each instruction set a batch
row's scores depend, bit for bit, on nothing but its own live tokens: not on padding, the rest of the batch or the
number of threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.backends import torch as definition
from gossamer.backends.cpu.lists import listed
from gossamer.backends.cpu.native import active_isa, check_tensors, kernels
from gossamer.backends.cpu.views import (
    address,
    arrays,
    dense_rows,
    grid_view,
    part_view,
    score_view,
    tensor_view,
    tokens_view,
)
from gossamer.backends.torch.mass import check_lse
from gossamer.call import AttentionCall
from gossamer.plan import Grid, ceil_div
from gossamer.rules import PerHead, per_head

__all__ = [
    "NEAR_BYTES",
    "PART_BYTES",
    "antidiagonal_peaks",
    "antidiagonal_scores",
    "block_attention",
    "block_mass",
    "group_differences",
    "group_shares",
    "last_query_probe",
    "mean_row_maxima",
    "near_keys",
    "pool_keys",
    "pool_queries",
    "pooled_scores",
    "row_block_energy",
]

# Scores of a part that is handed out at once: the kernels have no other working set that grows.
PART_BYTES = 64 << 20
# Scores of a part of which only a bit each is kept.
NEAR_BYTES = 1 << 30


def last_query_probe(call: AttentionCall, last: int) -> tuple[Tensor, Tensor]:
    """See `gossamer.backends.torch.last_query_probe`."""
    _check(call, call.q, call.k)
    if last < 1:
        raise ValueError(f"the probe needs at least one row, got last={last}")
    width = call.extent.longest
    columns = torch.zeros(call.batch, call.heads, width, device="cpu")
    diagonals = torch.zeros_like(columns)
    q, k = dense_rows(call.q), dense_rows(call.k)
    kernels().probe(
        active_isa(q.dtype),
        score_view(q, k, call),
        last=last,
        width=width,
        columns=columns.data_ptr(),
        diagonals=diagonals.data_ptr(),
    )
    return columns, diagonals


def pool_keys(call: AttentionCall, grid: Grid) -> Tensor:
    """See `gossamer.backends.torch.pool_keys`."""
    _check(call, call.k)
    grid = _of_call(grid, call)
    means = torch.empty(call.batch, call.groups, grid.key_blocks, call.k.shape[-1], device="cpu")
    k = dense_rows(call.k)
    kernels().pool_keys(
        active_isa(k.dtype),
        tokens_view(k),
        grid_view(grid),
        blocks=grid.key_blocks,
        out=means.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return means


def pool_queries(call: AttentionCall, grid: Grid) -> Tensor:
    """See `gossamer.backends.torch.pool_queries`."""
    _check(call, call.q)
    grid = _of_call(grid, call)
    means = torch.empty(call.batch, call.heads, grid.query_blocks, call.q.shape[-1], device="cpu")
    q = dense_rows(call.q)
    kernels().pool_queries(
        active_isa(q.dtype),
        tensor_view(q),
        grid_view(grid),
        blocks=grid.query_blocks,
        out=means.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return means


def pooled_scores(call: AttentionCall, grid: Grid, queries: Tensor, keys: Tensor, part: range) -> Tensor:
    """See `gossamer.backends.torch.pooled_scores`. ``queries`` and ``keys`` are fp32."""
    _check(call, queries, keys)
    grid = _of_call(grid, call)
    _check_part(part, grid)
    _check_pooled(queries, "queries", (call.batch, call.heads, grid.query_blocks, call.q.shape[-1]), torch.float32)
    _check_pooled(keys, "keys", (call.batch, call.groups, grid.key_blocks, call.q.shape[-1]), torch.float32)
    scores = torch.empty(call.batch, call.heads, len(part), grid.key_blocks, device="cpu")
    queries, keys = queries.contiguous(), keys.contiguous()
    kernels().pooled_products(
        active_isa(torch.float32),
        tensor_view(queries),
        tensor_view(keys),
        grid_view(grid),
        part_view(part),
        out=scores.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return scores


def block_attention(
    call: AttentionCall, grid: Grid, queries: Tensor, keys: Tensor, scale: float, part: range
) -> Tensor:
    """See `gossamer.backends.torch.block_attention`, which computes what needs a gradient: gates are trained by it."""
    if torch.is_grad_enabled() and (queries.requires_grad or keys.requires_grad):
        return definition.block_attention(call, grid, queries, keys, scale, part)
    _check(call, queries, keys)
    grid = _of_call(grid, call)
    _check_part(part, grid)
    channels = queries.shape[-1]
    _check_pooled(queries, "queries", (call.batch, call.heads, grid.query_blocks, channels), torch.float32)
    _check_pooled(keys, "keys", (call.batch, keys.shape[1], grid.key_blocks, channels), torch.float32)
    shares = torch.empty(call.batch, call.heads, len(part), grid.key_blocks, device="cpu")
    queries, keys = queries.contiguous(), keys.contiguous()
    kernels().pooled_shares(
        active_isa(torch.float32),
        tensor_view(queries),
        tensor_view(keys),
        grid_view(grid),
        part_view(part),
        scale=scale,
        out=shares.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return shares


def block_mass(call: AttentionCall, lse: Tensor, grid: Grid, part: range) -> Tensor:
    """See `gossamer.backends.torch.block_mass`, which serves calls with a soft-cap, too."""
    if call.softcap is not None:
        return definition.block_mass(call, lse, grid, part)
    _check(call, call.q, call.k)
    check_lse(call, lse)
    grid = _of_call(grid, call)
    _check_part(part, grid)
    mass = torch.empty(call.batch, call.heads, len(part), grid.key_blocks, device="cpu")
    q, k, lse = dense_rows(call.q), dense_rows(call.k), lse.float().contiguous()
    (given,) = arrays((lse,), (torch.float32,))
    kernels().block_mass(
        active_isa(q.dtype),
        score_view(q, k, call),
        grid_view(grid),
        part_view(part),
        key_blocks=grid.key_blocks,
        lse=given,
        out=mass.data_ptr(),
    )
    return mass


def row_block_energy(
    call: AttentionCall, grid: Grid, keys: Tensor, part: range, *, per_head: bool = False, ended: bool = False
) -> Tensor:
    """See `gossamer.backends.torch.row_block_energy`. ``keys`` have q's dtype."""
    _check(call, call.q, keys)
    grid = _of_call(grid, call)
    _check_part(part, grid)
    _check_pooled(keys, "keys", (call.batch, call.groups, grid.key_blocks, call.q.shape[-1]), call.q.dtype)
    heads = call.heads if per_head else call.groups
    energies = torch.empty(call.batch, heads, len(part), grid.key_blocks, device="cpu")
    q, keys = dense_rows(call.q), keys.contiguous()
    kernels().block_energy(
        active_isa(q.dtype),
        score_view(q, keys, call),
        grid_view(grid),
        part_view(part),
        per_head=per_head,
        ended=ended,
        out=energies.data_ptr(),
    )
    return energies


def group_differences(
    call: AttentionCall, grid: Grid, queries: Tensor, anchors: Tensor | None, group: int, part: range
) -> Tensor:
    """See `gossamer.backends.torch.group_differences`. ``queries`` have q's dtype."""
    grid = _check_groups(call, grid, queries, group, part)
    width = call.extent.longest
    above = torch.empty(call.batch, call.heads, len(part), width, device="cpu")
    anchors = _checked_anchors(call, grid, anchors)
    q, k, queries = dense_rows(call.q), dense_rows(call.k), queries.contiguous()
    kernels().group_differences(
        active_isa(q.dtype),
        score_view(q, k, call),
        tensor_view(queries),
        grid_view(grid),
        anchors=address(anchors),
        group=group,
        part=part_view(part),
        width=width,
        out=above.data_ptr(),
    )
    return above


def near_keys(
    call: AttentionCall,
    grid: Grid,
    queries: Tensor,
    anchors: Tensor | None,
    group: int,
    part: range,
    bar: PerHead,
    left_out: Tensor,
) -> tuple[Tensor, Tensor]:
    """See `gossamer.backends.torch.near_keys`. ``queries`` have q's dtype."""
    grid = _check_groups(call, grid, queries, group, part)
    width, rows = call.extent.longest, (call.batch, call.heads, len(part))
    bits = torch.empty(*rows, ceil_div(width, 64), dtype=torch.int64, device="cpu")
    counts = torch.empty(rows, dtype=torch.int64, device="cpu")
    bars = per_head(bar, call.heads, torch.float32, "cpu").contiguous()
    ranges = left_out[:, part.start : part.stop].to("cpu", torch.int64).contiguous()
    if ranges.shape != (call.batch, len(part), ranges.shape[2], 2):
        raise ValueError(f"left_out must be ({call.batch}, groups, any number, 2), got {tuple(left_out.shape)}")
    anchors = _checked_anchors(call, grid, anchors)
    q, k, queries = dense_rows(call.q), dense_rows(call.k), queries.contiguous()
    kernels().near_keys(
        active_isa(q.dtype),
        score_view(q, k, call),
        tensor_view(queries),
        grid_view(grid),
        anchors=address(anchors),
        group=group,
        part=part_view(part),
        width=width,
        bars=bars.data_ptr(),
        left_out=ranges.data_ptr(),
        ranges=ranges.shape[2],
        chosen=kernels().ChosenBits(bits=bits.data_ptr(), counts=counts.data_ptr()),
    )
    return listed(bits, counts, width)


def group_shares(call: AttentionCall, grid: Grid, queries: Tensor, group: int, part: range) -> Tensor:
    """See `gossamer.backends.torch.group_shares`. ``queries`` have q's dtype."""
    grid = _check_groups(call, grid, queries, group, part)
    width = call.extent.longest
    shares = torch.empty(call.batch, call.heads, len(part), width, device="cpu")
    q, k, queries = dense_rows(call.q), dense_rows(call.k), queries.contiguous()
    kernels().group_shares(
        active_isa(q.dtype),
        score_view(q, k, call),
        tensor_view(queries),
        grid_view(grid),
        group,
        part_view(part),
        width=width,
        out=shares.data_ptr(),
    )
    return shares


def antidiagonal_scores(call: AttentionCall, grid: Grid, stride: int, part: range) -> Tensor:
    """See `gossamer.backends.torch.antidiagonal_scores`.

    Working memory: packed keys, at most 192 MiB of them; and of each thread some MiB, and some KiB a key block.
    """
    grid = _check_cells(call, grid, stride, part)
    scores = torch.empty(call.batch, call.heads, len(part), grid.key_blocks, device="cpu")
    if scores.numel() == 0:
        return scores
    q, k = dense_rows(call.q), dense_rows(call.k)
    kernels().antidiagonal(
        active_isa(q.dtype),
        score_view(q, k, call),
        grid_view(grid),
        stride,
        part_view(part),
        key_blocks=grid.key_blocks,
        out=scores.data_ptr(),
    )
    return scores


def antidiagonal_peaks(call: AttentionCall, grid: Grid, stride: int, part: range, near: float) -> tuple[Tensor, Tensor]:
    """See `gossamer.backends.torch.antidiagonal_peaks`. Working memory as that of `antidiagonal_scores`."""
    grid = _check_cells(call, grid, stride, part)
    scores = torch.empty(call.batch, call.heads, len(part), grid.key_blocks, device="cpu")
    attained = torch.empty(scores.shape, dtype=torch.bool, device="cpu")
    if scores.numel() == 0:
        return scores, attained
    q, k = dense_rows(call.q), dense_rows(call.k)
    kernels().antidiagonal_peaks(
        active_isa(q.dtype),
        score_view(q, k, call),
        grid_view(grid),
        stride,
        part_view(part),
        key_blocks=grid.key_blocks,
        near=near,
        sums=scores.data_ptr(),
        attained=attained.data_ptr(),
    )
    return scores, attained


def mean_row_maxima(call: AttentionCall, grid: Grid, regions: Tensor, part: range) -> Tensor:
    """See `gossamer.backends.torch.mean_row_maxima`."""
    _check(call, call.q, call.k)
    grid = _of_call(grid, call)
    _check_part(part, grid)
    if regions.shape != (call.batch, grid.query_blocks, regions.shape[2], 2):
        raise ValueError(
            f"regions must be ({call.batch}, {grid.query_blocks}, any number, 2), got {tuple(regions.shape)}"
        )
    maxima = torch.empty(call.batch, call.heads, len(part), device="cpu")
    q, k = dense_rows(call.q), dense_rows(call.k)
    own = regions[:, part.start : part.stop].to("cpu", torch.int64).contiguous()  # held until the kernel is done
    kernels().row_maxima(
        active_isa(q.dtype),
        score_view(q, k, call),
        grid_view(grid),
        part_view(part),
        regions=own.data_ptr(),
        region_count=own.shape[2],
        out=maxima.data_ptr(),
    )
    return maxima


def _check(call: AttentionCall, *tensors: Tensor) -> None:
    """That kernels take the tensors, and that the extent still fits the call: outputs are as large as it says."""
    check_tensors(*tensors)
    call.extent.check(call.query_len, call.key_len)


def _of_call(grid: Grid, call: AttentionCall) -> Grid:
    """The kernels index the call's tensors by the grid's extent: it must be the call's own."""
    return grid if grid.extent is call.extent else Grid(call.extent, grid.block_q, grid.block_k)


def _check_cells(call: AttentionCall, grid: Grid, stride: int, part: range) -> Grid:
    _check(call, call.q, call.k)
    if stride < 1 or grid.block_q % stride or grid.block_k % stride:
        raise ValueError(
            f"stride must divide block_q and block_k, got {stride} for blocks {grid.block_q} and {grid.block_k}"
        )
    grid = _of_call(grid, call)
    _check_part(part, grid)
    return grid


def _check_groups(call: AttentionCall, grid: Grid, queries: Tensor, group: int, part: range) -> Grid:
    _check(call, call.q, call.k, queries)
    grid = _of_call(grid, call)
    if group < 1 or part.step != 1 or not 0 <= part.start <= part.stop <= ceil_div(grid.query_blocks, group):
        raise ValueError(f"a part must be of the groups of {group} among {grid.query_blocks} query blocks, got {part}")
    _check_pooled(queries, "queries", (call.batch, call.heads, grid.query_blocks, call.q.shape[-1]), call.q.dtype)
    return grid


def _checked_anchors(call: AttentionCall, grid: Grid, anchors: Tensor | None) -> Tensor | None:
    if anchors is None:
        return None
    _check_pooled(anchors, "anchors", (call.batch, call.heads, grid.query_blocks), torch.float32)
    return anchors.contiguous()


def _check_part(part: range, grid: Grid) -> None:
    if part.step != 1 or not 0 <= part.start <= part.stop <= grid.query_blocks:
        raise ValueError(f"a part must be consecutive rows of the plan's {grid.query_blocks}, got {part}")


def _check_pooled(x: Tensor, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(x.shape) != shape or x.dtype != dtype:
        raise ValueError(f"pooled {name} must be {dtype} of shape {shape}, got {x.dtype} of shape {tuple(x.shape)}")
