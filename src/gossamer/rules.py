"""Selection rules, as data: from the scores of candidates to the chosen ones. Ties break by the lower index.

Published "top-p" means several different sets; each rule here is stated exactly, in torch, and named after what it
does. Backends have fast versions of the rules that they know; any other runs by its own `Rule.select`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "Above",
    "AtLeast",
    "Besides",
    "Candidates",
    "Either",
    "RelativeToMax",
    "Rule",
    "TopK",
    "TopKOfRows",
    "TopP",
    "TopPBelow",
    "TopPInTiers",
    "TopPOfAllRows",
    "TopPReaching",
    "count_top_p",
    "top_k",
]

PerHead = Tensor | Sequence[float] | Sequence[int] | float | int


@dataclass(frozen=True, eq=False)
class Candidates:
    """What each row of a plan's lists may take, and what it must take.

    Fields (int64 on the CPU, but for the masks, which lie where the scores lie):
        seen: half-open range ``[B, rows, 2]``; nothing outside is chosen.
        forced: half-open range ``[B, rows, 2]``, taken by the heads that force any; it may reach outside ``seen``.
        first: this many first candidates are forced in every row, too.
        forced_heads: bool ``[B, heads]``, the heads that force any; None: all.
        diagonals: bool ``[B, heads, n]``: candidate ``origin - d`` is taken where ``diagonals[d]`` is set.
        origin: ``[B, rows]``, the candidate on diagonal 0.
        mirrored: candidate ``origin + d`` is taken as well.
        everywhere: bool ``[B, heads, candidates]``, taken in every row.
        ruled_heads: bool ``[B, heads]``, the heads for which a rule chooses; None: all.
    """

    seen: Tensor
    forced: Tensor
    first: int = 0
    forced_heads: Tensor | None = None
    diagonals: Tensor | None = None
    origin: Tensor | None = None
    mirrored: bool = False
    everywhere: Tensor | None = None
    ruled_heads: Tensor | None = None


class Rule(ABC):
    """Which candidates of each row are chosen, from their scores ``[B, heads, rows, candidates]``.

    A rule is made with one value for all heads, or one for each.
    """

    unseen: ClassVar[float] = 0.0
    """The score of a candidate that a row does not see."""
    all_rows: ClassVar[bool] = False
    """Whether the rule needs all rows of a head at once."""

    @abstractmethod
    def select(self, scores: Tensor, forced: Tensor) -> Tensor:
        """The definition: bool, as the scores.

        Args:
            scores: `unseen` outside what a row sees.
            forced: bool, broadcasts to the scores: what is taken whatever the rule says. Uniting is not its task.
        """


def per_head(value: PerHead, heads: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """One number for each head, ``[heads]``."""
    numbers = value.to(dtype) if isinstance(value, Tensor) else torch.tensor(value, dtype=dtype, device="cpu")
    if numbers.ndim > 1 or (numbers.ndim == 1 and numbers.numel() != heads):
        raise ValueError(f"a rule needs one number, or one for each of {heads} heads, got {tuple(numbers.shape)}")
    return numbers.expand(heads).to(device, non_blocking=torch.device(device).type != "cpu")


@dataclass(frozen=True, eq=False)
class RelativeToMax(Rule):
    """Candidates of at least ``alpha`` times the row's largest (FlashPrefill, 2603.06199): no sort, one pass.

    Scores are non-negative; one of 0 is chosen only by ``alpha == 0``, which chooses all that a row sees.
    """

    alpha: PerHead

    def select(self, scores: Tensor, forced: Tensor) -> Tensor:
        if scores.shape[-1] == 0:
            return scores.bool()
        alpha = per_head(self.alpha, scores.shape[1], torch.float32, scores.device)[:, None, None]
        return ((scores >= alpha * scores.amax(dim=-1, keepdim=True)) & (scores > 0)) | (alpha == 0)


@dataclass(frozen=True, eq=False)
class AtLeast(Rule):
    """Candidates whose score is at least ``bar``, whatever the others' (AnchorAttention, 2505.23520).

    A score of -inf is never chosen, not even by a bar of -inf, which chooses all others.
    """

    unseen: ClassVar[float] = float("-inf")
    bar: PerHead

    def select(self, scores: Tensor, forced: Tensor) -> Tensor:
        bar = per_head(self.bar, scores.shape[1], torch.float32, scores.device)[:, None, None]
        return (scores >= bar) & (scores > float("-inf"))


@dataclass(frozen=True, eq=False)
class Above(Rule):
    """Candidates whose score is above ``threshold`` (SeerAttention, 2410.13276): no sort, no look at the others.

    Scores are non-negative; a threshold of 0 chooses all that a row sees.
    """

    threshold: PerHead

    def select(self, scores: Tensor, forced: Tensor) -> Tensor:
        threshold = per_head(self.threshold, scores.shape[1], torch.float32, scores.device)[:, None, None]
        return (scores > threshold) | (threshold == 0)


@dataclass(frozen=True, eq=False)
class TopK(Rule):
    """The ``count`` best candidates of each row."""

    unseen: ClassVar[float] = float("-inf")
    count: PerHead

    def select(self, scores: Tensor, forced: Tensor) -> Tensor:
        budgets = per_head(self.count, scores.shape[1], torch.int64, "cpu")
        return top_k(scores, budgets[:, None])


@dataclass(frozen=True, eq=False)
class TopKOfRows(Rule):
    """The best candidates of each row, in a number of its own: ``counts`` int64 ``[B, heads or 1, rows]``, on the CPU.

    The rows are those of the scores: a rule is made for each part.
    """

    unseen: ClassVar[float] = float("-inf")
    counts: Tensor

    def select(self, scores: Tensor, forced: Tensor) -> Tensor:
        return top_k(scores, self.counts)


@dataclass(frozen=True, eq=False)
class TopP(Rule):
    """The fewest best candidates that hold the share ``p`` of the row's sum: the one that crosses p is in.

    A candidate is chosen when those before it hold less than p of the sum. With ``forced_first`` forced ones come first
    and use up their part of p (XAttention, 2503.16428). Scores are non-negative; sums are in fp64, from the best down.
    """

    p: PerHead
    forced_first: bool = False

    def select(self, scores: Tensor, forced: Tensor) -> Tensor:
        order = _best_first(scores, forced.expand_as(scores) if self.forced_first else None)
        up_to = _running_sum(scores, order)
        before = F.pad(up_to, (1, 0))[..., :-1]
        return _unsort(before < _shares(self.p, scores) * up_to[..., -1:], order)


@dataclass(frozen=True, eq=False)
class TopPReaching(Rule):
    """The best candidates up to the first whose running sum is at least ``p``; none where none reaches it.

    p is compared with the sum itself, for rows that sum to 1 (PBS-Attn, 2510.21270); a row that holds nothing reaches
    no p, not even 0.
    """

    p: PerHead

    def select(self, scores: Tensor, forced: Tensor) -> Tensor:
        order = _best_first(scores)
        up_to = _running_sum(scores, order)
        reached = (up_to >= _shares(self.p, scores)) & (up_to > 0)
        before = F.pad(reached.cumsum(dim=-1), (1, 0))[..., :-1] > 0
        return _unsort(~before & reached.any(dim=-1, keepdim=True), order)


@dataclass(frozen=True, eq=False)
class TopPBelow(Rule):
    """The best candidates whose running sum is at most ``p`` of the row's, and at least the best one.

    The one that crosses p is out (SpargeAttn, 2502.18137).
    """

    p: PerHead

    def select(self, scores: Tensor, forced: Tensor) -> Tensor:
        order = _best_first(scores)
        up_to = _running_sum(scores, order)
        chosen = up_to <= _shares(self.p, scores) * up_to[..., -1:]
        chosen[..., :1] = True
        return _unsort(chosen, order)


@dataclass(frozen=True, eq=False)
class TopPOfAllRows(Rule):
    """As `TopPBelow`, over all rows of a head at once and without a least one: a row may stay empty.

    One budget for all query blocks of a head (FlexPrefill's query-aware pattern, 2502.20766).
    """

    all_rows: ClassVar[bool] = True
    p: PerHead

    def select(self, scores: Tensor, forced: Tensor) -> Tensor:
        flat = scores.flatten(-2)[:, :, None]
        order = _best_first(flat)
        up_to = _running_sum(flat, order)
        return _unsort(up_to <= _shares(self.p, flat) * up_to[..., -1:], order).view(scores.shape)


@dataclass(frozen=True, eq=False)
class TopPInTiers(Rule):
    """As `TopP`, with candidates taken in tiers, by score in each: forced ones, those of ``early``, then the others.

    All use up their part of p, so that early ones behind the crossing are out (CoSA, 2607.25291). ``p == 1`` takes all.

    Fields:
        early: bool, as the scores: a rule is made for each part.
    """

    p: PerHead
    early: Tensor

    def select(self, scores: Tensor, forced: Tensor) -> Tensor:
        best = _best_first(scores)
        tier = torch.where(forced, 0, torch.where(self.early, 1, 2)).gather(-1, best)
        order = best.gather(-1, tier.argsort(dim=-1, stable=True))
        up_to, p = _running_sum(scores, order), _shares(self.p, scores)
        before = F.pad(up_to, (1, 0))[..., :-1]
        return _unsort((before < p * up_to[..., -1:]) | (p == 1), order)


class Besides(Rule):
    """What a rule chooses, and beside it what is ``taken`` anyway: bool, as the scores or broadcast to them.

    For what a method knows by other means than these scores: blocks that a mean says nothing of, or another scoring's
    choice. What a row does not see is left out as ever. A rule is made for each part.

    Raises:
        ValueError: the rule needs all rows at once.
    """

    def __init__(self, rule: Rule, taken: Tensor) -> None:
        if rule.all_rows:
            raise ValueError(f"{type(rule).__name__} needs all rows at once, and cannot be joined part by part")
        self.rule, self.taken = rule, taken

    @property
    def unseen(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.rule.unseen

    def select(self, scores: Tensor, forced: Tensor) -> Tensor:
        return self.rule.select(scores, forced) | self.taken


class Either(Rule):
    """What a rule chooses, and beside it what ``other`` chooses by ``others``, scores of its own for the same part.

    What a row does not see must have the `Rule.unseen` of its rule in ``others``. Forced candidates use up no part of
    the second rule's share. A rule is made for each part (Prism, 2602.08426).

    Raises:
        ValueError: one of the rules needs all rows at once.
    """

    def __init__(self, rule: Rule, other: Rule, others: Tensor) -> None:
        for one in (rule, other):
            if one.all_rows:
                raise ValueError(f"{type(one).__name__} needs all rows at once, and cannot be joined part by part")
        self.rule, self.other, self.others = rule, other, others

    @property
    def unseen(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.rule.unseen

    def select(self, scores: Tensor, forced: Tensor) -> Tensor:
        return self.rule.select(scores, forced) | self.other.select(self.others, torch.zeros_like(forced))


def count_top_p(scores: Tensor, p: PerHead) -> Tensor:
    """How many of the best candidates of each row hold at most ``p`` of its sum: int64, without the last dimension.

    A budget that is then spent on other scores (FlexPrefill's vertical-slash pattern, 2502.20766).
    """
    up_to = _running_sum(scores, _best_first(scores))
    return (up_to <= _shares(p, scores) * up_to[..., -1:]).sum(dim=-1)


def top_k(scores: Tensor, k: Tensor | int) -> Tensor:
    """The k largest scores of each row, as a bool mask of the same shape.

    Entries of -inf are never chosen; of equal scores the lower index wins. ``k`` is one number, or an integer tensor
    that broadcasts to the leading dimensions (heads may have different budgets). Budgets on the CPU spare scores on a
    device a wait.
    """
    budget = (k if isinstance(k, Tensor) else torch.tensor(k, device="cpu")).clamp(max=scores.shape[-1])
    most = int(budget.max()) if budget.numel() else 0
    budget = budget.to(scores.device, non_blocking=True)
    if most <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    # topk promises no order among equals, so only the threshold is taken from it.
    largest = scores.topk(most, dim=-1).values
    last = (budget - 1).clamp(min=0).expand(scores.shape[:-1])[..., None]
    threshold = largest.gather(-1, last)
    above = scores > threshold
    equal = scores == threshold
    room = budget[..., None] - above.sum(dim=-1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(dim=-1) <= room))
    return chosen & (scores > float("-inf"))


def shares(p: PerHead, heads: int, device: torch.device | str) -> Tensor:
    """Shares by head, fp64 ``[heads]``.

    Raises:
        ValueError: one lies outside [0, 1].
    """
    numbers = per_head(p, heads, torch.float64, "cpu")
    outside = ~((numbers >= 0) & (numbers <= 1))
    if bool(outside.any()):
        raise ValueError(f"p must lie in [0, 1], got {numbers[outside].tolist()[0]}")
    return numbers.to(device, non_blocking=torch.device(device).type != "cpu")


def _shares(p: PerHead, scores: Tensor) -> Tensor:
    """For scores ``[B, heads, rows, candidates]``."""
    return shares(p, scores.shape[1], scores.device)[:, None, None]


def _best_first(scores: Tensor, forced: Tensor | None = None) -> Tensor:
    first = scores if forced is None else scores.masked_fill(forced, float("inf"))
    return first.argsort(dim=-1, descending=True, stable=True)


def _running_sum(scores: Tensor, order: Tensor) -> Tensor:
    return scores.gather(-1, order).double().cumsum(dim=-1)


def _unsort(chosen: Tensor, order: Tensor) -> Tensor:
    return torch.zeros_like(chosen).scatter_(-1, order, chosen)
