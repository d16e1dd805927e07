"""Attention over some keys and over others, joined."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["merge"]


def merge(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> None:
    """Into attention over some keys, write it over those and others: ``out [.., Dv]`` and ``lse [..]``, in place.

    ``lse' = log(exp lse + exp part_lse)``, and each output counts by ``exp(its lse - lse')``. A row that attends
    nothing in either stays ``out = 0, lse = -inf``.
    """
    both = torch.logaddexp(lse, part_lse.to(lse))
    level = both.masked_fill(both == float("-inf"), 0.0)
    out.mul_(torch.exp(lse - level)[..., None]).add_(part_out.to(out) * torch.exp(part_lse.to(lse) - level)[..., None])
    lse.copy_(both)
