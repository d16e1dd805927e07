"""What our executors do where a gradient is asked of them: they say that there is none."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor

__all__ = ["refuse"]


def refuse(_context: Any, *_gradients: Tensor | None) -> NoReturn:
    """The backward of an executor's operator, for `torch.library.register_autograd`."""
    raise NotImplementedError(
        "a gradient was asked of a sparse executor, which has no backward; train with gossamer.sparse_attention, which "
        "runs dense attention where gradients are needed, or call the executor under torch.no_grad()"
    )
