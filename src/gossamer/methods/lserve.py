"""LServe: DuoAttention's split of heads with a wide local window for prompts, and pages of pages for decoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from gossamer.blocks import Blocks
from gossamer.call import AttentionCall
from gossamer.methods.base import Method, require_at_least, require_flag, require_share
from gossamer.methods.head_tables import Table, full_heads, gates_of_rank, of_layer, require_table, windows
from gossamer.methods.pages import choose, forced, plan_of_blocks, share_read, shared
from gossamer.plan import SparsePlan, ceil_div
from gossamer.scores import page_scores
from gossamer.summaries import PageBounds

__all__ = ["LServe"]


@dataclass(frozen=True)
class LServe(Method):
    """LServe (2502.14866): full and streaming heads by DuoAttention's gates, and pages chosen for the full ones.

    **Prompts** (section 3.4). The heads are split as `DuoAttention` splits them. Streaming ones have two forms:
        * ``exact=True`` (default, the released engine): ``pos(j) < sink`` and ``|pos(i) - pos(j)| < local``.
        * ``exact=False`` (the paper's block-wise streaming): each query block attends the first
          ``ceil(sink / block)`` key blocks, its own and the ones before, ``ceil(local / block)`` in all.

    **Decoding** (section 3.5, `Policy.decode`). Streaming heads read ``sink`` tokens and the last ``step_local``. For
    full ones a page of ``page`` tokens has the score of the best of its logical pages of ``logical`` tokens, scored as
    `Quest` scores pages: the ``budget // page`` best ones, three at least and the newest among them, are read in this
    step and the ``interval - 1`` after it, in which the newest joins them. A choice is dropped when a prompt comes,
    tokens are cut off or beams change places. A cache of no more tokens than the budget is read whole.

    Fields:
        gates: ``[layer][head]``, for key/value heads or for query heads, from DuoAttention's files or training. For
            decoding, none make all heads full ones.

    Defaults are those of the authors' scripts and engine: half of the heads, 128 and 8192 tokens, tiles of 128; in
    decoding 256 tokens, pages of 64 in logical ones of 16, 4,096 tokens, chosen every 4 steps.

    Deviations: in prompts, the full heads are dense; the paper's dynamic sparsity on them is not in the released engine
    (use `PerHead` for a mixture). In decoding, the query heads of a key/value head share a choice, as in `Quest`, where
    gates are of key/value heads; the first step after a prompt chooses, and every 4th from there (there, every 4th
    position); keys and values are not quantised by this method.
    """

    name: ClassVar[str] = "lserve"
    tables: ClassVar[tuple[str, ...]] = ("gates",)
    apart: ClassVar[bool] = False
    decodes: ClassVar[bool] = True
    gates: Table = ()
    sparsity: float = 0.5
    sink: int = 128
    local: int = 8192
    block: int = 128
    exact: bool = True
    step_local: int = 256
    budget: int = 4096
    page: int = 64
    logical: int = 16
    interval: int = 4

    def __post_init__(self) -> None:
        require_table(self, "gates")
        require_share(self, "sparsity")
        require_at_least(self, 0, "sink")
        require_at_least(self, 1, "local", "block", "step_local", "logical", "interval")
        require_at_least(self, self.logical, "page")
        require_at_least(self, self.page, "budget")
        require_flag(self, "exact")
        if self.page % self.logical:
            raise ValueError(f"{self.name}.page must be a multiple of logical, got {self.page} and {self.logical}")

    @cached_property
    def full(self) -> tuple[tuple[bool, ...], ...]:
        """The heads that are full, ``[layer][head]``."""
        return full_heads(self.gates, self.sparsity)

    def of_rank(self, rank: int, ranks: int, heads: int, groups: int) -> Method:
        return (
            replace(self, **gates_of_rank(self.full, rank, ranks, heads, groups)) if self.gates and ranks > 1 else self
        )

    def summaries(self) -> tuple[PageBounds]:
        return (PageBounds(self.logical),)

    def beside(self, dim: int, itemsize: int) -> float:
        del itemsize
        return 2 * 2 * dim / self.logical / self.interval

    def least_density(self, call: AttentionCall) -> float:
        if not _is_step(call):
            return 0.0
        full = self._full_of(call)
        streaming = min(1.0, (self.sink + self.step_local) / max(1, call.extent.longest))
        whole = share_read(call, max(3 * self.page, self.budget), self.page)
        return (sum(full) * whole + (len(full) - sum(full)) * streaming) / len(full)

    def plan(self, call: AttentionCall) -> SparsePlan:
        if _is_step(call):
            return self._step(call)
        full = of_layer(self.full, call.layer, [call.groups, call.heads], f"{self.name}.gates")
        blocks = Blocks(call, self.block, self.block, per="kv_head" if len(full) == call.groups else "head")
        if self.exact:
            return blocks.plan(sink=self.sink, window=windows(full, self.local))
        streaming = ~torch.tensor(full, device=call.device).expand(call.batch, -1)
        blocks.keep(first=ceil_div(self.sink, self.block), own=ceil_div(self.local, self.block), heads=streaming)
        return blocks.plan(window=windows(full, 0))

    def _full_of(self, call: AttentionCall) -> Sequence[bool]:
        """Of a decode step: which heads are full, for G or H of them."""
        if not self.gates:
            return [True] * call.groups
        return of_layer(self.full, call.layer, [call.groups, call.heads], f"{self.name}.gates")

    def _step(self, call: AttentionCall) -> SparsePlan:
        full = self._full_of(call)
        pages = ceil_div(call.extent.longest, self.page)
        held = forced(call, self.page, pages)
        chosen = self._chosen_before(call, pages)
        if chosen is None:
            chosen = self._choose(call, held, len(full))
            self._remember(call, chosen)
        is_full = torch.tensor(full, device=call.device)[:, None]
        streams = (~is_full[:, 0]).to(torch.int32)
        sinks, recent = (0, 0) if call.store is None else (call.store.sinks, call.store.recent)
        bands = {"sink": streams * max(self.sink, sinks), "window": streams * max(self.step_local, recent)}
        return plan_of_blocks(call, (chosen | held) & is_full, self.page, **({} if all(full) else bands))

    def _choose(self, call: AttentionCall, held: Tensor, heads: int) -> Tensor:
        """Anew, bool ``[B, heads, N]``."""
        scores = page_scores(call, self.logical)
        per, pages = self.page // self.logical, held.shape[2]
        scores = pad(scores, (0, pages * per - scores.shape[2]), value=float("-inf"))
        scores = scores.unflatten(2, (pages, per)).amax(dim=3)
        if heads == call.groups:
            scores = shared(scores, call.groups)
        return choose(scores, held, max(3, self.budget // self.page))

    def _chosen_before(self, call: AttentionCall, pages: int) -> Tensor | None:
        """What an earlier step chose, for so many pages, where it holds for this one too."""
        found = [] if call.state is None else [row.get(_name(call)) for row in call.state]
        if not found or any(one is None or one[0] >= self.interval for one in found):
            return None
        for row, one in zip(call.state or (), found, strict=True):
            assert one is not None
            row[_name(call)] = one[0] + 1, one[1]
        return torch.stack([pad(one[1], (0, pages - one[1].shape[1])) for one in found if one is not None])

    def _remember(self, call: AttentionCall, chosen: Tensor) -> None:
        for row, own in zip(call.state or (), chosen, strict=False):
            row[_name(call)] = 1, own


def _is_step(call: AttentionCall) -> bool:
    return call.query_len == 1 and call.store is not None and call.extent.causal


def _name(call: AttentionCall) -> str:
    """What a request's state holds by it: how many steps a choice has served, and the choice, bool ``[heads, N]``.

    Layers that share keys share their state.
    """
    return f"lserve of layer {call.layer}"
