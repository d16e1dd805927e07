"""Keys and values without their small elements: a bitmap, and the others packed (Mustafar, 2505.22913)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

__all__ = ["Sparse", "compress", "largest", "pruned_elements"]


@dataclass(frozen=True, slots=True, eq=False)
class Sparse:
    """``[B, G, T, D]`` of which each token has the same number of elements.

    Fields:
        bitmap: uint8 ``[B, G, T, ceil(D / 8)]``; bit ``d % 8`` of byte ``d // 8`` says that element d is there.
        packed: ``[B, G, T, D - k]``, those elements in order.
        dim: D.
    """

    coding: ClassVar[str] = "bitmap"
    bitmap: Tensor
    packed: Tensor
    dim: int

    @property
    def tokens(self) -> int:
        return self.packed.shape[2]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.bitmap, self.packed

    def like(self, tensors: Sequence[Tensor]) -> Sparse:
        """The same form with other tensors."""
        bitmap, packed = tensors
        return Sparse(bitmap, packed, self.dim)

    def decode(self) -> Tensor:
        """``[B, G, T, D]``, 0 for what is not there."""
        bits = torch.arange(8, device=self.bitmap.device, dtype=torch.uint8)
        there = ((self.bitmap[..., None] >> bits) & 1).flatten(-2)[..., : self.dim].bool()
        out = self.packed.new_zeros(*self.packed.shape[:3], self.dim)
        return out.masked_scatter_(there, self.packed)

    def between(self, first: int, last: int) -> Tensor:
        """Tokens ``first`` to ``last - 1``, decoded."""
        return self.like([x[:, :, first:last] for x in self.tensors]).decode()


def pruned_elements(sparsity: float, dim: int) -> int:
    """k, the elements of each token that are left out: ``sparsity * dim``, rounded down."""
    return int(round(sparsity * dim, 9))  # a product such as 0.29 * 100 lies below the integer that it means


def largest(x: Tensor, count: int) -> Tensor:
    """Where the ``count`` largest magnitudes of each ``[..., D]`` are, exactly so many; of equal ones the first."""
    order = x.abs().argsort(dim=-1, descending=True, stable=True)[..., :count]
    return torch.zeros(x.shape, dtype=torch.bool, device=x.device).scatter_(-1, order, True)


def compress(x: Tensor, sparsity: float) -> Sparse:
    """Leave the smallest elements of each token and head of ``x`` ``[B, G, T, D]`` out, `pruned_elements` of them.

    Raises:
        ValueError: a sparsity that is not at least 0 and below 1.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"compress takes a sparsity of at least 0 and below 1, got {sparsity}")
    dim = x.shape[-1]
    there = largest(x, dim - pruned_elements(sparsity, dim))
    packed = x[there].view(*x.shape[:3], -1) if x.numel() else x[..., : dim - pruned_elements(sparsity, dim)]
    bits = torch.nn.functional.pad(there, (0, -dim % 8)).unflatten(-1, (-1, 8)).to(torch.uint8)
    weights = 1 << torch.arange(8, device=x.device, dtype=torch.uint8)
    return Sparse((bits * weights).sum(-1, dtype=torch.uint8), packed, dim)
