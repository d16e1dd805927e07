"""Filling in masked tokens step by step, the most certain first, as LLaDA does (2502.09992)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["fill", "per_step"]


def per_step(count: int, steps: int) -> list[int]:
    """How many of ``count`` tokens are filled in at each step: as even as can be, the first steps one more."""
    each, more = divmod(count, steps)
    return [each + (step < more) for step in range(steps)]


@torch.no_grad()
def fill(
    logits_of: Callable[[Tensor], Tensor],
    tokens: Tensor,
    masked: Tensor,
    mask_token: int,
    steps: int,
    *,
    block: int | None = None,
    start: int | None = None,
    begin: Callable[[int, Tensor], None] = lambda step, tokens: None,
    seen: Callable[[int, Tensor], None] = lambda step, logits: None,
) -> Tensor:
    """Fill in masked tokens, greedily and without randomness: the same call gives the same tokens.

    At each step every masked token is predicted from all that is there, and those with the highest probability are kept
    (LLaDA 2502.09992, algorithm 5: remasking of low confidence); of equal ones the first. With ``block`` the masked
    region is filled in stretch by stretch (its section 2.4, semi-autoregressive).

    Deviations: any tokens may be masked, not only all that follow a prompt; the mask itself is never filled in;
    temperature is 0.

    Args:
        logits_of: the model, tokens ``[B, S]`` to logits ``[B, S, V]``; it is called once a step.
        tokens: int64 ``[B, S]``; what stands where it is masked does not matter.
        masked: bool ``[B, S]``.
        steps: of the whole sampling.
        block: tokens of a stretch; ``steps`` must be a multiple of the number of stretches.
        start: where the first stretch begins: stretches then go on to the end, also those without a mask, so that their
            number does not depend on which tokens are masked. None: at the first masked token, up to the last.
        begin: called before each step, with its number and the tokens that the model gets.
        seen: called after each step, with its logits.

    Returns:
        int64 ``[B, S]``.

    Raises:
        ValueError: shapes that do not fit, or steps that cannot be shared evenly by the stretches.
    """
    if tokens.ndim != 2 or tokens.shape != masked.shape or masked.dtype != torch.bool:
        raise ValueError(
            f"fill needs tokens [B, S] and a bool mask of the same shape, got {tuple(tokens.shape)} and "
            f"{tuple(masked.shape)} of {masked.dtype}"
        )
    if steps < 1 or (block is not None and block < 1):
        raise ValueError(f"fill needs at least 1 step and blocks of at least 1 token, got {steps} and {block}")
    if start is not None and not (0 <= start < masked.shape[1] and not bool(masked[:, :start].any())):
        raise ValueError(
            f"start must be a position below {masked.shape[1]} with no masked token before it, got {start}; give the "
            "first one that may be masked"
        )
    parts = _stretches(masked, block, start)
    if steps % len(parts):
        raise ValueError(
            f"{steps} steps cannot be shared evenly by {len(parts)} stretches of {block} tokens; give a multiple"
        )
    each = steps // len(parts)
    filled = tokens.masked_fill(masked, mask_token)
    for number, part in enumerate(parts):
        counts = [per_step(int(row.sum()), each) for row in part]
        left = part.clone()
        for step in range(each):
            begin(number * each + step, filled)
            logits = logits_of(filled)
            seen(number * each + step, logits)
            best, taken = _most_certain(logits, left, [count[step] for count in counts], mask_token)
            filled = torch.where(taken, best, filled)
            left &= ~taken
    return filled


def _stretches(masked: Tensor, block: int | None, start: int | None) -> list[Tensor]:
    """The masked tokens of each stretch, bool ``[B, S]``; they begin at ``start`` or a row's first masked one."""
    if block is None or not bool(masked.any()):
        return [masked]
    position = torch.arange(masked.shape[1], device=masked.device)
    if start is not None:
        number = (position - start).div(block, rounding_mode="floor")
        return [masked & (number == n) for n in range(int(number[-1]) + 1)]
    first = torch.where(masked, position, masked.shape[1]).amin(dim=1, keepdim=True)
    number = (position - first).div(block, rounding_mode="floor")
    last = int(number.masked_fill(~masked, 0).max())
    return [masked & (number == n) for n in range(last + 1)]


def _most_certain(logits: Tensor, left: Tensor, counts: list[int], mask_token: int) -> tuple[Tensor, Tensor]:
    """Predictions ``[B, S]``, and which of the masked ones are kept."""
    found = logits[left].float()  # a copy
    found[:, mask_token] = float("-inf")
    certain = torch.full(left.shape, float("-inf"), device=logits.device)
    best = torch.zeros(left.shape, dtype=torch.int64, device=logits.device)
    certain[left], best[left] = found.log_softmax(dim=-1).max(dim=-1)
    order = certain.argsort(dim=1, descending=True, stable=True)
    taken = torch.zeros_like(left)
    for row, count in enumerate(counts):
        taken[row, order[row, :count]] = True
    return best, taken & left
