"""From the operator's arguments to a grid of programs. Imports Triton."""

# Triton compiles these functions; their parameters and constants are not what Python sees.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import importlib.util
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from gossamer.backends.triton.bitmap import mark_blocks
from gossamer.backends.triton.config import Config, Problem, choose, power_of_two
from gossamer.backends.triton.kernels import attend
from gossamer.plan import ceil_div

__all__ = ["describable", "launch", "offers_descriptors"]

_MARK_TILE = 128
_MOST_BITMAP_BYTES = 64 << 20
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
    has_blocks, has_columns = block_indices.numel() > 0, column_indices.numel() > 0
    if config is None:
        parts = {"blocks": has_blocks, "columns": has_columns}
        config = choose(Problem.of(q, v, plan_heads, block_q, block_k, key_len, **parts))
    if scale <= 0:  # the kernel multiplies a row's maximum by the scale
        q, scale = (-q, -scale) if scale < 0 else (torch.zeros_like(q), 1.0)
    share = heads // plan_heads
    blocks, tiles = ceil_div(query_len, block_q), ceil_div(block_q * share, config.tile_m)
    words = ceil_div(ceil_div(key_len, block_k), 32)
    rows, together = batch * plan_heads, plan_heads // groups
    bits = block_indices
    if has_blocks and has_columns:
        rows, together = _rows_at_once(rows, together, blocks * words * 4)
        bits = torch.empty(rows * blocks, words, dtype=torch.int32, device=q.device)
    k_rank = _inverse(k_order) if has_blocks and has_columns else k_order
    descriptors = config.descriptors and describable(k) and describable(v) and offers_descriptors(q.device)
    block_d, block_dv = power_of_two(dim), power_of_two(value_dim)
    halves = _halves(q.device, config.tile_m, block_dv)
    block_dv //= halves
    k_descriptor, v_descriptor = k, v
    if descriptors:
        k_descriptor, v_descriptor = _descriptor(k, config.tile_n, block_d), _descriptor(v, config.tile_n, block_dv)
    log2_e = math.log2(math.e)
    sink, window = sink.clamp(max=_UNLIMITED), window.clamp(max=_UNLIMITED)
    with torch.cuda.device_of(q):  # Triton launches on the current device
        for first_row in range(0, batch * plan_heads, rows):
            count = min(rows, batch * plan_heads - first_row)
            if has_blocks and has_columns:
                bits.zero_()
                mark_blocks[(count * blocks,)](
                    block_indptr, block_indices, bits, first_row * blocks, words, TILE=_MARK_TILE
                )
            attend[(count * blocks * tiles,)](
                q,
                k,
                v,
                k_descriptor,
                v_descriptor,
                out,
                lse,
                *q.stride()[:3],
                *k.stride()[:3],
                *v.stride()[:3],
                block_indptr,
                block_indices,
                column_indptr,
                column_indices,
                sink,
                window,
                q_order,
                k_order,
                k_rank,
                bits,
                extent,
                sinks,
                batch,
                plan_heads,
                groups,
                first_row,
                together,
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
                BLOCK_D=block_d,
                BLOCK_DV=block_dv,
                HALVES=halves,
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
                DESCRIPTORS=descriptors,
                WARP_SPECIALIZE=config.warp_specialize,
                WIDEN=widen,
                PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
                num_warps=config.warps,
                num_stages=config.stages,
            )
    return out.to(q.dtype), lse


def offers_descriptors(device: torch.device) -> bool:
    """Whether this Triton makes tensor descriptors on the host for a device: Triton 3.6, compute capability 9.0."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        return False
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    has_them = hasattr(tl, "tensor_descriptor") and importlib.util.find_spec("triton.tools.tensor_descriptor")
    return version >= (3, 6) and bool(has_them)


def describable(t: Tensor) -> bool:
    """Whether ``[B, G, T, D]`` has two-byte elements and the alignment that a tensor descriptor needs: 16 bytes."""
    if t.element_size() != 2 or t.stride(-1) != 1 or t.data_ptr() % 16 or not t.numel():
        return False
    strides = [stride for size, stride in zip(t.shape[:-1], t.stride()[:-1], strict=True) if size > 1]
    return all(stride > 0 and stride % 8 == 0 for stride in strides)


def _halves(device: torch.device, tile_m: int, block_dv: int) -> int:
    """In how many parts to accumulate an output: 2 where its halves are no wider than high, but it is.

    For Ampere-style products Triton gives the warps rows when the accumulator is at least as high as wide, and else
    columns, and then every softmax step passes shared memory. Those of Hopper and big Blackwells do not care.
    """
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
    return 2 if tile_m < block_dv <= 2 * tile_m and major not in (9, 10) else 1


def _descriptor(t: Tensor, tile_n: int, block_dim: int) -> object:
    from triton.tools.tensor_descriptor import TensorDescriptor

    # A dimension of one element may have any stride; a descriptor wants an aligned one.
    strides = [stride if size > 1 else 8 for size, stride in zip(t.shape[:-1], t.stride()[:-1], strict=True)]
    return TensorDescriptor(t, list(t.shape), [*strides, 1], [1, 1, tile_n, block_dim])


def _rows_at_once(rows: int, together: int, bytes_a_row: int) -> tuple[int, int]:
    """Rows of the plan (batch times head) that one launch serves so that their bitmap stays small, and how many of
    them run side by side: the heads of a key/value head, or as many of them as fit.
    """
    most = max(1, _MOST_BITMAP_BYTES // max(1, bytes_a_row))
    if most >= rows:
        return rows, together
    together = max(n for n in range(1, together + 1) if together % n == 0 and n <= most)
    return most - most % together, together


def _inverse(order: Tensor) -> Tensor:
    """Rank by original index, of the last dimension."""
    if not order.numel():
        return order
    ranks = torch.arange(order.shape[-1], dtype=torch.int32, device=order.device).expand_as(order).contiguous()
    return torch.empty_like(ranks).scatter_(-1, order.long(), ranks)
