"""The kernel of the queries' gradients: one tile of query rows against every key that its plan names.

It goes over the keys as the forward kernel does, and recomputes the weights from the LSE. Each tile has one owner. For
the kernels of the keys' gradients it leaves what each row measures its slopes from, and its LSE.
"""

# Triton compiles these functions; their parameters and constants are not what Python sees.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from gossamer.backends.triton.kernels.attend import attend_keys
from gossamer.backends.triton.kernels.blocks import Blocks
from gossamer.backends.triton.kernels.coded import PLAIN, Coded
from gossamer.backends.triton.kernels.columns import Columns
from gossamer.backends.triton.kernels.extent import load_extent
from gossamer.backends.triton.kernels.pruned import Means, add_means, wholly_seen
from gossamer.backends.triton.kernels.ranges import Bands
from gossamer.backends.triton.kernels.rows import load_queries, tile_rows
from gossamer.backends.triton.kernels.softmax import SLOPES, Keys, Logits, Queries, no_slopes

__all__ = ["query_gradients"]

_LOG2_E = tl.constexpr(1.4426950408889634)


class Measured(NamedTuple):
    """Of a tile's rows: what reaches the outputs ``[TILE_M, BLOCK_DV]``; its products with them; the LSE in units of
    log2; what reaches the LSE."""

    out: Any
    products: Any
    base: Any
    lse: Any


