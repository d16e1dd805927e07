"""`Unread`: keys or values that are rows of a tensor once somebody looks at their numbers.

They stand wherever a tensor ``[B, G, T, D]`` of keys or values does. The C++ kernels read what they are made of;
whatever else looks at the numbers gets a copy of them as rows, made then, and once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

__all__ = ["Unread"]


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
