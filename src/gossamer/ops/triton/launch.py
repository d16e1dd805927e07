"""From the operator's arguments to a grid of programs. Imports Triton."""

# Triton compiles these functions; their parameters and constants are not what Python sees.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import math

import torch
from torch import Tensor

from gossamer.ops.triton.config import Config, Problem, choose, power_of_two
from gossamer.ops.triton.kernels import attend, mark_blocks
from gossamer.plan import ceil_div

__all__ = ["launch"]

_MARK_TILE = 128
_UNLIMITED = 1 << 29


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indptr: Tensor,
    block_indices: Tensor,
    column_indptr: Tensor,
    column_indices: Tensor,
    sink: Tensor,
    window: Tensor,
    q_order: Tensor,
    k_order: Tensor,
    extent: Tensor,
    sinks: Tensor,
    shape: list[int],
    limit: int,
    causal: bool,
    scale: float,
    softcap: float,
    *,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the kernel. Arguments as those of ``gossamer::triton_execute``; ``config`` overrides the table's."""
    plan_heads, block_q, block_k, column_group = shape
    batch, heads, query_len, dim = q.shape
    groups, key_len, value_dim = k.shape[1], k.shape[2], v.shape[-1]
    widen = q.dtype == torch.bfloat16 and not q.is_cuda
    out_dtype = torch.float32 if widen else q.dtype
    out = torch.empty(batch, heads, query_len, value_dim, dtype=out_dtype, device=q.device)
    lse = torch.empty(batch, heads, query_len, dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out.to(q.dtype), lse
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    if config is None:
        config = choose(Problem.of(q, v, plan_heads, block_q, block_k, key_len))
    share = heads // plan_heads
    blocks, tiles = ceil_div(query_len, block_q), ceil_div(block_q * share, config.tile_m)
    has_blocks, has_columns = block_indices.numel() > 0, column_indices.numel() > 0
    words = ceil_div(ceil_div(key_len, block_k), 32)
    bits = block_indices
    if has_blocks and has_columns:
        bits = selected_bits(block_indptr, block_indices, words)
    k_rank = _inverse(k_order) if has_blocks and has_columns else k_order
    log2_e = math.log2(math.e)
    attend[(batch * plan_heads * blocks * tiles,)](
        q,
        k,
        v,
        out,
        lse,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        block_indptr,
        block_indices,
        column_indptr,
        column_indices,
        sink.clamp(max=_UNLIMITED),
        window.clamp(max=_UNLIMITED),
        q_order,
        k_order,
        k_rank,
        bits,
        extent,
        sinks,
        batch,
        plan_heads,
        groups,
        query_len,
        key_len,
        blocks,
        ceil_div(blocks, column_group),
        column_group,
        words,
        limit if limit >= 0 else _UNLIMITED,
        scale * log2_e,
        softcap * log2_e,
        2.0 * log2_e * scale / softcap if softcap else 0.0,
        SHARE=share,
        TILES=tiles,
        DIM=dim,
        VALUE_DIM=value_dim,
        BLOCK_D=power_of_two(dim),
        BLOCK_DV=power_of_two(value_dim),
        BLOCK_Q=block_q,
        BLOCK_K=block_k,
        TILE_M=config.tile_m,
        TILE_N=config.tile_n,
        HAS_BLOCKS=has_blocks,
        HAS_COLUMNS=has_columns,
        Q_ORDER=q_order.numel() > 0,
        K_ORDER=k_order.numel() > 0,
        CAUSAL=causal,
        LIMITED=limit >= 0,
        SOFTCAP=softcap > 0,
        SINKS=sinks.numel() > 0,
        WIDEN=widen,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return out.to(q.dtype), lse


def selected_bits(block_indptr: Tensor, block_indices: Tensor, words: int) -> Tensor:
    """One bit for each key block that a query block selects: int32 ``[rows, words]``."""
    rows = block_indptr.numel() - 1
    bits = torch.zeros(rows, words, dtype=torch.int32, device=block_indices.device)
    mark_blocks[(rows,)](block_indptr, block_indices, bits, words, TILE=_MARK_TILE)
    return bits


def _inverse(order: Tensor) -> Tensor:
    """Rank by original index, of the last dimension."""
    if not order.numel():
        return order
    ranks = torch.arange(order.shape[-1], dtype=torch.int32, device=order.device).expand_as(order).contiguous()
    return torch.empty_like(ranks).scatter_(-1, order.long(), ranks)
