"""Which rows of a step run a plan, and why the others do not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gossamer.policy import Policy

__all__ = ["Row", "Step", "choose"]


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence's queries in a step.

    Fields:
        index: of the sequence in the batch.
        start, end: its queries among the tokens of the step.
        tokens: of the sequence up to now, these queries included.
        policy: with ``min_tokens`` as a number.
    """

    index: int
    start: int
    end: int
    tokens: int
    policy: Policy

    @property
    def queries(self) -> int:
        return self.end - self.start

    @property
    def past(self) -> int:
        """Tokens before these queries."""
        return self.tokens - self.queries


@dataclass(slots=True)
class Step:
    """A step of the engine, for the layers of one group.

    Fields:
        rows: those that run a plan.
        others: tokens of the step that belong to other rows, int64 ``[n]``.
        stock: vLLM's metadata for the other rows alone; None if there are none.
        reasons: why the other rows do not, and how many.
    """

    rows: tuple[Row, ...]
    others: Tensor
    reasons: Counter[str]
    stock: Any = None

    def count(self) -> int:
        return len(self.rows) + sum(self.reasons.values())


def choose(starts: Sequence[int], lengths: Sequence[int], policies: Sequence[Policy], least: int) -> Step:
    """Part the rows of a step.

    Args:
        starts: where each row's queries begin among the tokens of the step, and where the last ends: rows + 1 numbers.
        lengths: tokens of each sequence, the queries of this step included.
        policies: of each row, with ``min_tokens`` as numbers.
        least: rows with fewer queries run on vLLM's own kernel.

    A plan pays by the pairs of query and key that it spares: a chunk with fewer pairs than a whole prompt of
    ``min_tokens`` does not run one either.
    """
    rows, others, reasons = [], [], Counter()
    for index, (start, end, tokens, policy) in enumerate(zip(starts[:-1], starts[1:], lengths, policies, strict=True)):
        reason = None
        if end - start < least:
            reason = "decode" if end - start <= 1 else "few queries"
        elif tokens < (policy.min_tokens or 0):
            reason = "short prompt"
        elif _pairs(end - start, tokens) < _pairs(policy.min_tokens or 0, policy.min_tokens or 0):
            reason = "short chunk"
        if reason is None:
            rows.append(Row(index, start, end, tokens, policy))
        else:
            reasons[reason] += 1
            others.append(torch.arange(start, end, device="cpu"))
    return Step(tuple(rows), torch.cat(others) if others else torch.empty(0, dtype=torch.int64, device="cpu"), reasons)


def _pairs(queries: int, tokens: int) -> int:
    """Of the last queries of a sequence and the keys that each may see."""
    return queries * (2 * tokens - queries + 1) // 2
