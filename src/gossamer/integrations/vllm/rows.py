"""Which rows of a step run a plan, or choose what they read, and why the others do not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gossamer.paged import Table
from gossamer.plan import Extent
from gossamer.policy import Policy

__all__ = ["NEVER", "Decoding", "Readers", "Row", "Step", "choose", "put", "taken"]

NEVER = (1 << 31) - 1
"""``min_tokens`` of a policy under which vLLM's kernel runs all prompts."""


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


@dataclass(eq=False)
class Readers:
    """The queries of a step that decode under one policy: each reads what its method chooses.

    A row of several queries, as speculative decoding has them, is as many readers of the same pages.

    Fields:
        policy: whose `decode` chooses.
        rows: of the batch, that they are.
        indices, places, counts: of each query its row, its place among the tokens of the step, and the tokens it sees.
        states: of each query what its request remembers (`gossamer.AttentionCall.state`); empty where nobody knows.
    """

    policy: Policy
    rows: int = 0
    indices: list[int] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    states: list[dict[str, Any]] = field(default_factory=list)
    _ready: tuple[Extent, Table] | None = None

    def add(self, index: int, start: int, end: int, tokens: int) -> None:
        """A row's queries."""
        self.rows += 1
        for place in range(start, end):
            self.indices.append(index)
            self.places.append(place)
            self.counts.append(tokens - (end - 1 - place))

    def part(self, indices: Collection[int]) -> Readers:
        """Those of some of its rows."""
        found = Readers(self.policy, len(indices))
        of_query = zip(self.indices, self.places, self.counts, strict=True)
        chosen = [one for one in of_query if one[0] in indices]
        found.indices, found.places, found.counts = (list(part) for part in zip(*chosen, strict=True))
        return found

    @property
    def span(self) -> slice | None:
        """Where the queries lie among the tokens, if they follow one another."""
        first, last = self.places[0], self.places[-1]
        return slice(first, last + 1) if last - first + 1 == len(self.places) else None

    def ready(self, table: Tensor, page: int) -> tuple[Extent, Table]:
        """The extent of a call of all queries, and their pages: the same for all layers of a step.

        Args:
            table: int ``[rows of the batch, n]``, pages of ``page`` tokens.
        """
        if self._ready is None:
            counts = torch.tensor(self.counts, device="cpu")
            extent = Extent(counts - 1, torch.ones_like(counts), torch.zeros_like(counts), counts)
            own = table if self.indices == list(range(len(table))) else table[self.indices]
            self._ready = extent, Table(own[:, : -(-max(self.counts) // page)])
        return self._ready


@dataclass(slots=True)
class Step:
    """A step of the engine, for the layers of one group.

    Fields:
        rows: those that run a plan.
        readers: those that decode and choose what they read, by policy.
        others: where the tokens of other rows lie in the step, as spans from a first to before a last, in order.
        reasons: why the other rows do not, and how many.
        stock: vLLM's metadata for the other rows alone; None if there are none, or no rows but them.
        without: the same step with some readers among the others, for layers that read the whole cache under their
            policies; None where there are no readers.
    """

    rows: tuple[Row, ...]
    others: tuple[tuple[int, int], ...]
    reasons: Counter[str]
    readers: tuple[Readers, ...] = ()
    stock: Any = None
    without: Callable[[Collection[int]], Step] | None = None

    @property
    def is_stock(self) -> bool:
        """Whether vLLM's kernel runs all rows."""
        return not self.rows and not self.readers

    def chosen(self) -> Iterator[int]:
        """Rows of the batch that vLLM's kernel does not run."""
        yield from (row.index for row in self.rows)
        for some in self.readers:
            yield from some.indices

    def count(self) -> int:
        return len(self.rows) + sum(some.rows for some in self.readers) + sum(self.reasons.values())


@dataclass(frozen=True)
class Decoding:
    """Which rows of a step may choose what they read.

    Fields:
        shortest: for policies by `id`, the tokens of the shortest sequence of which a method reads less than all.
        most_queries: of a row that decodes: one, and the drafts of speculative decoding.
        prompts: of each row whether its queries are a prompt's tokens.
        whole: policies, by `id`, whose rows read the whole cache after all.
    """

    shortest: Mapping[int, int]
    most_queries: int = 1
    prompts: Sequence[bool] = ()
    whole: Collection[int] = ()

    def why_not(self, index: int, queries: int, tokens: int, policy: Policy) -> str | None:
        least = self.shortest.get(id(policy))
        if least is None or not 1 <= queries <= self.most_queries:
            return "decode" if queries <= 1 else "few queries"
        if self.prompts and self.prompts[index]:
            return "end of a prompt"
        if tokens - queries + 1 < least:
            return "short context"
        return "whole layer" if id(policy) in self.whole else None


NONE = Decoding({})


def choose(
    starts: Sequence[int], lengths: Sequence[int], policies: Sequence[Policy], least: int, decoding: Decoding = NONE
) -> Step:
    """Part the rows of a step.

    Args:
        starts: where each row's queries begin among the tokens of the step, and where the last ends: rows + 1 numbers.
        lengths: tokens of each sequence, the queries of this step included.
        policies: of each row, with ``min_tokens`` as numbers.
        least: rows with fewer queries run no plan of a prompt.
        decoding: which of those with fewer choose what they read.

    A plan pays by the pairs of query and key that it spares: a chunk with fewer pairs than a whole prompt of
    ``min_tokens`` does not run one either.
    """
    rows, reasons = [], Counter()
    readers: dict[int, Readers] = {}
    others: list[tuple[int, int]] = []
    for index, (start, end, tokens, policy) in enumerate(zip(starts[:-1], starts[1:], lengths, policies, strict=True)):
        few = end - start < least
        reason = decoding.why_not(index, end - start, tokens, policy) if few else _why_not(end - start, tokens, policy)
        if reason is None and few:
            readers.setdefault(id(policy), Readers(policy)).add(index, start, end, tokens)
            continue
        if reason is None:
            rows.append(Row(index, start, end, tokens, policy))
            continue
        reasons[reason] += 1
        if others and others[-1][1] == start:
            others[-1] = others[-1][0], end
        elif start < end:
            others.append((start, end))
    return Step(tuple(rows), tuple(others), reasons, tuple(readers.values()))


def _why_not(queries: int, tokens: int, policy: Policy) -> str | None:
    shortest = policy.min_tokens or 0
    if shortest == NEVER:
        return "no method for prompts"
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
