"""Second moments of what enters a linear layer, and the error of a column handed on to later ones.

Compressing a weight ``W [out, in]`` so that ``W x`` stays what it was is least squares with the Hessian
``H = 2/n sum x x^T``. Columns are compressed from left to right, a block at a time; what a column loses is made up for
by the columns that are still free. With ``H^-1 = U^T U``, U upper triangular, the optimal update of the free columns
after column i lost ``w - q`` is ``-(w - q) / U_ii U_i,`` (Optimal Brain Surgeon on ``H`` without the columns before i;
GPTQ, 2210.17323, section 3; SparseGPT, 2301.00774, section 3.3). Pruning and binarising share it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Hessian", "in_order", "propagated"]

Choose = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


class Hessian:
    """``2/n sum x x^T`` of the inputs of a linear layer, fp32 ``[in, in]``, added up batch by batch."""

    def __init__(self, features: int, device: torch.device | str | None = None) -> None:
        self.sum = torch.zeros(features, features, device=device)
        self.count = 0

    def add(self, x: Tensor) -> None:
        """Count inputs ``[..., in]``; n is how many vectors there were.

        Raises:
            ValueError: another number of features; numbers that are not finite.
        """
        if x.shape[-1] != len(self.sum):
            raise ValueError(f"inputs must have {len(self.sum)} features, got {list(x.shape)}")
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        if not bool(rows.isfinite().all()):
            raise ValueError("inputs of a linear layer are not finite: calibrate in float32 or with other texts")
        self.sum.addmm_(rows.T, rows)
        self.count += len(rows)

    def matrix(self) -> Tensor:
        """H, fp32 ``[in, in]``."""
        return self.sum * (2.0 / max(1, self.count))

    @property
    def dead(self) -> Tensor:
        """Features that never were anything but 0, bool ``[in]``: whatever their weights are, nothing is lost."""
        return self.sum.diagonal() == 0

    def factor(self, damp: float = 0.01) -> Tensor:
        """Upper triangular U ``[in, in]`` with ``H^-1 = U^T U``, of H with ``damp`` of its mean diagonal added to it.

        Dead features have the mean diagonal of the others as their own, so that their columns touch no other.

        Raises:
            ValueError: nothing was counted, or ``damp`` is not above 0.
        """
        if self.count == 0:
            raise ValueError("a Hessian needs inputs: add() some first")
        if not damp > 0:
            raise ValueError(f"damp must be above 0, got {damp}")
        h = self.matrix().double()
        diagonal, dead = h.diagonal(), self.dead
        mean = float(diagonal[~dead].mean()) if not bool(dead.all()) else 1.0
        diagonal[dead] = mean
        diagonal += damp * mean
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
        return torch.linalg.cholesky(inverse, upper=True).float()


def propagated(
    weight: Tensor,
    factor: Tensor,
    choose: Choose,
    block: int = 128,
    *,
    dead: Tensor | None = None,
    hand_on: bool = True,
) -> Tensor:
    """The compressed weight, fp32 ``[out, in]``: each block is what ``choose`` makes of it, and its loss is handed on.

    Args:
        weight: ``[out, in]``.
        factor: `Hessian.factor`, ``[in, in]``.
        choose: gets a block ``[out, b]`` as the blocks before have left it, the factor's rows and columns of it
            ``[b, b]``, and its first column; gives its compressed values and each column's loss over ``U_ii``, both
            ``[out, b]``.
        block: columns of a block.
        dead: features that never are anything but 0, bool ``[in]``; their weights begin as 0, as in the authors' code.
        hand_on: False leaves later blocks as they are.
    """
    w, out = weight.detach().float().clone(), torch.empty_like(weight, dtype=torch.float32)
    if dead is not None:
        w[:, dead] = 0.0
    for start in range(0, w.shape[1], block):
        end = min(start + block, w.shape[1])
        out[:, start:end], errors = choose(w[:, start:end], factor[start:end, start:end], start)
        if hand_on:
            w[:, end:] -= errors @ factor[start:end, end:]
    return out


def in_order(w: Tensor, factor: Tensor, column: Callable[[int, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Compress a block ``[out, b]`` a column at a time, with the loss of each handed on inside the block too.

    Args:
        column: gets the number of a column and the block with what is handed on up to it; gives the column ``[out]``.
    """
    w, values, errors = w.clone(), torch.empty_like(w), torch.empty_like(w)
    for i in range(w.shape[1]):
        values[:, i] = column(i, w)
        errors[:, i] = (w[:, i] - values[:, i]) / factor[i, i]
        w[:, i + 1 :] -= errors[:, i, None] * factor[i, i + 1 :]
    return values, errors
