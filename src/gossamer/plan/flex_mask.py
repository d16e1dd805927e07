"""A plan as FlexAttention's ``BlockMask``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from gossamer.plan.integers import ceil_div
from gossamer.plan.plan import SparsePlan


def to_block_mask(plan: SparsePlan, num_heads: int) -> BlockMask:
    """See `SparsePlan.to_block_mask`. Listed are the tiles that any part touches, those that are computed whole apart;
    ``mask_mod`` is the definition, for the others.

    FlexAttention's tiles are cut at slots and rows, a plan's blocks at positions: a tile of a batch row with padding
    may meet four blocks.
    """
    if plan.permuted:
        raise ValueError("FlexAttention cannot express a permuted plan; permute q, k and v and plan without an order")
    if plan.pruned_mean or plan.skip is not None:
        raise ValueError(
            "FlexAttention knows neither pruned_mean nor skip; make the plan without (SparsePlan.with_attributes()), "
            "or attend by another backend"
        )
    if num_heads % plan.heads:
        raise ValueError(f"num_heads ({num_heads}) must be a multiple of the plan's heads ({plan.heads})")
    share = num_heads // plan.heads
    tiles = _MaskBlocks(plan)
    touched, whole = tiles.touched(), tiles.whole()
    device, extent = plan.device, plan.extent

    def listed(flags: Tensor) -> tuple[Tensor, Tensor]:
        counts = flags.sum(dim=-1).to(torch.int32)
        # A stable descending sort of the flags lists the flagged key tiles first, ascending.
        order = flags.to(torch.int8).sort(descending=True, stable=True).indices.to(torch.int32)
        return counts.repeat_interleave(share, dim=1), order.repeat_interleave(share, dim=1)

    selected, columns = plan.block_mask(), plan.column_mask()
    sink, window = torch.as_tensor(plan.sink, device=plan.device), torch.as_tensor(plan.window, device=plan.device)
    query_start, key_start = extent.query_start.to(device), extent.key_start.to(device)
    first_block = plan.grid.first_block.to(device)
    live_query = extent.live_queries(plan.query_len, device)
    live_key = extent.live_keys(plan.key_len, device)
    has_blocks, has_columns = plan.block_indices.numel() > 0, plan.column_indices.numel() > 0
    causal, limit = extent.causal, extent.limit
    block_q, block_k, column_group = plan.block_q, plan.block_k, plan.column_group
    last_query, last_key = max(plan.query_len - 1, 0), max(plan.key_len - 1, 0)
    last_row, last_block = max(selected.shape[2] - 1, 0), max(selected.shape[3] - 1, 0)
    last_column = max(columns.shape[3] - 1, 0)

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        head = h // share
        # FlexAttention rounds lengths up to whole tiles; what lies outside is clipped by it afterwards.
        q_pos, k_pos = q_idx + query_start[b], kv_idx - key_start[b]
        allowed = live_query[b, q_idx.clamp(max=last_query)] & live_key[b, kv_idx.clamp(max=last_key)]
        if causal:
            allowed = allowed & (k_pos <= q_pos)
        if limit is not None:
            allowed = allowed & ((q_pos - k_pos).abs() < limit)
        chosen = (k_pos < sink[head]) | ((q_pos - k_pos).abs() < window[head])
        row = (q_pos.clamp(min=0) // block_q - first_block[b]).clamp(0, last_row)
        if has_blocks:
            chosen = chosen | selected[b, head, row, (k_pos.clamp(min=0) // block_k).clamp(max=last_block)]
        if has_columns:
            chosen = chosen | columns[b, head, row // column_group, k_pos.clamp(0, last_column)]
        return allowed & chosen

    return BlockMask.from_kv_blocks(
        *listed(touched & ~whole),
        *listed(whole),
        BLOCK_SIZE=(block_q, block_k),
        mask_mod=mask_mod,
        seq_lengths=(plan.query_len, plan.key_len),
    )


class _MaskBlocks:
    """FlexAttention's tiles: ``block_q`` query rows by ``block_k`` key slots."""

    def __init__(self, plan: SparsePlan) -> None:
        self.plan, device = plan, plan.device
        self.first_q = torch.arange(ceil_div(plan.query_len, plan.block_q), device=device) * plan.block_q
        self.first_k = torch.arange(ceil_div(plan.key_len, plan.block_k), device=device) * plan.block_k
        # Positions of a tile's first row and slot, [B, M] and [B, N].
        self.q_pos = self.first_q + plan.extent.query_start.to(device)[:, None]
        self.k_pos = self.first_k - plan.extent.key_start.to(device)[:, None]

    def touched(self) -> Tensor:
        """Tiles that hold at least one candidate pair, bool ``[B, heads, M, N]`` (a superset at edges)."""
        plan, device = self.plan, self.plan.device
        listed = plan.block_mask()
        if plan.column_indices.numel():
            columns = plan.column_mask()
            columns = torch.nn.functional.pad(columns, (0, -columns.shape[3] % plan.block_k))
            columns = columns.unflatten(3, (-1, plan.block_k)).any(-1)
            listed = listed | columns.repeat_interleave(plan.column_group, dim=2)[:, :, : plan.num_query_blocks]
        rows = self.q_pos // plan.block_q - plan.grid.first_block.to(device)[:, None]
        touched = self._over_two(listed, rows, 2, self.q_pos % plan.block_q != 0)
        touched = self._over_two(touched, self.k_pos // plan.block_k, 3, self.k_pos % plan.block_k != 0)
        q_pos, k_pos = self.q_pos[:, None, :, None], self.k_pos[:, None, None]
        sink = torch.as_tensor(plan.sink, device=plan.device).view(1, -1, 1, 1)
        window = torch.as_tensor(plan.window, device=plan.device).view(1, -1, 1, 1)
        distance = torch.maximum(q_pos - (k_pos + plan.block_k - 1), k_pos - (q_pos + plan.block_q - 1))
        touched = touched | (k_pos < sink) | (distance.clamp(min=0) < window)
        if plan.extent.causal:
            touched = touched & (k_pos <= q_pos + plan.block_q - 1)
        return touched if plan.extent.limit is None else touched & (distance < plan.extent.limit)

    @staticmethod
    def _over_two(flags: Tensor, index: Tensor, dim: int, crossing: Tensor) -> Tensor:
        """``flags`` at ``index`` ``[B, n]`` of a dimension, or, where a tile crosses into it, at the index after."""
        many = flags.shape[dim]
        shape = [*flags.shape[:dim], index.shape[1], *flags.shape[dim + 1 :]]
        out = torch.zeros(shape, dtype=torch.bool, device=flags.device)
        if many == 0:
            return out
        view = [index.shape[0], 1, 1, 1]
        view[dim] = index.shape[1]
        for step, applies in ((0, torch.ones_like(crossing)), (1, crossing)):
            here = index + step
            inside = (here >= 0) & (here < many) & applies
            out |= flags.gather(dim, here.clamp(0, many - 1).view(view).expand(shape)) & inside.view(view)
        return out

    def whole(self) -> Tensor:
        """Tiles that are selected blocks and all of whose pairs are computed, bool ``[B, heads, M, N]``."""
        plan, extent, device = self.plan, self.plan.extent, self.plan.device
        rows = self.q_pos // plan.block_q - plan.grid.first_block.to(device)[:, None]
        never = torch.zeros(1, 1, dtype=torch.bool, device=device)
        selected = self._over_two(plan.block_mask(), rows, 2, never.expand_as(rows))
        selected = self._over_two(selected, self.k_pos // plan.block_k, 3, never.expand_as(self.k_pos))
        q_pos, k_pos = self.q_pos[:, :, None], self.k_pos[:, None]
        last_q, past_k = q_pos + plan.block_q - 1, k_pos + plan.block_k
        end = (extent.first_position + extent.query_count).to(device)[:, None, None]
        inside = (q_pos >= 0) & (last_q < end) & (k_pos >= 0) & (past_k <= extent.key_count.to(device)[:, None, None])
        whole = inside & (q_pos % plan.block_q == 0) & (k_pos % plan.block_k == 0)
        if extent.causal:
            whole = whole & (past_k - 1 <= q_pos)
        if extent.limit is not None:
            whole = whole & (last_q - k_pos < extent.limit) & (past_k - 1 - q_pos < extent.limit)
        return selected & whole[:, None]
