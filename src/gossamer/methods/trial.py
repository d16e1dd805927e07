"""What a few query rows attend exactly, against which plans are judged before they run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.backends import backend_of
from gossamer.call import AttentionCall
from gossamer.plan import SparsePlan

__all__ = ["Trial"]


@dataclass(frozen=True, eq=False)
class Trial:
    """A few query rows of each batch row, and their outputs under dense attention: fp32 ``[B, H, R, Dv]``.

    To make one, and to judge a plan, costs at most what dense attention costs for so many rows.
    """

    call: AttentionCall
    rows: Tensor
    exact: Tensor

    @classmethod
    def of(cls, call: AttentionCall, rows: int) -> Trial:
        """Of ``rows`` query rows, spread evenly over the live ones of each batch row."""
        extent = call.extent
        ordinal = (2 * torch.arange(rows, device="cpu") + 1) * extent.query_count[:, None] // (2 * rows)
        # A batch row without live queries has dead rows here, which attend nothing.
        chosen = (extent.first_query[:, None] + ordinal).clamp(max=max(0, call.query_len - 1))
        dense = SparsePlan.dense(call.groups, call.query_len, call.key_len, extent).to(call.device)
        return cls(call, chosen, _outputs(call, dense, chosen))

    def of_groups(self, groups: Sequence[int]) -> Trial:
        """Of some key/value heads and their query heads."""
        exact = self.exact.unflatten(1, (self.call.groups, -1))[:, list(groups)].flatten(1, 2)
        return Trial(self.call.of_groups(groups), self.rows, exact)

    def error(self, plan: SparsePlan) -> Tensor:
        """Relative L2 error of the rows' outputs under a plan, fp32 ``[B, H]``; 0 where all of them are 0."""
        wrong = (_outputs(self.call, plan, self.rows) - self.exact).square().sum(dim=(2, 3))
        size = self.exact.square().sum(dim=(2, 3))
        return (wrong / size.clamp(min=torch.finfo(wrong.dtype).tiny)).sqrt()


def _outputs(call: AttentionCall, plan: SparsePlan, rows: Tensor) -> Tensor:
    return backend_of(call, "attend_rows").attend_rows(call, plan, rows)[0].float()
