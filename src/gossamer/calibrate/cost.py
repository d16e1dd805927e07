"""What attending a plan costs: by a model of this machine's kernels, or by FLOPs.

Seconds of a call are a sum of terms, each a number that the plan tells, times seconds apiece that were fitted to
measurements (`gossamer.calibrate.fit`). Planning is another part, measured for each method by itself.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer.call import AttentionCall
from gossamer.methods import Method
from gossamer.plan import SparsePlan
from gossamer.profiles.costs import TERMS, Costs, Kernel, at_hand

__all__ = ["Cost", "CostModel", "Flops", "count_terms", "pairs_of_heads"]

_ENTRIES = 1 << 22  # of column lists, looked at at once


class Cost(Protocol):
    """What a plan costs, so that candidates can be compared."""

    name: ClassVar[str]
    """``machine`` or ``flops``."""

    def seconds(self, call: AttentionCall, plan: SparsePlan) -> float:
        """Of attending a plan, for all rows and heads; of `Flops`, only ratios mean something."""
        ...

    def of_heads(self, call: AttentionCall, plan: SparsePlan) -> Tensor:
        """The query heads' parts of `seconds`, fp64 ``[H]``: all but what a call costs however many heads it has."""
        ...


@dataclass(frozen=True)
class CostModel:
    """Seconds of this machine's kernels.

    Raises:
        ValueError: from its functions, for a kernel that was not measured.
    """

    name: ClassVar[str] = "machine"
    costs: Costs

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CostModel:
        """From a file that `gossamer bench --cost-model` wrote, of whatever machine.

        Raises:
            OSError: it cannot be read.
            ValueError: it is something else.
        """
        return cls(Costs.load(path))

    @classmethod
    def here(cls) -> CostModel:
        """Of this machine.

        Raises:
            ValueError: there is none; the message says why and what to do.
        """
        costs, reason = at_hand()
        if costs is None:
            raise ValueError(f"no cost model of this machine is at hand: {reason}")
        return cls(costs)

    def seconds(self, call: AttentionCall, plan: SparsePlan) -> float:
        return self._each(call)["calls"] + float(self.of_heads(call, plan).sum())

    def of_heads(self, call: AttentionCall, plan: SparsePlan) -> Tensor:
        each = self._each(call)
        counts = count_terms(call, plan)
        return torch.stack([counts[name] * each[name] for name in counts]).sum(dim=0)

    def planning(self, call: AttentionCall, method: Method) -> float | None:
        """Seconds of a method's plan for a call; None where they were not measured with just its fields."""
        fields = json.loads(json.dumps(method.to_dict()))
        return self.costs.planning_seconds(fields, Kernel.of(call), call.heads, call.groups, call.query_len)

    def _each(self, call: AttentionCall) -> dict[str, float]:
        kernel = Kernel.of(call)
        cost = self.costs.kernel(kernel)
        if cost is None:
            known = "; ".join(str(one.kernel) for one in self.costs.kernels) or "nothing"
            raise ValueError(
                f"the cost model knows no {kernel}, only {known}; run `gossamer bench --cost-model` with this dtype "
                "and head dimension, or compare by FLOPs"
            )
        return dict.fromkeys(TERMS, 0.0) | dict(cost.seconds)


@dataclass(frozen=True)
class Flops:
    """The work of both products, as seconds of a machine that does 10^12 operations a second."""

    name: ClassVar[str] = "flops"

    def seconds(self, call: AttentionCall, plan: SparsePlan) -> float:
        return float(self.of_heads(call, plan).sum())

    def of_heads(self, call: AttentionCall, plan: SparsePlan) -> Tensor:
        width = call.q.shape[-1] + (call.q.shape[-1] if call.v is None else call.v.shape[-1])
        return pairs_of_heads(call, plan) * (2 * width / 1e12)


