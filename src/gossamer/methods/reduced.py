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

__all__ = ["Reduced", "Reducing", "gathered", "listed", "reduced_call"]


@dataclass(frozen=True, slots=True, eq=False)
class Reduced:
    """A smaller call that stands for a call.

    Fields:
        call: with the same queries; keys and values of its own, for key/value heads or for query heads, and a bias.
        density: keys that it reads over those of the cache.
    """

    call: AttentionCall
    density: float


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
    """Keys and values ``[B, heads, n, .]`` of positions int64 ``[B, heads, n]``, heads G or H; anything at ``-1``."""
    batch, heads = index.shape[:2]
    row = torch.arange(batch, device=index.device)[:, None, None]
    group = torch.arange(heads, device=index.device)[:, None] // (heads // call.groups)
    slot = index.clamp(min=0) + on_device(call.extent.key_start, index.device)[:, None, None]
    return call.k[row, group, slot], call.values[row, group, slot]


def reduced_call(call: AttentionCall, k: Tensor, v: Tensor, bias: Tensor) -> Reduced:
    """The call of a query with other keys and values, all of which it attends whose bias is not -inf."""
    batch, heads, count = bias.shape
    rows = torch.ones(batch, dtype=torch.int64, device="cpu")
    extent = Extent(rows * (count - 1), call.extent.query_count, rows * 0, rows * count)
    held = heads * int(call.extent.key_count.sum())
    read = int((bias > float("-inf")).sum())
    dead = bias == float("-inf")
    k, v = (x.masked_fill(dead[..., None], 0.0) for x in (k, v))
    fields = {"store": None, "state": None, "rotary": None, "layout": None}
    return Reduced(replace(call, k=k, v=v, extent=extent, bias=bias, **fields), read / held if held else 1.0)
