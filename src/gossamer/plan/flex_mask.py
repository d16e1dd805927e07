"""A plan as FlexAttention's ``BlockMask``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from gossamer.plan import SparsePlan


def to_block_mask(plan: SparsePlan, num_heads: int) -> BlockMask:
    """See `SparsePlan.to_block_mask`. Listed are the tiles that any part touches, those that are computed whole apart;
    ``mask_mod`` is the definition, for the others."""
    if plan.q_order is not None or plan.k_order is not None:
        raise ValueError("FlexAttention cannot express a permuted plan; permute q, k and v and plan without an order")
    if num_heads % plan.heads:
        raise ValueError(f"num_heads ({num_heads}) must be a multiple of the plan's heads ({plan.heads})")
    share = num_heads // plan.heads
    touched, whole = _touched_tiles(plan), _whole_tiles(plan)
    device = plan.device

    def listed(tiles: Tensor) -> tuple[Tensor, Tensor]:
        counts = tiles.sum(dim=-1).to(torch.int32)
        # A stable descending sort of the flags lists the flagged key blocks first, ascending.
        order = tiles.to(torch.int8).sort(dim=-1, descending=True, stable=True).indices.to(torch.int32)
        return counts.repeat_interleave(share, dim=1), order.repeat_interleave(share, dim=1)

    selected, columns = plan.block_mask(), plan.column_mask()
    sink, window = torch.as_tensor(plan.sink), torch.as_tensor(plan.window)
    query_start = plan.extent.query_start.to(device)
    key_start = plan.extent.key_start.to(device)
    key_count = plan.extent.key_count.to(device)
    strip = plan.block_q * plan.column_group
    has_columns = plan.column_indices.numel() > 0
    causal, limit = plan.causal, plan.limit
    block_q, block_k = plan.block_q, plan.block_k
    last_query, last_key = max(plan.query_len - 1, 0), max(plan.key_len - 1, 0)

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        head = h // share
        # FlexAttention rounds lengths up to whole blocks; what lies outside is clipped by it afterwards.
        q_slot, k_slot = q_idx.clamp(max=last_query), kv_idx.clamp(max=last_key)
        qpos, kpos = q_idx + query_start[b], kv_idx - key_start[b]
        allowed = (kpos >= 0) & (kpos < key_count[b])
        if causal:
            allowed = allowed & (kpos <= qpos)
        if limit is not None:
            allowed = allowed & ((qpos - kpos).abs() < limit)
        chosen = selected[b, head, q_slot // block_q, k_slot // block_k]
        chosen = chosen | (kpos < sink[head]) | ((qpos - kpos).abs() < window[head])
        if has_columns:
            chosen = chosen | columns[b, head, q_slot // strip, k_slot]
        return allowed & chosen

    return BlockMask.from_kv_blocks(
        *listed(touched & ~whole),
        *listed(whole),
        BLOCK_SIZE=(block_q, block_k),
        mask_mod=mask_mod,
        seq_lengths=(plan.query_len, plan.key_len),
    )


def _touched_tiles(plan: SparsePlan) -> Tensor:
    """Tiles that hold at least one candidate pair, bool ``[B, heads, M, N]`` (a superset at band edges)."""
    device = plan.device
    touched = plan.block_mask()
    columns = plan.column_mask()
    pad = plan.num_key_blocks * plan.block_k - plan.key_len
    columns = torch.nn.functional.pad(columns, (0, pad)).unflatten(-1, (plan.num_key_blocks, plan.block_k)).any(-1)
    columns = columns.repeat_interleave(plan.column_group, dim=2)[:, :, : plan.num_query_blocks]
    first_q = torch.arange(plan.num_query_blocks, device=device) * plan.block_q
    first_k = torch.arange(plan.num_key_blocks, device=device) * plan.block_k
    qpos = (first_q + plan.extent.query_start.to(device)[:, None])[:, None, :, None]
    kpos = (first_k - plan.extent.key_start.to(device)[:, None])[:, None, None, :]
    sink = torch.as_tensor(plan.sink).view(1, -1, 1, 1)
    window = torch.as_tensor(plan.window).view(1, -1, 1, 1)
    distance = torch.maximum(qpos - (kpos + plan.block_k - 1), kpos - (qpos + plan.block_q - 1))
    bands = (kpos < sink) | (distance < window)
    touched = touched | columns | bands
    if plan.causal:
        touched = touched & (kpos <= qpos + plan.block_q - 1)
    return touched


def _whole_tiles(plan: SparsePlan) -> Tensor:
    """Selected blocks all of whose pairs are computed, bool ``[B, heads, M, N]``. None is cut off by the lengths."""
    device = plan.device
    first_q = torch.arange(plan.num_query_blocks, device=device) * plan.block_q
    first_k = torch.arange(plan.num_key_blocks, device=device) * plan.block_k
    qpos = (first_q + plan.extent.query_start.to(device)[:, None])[:, :, None]
    kpos = (first_k - plan.extent.key_start.to(device)[:, None])[:, None, :]
    last_qpos, past_kpos = qpos + plan.block_q - 1, kpos + plan.block_k
    whole = (kpos >= 0) & (past_kpos <= plan.extent.key_count.to(device)[:, None, None])
    whole = whole & (first_q + plan.block_q <= plan.query_len)[:, None]
    if plan.causal:
        whole = whole & (past_kpos - 1 <= qpos)
    if plan.limit is not None:
        whole = whole & (last_qpos - kpos < plan.limit) & (past_kpos - 1 - qpos < plan.limit)
    return plan.block_mask() & whole[:, None]
