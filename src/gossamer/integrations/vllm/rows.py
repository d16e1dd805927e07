"""Which rows of a step run a plan, and why the others do not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gossamer.policy import Policy

__all__ = ["Row", "Step", "choose", "decodes", "put", "taken"]


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
        others: where the tokens of other rows lie in the step, as spans from a first to before a last, in order.
        stock: vLLM's metadata for the other rows alone; None if there are none.
        reasons: why the other rows do not, and how many.
    """

    rows: tuple[Row, ...]
    others: tuple[tuple[int, int], ...]
    reasons: Counter[str]
    stock: Any = None

    def count(self) -> int:
        return len(self.rows) + sum(self.reasons.values())


def decodes(policy: Policy) -> bool:
    """Whether a policy's method chooses what a query that decodes reads. None does yet: this is decoding's place.

    A row of one query, or of the few of speculative decoding, for which this holds is a `Row` like a chunk's. All
    behind it takes such rows as they are, which a test shows: `SparseImpl` hands the sequence's pages to
    `Engine.attend` without a copy, where a method that selects pages makes its plan, and `Policy.why_dense` is what
    still says "decode" of every call of one query. Two things are to be done then: `SparseBuilder._step` asks whose
    rows a step has where it has prompts alone, and on GPUs such steps must stay out of vLLM's graphs, as those with
    prompts do (`SparseTritonBuilder._cudagraph_support`).
    """
    del policy
    return False


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
    rows, reasons = [], Counter()
    others: list[tuple[int, int]] = []
    for index, (start, end, tokens, policy) in enumerate(zip(starts[:-1], starts[1:], lengths, policies, strict=True)):
        reason = _why_not(end - start, tokens, policy, least)
        if reason is None:
            rows.append(Row(index, start, end, tokens, policy))
            continue
        reasons[reason] += 1
        if others and others[-1][1] == start:
            others[-1] = others[-1][0], end
        elif start < end:
            others.append((start, end))
    return Step(tuple(rows), tuple(others), reasons)


def _why_not(queries: int, tokens: int, policy: Policy, least: int) -> str | None:
    if queries < least:
        if decodes(policy):
            return None
        return "decode" if queries <= 1 else "few queries"
    shortest = policy.min_tokens or 0
    if tokens < shortest:
        return "short prompt"
    return "short chunk" if _pairs(queries, tokens) < _pairs(shortest, shortest) else None


def taken(tokens: Tensor, spans: Sequence[tuple[int, int]]) -> Tensor:
    """The first dimension's spans, one behind the other; a view where there is one."""
    parts = [tokens[start:end] for start, end in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def put(into: Tensor, spans: Sequence[tuple[int, int]], values: Tensor) -> None:
    """Write what was made of `taken` to where it was taken from."""
    counts = [end - start for start, end in spans]
    for (start, end), part in zip(spans, values.split(counts), strict=True):
        into[start:end] = part


def _pairs(queries: int, tokens: int) -> int:
    """Of the last queries of a sequence and the keys that each may see."""
    return queries * (2 * tokens - queries + 1) // 2
