"""`EncodedTokens`: keys or values of which the older ones are encoded, as a cache holds them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor

from gossamer.unread import Unread

__all__ = ["EncodedTokens", "Encoding"]


class Encoding(Protocol):
    """Encoded tokens ``[B, G, T, D]``, in tensors ``[B, G, tokens or groups of them, ...]``.

    Attributes:
        coding: ``codes`` or ``bitmap``: what kernels read; see `gossamer.cache.integers.Quantised` and
            `gossamer.cache.bitmaps.Sparse`.
    """

    coding: ClassVar[str]

    @property
    def tokens(self) -> int: ...

    @property
    def tensors(self) -> tuple[Tensor, ...]: ...

    def like(self, tensors: Sequence[Tensor], /) -> Self:
        """The same form with other tensors."""
        ...

    def decode(self) -> Tensor: ...

    def between(self, first: int, last: int, /) -> Tensor:
        """Tokens ``first`` to ``last - 1``, decoded."""
        ...


class EncodedTokens(Unread):
    """Keys or values ``[B, G, T, D]``: encoded tokens, and then others as they came.

    Args:
        encoded: the first tokens.
        tail: ``[B, G, n, D]``, the others, in the model's dtype.
    """

    encoded: Any
    tail: Tensor

    @staticmethod
    def __new__(cls, encoded: Encoding, tail: Tensor) -> EncodedTokens:
        batch, groups, tokens, dim = tail.shape
        return Unread.made(cls, (batch, groups, encoded.tokens + tokens, dim), tail)

    def __init__(self, encoded: Encoding, tail: Tensor) -> None:
        self.encoded, self.tail = encoded, tail

    def copied(self) -> Tensor:
        return torch.cat([self.encoded.decode(), self.tail], dim=2)

    def between(self, first: int, last: int) -> Tensor:
        """Tokens ``first`` to ``last - 1``, of which no others are decoded."""
        if self._read is not None:
            return self._read[:, :, first:last]
        coded = self.encoded.tokens
        tail = self.tail[:, :, max(first - coded, 0) : max(last - coded, 0)]
        if first >= coded:
            return tail
        found = self.encoded.between(first, min(last, coded))
        return torch.cat([found, tail], dim=2) if last > coded else found

    def of_some_heads(self, first: int, last: int) -> Tensor:
        encoded = self.encoded.like([x[:, first:last] for x in self.encoded.tensors])
        return EncodedTokens(encoded, self.tail[:, first:last])

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"EncodedTokens({tuple(self.shape)}, {self.dtype}, {self.encoded.tokens} in {self.encoded.coding})"
