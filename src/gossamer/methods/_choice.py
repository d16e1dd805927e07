"""Chosen key blocks of each query block: a rule on scores, block diagonals and forced blocks; plans from them.

In C++ for CPU tensors, in Triton for CUDA tensors, else as bool masks in torch; equal scores give equal sets.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from gossamer.backends.cpu.planning import Ranges, one_rule
from gossamer.backends.planners import cpu_planner, device_planner, model_window
from gossamer.estimators import BlockVisibility
from gossamer.plan import Extent, SparsePlan
from gossamer.selectors import (
    CsrBuilder,
    local_blocks,
    relative_to_max,
    top_k,
    top_p,
    top_p_below,
    top_p_of_all_rows,
    top_p_reaching,
)

__all__ = ["BlockChoice", "Lists", "column_lists", "has_pairs", "make_plan"]

_MASK_BYTES = 64 << 20


def has_pairs(q: Tensor, k: Tensor) -> bool:
    """Whether there is anything to score: a batch row, a query and a key slot."""
    return 0 not in (q.shape[0], q.shape[2], k.shape[2])


class Lists(Protocol):
    """Chosen candidates: a `CsrBuilder`, or bits on a device (`gossamer.backends.triton.planning.BitLists`)."""

    def build(self) -> tuple[Tensor, Tensor]: ...


@dataclass
class BlockChoice:
    """Collects the choice of ever more query blocks. A forced block counts only where it holds visible pairs.

    Fields:
        visible: where pairs are.
        heads: heads of the plan.
        window: forced are a query block's own key blocks and the ``window - 1`` before.
        leading: forced are the first blocks that hold live keys.
        tail: bool ``[B, M]``, query blocks that take every visible key block.
        bands: bool ``[B, heads, bands]``: chosen block diagonals, counted from the key block of a query block's last
            row, so that one rule serves chunks that start anywhere.
        forcing: bool ``[B, heads]``, the heads that force any; default all.
        lists: what was chosen so far; see `Lists`.
    """

    visible: BlockVisibility
    heads: int
    window: int = 1
    leading: int = 0
    tail: Tensor | None = None
    bands: Tensor | None = None
    forcing: Tensor | None = None
    lists: Any = field(init=False)

    def __post_init__(self) -> None:
        planner = device_planner(self.visible.device)
        (batch, blocks), key_blocks = self.visible.last_query.shape, self.visible.first_key.shape[1]
        if planner is None:
            self.lists = CsrBuilder()
        else:
            self.lists = planner.BitLists(batch, self.heads, blocks, key_blocks, self.visible.device)

    def add(
        self,
        at: int,
        stop: int,
        scores: Tensor | None = None,
        **rule: Tensor | float,
    ) -> None:
        """Choose for query blocks ``at .. stop - 1``.

        Args:
            scores: fp32 ``[B, heads, stop - at, N]``, with exactly one rule. Outside what a query block sees they
                are -inf for ``budgets`` and 0 for ``alpha``; a share leaves them out.
            rule: ``alpha`` (`gossamer.selectors.relative_to_max`), ``budgets`` (`gossamer.selectors.top_k`, int64
                ``[heads]``), or a share, a number or ``[heads]``: ``top_p`` (`gossamer.selectors.top_p`),
                ``top_p_forced`` (the same with the forced blocks first, which use up their part of it),
                ``top_p_reaching``, ``top_p_below`` and ``top_p_of_all_rows`` (the selectors of these names; the last
                shares out among the query blocks of this call, which should be all of them).

        Raises:
            TypeError: not exactly one rule with scores, or one without them.
            ValueError: a share outside [0, 1].
        """
        native = cpu_planner(self.visible.device)
        if not isinstance(self.lists, CsrBuilder):
            one_rule(scores, rule)
            if rule.keys() <= self.lists.RULES:
                self.lists.choose(at, self._ranges(at, stop), scores=scores, **rule, **self._diagonals(at, stop))
            else:
                self.lists.take(self._mask(at, stop, scores, rule), at)
        elif native is not None:
            width = self.visible.first_key.shape[1]
            ranges, diagonals = self._ranges(at, stop), self._diagonals(at, stop)
            self.lists.add_lists(*native.choose(ranges, self.heads, width, scores=scores, **rule, **diagonals))
        else:
            self.lists.add(self._mask(at, stop, scores, rule))

    def add_all(self) -> None:
        """Choose for all query blocks without scores, in chunks whose masks are small."""
        blocks, key_blocks = self.visible.last_query.shape[1], self.visible.first_key.shape[1]
        row_bytes = self.visible.last_query.shape[0] * self.heads * key_blocks
        step = max(1, _MASK_BYTES // max(1, row_bytes)) if isinstance(self.lists, CsrBuilder) else max(1, blocks)
        for at in range(0, blocks, step):
            self.add(at, min(at + step, blocks))

    def build(self) -> tuple[Tensor, Tensor]:
        """Row pointers and indices of the plan's blocks."""
        return self.lists.build()

    def _ranges(self, at: int, stop: int) -> Ranges:
        seen = self.visible.seen_blocks(at, stop)
        first, last = self.visible.own_key_blocks(at, stop)
        forced = torch.stack([first - self.window + 1, last + 1], dim=-1)
        if self.tail is not None:
            forced = torch.where(self.tail[:, at:stop, None], seen, forced)
        return Ranges(seen, forced, self.visible.leading_blocks(self.leading))

    def _diagonals(self, at: int, stop: int) -> dict[str, Tensor | None]:
        _, last = self.visible.own_key_blocks(at, stop)
        return {"bands": self.bands, "band_origin": last, "forcing": self.forcing}

    def _mask(self, at: int, stop: int, scores: Tensor | None, rule: dict[str, Tensor | float]) -> Tensor:
        key_blocks, device = self.visible.first_key.shape[1], self.visible.device
        first, last = self.visible.own_key_blocks(at, stop)
        block = torch.arange(key_blocks, device=device)
        leading = self.visible.leading_blocks(self.leading)
        forced = local_blocks(first, last, self.window, key_blocks)
        forced |= ((block >= leading[:, :1]) & (block < leading[:, 1:]))[:, None]
        if self.tail is not None:
            forced |= self.tail[:, at:stop, None]
        forced = forced[:, None]
        chosen = forced if self.forcing is None else forced & self.forcing[:, :, None, None]
        seen = self.visible.any_pair(at, stop)[:, None]
        name_and_value = one_rule(scores, rule)
        if scores is not None and name_and_value is not None:
            chosen = chosen | _select(scores, *name_and_value, seen, chosen)
        if self.bands is not None:
            band = last[..., None] - block  # [B, m, N]
            inside = (band >= 0) & (band < self.bands.shape[-1])
            index = band.clamp(0, self.bands.shape[-1] - 1)[:, None].expand(-1, self.heads, -1, -1)
            rows = self.bands[:, :, None].expand(-1, -1, stop - at, -1)
            chosen = chosen | (rows.gather(3, index) & inside[:, None])
        chosen = chosen & seen
        return chosen.expand(-1, self.heads, -1, -1)


