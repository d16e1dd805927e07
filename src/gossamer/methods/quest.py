"""Quest: a decode step reads the pages of the cache whose bounds allow the largest logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gossamer.call import AttentionCall
from gossamer.methods.base import Method, Settings, require_at_least, require_flag
from gossamer.methods.pages import plan_of_tokens, share_read
from gossamer.plan import SparsePlan
from gossamer.scores import page_scores
from gossamer.summaries import PageBounds

__all__ = ["Quest"]


@dataclass(frozen=True)
class Quest(Method):
    """Quest (2406.10774, section 3): page bounds, then exact attention to the best pages.

    For each page of 16 tokens the cache knows the largest and the smallest value of each key channel. A page's score
    is the largest logit that these allow, ``sum_d max(q_d * largest_d, q_d * smallest_d)``; the ``budget // page``
    best pages are read, the newest one always among them. A cache of no more pages is read whole; so are the first
    ``dense_layers`` layers, and prompts are not part of the method.

    Fields:
        budget: tokens that a step reads of each key/value head.
        per_query_head: choose for each query head, as published, and not for those of a key/value head together.

    Defaults: pages of 16 and two dense layers, as the authors have; 2,048 tokens, as in their timings at 32K (their
    code's own default is 512; 256 to 4,096 in the paper).

    Deviations: the query heads of a key/value head share a choice, by the sum of the softmaxes of their scores over
    the pages, so that a page is read once for all of them (the kernels published know no such groups). Sinks and
    recent tokens that the store asks for are part of the budget; there are none by default, as in the paper.
    """

    name: ClassVar[str] = "quest"
    needs: ClassVar[frozenset[str]] = frozenset({"store", "causal", "one query"})
    decodes: ClassVar[bool] = True
    settings: ClassVar[Settings] = tuple({"budget": budget} for budget in (256, 512, 1024, 2048, 4096))
    budget: int = 2048
    page: int = 16
    dense_layers: int = 2
    per_query_head: bool = False

    def __post_init__(self) -> None:
        require_at_least(self, 0, "dense_layers")
        require_at_least(self, 1, "page")
        require_at_least(self, self.page, "budget")
        require_flag(self, "per_query_head")

    def summaries(self) -> tuple[PageBounds]:
        return (PageBounds(self.page),)

    def beside(self, dim: int, itemsize: int) -> float:
        del itemsize
        return 2 * 2 * dim / self.page  # bounds, in 16 bits

    def least_density(self, call: AttentionCall) -> float:
        dense = call.layer is not None and call.layer < self.dense_layers
        return 1.0 if dense else share_read(call, self.budget, self.page)

    def plan(self, call: AttentionCall) -> SparsePlan:
        heads = call.heads if self.per_query_head else call.groups
        return plan_of_tokens(call, page_scores(call, self.page), self.page, self.budget // self.page, heads)
