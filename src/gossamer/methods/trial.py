"""What a few query rows attend exactly, against which plans are judged before they run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gossamer.backends.torch.attend import cleared, logits
from gossamer.call import AttentionCall
from gossamer.plan import SparsePlan

__all__ = ["Trial"]


class Trial:
    """``rows`` query rows of each batch row, spread evenly over its live ones, under dense attention.

    It costs what dense attention costs for so many rows, and a part of it again for each plan. Weights are held in q's
    dtype, ``B * H * rows * T`` of them.
    """

    def __init__(self, call: AttentionCall, rows: int) -> None:
        extent = call.extent
        ordinal = (2 * torch.arange(rows, device="cpu") + 1) * extent.query_count[:, None] // (2 * rows)
        # A batch row without live queries has dead rows here, which attend nothing.
        self._rows = (extent.first_query[:, None] + ordinal).clamp(max=max(0, call.query_len - 1)).to(call.device)
        self._call, self._values = call, cleared(call.values, call)
        allowed = extent.allowed(self._rows, call.key_len, call.device)
        # Shares [B, G, share, rows, T], and what sinks have of each row.
        self._shares = call.q.new_empty(call.batch, call.groups, call.share, rows, call.key_len)
        self._rest = torch.zeros(call.batch, call.groups, call.share, rows, device=call.device)
        for b in range(call.batch):
            for g in range(call.groups):
                self._shares[b, g], self._rest[b, g] = self._softmax(b, g, allowed[b])
        self._exact = self._outputs(self._shares, range(call.groups))

    def error(self, plan: SparsePlan, groups: Sequence[int] | None = None) -> Tensor:
        """Relative L2 error of the rows' outputs under a plan, fp32 ``[B, heads]``; 0 where all of them are 0.

        Args:
            plan: of all heads, or of the query heads of some.
            groups: these key/value heads.
        """
        groups = range(self._call.groups) if groups is None else groups
        mask = plan.rows_mask(self._rows).to(self._call.device)
        mask = mask.unflatten(1, (len(groups), -1))
        exact = self._exact[:, groups]
        shares = self._shares if len(groups) == self._call.groups else self._shares[:, groups]
        wrong = (self._outputs(shares * mask, groups) - exact).square().sum(dim=(3, 4))
        return (wrong / exact.square().sum(dim=(3, 4)).clamp(min=torch.finfo(wrong.dtype).tiny)).sqrt().flatten(1)

    def _outputs(self, shares: Tensor, groups: Sequence[int]) -> Tensor:
        """Fp32 ``[B, groups, share, rows, Dv]``."""
        values = self._values if len(groups) == self._call.groups else self._values[:, groups]
        total = shares.sum(dim=-1, dtype=torch.float32) + self._rest[:, groups]
        out = (shares.flatten(2, 3) @ values).view(*shares.shape[:-1], -1)
        return out.float() / total.clamp(min=torch.finfo(total.dtype).tiny)[..., None]

    def _softmax(self, b: int, g: int, allowed: Tensor) -> tuple[Tensor, Tensor]:
        """Of one key/value head: logits of all would be large."""
        call = self._call
        heads = slice(g * call.share, (g + 1) * call.share)
        one = replace(
            call,
            q=call.q[b : b + 1, heads],
            k=call.k[b : b + 1, g : g + 1],
            v=None,
            extent=call.extent.of_rows(slice(b, b + 1)),
            sinks=None,
            state=None,
        )
        scores = logits(one, self._rows[b])[0].masked_fill_(~allowed, float("-inf"))
        sink = scores.new_full(scores.shape[:2], float("-inf"))
        if call.sinks is not None:
            sink = call.sinks[heads].to(scores)[:, None].expand_as(sink)
        lse = torch.logaddexp(scores.logsumexp(dim=-1), sink)
        lse = lse.masked_fill(lse == float("-inf"), 0.0)  # of a row that attends nothing
        return scores.sub_(lse[..., None]).exp_(), (sink - lse).exp()
