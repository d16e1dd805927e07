"""Plans of queries, and maybe keys, that are grouped: from what each group computes to blocks and columns of ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer.call import AttentionCall
from gossamer.methods.flagged import FlaggedLists, parts
from gossamer.methods.probed_rows import padded_order
from gossamer.methods.segment_patterns import BLOCK, Chosen
from gossamer.plan import SparsePlan, ceil_div

__all__ = ["GroupedRow", "joined"]


class GroupedRow:
    """One batch row, its queries ordered by group; inside of a group with a grid by class, else as they stand.

    Args:
        groups: of each position, int64 on the CPU.
        pairs: what queries of a group compute of keys of a group; without ``grouped_keys`` of all keys, under 0.

    Attributes:
        q_order: int32 ``[H, S]``; k_order: int32 ``[H, T]``, the same for all heads; see `SparsePlan`.
    """

    def __init__(
        self,
        call: AttentionCall,
        row: int,
        groups: Tensor,
        pairs: Mapping[tuple[int, int], Chosen],
        *,
        grouped_keys: bool,
    ) -> None:
        self.queries, self.keys = int(call.extent.query_count[row]), int(call.extent.key_count[row])
        self._pairs, self._heads, self._groups = pairs, call.heads, groups.to(call.device)
        self._order = self._order_of_queries()
        of_keys, place = self._groups[: self.keys], torch.arange(self.keys, device=call.device)
        self._k_order = of_keys.argsort(stable=True) if grouped_keys else place
        self._of_keys = of_keys[self._k_order] if grouped_keys else torch.zeros_like(place)
        self.q_order = padded_order(self._order, call.query_len)
        self.k_order = padded_order(self._k_order[None], call.key_len).expand(call.heads, -1)

    def _order_of_queries(self) -> Tensor:
        """Positions by rank, int64 ``[H, queries]``."""
        groups, count = self._groups[: self.queries], self.queries
        position = torch.arange(count, device=groups.device)
        inside = position.expand(self._heads, -1)
        for (of_query, _), chosen in self._pairs.items():
            if chosen.lines is not None:
                classes = (position - chosen.lines.column[:, None]) % chosen.lines.stride[:, None]
                by_class = (classes * count + position).argsort(dim=1).argsort(dim=1)
                inside = torch.where(groups == of_query, by_class, inside)
        return (groups * count + inside).argsort(dim=1)

    def blocks(self, heads: slice, rows: slice) -> Tensor:
        """Key blocks of some blocks of queries, bool ``[heads, rows, n]``."""
        order, columns = self._ranks(heads, rows, BLOCK), ceil_div(self.keys, BLOCK)
        kept = torch.zeros(len(order), rows.stop - rows.start, columns, dtype=torch.bool, device=order.device)
        for (of_query, of_key), chosen in self._pairs.items():
            own, theirs = self._groups[order] == of_query, self._of_keys == of_key
            if chosen.bands is not None:
                kept |= _banded(
                    chosen.bands[heads], _touched(order, own), _touched(self._k_order[None], theirs[None])[0]
                )
            if chosen.lines is not None and chosen.hline:
                lines = chosen.lines.of(heads)
                on_line = own & ((order - lines.row[:, None]) % lines.stride[:, None] == 0)
                kept |= _any_in(on_line, BLOCK)[:, :, None] & _any_in(theirs[None], BLOCK)[:, None]
        low = F.pad(self._k_order, (0, -self.keys % BLOCK), value=self.keys).view(-1, BLOCK).amin(dim=-1)
        high = F.pad(order, (0, -order.shape[1] % BLOCK), value=-1).unflatten(1, (-1, BLOCK)).amax(dim=-1)
        return kept & (low <= high[:, :, None])

    def _ranks(self, heads: slice, lists: slice, width: int) -> Tensor:
        """Positions of the queries of some lists, ``width`` ranks each but the last."""
        return self._order[heads, lists.start * width : lists.stop * width]

    def columns(self, heads: slice, lists: slice, group: int) -> Tensor:
        """Single keys of some of the groups of ``group`` query blocks, bool ``[heads, lists, keys]``."""
        width = group * BLOCK
        order = self._ranks(heads, lists, width)
        kept = torch.zeros(len(order), lists.stop - lists.start, self.keys, dtype=torch.bool, device=order.device)
        for (of_query, of_key), chosen in self._pairs.items():
            own = self._groups[order] == of_query
            kept |= _any_in(own, width)[:, :, None] & chosen.columns[heads][:, None]
            if chosen.lines is not None:
                self._add_slashes(kept, order, own, chosen, heads, of_key, width)
        return kept

    def _add_slashes(
        self, kept: Tensor, order: Tensor, own: Tensor, chosen: Chosen, heads: slice, of_key: int, width: int
    ) -> None:
        """Keys at a slash's distance from a query of a list, and each query's own key."""
        assert chosen.lines is not None
        of_list = torch.arange(order.shape[1], device=order.device) // width
        head, rank = (own & (order < self.keys)).nonzero(as_tuple=True)
        kept[head, of_list[rank], order[head, rank]] = True
        if not chosen.slash:
            return
        lines = chosen.lines.of(heads)
        stride = lines.stride[:, None]
        classes = torch.zeros(*kept.shape[:2], int(lines.stride.max()), dtype=torch.bool, device=order.device)
        head, rank = own.nonzero(as_tuple=True)
        classes[head, of_list[rank], ((order - lines.distance[:, None]) % stride)[head, rank]] = True
        of_position = (torch.arange(self.keys, device=order.device) % stride)[:, None].expand(-1, kept.shape[1], -1)
        theirs = torch.zeros_like(self._of_keys, dtype=torch.bool)
        theirs[self._k_order] = self._of_keys == of_key
        kept |= classes.gather(2, of_position) & theirs


def _any_in(flags: Tensor, width: int) -> Tensor:
    """Whether a run of ``width`` of ``[heads, n]`` has one that is set: ``[heads, runs]``."""
    return F.pad(flags, (0, -flags.shape[1] % width)).unflatten(1, (-1, width)).any(dim=-1)


def _touched(order: Tensor, own: Tensor) -> Tensor:
    """Blocks of positions that hold a token of a block of ranks which is set in ``own``: ``[heads, blocks, most]``.

    -1 where there are fewer.
    """
    blocks = torch.where(own, order // BLOCK, -1)
    blocks = F.pad(blocks, (0, -order.shape[1] % BLOCK), value=-1).unflatten(1, (-1, BLOCK))
    blocks = blocks.sort(dim=-1, descending=True).values
    again = F.pad(blocks[..., 1:] == blocks[..., :-1], (1, 0))
    blocks = blocks.masked_fill(again, -1).sort(dim=-1, descending=True).values
    most = int((blocks >= 0).sum(dim=-1).max()) if blocks.numel() else 0
    return blocks[..., :most]


def _banded(bands: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """Pairs of blocks of ranks that hold blocks of positions at a chosen distance, bool ``[heads, m, n]``.

    Args:
        bands: bool ``[heads, distances]``; queries: `_touched`, ``[heads, m, .]``; keys: ``[n, .]``.
    """
    kept = torch.zeros(*queries.shape[:2], keys.shape[0], dtype=torch.bool, device=bands.device)
    for of_query in queries.unbind(-1):
        for of_key in keys.unbind(-1):
            apart = of_query[:, :, None] - of_key
            there = (apart >= 0) & (of_query >= 0)[:, :, None] & (of_key >= 0) & (apart < bands.shape[1])
            taken = bands.gather(1, apart.clamp(0, bands.shape[1] - 1).flatten(1)).view(kept.shape)
            kept |= taken & there
    return kept


def joined(call: AttentionCall, rows: Sequence[GroupedRow], group: int, *, ordered_keys: bool) -> SparsePlan:
    """The plan of all batch rows, with a list of columns for each ``group`` of query blocks."""
    many = ceil_div(call.query_len, BLOCK)
    of_blocks, of_columns = FlaggedLists(many, call.device), FlaggedLists(ceil_div(many, group), call.device)
    for row in rows:
        live = ceil_div(row.queries, BLOCK)
        for heads, lists in parts(call.heads, live, ceil_div(row.keys, BLOCK)):
            of_blocks.add(row.blocks(heads, lists), live, lists)
        live = ceil_div(live, group)
        for heads, lists in parts(call.heads, live, row.keys):
            of_columns.add(row.columns(heads, lists, group), live, lists)
    orders: dict[str, Any] = {"q_order": _stacked([row.q_order for row in rows], call, call.query_len)}
    if ordered_keys:
        orders["k_order"] = _stacked([row.k_order for row in rows], call, call.key_len)
    return SparsePlan(
        heads=call.heads,
        query_len=call.query_len,
        key_len=call.key_len,
        extent=call.extent,
        block_q=BLOCK,
        block_k=BLOCK,
        block_indptr=of_blocks.indptr,
        block_indices=of_blocks.indices,
        column_group=group,
        column_indptr=of_columns.indptr,
        column_indices=of_columns.indices,
        **orders,
    )


def _stacked(orders: Sequence[Tensor], call: AttentionCall, tokens: int) -> Tensor:
    if not orders:
        return torch.zeros(0, call.heads, tokens, dtype=torch.int32, device=call.device)
    return torch.stack(list(orders))
