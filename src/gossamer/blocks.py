"""`Blocks`: from scores and rules to a plan. It owns geometry, lists, empty inputs and the order of parts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from gossamer import scores as score_functions
from gossamer.backends import backend_of
from gossamer.call import AttentionCall
from gossamer.plan import Grid, SparsePlan, ceil_div
from gossamer.rules import AtLeast, Candidates, PerHead, Rule

__all__ = ["Blocks"]

# Chosen flags of a part without scores.
MASK_BYTES = 64 << 20


class Blocks:
    """Builds the plan of one call: a method says what to keep and by which rule to choose, and never sees a list.

    The plan has all that `keep`, `choose`, `diagonals`, `block_columns` and `columns` name, and bands; a pair that
    several name counts once. From the first of these calls but `columns` on, every query block keeps its own key
    blocks, so that no live query is left without a key; a method of bands alone calls none of them.

    Args:
        block_q, block_k: tokens of a query block and of a key block.
        per: ``"head"`` for lists of their own for each of H query heads, ``"kv_head"`` for lists that the query heads
            of a key/value head share.

    Attributes:
        grid: how the blocks lie; `gossamer.scores` take it.
        heads: of the plan, H or G.

    Raises:
        ValueError: the call's extent was written to, and names tokens that the call does not have.
    """

    def __init__(
        self,
        call: AttentionCall,
        block_q: int = 64,
        block_k: int = 64,
        *,
        per: Literal["head", "kv_head"] = "head",
    ) -> None:
        call.extent.check(call.query_len, call.key_len)  # it may have been written to, and says how much is allocated
        self.call = call
        self.grid = Grid(call.extent, block_q, block_k)
        self.heads = call.heads if per == "head" else call.groups
        self._backend = backend_of(call, "ListWriter")
        self._rows: Any = None
        self._missing: list[range] = []
        self._columns: Any = None
        self._column_group = max(1, self.grid.query_blocks)
        self._first, self._own, self._last_rows, self._group = 0, 1, 0, 1
        self._beyond: Tensor | None = None
        self._diagonals: Tensor | None = None
        self._block_columns: Tensor | None = None
        self._k_order: Tensor | None = None
        self._segment = 0
        self._forced_heads: Tensor | None = None
        self._kept = self._chose = False
        self._pending: list[tuple[range, Tensor]] = []
        self._pending_rule: Rule | None = None
        self._pending_heads: Tensor | None = None

    def keep(
        self, *, first: int = 0, own: int = 1, last_rows: int = 0, group: int = 1, heads: Tensor | None = None
    ) -> None:
        """Force blocks into every query block's choice, as far as it sees them. Once, and before `choose`.

        Args:
            first: the first key blocks.
            own: the query block's own key blocks and the ``own - 1`` before (and after, where attention is not causal).
            last_rows: everything, for query blocks that hold one of the last ``last_rows`` live queries of the call.
            group: the key blocks of all ``group`` query blocks that it is grouped with, see `Grid.group`.
            heads: bool ``[B, heads]``, only for these.
        """
        self._once(self._kept, "keep")
        self._kept = True
        self._first, self._own, self._last_rows, self._group = first, own, last_rows, group
        self._forced_heads = heads
        self._start()

    def order_keys(self, order: Tensor, segment: int) -> None:
        """Count key blocks by rank, under a permutation inside segments of positions. Once, and first of all.

        A query block then sees all blocks of the segments that it sees keys of, and keeps those of its own segment,
        where causality cuts through them: what is attended goes by the original positions.

        Args:
            order: key positions by rank, ``[B, heads, T]``; see `gossamer.methods.segments.order_in_segments`.
            segment: a multiple of ``block_k``.

        Raises:
            ValueError: it is none, or something was said before.
        """
        if segment < 1 or segment % self.grid.block_k:
            raise ValueError(f"segment must be a multiple of block_k = {self.grid.block_k}, got {segment}")
        self._once(self._rows is not None or self._columns is not None or self._k_order is not None, "order_keys")
        self._k_order, self._segment = order.to(torch.int32), segment
        self._start()

    def outside(self, part: range) -> Tensor:
        """Key blocks that query blocks see outside their own segments, bool ``[B, 1, len(part), N]``.

        Raises:
            ValueError: there are no segments.
        """
        if self._k_order is None:
            raise ValueError("there are no segments; say `order_keys` before")
        grid, device = self.grid, self.call.device
        seen, own = (grid.in_segments(ranges, self._segment) for ranges in (grid.seen, grid.own()))
        return (grid.inside(seen, part, device) & ~grid.inside(own, part, device))[:, None]

    def diagonals(self, chosen: Tensor) -> None:
        """Take whole block diagonals: bool ``[B, heads, n]``, the n-th at n blocks before a query block's own.

        And after it, where attention is not causal. Once, and before `choose`.
        """
        self._once(self._diagonals is not None, "diagonals")
        self._diagonals = chosen
        self._start()

    def block_columns(self, chosen: Tensor) -> None:
        """Take key blocks for all query blocks alike, as far as they see them: bool ``[B, heads, N]``.

        Once, and before `choose`.
        """
        self._once(self._block_columns is not None, "block_columns")
        self._block_columns = chosen
        self._start()

    def choose(self, part: range, scores: Tensor, rule: Rule, *, heads: Tensor | None = None) -> None:
        """Choose the key blocks of some query blocks, by a rule on their scores.

        Parts may come in any order, each query block in one of them. A rule that needs all rows of a head is applied
        when the last part is there; the scores are held until then.

        Args:
            part: plan rows, as `gossamer.scores` say them.
            scores: fp32 ``[B, heads, len(part), N]``.
            heads: bool ``[B, heads]``, only for these; the others have what is named otherwise.

        Raises:
            ValueError: a query block was given before; or parts have different rules that need all rows.
        """
        self._start()
        self._chose = True
        if rule.all_rows:
            self._hold(part, scores, rule, heads)
        else:
            self._write(part, scores, rule, heads)

    def columns(self, scores: Tensor, rule: Rule) -> None:
        """Choose single keys for all query blocks alike, by a rule on the scores ``[B, heads, positions]``.

        Raises:
            ValueError: they were chosen before.
        """
        if self._columns is not None:
            raise ValueError("columns are chosen once: unite the scores, or the choices, before")
        if self.grid.query_blocks:
            self.group_columns(range(1), scores[:, :, None], rule, group=self.grid.query_blocks)

    def group_columns(self, part: range, scores: Tensor, rule: Rule, *, group: int, first: int = 0) -> None:
        """Choose single keys for each ``group`` of consecutive query blocks, by a rule on their scores.

        Parts may come in any order, each group in one of them; a group that never comes has no columns.

        Args:
            part: of the ``ceil(M / group)`` groups, from the plan's row 0 on.
            scores: fp32 ``[B, heads, len(part), positions]``; the keys that a group does not see do not count.
            group: the same for all parts.
            first: the first keys, which are taken besides.

        Raises:
            ValueError: a group was given before, or parts have groups of other sizes.
        """
        self._start_columns(group)
        seen = self.grid.keys_of_groups(group)[:, part.start : part.stop]
        self._columns.choose(part, Candidates(seen, seen[..., :1].expand_as(seen), first), scores, rule)

    def near_columns(self, anchors: Tensor | None, bar: PerHead, *, group: int, left_out: Tensor) -> None:
        """Choose single keys for each ``group`` of query blocks: those whose logit lies near an anchor, or above.

        As `group_columns` with `gossamer.scores.group_differences` and `AtLeast` a bar, but where the backend can, no
        score is kept: there is one for each key and group.

        Args:
            anchors: as `gossamer.scores.group_differences` takes them.
            left_out: int64 ``[B, groups, R, 2]``, ranges of positions that are not chosen.
        """
        self._start_columns(group)
        if hasattr(self._backend, "near_keys"):
            for part, *lists in score_functions.near_keys(self.call, self.grid, anchors, group, bar, left_out):
                self._columns.take(part, *lists)
            return
        key, ranges = torch.arange(self.call.extent.longest, device=self.call.device), left_out.to(self.call.device)
        for part, above in score_functions.group_differences(self.call, self.grid, anchors, group):
            low, high = ranges[:, part.start : part.stop, :, None].unbind(-1)
            hidden = ((key >= low) & (key < high)).any(dim=2)[:, None]
            self.group_columns(part, above.masked_fill_(hidden, float("-inf")), AtLeast(bar), group=group)

    def _start_columns(self, group: int) -> None:
        if self._columns is None:
            lists, width = ceil_div(self.grid.query_blocks, group), self.call.extent.longest
            self._columns = self._backend.ListWriter(self.call.batch, self.heads, lists, width, self.call.device)
            self._column_group = group
        if group != self._column_group:
            raise ValueError(f"columns are for groups of {self._column_group} query blocks, got others of {group}")

    def lists(self, parts: Iterator[tuple[range, Any, Any]]) -> None:
        """Blocks and columns of each query block as lists: ``part, (counts, indices), (counts, indices)``.

        For methods that construct lists themselves (`gossamer.backends.torch.exact_slashes`). Counts are int64
        ``[B, heads, len(part)]``, indices int32 in order.
        """
        self._backend = backend_of(self.call, "exact_slashes")  # one whose writer takes lists
        size = (self.call.batch, self.heads, self.grid.query_blocks)
        self._rows = self._backend.ListWriter(*size, self.grid.key_blocks, self.call.device)
        self._columns = self._backend.ListWriter(*size, self.call.extent.longest, self.call.device)
        self._missing, self._column_group = [], 1
        for part, blocks, columns in parts:
            self._rows.take(part, *blocks)
            self._columns.take(part, *columns)

    def plan(
        self,
        *,
        sink: Tensor | int = 0,
        window: Tensor | int = 0,
        pruned_mean: bool = False,
        skip: float | None = None,
    ) -> SparsePlan:
        """The plan, its pairs counted. On a device this waits once, for the numbers of blocks, columns and pairs.

        Args:
            sink, window: its bands in tokens, one number or ``[heads]``.
            pruned_mean, skip: its attributes, for blocks alone; `gossamer.methods.Corrected` gives them to the plans of
                any method.

        Raises:
            ValueError: a rule needed all rows, and some never came; an attribute beside columns or bands.
        """
        if self._pending:
            raise ValueError(
                f"{type(self._pending_rule).__name__} needs all {self.grid.query_blocks} query blocks, "
                f"got {sum(len(part) for part, _ in self._pending)}"
            )
        self._reach(sink, window)
        row_bytes = self.call.batch * self.heads * self.grid.key_blocks
        for missing in self._missing:
            for part in self.grid.parts(row_bytes, MASK_BYTES):
                both = range(max(part.start, missing.start), min(part.stop, missing.stop))
                if both:
                    self._rows.choose(both, self._candidates(both))
        return self._backend.finish(
            self._rows,
            self._columns,
            heads=self.heads,
            query_len=self.call.query_len,
            key_len=self.call.key_len,
            extent=self.call.extent,
            block_q=self.grid.block_q,
            block_k=self.grid.block_k,
            column_group=self._column_group,
            sink=sink,
            window=window,
            pruned_mean=pruned_mean,
            skip=skip,
            k_order=self._k_order,
        )

    def _reach(self, sink: Tensor | int, window: Tensor | int) -> None:
        """Where bands alone would leave queries beyond the keys without any, they keep the last key block."""
        extent = self.call.extent
        if extent.causal or (self._rows is not None and self._own) or self._columns is not None or _least(sink) > 0:
            return
        past = self.grid.queries[..., 1] - extent.key_count[:, None]
        beyond = (past >= _least(window)) & (extent.key_count > 0)[:, None]
        if bool(beyond.any()):
            self._own, self._beyond = 0, beyond
            self._start()

    def _once(self, before: bool, name: str) -> None:
        if before or self._chose:
            raise ValueError(f"`{name}` is said once, and before `choose`, which takes what is said into account")

    def _start(self) -> None:
        if self._rows is None:
            size = (self.call.batch, self.heads, self.grid.query_blocks, self.grid.key_blocks)
            self._rows = self._backend.ListWriter(*size, self.call.device)
            self._missing = [range(self.grid.query_blocks)]

    def _write(self, part: range, scores: Tensor, rule: Rule, heads: Tensor | None) -> None:
        self._rows.choose(part, self._candidates(part, heads), scores, rule)
        self._missing = [
            rest
            for gap in self._missing
            for rest in (range(gap.start, min(gap.stop, part.start)), range(max(gap.start, part.stop), gap.stop))
            if rest
        ]

    def _hold(self, part: range, scores: Tensor, rule: Rule, heads: Tensor | None) -> None:
        """Until all rows are there."""
        if any(part.start < other.stop and other.start < part.stop for other, _ in self._pending):
            raise ValueError(f"the query blocks {part.start} to {part.stop - 1} were given before")
        if self._pending and (rule is not self._pending_rule or heads is not self._pending_heads):
            raise ValueError(f"{type(rule).__name__} chooses for all query blocks at once: give one rule for all parts")
        self._pending.append((part, scores))
        self._pending_rule, self._pending_heads = rule, heads
        self._choose_pending()

    def _choose_pending(self) -> None:
        parts = sorted(self._pending, key=lambda pair: pair[0].start)
        if sum(len(part) for part, _ in parts) == self.grid.query_blocks and self._pending_rule is not None:
            scores = parts[0][1] if len(parts) == 1 else torch.cat([scores for _, scores in parts], dim=2)
            self._pending = []
            self._write(range(self.grid.query_blocks), scores, self._pending_rule, self._pending_heads)

    def _candidates(self, part: range, ruled_heads: Tensor | None = None) -> Candidates:
        rows = slice(part.start, part.stop)
        seen, forced = self.grid.seen, self.grid.own(self._own)
        if self._segment:
            seen, forced = (self.grid.in_segments(ranges, self._segment) for ranges in (seen, forced))
        seen, forced = seen[:, rows], forced[:, rows]
        if self._own == 0:
            keeps = False if self._beyond is None else self._beyond[:, rows, None]
            forced = torch.where(torch.as_tensor(keeps, device="cpu"), self.grid.own()[:, rows], 0)
        if self._group > 1:
            begin, end = self.grid.group(self._group)[:, rows].unbind(-1)
            first, last = begin // self.grid.block_k, -(-end // self.grid.block_k)
            forced = torch.stack([forced[..., 0].minimum(first), forced[..., 1].maximum(last)], dim=-1)
        if self._last_rows:
            forced = torch.where(self.grid.holds_last(self._last_rows)[:, rows, None], seen, forced)
        origin = None if self._diagonals is None else (self.grid.queries[:, rows, 1] - 1) // self.grid.block_k
        return Candidates(
            seen,
            forced,
            self._first,
            self._forced_heads,
            self._diagonals,
            origin,
            mirrored=not self.call.extent.causal,
            everywhere=self._block_columns,
            ruled_heads=ruled_heads,
        )


def _least(band: Tensor | int) -> int:
    return int(band.min()) if isinstance(band, Tensor) else band
