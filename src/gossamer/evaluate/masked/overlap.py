"""How much the blocks that SparseD would choose are the same: at other steps, for other texts, for other masks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from gossamer.evaluate.masked.comparison import Fills, Record, fields_of
from gossamer.evaluate.masked.passages import Passage
from gossamer.integrations.stats import Observation
from gossamer.methods.sparsed import SparseD
from gossamer.policy import Policy

__all__ = ["Overlaps", "jaccard"]


def jaccard(one: Tensor, other: Tensor) -> Tensor:
    """Blocks in both over blocks in either, fp32 ``[...]``, of masks ``[..., M, N]``."""
    both, either = (one & other).sum(dim=(-2, -1)), (one | other).sum(dim=(-2, -1))
    return both.float() / either.clamp(min=1)


def by_chance(one: Tensor, other: Tensor) -> Tensor:
    """What `jaccard` is, about, where each row of blocks were chosen at random, as many as here."""
    a, b = one.sum(dim=-1).float(), other.sum(dim=-1).float()
    both = a * b / one.shape[-1]
    return both.sum(dim=-1) / (a + b - both).sum(dim=-1).clamp(min=1)


class Overlaps:
    """Gathers, in dense samplings, what some settings of SparseD would choose at each step.

    Args:
        methods: settings; each counts by itself.
    """

    def __init__(self, methods: Iterable[SparseD], fills: Fills) -> None:
        self._methods, self._fills = tuple(methods), fills
        # By method, then by passage: at each step the masks of all layers, bool [layers, H, M, N].
        self._now: dict[tuple[Any, ...], dict[int, list[Tensor]]] = {}
        self._chosen: dict[tuple[Any, ...], Tensor] = {}

    def observe(self, passage: Passage, step: int, seen: Observation) -> None:
        """For `fill_lines`."""
        for method in self._methods:
            key = method, passage.length, passage.index, passage.seed
            self._now.setdefault(key, {}).setdefault(step, []).append(method.mask(seen.call)[0].cpu())

    def heads(self, passage: Passage) -> list[Record]:
        """What of the lines of a passage says what they are of."""
        own = {"kind": "overlap"} | self._fills.head(passage)
        return [own | fields_of(Policy(method, min_tokens=0)) for method in self._methods]

    def lines(self, passage: Passage) -> Iterator[Record]:
        """A line ``overlap`` for each setting, once the passage's sampling is over; of other passages before it."""
        for method, head in zip(self._methods, self.heads(passage), strict=True):
            own = method, passage.length, passage.index, passage.seed
            steps = self._now.pop(own, {})
            if len(steps) < self._fills.steps:
                continue
            masks = [torch.stack(steps[step]) for step in range(self._fills.steps)]
            at = min(method.chooses_at(self._fills.steps), self._fills.steps - 1)
            chosen, later = masks[at], masks[at + 1 :]
            others = {key: mask for key, mask in self._chosen.items() if key[:2] == own[:2]}
            self._chosen[own] = chosen
            shared = torch.stack([jaccard(chosen, mask) for mask in later]) if later else None
            yield {
                **head,
                "chosen": at,
                "blocks": round(float(chosen.float().mean()), 6),
                "by_step": [round(float(jaccard(chosen, mask).mean()), 6) for mask in masks],
                "chance": round(float(by_chance(chosen, chosen).mean()), 6),
                "by_head": []
                if shared is None
                else [[round(x, 4) for x in row] for row in shared.mean(dim=0).tolist()],
                "seeds": [_mean(chosen, m) for key, m in others.items() if key[2] == passage.index],
                "texts": [_mean(chosen, m) for key, m in others.items() if key[3] == passage.seed],
            }


def _mean(one: Tensor, other: Tensor) -> float:
    return round(float(jaccard(one, other).mean()), 6)
