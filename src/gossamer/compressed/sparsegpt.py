"""SparseGPT (2301.00774): weights set to 0 in one pass, the others moved so that outputs stay near."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.compressed.hessian import in_order, propagated
from gossamer.compressed.int8 import TOP

__all__ = ["Pattern", "magnitude", "prune"]


@dataclass(frozen=True)
class Pattern:
    """Which weights may be 0.

    Args:
        share: of all weights that become 0, in 0 .. 1; where ``of`` is given it is ``(of - keep) / of``.
        keep, of: keep so many of each ``of`` consecutive inputs of a row (N:M sparsity), such as 2 of 4.
    """

    share: float = 0.5
    keep: int = 0
    of: int = 0

    def __post_init__(self) -> None:
        if self.of:
            if not 0 < self.keep < self.of:
                raise ValueError(f"N:M sparsity keeps 1 to M - 1 of M weights, got {self.keep} of {self.of}")
            object.__setattr__(self, "share", (self.of - self.keep) / self.of)
        elif not 0.0 <= self.share < 1.0:
            raise ValueError(f"share must be in [0, 1), got {self.share}")

    @staticmethod
    def parse(text: str | float) -> Pattern:
        """``"0.7"`` or the number, or ``"2:4"`` for two of four kept.

        Raises:
            ValueError: neither.
        """
        try:
            if isinstance(text, str) and ":" in text:
                keep, of = text.split(":")
                return Pattern(keep=int(keep), of=int(of)) if int(of) else Pattern(share=2.0)
            return Pattern(float(text))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"a pattern is the share of zeros, such as 0.7, or N:M, such as 2:4; got {text!r}"
            ) from error

    def __str__(self) -> str:
        return f"{self.keep}:{self.of}" if self.of else f"{self.share:g}"


def prune(
    weight: Tensor,
    factor: Tensor,
    pattern: Pattern,
    block: int = 128,
    *,
    dead: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """A weight ``[out, in]`` with zeros by the pattern, fp32.

    The masks of a block of columns are chosen by the least ``w^2 / U_ii^2``: of the whole block at once where the
    pattern is a share, and of each group of M when its first column is reached. Then columns go from left to right,
    each handing its loss to the later ones (2301.00774, algorithm 1; groups as in the authors' code).

    Args:
        factor: `Hessian.factor` of the layer's inputs, ``[in, in]``.
        dead: `Hessian.dead`; their weights are pruned first.
        scale: ``[out]``; weights that are kept are rounded to -127 to 127 times it, and what that loses is handed on
            too (section 3.5, with a fixed grid of each row).

    Raises:
        ValueError: M does not divide the inputs, or the block.
    """
    if pattern.of and (weight.shape[1] % pattern.of or block % pattern.of):
        raise ValueError(f"{pattern} needs inputs and blocks in multiples of {pattern.of}: {weight.shape[1]}, {block}")

    def choose(w: Tensor, own: Tensor, _: int) -> tuple[Tensor, Tensor]:
        diagonal = own.diagonal()
        zero = torch.zeros_like(w, dtype=torch.bool) if pattern.of else _least((w / diagonal) ** 2, pattern.share)

        def column(i: int, now: Tensor) -> Tensor:
            if pattern.of and i % pattern.of == 0:
                group = slice(i, i + pattern.of)
                zero[:, group] = _least_of_rows((now[:, group] / diagonal[group]) ** 2, pattern.of - pattern.keep)
            kept = now[:, i].masked_fill(zero[:, i], 0.0)
            return kept if scale is None else (kept / scale).round().clamp(-TOP, TOP) * scale

        return in_order(w, own, column)

    return propagated(weight, factor, choose, block, dead=dead)


def magnitude(weight: Tensor, pattern: Pattern) -> Tensor:
    """The same pattern by the least magnitudes, with nothing handed on: what SparseGPT is compared with."""
    w = weight.detach().float()
    if not pattern.of:
        return w.masked_fill(_least(w.abs(), pattern.share), 0.0)
    if w.shape[1] % pattern.of:
        raise ValueError(f"{pattern} needs inputs in multiples of {pattern.of}, got {w.shape[1]}")
    groups = w.view(len(w), -1, pattern.of)
    return groups.masked_fill(_least_of_rows(groups.abs(), pattern.of - pattern.keep), 0.0).view_as(w)


def _least(scores: Tensor, share: float) -> Tensor:
    """The ``floor(share n)`` least of all; of equal ones the first."""
    order = scores.flatten().argsort(stable=True)[: int(share * scores.numel())]
    return (
        torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device).index_fill_(0, order, True).view_as(scores)
    )


def _least_of_rows(scores: Tensor, number: int) -> Tensor:
    """So many least ones along the last dimension; of equal ones the first."""
    least = scores.argsort(dim=-1, stable=True)[..., :number]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, least, True)
