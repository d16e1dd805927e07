"""Scores of one vector for each block, whatever made it, in plain torch: the definitions that learned gates use."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer.backends.torch.scores import pool_keys, pool_queries
from gossamer.call import AttentionCall
from gossamer.plan import Grid

__all__ = ["block_attention", "pool_before_rotary", "pool_key_bounds"]

CHUNK_BYTES = 16 << 20


def pool_before_rotary(call: AttentionCall, grid: Grid) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pools of q and k as they were before the model turned them (`gossamer.AttentionCall.before_rotary`).

    Returns:
        `pool_queries` of it, both of `pool_key_bounds`, and `pool_keys`.

    Raises:
        ValueError: the call does not say how they were turned.
    """
    plain = call.before_rotary()
    return pool_queries(plain, grid), *pool_key_bounds(plain, grid), pool_keys(plain, grid)


def pool_key_bounds(call: AttentionCall, grid: Grid) -> tuple[Tensor, Tensor]:
    """Smallest and largest entry, by channel, of the live keys of each key block.

    Returns:
        low, high: fp32 ``[B, G, N, D]``; 0 for a block without live keys.
    """
    batch, groups, _, dim = call.k.shape
    low = torch.zeros(batch, groups, grid.key_blocks, dim, dtype=torch.float32, device=call.device)
    high, block = torch.zeros_like(low), grid.block_k
    step = max(1, CHUNK_BYTES // max(1, 4 * groups * block * dim))
    for b in range(batch):
        start, count = int(call.extent.key_start[b]), int(call.extent.key_count[b])
        keys = call.k[b, :, start : start + count]
        for first in range(0, -(-count // block), step):
            part = keys[:, first * block : (first + step) * block].float()
            rest = (0, 0, 0, -part.shape[1] % block)
            for bound, sign in ((low, -1.0), (high, 1.0)):
                blocks = F.pad(sign * part, rest, value=float("-inf")).unflatten(1, (-1, block))
                bound[b, :, first : first + blocks.shape[1]] = sign * blocks.amax(dim=2)
    return low, high


def block_attention(
    call: AttentionCall, grid: Grid, queries: Tensor, keys: Tensor, scale: float, part: range
) -> Tensor:
    """Softmax over the key blocks that a query block sees, of ``scale * queries . keys``.

    Args:
        queries: fp32 ``[B, H, M, C]``; keys: fp32 ``[B, G or H, N, C]``; part: rows of the plan.

    Returns:
        fp32 ``[B, H, len(part), N]``; 0 for what is not seen.
    """
    rows = queries[:, :, part.start : part.stop].unflatten(1, (keys.shape[1], -1))
    logits = (rows @ keys[:, :, None].transpose(-1, -2)).mul(scale).flatten(1, 2)
    low, high = grid.seen[:, part.start : part.stop].to(call.device)[..., None, :].unbind(-1)
    block = torch.arange(grid.key_blocks, device=call.device)
    seen = ((block >= low) & (block < high))[:, None]
    # A row that sees nothing is 0 / 0 for the softmax.
    return logits.masked_fill(~seen, float("-inf")).softmax(dim=-1).masked_fill(~seen, 0.0)