@triton.jit(
    do_not_specialize=["query_len", "key_len", "blocks", "words", "column_lists", "column_group", "key_blocks"]
)  # fmt: skip
def query_gradients(
    q_ptr, k_ptr, v_ptr, reaching_ptr, out_ptr, lse_ptr, reaching_lse_ptr, grad_ptr, level_ptr, base_ptr,
    q_batch_stride, q_head_stride, q_stride, k_batch_stride, k_head_stride, k_stride,
    v_batch_stride, v_head_stride, v_stride, reaching_batch_stride, reaching_head_stride, reaching_stride,
    block_indptr, block_indices, column_indptr, column_indices, sink_ptr, window_ptr,
    q_order, k_order, k_rank, selected_bits, k_means, v_means, extent_ptr,
    plan_heads, groups, query_len, key_len, blocks, key_blocks, column_lists, column_group, words,
    scale, scale_log2, softcap_log2, softcap_slope,
    SHARE: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr,
    HAS_BLOCKS: tl.constexpr, HAS_COLUMNS: tl.constexpr, Q_ORDER: tl.constexpr, K_ORDER: tl.constexpr,
    SOFTCAP: tl.constexpr, MEANS: tl.constexpr, REACHING_LSE: tl.constexpr, PASS: tl.constexpr,
):  # fmt: skip
    """One tile of one query block of one head of the plan. Grid: ``B * plan_heads * blocks * tiles of a block``.

    ``out``, ``grad``, ``lse``, ``level`` and ``base`` are contiguous, ``[B, H, S]`` first. ``level`` gets
    ``sum(dO * out) - dlse``, ``base`` the LSE in units of log2, or infinity where a row attends nothing; rows that are
    not live are left as they are.
    """
    TILES: tl.constexpr = (BLOCK_Q * SHARE + TILE_M - 1) // TILE_M
    program = tl.program_id(0)
    block = blocks - 1 - (program // TILES) % blocks
    plan_row = program // (TILES * blocks)
    b = plan_row // plan_heads
    plan_head = plan_row % plan_heads
    group = plan_head // (plan_heads // groups)
    wide_row = plan_row.to(tl.int64)
    extent = load_extent(extent_ptr, b)
    order = q_order + wide_row * query_len
    rows = tile_rows(extent, block, program % TILES, plan_head, query_len, order, SHARE, BLOCK_Q, TILE_M, Q_ORDER)
    own = (b * plan_heads * SHARE + rows.head).to(tl.int64) * query_len + rows.row
    reaching_rows = reaching_ptr + b.to(tl.int64) * reaching_batch_stride
    reaching_rows += rows.head.to(tl.int64) * reaching_head_stride + rows.row.to(tl.int64) * reaching_stride
    measured = load_measured(
        reaching_rows, out_ptr + own * VALUE_DIM, lse_ptr + own, reaching_lse_ptr + own, rows.exists, VALUE_DIM,
        BLOCK_DV, REACHING_LSE,
    )  # fmt: skip
    plain = load_queries(
        q_ptr + b.to(tl.int64) * q_batch_stride, q_head_stride, q_stride, extent, rows, DIM, BLOCK_D
    )  # fmt: skip
    queries = Queries(plain.q, plain.positions, plain.lowest, plain.highest, measured.out, measured.base,
                      measured.products - measured.lse, 0.0, 0.0)  # fmt: skip
    k_ptr += b.to(tl.int64) * k_batch_stride + group.to(tl.int64) * k_head_stride
    v_ptr += b.to(tl.int64) * v_batch_stride + group.to(tl.int64) * v_head_stride
    selected = selected_bits + (wide_row * blocks + block) * words
    state = attend_keys(
        no_slopes(TILE_M, BLOCK_D),
        queries,
        Keys(
            k_ptr + extent.key_start.to(tl.int64) * k_stride, v_ptr + extent.key_start.to(tl.int64) * v_stride,
            k_stride, v_stride, k_ptr, v_ptr, Coded(k_ptr, k_ptr, k_ptr, 0, 0, 0, PLAIN, 8, 1),
            Coded(v_ptr, v_ptr, v_ptr, 0, 0, 0, PLAIN, 8, 1), k_ptr, k_ptr, b, group, extent.key_start, DIM, VALUE_DIM,
            TILE_N, False,
        ),
        Logits(scale_log2, softcap_log2, softcap_slope, 0.0, SOFTCAP, False, False, PASS),
        extent,
        Bands(tl.load(sink_ptr + plan_head), tl.load(window_ptr + plan_head)),
        Blocks(
            block_indptr + wide_row * blocks + block, block_indices, k_order + wide_row * key_len, key_len, BLOCK_K,
            HAS_BLOCKS, K_ORDER,
        ),
        Columns(
            column_indptr + wide_row * column_lists + block // column_group, column_indices,
            selected, k_rank + wide_row * key_len, HAS_COLUMNS,
        ),
    )  # fmt: skip
    if MEANS:
        low, high = wholly_seen(extent, block, BLOCK_Q, BLOCK_K)
        first_mean = (b * groups + group).to(tl.int64) * key_blocks
        state = add_means(
            state,
            queries,
            Logits(scale_log2, softcap_log2, softcap_slope, 0.0, SOFTCAP, False, False, PASS),
            Means(
                k_means + first_mean * DIM, v_means + first_mean * VALUE_DIM, selected, low, high, extent.keys, DIM,
                VALUE_DIM, BLOCK_K, TILE_N, HAS_BLOCKS,
            ),
        )  # fmt: skip
    # What reaches an output that attends nothing says nothing; its LSE may be a sink's.
    empty = state.some == 0
    tl.store(level_ptr + own, tl.where(empty, 0.0, measured.products) - measured.lse, mask=rows.exists)
    tl.store(base_ptr + own, tl.where(empty, float("inf"), measured.base), mask=rows.exists)
    if PASS == SLOPES:
        dim = tl.arange(0, BLOCK_D)
        grad = (state.q * scale).to(grad_ptr.dtype.element_ty)
        tl.store(
            grad_ptr + own[:, None] * DIM + dim[None, :], grad, mask=rows.exists[:, None] & (dim < DIM)[None, :]
        )  # fmt: skip


@triton.jit
def load_measured(
    reaching, out, lse, reaching_lse, exists,
    VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, REACHING_LSE: tl.constexpr,
):  # fmt: skip
    """Of the rows at these pointers; 0 for those that do not exist."""
    value = tl.arange(0, BLOCK_DV)
    mask = exists[:, None] & (value < VALUE_DIM)[None, :]
    reached = tl.load(reaching[:, None] + value[None, :], mask=mask, other=0.0)
    outputs = tl.load(out[:, None] + value[None, :], mask=mask, other=0.0)
    sums = tl.load(lse, mask=exists, other=float("-inf"))
    products = tl.sum(reached.to(tl.float32) * outputs.to(tl.float32), 1)
    of_lse = tl.zeros_like(products)
    if REACHING_LSE:
        of_lse = tl.load(reaching_lse, mask=exists, other=0.0)
    return Measured(reached, products, tl.where(sums == float("-inf"), 0.0, sums * _LOG2_E), of_lse)