def _select(scores: Tensor, name: str, value: Tensor | float, seen: Tensor, forced: Tensor) -> Tensor:
    """A rule of `gossamer.backends.cpu.planning.RULES` by its selector; the masks broadcast to the scores."""
    if name == "alpha":
        return relative_to_max(scores, float(value))
    dtype = torch.int64 if name == "budgets" else torch.float64
    a_head = torch.as_tensor(value, dtype=dtype, device=scores.device).expand(scores.shape[1])[:, None]
    if name == "budgets":
        return top_k(scores, a_head.expand(scores.shape[:3]))
    scores = scores.masked_fill(~seen, 0.0)
    if name == "top_p_forced":
        return top_p(scores, a_head, forced.expand_as(scores))
    if name == "top_p_of_all_rows":
        return top_p_of_all_rows(scores, a_head[:, 0]) if scores.numel() else scores.bool()
    return {"top_p": top_p, "top_p_reaching": top_p_reaching, "top_p_below": top_p_below}[name](scores, a_head)


def column_lists(scores: Tensor, budgets: Tensor) -> Lists:
    """`gossamer.selectors.top_k` of ``scores`` ``[B, H, T]`` for budgets ``[H]``, one list a head."""
    batch, heads, key_len = scores.shape
    device, native = device_planner(scores.device), cpu_planner(scores.device)
    if device is not None:
        bits = device.BitLists(batch, heads, 1, key_len, scores.device)
        bits.take(top_k(scores, budgets)[:, :, None])
        return bits
    csr = CsrBuilder()
    if native is not None:
        everything = torch.tensor([0, key_len]).expand(batch, 1, 2)
        nothing = torch.zeros(batch, 1, 2, dtype=torch.int64)
        ranges = Ranges(everything, nothing, nothing[:, 0])
        csr.add_lists(*native.choose(ranges, heads, key_len, scores=scores[:, :, None], budgets=budgets))
    else:
        csr.add(top_k(scores, budgets)[:, :, None])
    return csr


def make_plan(
    heads: int,
    query_len: int,
    key_len: int,
    extent: Extent,
    *,
    block_q: int,
    block_k: int,
    blocks: BlockChoice | None = None,
    columns: Lists | None = None,
    column_group: int = 1,
    sink: Tensor | int = 0,
    window: Tensor | int = 0,
) -> SparsePlan:
    """The plan of chosen blocks and columns. The other arguments are the plan's fields.

    On a device it waits once, for the numbers of blocks, columns and pairs (under the model's own window, where
    `gossamer.backends.planners.within` says one); the plan is not validated there, since that would wait again.
    """
    chosen = {"block": blocks.lists if blocks is not None else None, "column": columns}
    chosen = {name: lists for name, lists in chosen.items() if lists is not None}
    shape: dict[str, Any] = dict(heads=heads, query_len=query_len, key_len=key_len, extent=extent)
    shape |= dict(block_q=block_q, block_k=block_k, column_group=column_group, sink=sink, window=window)
    shape |= dict(limit=model_window())
    fields: dict[str, Any] = {}
    if not chosen or any(isinstance(lists, CsrBuilder) for lists in chosen.values()):
        for name, lists in chosen.items():
            fields[f"{name}_indptr"], fields[f"{name}_indices"] = lists.build()
        return SparsePlan(**shape, **fields)
    from gossamer.backends.triton import planning

    device = next(iter(chosen.values())).bits.device
    bits = {name: lists.bits for name, lists in chosen.items()}
    pairs = planning.pairs_of_bits(bits.get("block"), bits.get("column"), **shape, causal=True, device=device).sum()
    built, (counted,) = planning.build(*chosen.values(), numbers=[pairs])
    for name, (indptr, indices) in zip(chosen, built, strict=True):
        fields[f"{name}_indptr"], fields[f"{name}_indices"] = indptr, indices
    if "block" not in chosen:  # the plan lies where its blocks lie
        fields["block_indices"] = torch.empty(0, dtype=torch.int32, device=device)
    return SparsePlan.unchecked(**shape, **fields, pairs=counted)
