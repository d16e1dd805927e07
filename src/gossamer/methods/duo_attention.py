"""DuoAttention: full attention for the heads that retrieve, sinks and a recent window for the others."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

from gossamer.blocks import Blocks
from gossamer.call import AttentionCall
from gossamer.methods.base import Method, require_at_least, require_share
from gossamer.methods.head_tables import Table, full_heads, gates_of_rank, of_layer, require_table, windows
from gossamer.plan import SparsePlan

__all__ = ["DuoAttention"]


@dataclass(frozen=True)
class DuoAttention(Method):
    """DuoAttention (2410.10819, sections 2.3 and 2.4): each key/value head is full or streaming, for good.

    Training gave each key/value head a gate in [0, 1], the share of full attention that it needs. The heads whose gate
    is at least the quantile ``sparsity`` of all the model's gates are full; the others attend ``pos(j) < sink`` and
    ``|pos(i) - pos(j)| < recent``, exact to the token; the window counts the token itself, and is symmetric where
    attention is not causal.

    Fields:
        gates: ``[layer][head]``, for key/value heads, as the authors train them, or for query heads.

    Defaults: half of the heads, 64 and 256 tokens, as the authors deploy models with grouped heads (0.75 without).
    Gates have none: read the authors' files with `gossamer.profiles.read_duo`, or train them.

    Deviations from the authors' code: equal gates are ranked by layer and head (there by random noise of 1e-6); the
    streaming heads stream from the first token on (there the first chunk of a prefill is dense).
    """

    name: ClassVar[str] = "duo_attention"
    tables: ClassVar[tuple[str, ...]] = ("gates",)
    apart: ClassVar[bool] = False
    gates: Table = ()
    sparsity: float = 0.5
    sink: int = 64
    recent: int = 256

    def __post_init__(self) -> None:
        require_table(self, "gates")
        require_share(self, "sparsity")
        require_at_least(self, 0, "sink")
        require_at_least(self, 1, "recent")

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
        blocks = Blocks(call, per="kv_head" if len(full) == call.groups else "head")
        return blocks.plan(sink=self.sink, window=windows(full, self.recent))
