"""Chosen key blocks of each query block: a rule on scores, block diagonals and forced blocks, as one CSR.

In C++ for CPU tensors, else as bool masks in torch; the sets are the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from gossamer.estimators import BlockVisibility
from gossamer.ops.cpu import planning
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

__all__ = ["BlockChoice", "column_lists"]

_MASK_BYTES = 64 << 20


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
    """

    visible: BlockVisibility
    heads: int
    window: int = 1
    leading: int = 0
    tail: Tensor | None = None
    bands: Tensor | None = None
    forcing: Tensor | None = None
    _csr: CsrBuilder = field(default_factory=CsrBuilder, init=False)

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
        if planning.enabled() and self.visible.device.type == "cpu":
            self._csr.add_lists(*self._lists(at, stop, scores, rule))
        else:
            self._csr.add(self._mask(at, stop, scores, rule))

    def add_all(self) -> None:
        """Choose for all query blocks without scores, in chunks whose masks are small."""
        blocks, key_blocks = self.visible.last_query.shape[1], self.visible.first_key.shape[1]
        row_bytes = self.visible.last_query.shape[0] * self.heads * key_blocks
        step = max(1, _MASK_BYTES // max(1, row_bytes))
        for at in range(0, blocks, step):
            self.add(at, min(at + step, blocks))

    def build(self) -> tuple[Tensor, Tensor]:
        """Row pointers and indices of the plan's blocks."""
        return self._csr.build()

    def _lists(
        self, at: int, stop: int, scores: Tensor | None, rule: dict[str, Tensor | float]
    ) -> tuple[Tensor, Tensor]:
        seen = self.visible.seen_blocks(at, stop)
        first, last = self.visible.own_key_blocks(at, stop)
        forced = torch.stack([first - self.window + 1, last + 1], dim=-1)
        if self.tail is not None:
            forced = torch.where(self.tail[:, at:stop, None], seen, forced)
        return planning.choose(
            planning.Ranges(seen, forced, self.visible.leading_blocks(self.leading)),
            self.heads,
            self.visible.first_key.shape[1],
            scores=scores,
            bands=self.bands,
            band_origin=last,
            forcing=self.forcing,
            **rule,
        )

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
        name_and_value = planning.one_rule(scores, rule)
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
    """One of `planning.RULES` by its selector; ``seen`` and ``forced`` are masks that broadcast to the scores."""
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


def column_lists(scores: Tensor, budgets: Tensor) -> tuple[Tensor, Tensor]:
    """`gossamer.selectors.top_k` of ``scores`` ``[B, H, T]`` for budgets ``[H]``, one list a head, as a CSR."""
    csr = CsrBuilder()
    batch, heads, key_len = scores.shape
    if planning.enabled() and scores.device.type == "cpu":
        everything = torch.tensor([0, key_len]).expand(batch, 1, 2)
        nothing = torch.zeros(batch, 1, 2, dtype=torch.int64)
        ranges = planning.Ranges(everything, nothing, nothing[:, 0])
        csr.add_lists(*planning.choose(ranges, heads, key_len, scores=scores[:, :, None], budgets=budgets))
    else:
        csr.add(top_k(scores, budgets)[:, :, None])
    return csr.build()
