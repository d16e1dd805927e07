"""LServe's prefill: DuoAttention's split of heads with a wide local window, exact to the token or by blocks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch

from gossamer.blocks import Blocks
from gossamer.call import AttentionCall
from gossamer.methods.base import Method, require_at_least, require_flag, require_share
from gossamer.methods.head_tables import Table, full_heads, gates_of_rank, of_layer, require_table, windows
from gossamer.plan import SparsePlan, ceil_div

__all__ = ["LServe"]


@dataclass(frozen=True)
class LServe(Method):
    """LServe's static sparsity in prefill (2502.14866, section 3.4): full and streaming heads by DuoAttention's gates.

    The heads are split as `DuoAttention` splits them. Streaming ones have two forms:
        * ``exact=True`` (default, the released engine): ``pos(j) < sink`` and ``|pos(i) - pos(j)| < local``.
        * ``exact=False`` (the paper's block-wise streaming): each query block attends the first
          ``ceil(sink / block)`` key blocks, its own and the ones before, ``ceil(local / block)`` in all.

    Fields:
        gates: ``[layer][head]``, for key/value heads or for query heads, from DuoAttention's files or training.

    Defaults are those of the authors' scripts and engine: half of the heads, 128 and 8192 tokens, tiles of 128.

    Deviations: the full heads are dense; the paper's dynamic sparsity on them is not in the released engine (use
    `PerHead` for a mixture). Decoding, which selects pages of a cache, is not part of this method.
    """

    name: ClassVar[str] = "lserve"
    tables: ClassVar[tuple[str, ...]] = ("gates",)
    apart: ClassVar[bool] = False
    gates: Table = ()
    sparsity: float = 0.5
    sink: int = 128
    local: int = 8192
    block: int = 128
    exact: bool = True

    def __post_init__(self) -> None:
        require_table(self, "gates")
        require_share(self, "sparsity")
        require_at_least(self, 0, "sink")
        require_at_least(self, 1, "local", "block")
        require_flag(self, "exact")

    @cached_property
    def full(self) -> tuple[tuple[bool, ...], ...]:
        """The heads that are full, ``[layer][head]``."""
        return full_heads(self.gates, self.sparsity)

    def of_rank(self, rank: int, ranks: int, heads: int, groups: int) -> Method:
        return (
            replace(self, **gates_of_rank(self.full, rank, ranks, heads, groups)) if self.gates and ranks > 1 else self
        )

    def plan(self, call: AttentionCall) -> SparsePlan:
        full = of_layer(self.full, call.layer, [call.groups, call.heads], f"{self.name}.gates")
        blocks = Blocks(call, self.block, self.block, per="kv_head" if len(full) == call.groups else "head")
        if self.exact:
            return blocks.plan(sink=self.sink, window=windows(full, self.local))
        streaming = ~torch.tensor(full, device=call.device).expand(call.batch, -1)
        blocks.keep(first=ceil_div(self.sink, self.block), own=ceil_div(self.local, self.block), heads=streaming)
        return blocks.plan(window=windows(full, 0))
