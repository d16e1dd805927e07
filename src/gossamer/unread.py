"""`Unread`: keys or values that are rows of a tensor once somebody looks at their numbers.

They stand wherever a tensor ``[B, G, T, D]`` of keys or values does. The C++ kernels read what they are made of;
whatever else looks at the numbers gets a copy of them as rows, made then, and once. Where no kernel reads what they are
made of, they attend steps themselves (`Elsewhere`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

__all__ = ["Elsewhere", "Unread"]


class Unread(Tensor):
    """The base of such tensors. A subclass says what the rows are, and what some of its heads are.

    Shape, dtype and device are answered without Python; operations get the rows.
    """

    _read: Tensor | None

    @staticmethod
    def made(kind: type[Tensor], shape: Sequence[int], like: Tensor) -> Any:
        """A new one of a subclass, of the dtype and device of some tensor."""
        found = Tensor._make_wrapper_subclass(kind, shape, dtype=like.dtype, device=like.device)
        found._read = None  # type: ignore[attr-defined]
        return found

    def copied(self) -> Tensor:
        """The rows ``[B, G, T, D]``, a copy."""
        raise NotImplementedError

    def between(self, first: int, last: int) -> Tensor:
        """Tokens ``first`` to ``last - 1`` as rows, of which a subclass may read no others."""
        return self.rows()[:, :, first:last]

    def gathered(self, slots: Tensor) -> Tensor:
        """Some tokens as rows ``[B, heads, n, D]``, of which a subclass may read no others.

        Args:
            slots: int64 ``[B, heads, n]``; heads G, or a multiple, of which neighbours share a key/value head.
        """
        rows, heads = self.rows(), slots.shape[1]
        row = torch.arange(slots.shape[0], device=slots.device)[:, None, None]
        group = torch.arange(heads, device=slots.device)[:, None] // (heads // rows.shape[1])
        return rows[row, group, slots]

    def of_some_heads(self, first: int, last: int) -> Tensor:
        """Heads ``first`` to ``last - 1`` of what was not read."""
        raise NotImplementedError

    def rows(self) -> Tensor:
        """A copy as rows, made once."""
        if self._read is None:
            self._read = self.copied()
        return self._read

    def at_hand(self) -> Tensor:
        """The rows, if they were asked for before; else itself."""
        return self if self._read is None else self._read

    def of_heads(self, first: int, last: int) -> Tensor:
        """Heads ``first`` to ``last - 1`` alone; nothing is copied."""
        return self.of_some_heads(first, last) if self._read is None else self._read[:, first:last]

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(Unread, Unread.rows, (args, kwargs or {}))
        return func(*args, **kwargs)


class Elsewhere(Unread):
    """Those that lie where no kernel reads: a decode step on such keys is attended by them."""

    def attend(self, call: Any, plan: Any) -> tuple[Tensor, Tensor]:
        """Attention of one query a row over what a plan names, or over all keys without one.

        Args:
            call: the `gossamer.AttentionCall` whose keys they are.
            plan: its `gossamer.SparsePlan`, or None.

        Returns:
            out ``[B, H, 1, Dv]``, and the natural log of the softmax denominator, fp32 ``[B, H, 1]``.
        """
        raise NotImplementedError
