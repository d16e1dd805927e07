"""Pools of queries and keys as they were before the model turned them, in C++: what is turned is kept nowhere."""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.backends import torch as definition
from gossamer.backends.cpu.native import active_isa, check_tensors, kernels
from gossamer.backends.cpu.views import address, arrays, dense_rows, grid_view, tokens_view
from gossamer.call import AttentionCall
from gossamer.plan import Grid
from gossamer.rotary import Rotary

__all__ = ["pool_before_rotary"]


def pool_before_rotary(call: AttentionCall, grid: Grid) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `gossamer.backends.torch.pool_before_rotary`, which turns interleaved pairs, and what needs a gradient."""
    if call.rotary is None or call.rotary.interleaved or call.needs_gradient:
        return definition.pool_before_rotary(call, grid)
    check_tensors(call.q, call.k)
    call.extent.check(call.query_len, call.key_len)
    if grid.extent is not call.extent:
        grid = Grid(call.extent, grid.block_q, grid.block_k)
    queries = torch.empty(call.batch, call.heads, grid.query_blocks, call.q.shape[-1], device="cpu")
    low, high, keys = torch.empty(3, call.batch, call.groups, grid.key_blocks, call.k.shape[-1], device="cpu")
    _pool(call.rotary, call.q, call.extent.query_positions(call.query_len), grid, queries)
    _pool(call.rotary, call.k, call.extent.key_positions(call.key_len), grid, keys, (low, high))
    return queries, low, high, keys


def _pool(
    rotary: Rotary, x: Tensor, positions: Tensor, grid: Grid, mean: Tensor, bounds: tuple[Tensor, Tensor] | None = None
) -> None:
    cos, sin = (own.contiguous() for own in rotary.factors(positions, torch.float32, back=True))
    cosines, sines = arrays((cos, sin), (torch.float32, torch.float32))
    x, (low, high) = dense_rows(x), bounds or (None, None)
    kernels().pool_turned(
        active_isa(x.dtype),
        tokens_view(x),
        cos=cosines,
        sin=sines,
        grid=grid_view(grid),
        keys=bounds is not None,
        blocks=mean.shape[2],
        mean=mean.data_ptr(),
        low=address(low),
        high=address(high),
        threads=torch.get_num_threads(),
    )
