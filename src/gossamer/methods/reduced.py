"""Methods that answer a decode step with a smaller attention call in place of a plan."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.call import AttentionCall
from gossamer.methods.base import Method
from gossamer.plan import Extent, SparsePlan, on_device
from gossamer.unread import Unread

__all__ = ["Reduced", "Reducing", "gathered", "listed", "reduced_call"]


@dataclass(frozen=True, slots=True, eq=False)
class Reduced:
    """A smaller call that stands for a call, or two with one softmax over the keys of both.

    Fields:
        call: with the same queries; keys and values of its own, for key/value heads or for query heads, and a bias.
        density: keys that it reads over those of the cache; of prompts, pairs over the allowed ones.
        plan: what it attends; None: all of its keys.
        beside: the other one, of pairs that this one does not have.
    """

    call: AttentionCall
    density: float
    plan: SparsePlan | None = None
    beside: Reduced | None = None


@dataclass(frozen=True)
class Reducing(Method):
    """A method that chooses keys and weighs them: what a decode step attends is a call of its own, all of it.

    Subclasses have ``reduce`` in place of ``plan``. Such a call has no gradient with respect to the cache.
    """

    decodes: ClassVar[bool] = True

    @abstractmethod
    def reduce(self, call: AttentionCall) -> Reduced | None:
        """The call to attend in place of this one; None: this one, since it has too few keys."""

    def plan(self, call: AttentionCall) -> SparsePlan:
        """There is none.

        Raises:
            ValueError: always.
        """
        del call
        raise ValueError(
            f"{self.name} answers a call with a smaller one, whose keys have weights, and not with a plan: ask "
            "Policy.decide, or reduce"
        )


def listed(mask: Tensor) -> Tensor:
    """Of bool ``[B, heads, n]`` the places that are set, ascending: int64 ``[B, heads, most]``, then ``-1``."""
    counts = mask.sum(dim=2)
    row, head, place = mask.nonzero(as_tuple=True)
    before = counts.flatten().cumsum(0) - counts.flatten()
    ordinal = torch.arange(len(place), device=mask.device) - before[row * mask.shape[1] + head]
    index = torch.full((*mask.shape[:2], int(counts.max()) if counts.numel() else 0), -1, device=mask.device)
    index[row, head, ordinal] = place
    return index


def gathered(call: AttentionCall, index: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values ``[B, heads, n, .]`` of positions int64 ``[B, heads, n]``, heads G or H; at -1 the first."""
    slots = index.clamp(min=0) + on_device(call.extent.key_start, index.device)[:, None, None]
    return _taken(call.k, slots), _taken(call.values, slots)


def _taken(x: Tensor, slot: Tensor) -> Tensor:
    """Tokens of each head; as rows of a matrix where all of ``x`` lies in one: that is copied by whole rows."""
    if isinstance(x, Unread):
        return x.gathered(slot)
    batch, heads = slot.shape[:2]
    row = torch.arange(batch, device=slot.device)[:, None, None]
    group = torch.arange(heads, device=slot.device)[:, None] // (heads // x.shape[1])
    of_row, of_group, of_slot, one = x.stride()
    if type(x) is not Tensor or one != 1 or not of_slot or of_row % of_slot or of_group % of_slot:
        return x[row, group, slot]
    place = row * (of_row // of_slot) + group * (of_group // of_slot) + slot
    count = 1 + sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True)) // of_slot
    matrix = x.as_strided((count, x.shape[3]), (of_slot, 1))
    return matrix.index_select(0, place.flatten()).unflatten(0, place.shape)


def reduced_call(call: AttentionCall, k: Tensor, v: Tensor, bias: Tensor) -> Reduced:
    """The call of a query with other keys and values, all of which it attends whose bias is not -inf."""
    batch, heads, count = bias.shape
    rows = torch.ones(batch, dtype=torch.int64, device="cpu")
    extent = Extent(rows * (count - 1), call.extent.query_count, rows * 0, rows * count)
    held = heads * int(call.extent.key_count.sum())
    read = int((bias > float("-inf")).sum())
    fields = {"store": None, "state": None, "rotary": None, "layout": None}
    return Reduced(replace(call, k=k, v=v, extent=extent, bias=bias, **fields), read / held if held else 1.0)
