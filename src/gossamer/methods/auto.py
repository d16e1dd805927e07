"""Auto: blocks, keys or everything for each head, tried on a few queries."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gossamer import scores
from gossamer.blocks import Blocks
from gossamer.call import AttentionCall
from gossamer.methods.base import Method, Settings, require_at_least, require_share
from gossamer.methods.merging import merge_plans
from gossamer.methods.trial import Trial
from gossamer.plan import Grid, SparsePlan
from gossamer.plan.plan import WHOLE
from gossamer.rules import TopP

__all__ = ["Auto"]

# error = SCALE * (share left out) ** POWER, mean over heads: fitted on five layers of SmolLM2-135M-Instruct under two
# prompts of 7,680 tokens, shares of 0.06 to 0.61. Where it is wrong the trial tells.
SCALE, POWER = 0.230, 0.335

STRIDE = 16  # of antidiagonals, as in XAttention
KEPT_BYTES = 512 << 20  # of their scores: as many as of 32 heads at 128K


@dataclass(frozen=True)
class Auto(Method):
    """Blocks, keys or everything, as a trial on a few queries decides, under one knob: the accepted error.

    Of these plans, each batch row and head has the first that the trial accepts:

    1. Blocks: the first, a query block's own, and those of most antidiagonal mass until ``threshold`` is held, as in
       `XAttention`.
    2. Keys. ``group`` blocks of ``block`` queries form a group. Each block's mean query attends all keys that the block
       sees; a key's share is the largest that any block of the group gives it. The group computes the fewest keys that
       hold all of these shares but `left_out`, and the first ``sink`` ones. Shares of the first keys do not count:
       their values are small in trained models, so that the others decide the error.
    3. Blocks, until ``fallback`` is held.
    4. Everything.

    In all of them a query attends the ``window`` latest keys. The trial attends ``rows`` queries exactly, spread over
    the call, and accepts a plan under which their outputs have a relative L2 error of ``error`` or less; 0 is dense.
    Other queries of the head may be off by more. Why a trial: scores of means and of antidiagonals say little of some
    heads, among them those that a model copies with, and a few heads whose outputs are far off cost the predictions
    more than all others together.

    Ours, from parts of others: stripes for groups of queries (AnchorAttention, 2505.23520), mean queries against all
    keys (VecAttention, in Tencent's AngelSlim), antidiagonals and a share of a row's sum (XAttention, 2503.16428). It
    plans for each query head. A call is tried on its own rows, so that chunks may be planned otherwise than one piece.
    """

    name: ClassVar[str] = "auto"
    needs: ClassVar[frozenset[str]] = frozenset({"values"})
    settings: ClassVar[Settings] = tuple({"error": error} for error in (0.3, 0.2, 0.15, 0.1, 0.07))
    error: float = 0.15
    sink: int = 4
    window: int = 64
    group: int = 8
    block: int = 64
    threshold: float = 0.8
    fallback: float = 0.95
    rows: int = 32

    def __post_init__(self) -> None:
        require_at_least(self, 0, "sink")
        require_at_least(self, 1, "window", "group", "block", "rows")
        require_share(self, "error", "threshold", "fallback")

    @property
    def left_out(self) -> float:
        """Share of what the mean queries attend that keys leave out, so that half of ``error`` is expected."""
        return min(1.0, (self.error / 2 / SCALE) ** (1 / POWER))

    def plan(self, call: AttentionCall) -> SparsePlan:
        if self.error == 0 or 0 in (call.batch, call.query_len, call.key_len):
            return Blocks(call, self.block, self.block).plan(window=WHOLE)
        trial, masses = Trial.of(call, self.rows), self._kept_masses(call)

        def blocks(part: AttentionCall, heads: list[int], threshold: float) -> SparsePlan:
            of_all = len(heads) == call.heads
            own = ((rows, mass if of_all else mass[:, heads]) for rows, mass in masses)
            return self._blocks(part, own if masses else self._masses(part), threshold)

        attempts = (
            lambda part, heads: blocks(part, heads, self.threshold),
            lambda part, _: self._keys(part),
            lambda part, heads: blocks(part, heads, self.fallback),
            lambda part, _: self._everything(part),
        )
        plans, sources = [], []
        owner = torch.zeros(call.batch, call.heads, dtype=torch.int64, device="cpu")
        failing = torch.ones_like(owner, dtype=torch.bool)
        for number, attempt in enumerate(attempts):
            groups = failing.any(dim=0).view(call.groups, -1).any(dim=1).nonzero().flatten().tolist()
            if not groups:
                break
            heads = [g * call.share + n for g in groups for n in range(call.share)]
            tried = trial.of_groups(groups)
            plan = attempt(tried.call, heads)
            owner[failing] = len(plans)
            plans.append(plan)
            sources.append([heads.index(head) if head in heads else 0 for head in range(call.heads)])
            if number + 1 < len(attempts):
                failing[:, heads] &= ~(tried.error(plan) <= self.error).cpu()  # NaN fails
        return merge_plans(plans, owner.tolist(), sources) if len(plans) > 1 else plans[0]

    def _masses(self, call: AttentionCall) -> Iterator[tuple[range, Tensor]]:
        grid = Grid(call.extent, self.block, self.block)
        return scores.antidiagonal_scores(call, grid, math.gcd(STRIDE, self.block))

    def _kept_masses(self, call: AttentionCall) -> list[tuple[range, Tensor]]:
        """For both plans of blocks; none where they are too many to be kept."""
        grid = Grid(call.extent, self.block, self.block)
        size = 4 * call.batch * call.heads * grid.query_blocks * grid.key_blocks
        return list(self._masses(call)) if size <= KEPT_BYTES else []

    def _keys(self, call: AttentionCall) -> SparsePlan:
        blocks = Blocks(call, self.block, self.block)
        for part, shares in scores.group_shares(call, blocks.grid, self.group):
            shares[..., : self.sink] = 0.0
            blocks.group_columns(part, shares, TopP(1 - self.left_out), group=self.group, first=self.sink)
        return blocks.plan(window=self.window)

    def _blocks(self, call: AttentionCall, masses: Iterable[tuple[range, Tensor]], threshold: float) -> SparsePlan:
        blocks = Blocks(call, self.block, self.block)
        blocks.keep(first=1)
        for part, mass in masses:
            blocks.choose(part, mass, TopP(threshold, forced_first=True))
        return blocks.plan(window=self.window)

    def _everything(self, call: AttentionCall) -> SparsePlan:
        blocks = Blocks(call, self.block, self.block)
        blocks.keep(last_rows=call.query_len)
        return blocks.plan(window=self.window)