def count_terms(call: AttentionCall, plan: SparsePlan) -> dict[str, Tensor]:
    """What the cost of a plan depends on, fp64 ``[H]`` each: all of `TERMS` but ``calls``, which is 1 a call.

    ``tokens`` are live queries, and the head's share of the live keys that its group has in common, which are packed
    once. ``column_pairs`` are those of the column lists, ``pairs`` all others that the plan computes (exactly, as
    `SparsePlan.count_pairs`); ``blocks`` and ``columns`` are entries of the lists. Lists of a plan that the heads of a
    group share are run for each of them.
    """
    extent = call.extent
    tokens = int(extent.query_count.sum()) + int(extent.key_count.sum()) / call.share
    pairs, columns = pairs_of_heads(call, plan), _for_query_heads(call, _column_pairs(plan))
    return {
        "tokens": torch.full((call.heads,), tokens, dtype=torch.float64, device="cpu"),
        "pairs": (pairs - columns).clamp(min=0),
        "column_pairs": columns,
        "blocks": _for_query_heads(call, _entries(plan, plan.block_indptr)),
        "columns": _for_query_heads(call, _entries(plan, plan.column_indptr)),
    }


def pairs_of_heads(call: AttentionCall, plan: SparsePlan) -> Tensor:
    """Pairs that are computed by query head, fp64 ``[H]``."""
    return _for_query_heads(call, plan.count_pairs().sum(dim=0))


def _for_query_heads(call: AttentionCall, counts: Tensor) -> Tensor:
    """fp64 ``[H]`` of counts ``[plan heads]``."""
    return counts.double().repeat_interleave(call.heads // len(counts))


def _entries(plan: SparsePlan, indptr: Tensor) -> Tensor:
    """Entries of a list by head of the plan."""
    rows = (indptr.numel() - 1) // (plan.batch * plan.heads)
    ends = indptr[::rows].cpu() if rows else torch.zeros(plan.batch * plan.heads + 1, dtype=torch.int64, device="cpu")
    return ends.diff().view(plan.batch, plan.heads).sum(dim=0)


def _column_pairs(plan: SparsePlan) -> Tensor:
    """Pairs that the column lists name, each list by itself, int64 ``[plan heads]``.

    Where queries are permuted, every row of a group counts, whatever it may see.
    """
    total = torch.zeros(plan.batch * plan.heads, dtype=torch.int64, device="cpu")
    lists = plan.column_indptr.cpu().diff()
    if not plan.column_indices.numel():
        return total[: plan.heads]
    first, past = (x.flatten() for x in _group_rows(plan))
    of_list = torch.repeat_interleave(lists)
    for start in range(0, len(of_list), _ENTRIES):
        at = of_list[start : start + _ENTRIES]
        column = plan.column_indices[start : start + _ENTRIES].cpu().long()
        low, high = first[at], past[at]
        if plan.q_order is None:
            limit = plan.extent.limit
            if plan.extent.causal:
                low = low.maximum(column)
            elif limit is not None:
                low = low.maximum(column - limit + 1)
            if limit is not None:
                high = high.minimum(column + limit)
        total.index_add_(0, at // plan.num_column_groups, (high - low).clamp(min=0))
    return total.view(plan.batch, plan.heads).sum(dim=0)


def _group_rows(plan: SparsePlan) -> tuple[Tensor, Tensor]:
    """Positions (or ranks) of the queries of each list's group, half-open: two of ``[B, heads, groups]``."""
    group = plan.column_group
    extent = plan.extent
    live = extent.query_count[:, None]
    if plan.q_order is None:
        first, past = plan.grid.queries.unbind(-1)
        live = live + extent.first_position[:, None]
    else:
        first = torch.arange(plan.num_query_blocks, device="cpu").expand(plan.batch, -1) * plan.block_q
        past = first + plan.block_q
    past = F.pad(past.minimum(live), (0, -past.shape[1] % group)).unflatten(1, (-1, group)).amax(dim=-1)
    first = first[:, ::group]
    return first[:, None].expand(-1, plan.heads, -1), past[:, None].expand(-1, plan.heads, -1)
