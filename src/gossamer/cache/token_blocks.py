"""Keys and values of some consecutive tokens as a block of a file."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gossamer.cache.block_file import PAGE, BlockFile, aligned
from gossamer.plan import ceil_div

__all__ = ["TokenBlocks"]


class TokenBlocks:
    """How keys and values of a block lie in the bytes of the file: rows of D keys, then of Dv values."""

    def __init__(self, folder: str | None, block: int, dtype: torch.dtype, dim: int, value_dim: int) -> None:
        self.block, self.dtype, self.dim, self.value_dim = block, dtype, dim, value_dim
        # Both begin at multiples of their rows, so that all rows of a channel count lie one after the other.
        each = math.lcm(dim, value_dim)
        self.values_at = ceil_div(block * dim, each) * each
        whole = math.lcm(each, PAGE // math.gcd(PAGE, dtype.itemsize))
        self.elements = ceil_div(self.values_at + block * value_dim, whole) * whole
        self.file = BlockFile(folder, self.elements * dtype.itemsize)
        self.used: set[int] = set()

    @classmethod
    def like(cls, keys: Tensor, values: Tensor, block: int, folder: str | None) -> TokenBlocks:
        """In the wider dtype of the two: under autocast keys may be in fp32, and values not."""
        dtype = torch.promote_types(keys.dtype, values.dtype)
        return cls(folder, block, dtype, keys.shape[3], values.shape[3])

    def write(self, keys: Tensor, values: Tensor) -> Tensor:
        """Write ``[B, G, n * block, .]``; the numbers int64 ``[B, G, n]``, of all heads of a block neighbours."""
        batch, groups, tokens = keys.shape[:3]
        count = tokens // self.block
        rows = aligned(count * batch * groups, self.file.nbytes)
        to = rows.view(self.dtype).view(count, batch, groups, self.elements)
        for x, at, dim in ((keys, 0, self.dim), (values, self.values_at, self.value_dim)):
            own = to[..., at : at + self.block * dim].unflatten(-1, (self.block, dim))
            own.copy_(x.unflatten(2, (count, self.block)).permute(2, 0, 1, 3, 4))
        numbers = self.file.write(rows)
        self.used.update(numbers)
        return torch.tensor(numbers, dtype=torch.int64, device="cpu").view(count, batch, groups).permute(1, 2, 0)

    def free(self, numbers: list[int]) -> None:
        self.used.difference_update(numbers)
        self.file.free(numbers)

    def unpacked(self, rows: Tensor, shape: Any) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, G, n * block, .]`` of ``[B * G * n, nbytes]``, in this order."""
        own = rows.view(self.dtype).view(*shape, -1, self.elements)
        return tuple(  # type: ignore[return-value]
            own[..., at : at + self.block * dim].unflatten(-1, (self.block, dim)).flatten(2, 3)
            for at, dim in ((0, self.dim), (self.values_at, self.value_dim))
        )

    def gathered(self, rows: Tensor, place: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``[n, .]`` of tokens ``offset`` of the blocks at rows ``place``, both int64 ``[n]``."""
        own = rows.view(self.dtype).flatten()
        return tuple(  # type: ignore[return-value]
            own.view(-1, dim).index_select(0, (place * self.elements + at) // dim + offset)
            for at, dim in ((0, self.dim), (self.values_at, self.value_dim))
        )
