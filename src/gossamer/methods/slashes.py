"""The authors' token-exact lowering of vertical-slash, for studies."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gossamer.backends import backend_of
from gossamer.call import AttentionCall
from gossamer.plan import Grid
from gossamer.rules import top_k

__all__ = ["FORCED_DIAGONALS", "MINIMUM_DIAGONALS", "slash_lists"]

FORCED_DIAGONALS = 100
MINIMUM_DIAGONALS = 50
PART_ENTRIES = 16 << 20


def slash_lists(
    call: AttentionCall, grid: Grid, columns: Tensor, diagonals: Tensor, column_budget: Tensor, slash_budget: Tensor
) -> Iterator[tuple[range, Any, Any]]:
    """What the best columns and diagonals become, by parts; see `gossamer.backends.torch.exact_slashes`.

    Args:
        columns, diagonals: mass ``[B, H, positions]``, infinite for forced columns.
        column_budget, slash_budget: one number, or one a head. The 100 first distances are forced.
    """
    position = torch.arange(columns.shape[-1], device=call.device)
    beyond = (position >= call.extent.key_count.to(call.device)[:, None])[:, None]
    chosen = top_k(columns.masked_fill(beyond, float("-inf")), column_budget)
    nearest = diagonals.masked_fill(position < FORCED_DIAGONALS, float("inf"))
    slashes = top_k(nearest.masked_fill(beyond, float("-inf")), slash_budget)
    exact_slashes = backend_of(call, "exact_slashes").exact_slashes
    for part in grid.parts(columns.numel(), PART_ENTRIES):
        yield part, *exact_slashes(chosen, slashes, grid, part)
