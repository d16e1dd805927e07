"""Seconds as a sum of terms: least squares with coefficients of 0 or more, and what it misses on held-out samples."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

__all__ = ["fit", "held_out_errors"]


def fit(terms: Tensor, seconds: Tensor) -> Tensor:
    """Coefficients that make the relative errors' squares the least, none below 0; exact, by trying all sets of terms.

    Args:
        terms: fp64 ``[samples, terms]``, at most a dozen terms.
        seconds: fp64 ``[samples]``, above 0.

    Returns:
        fp64 ``[terms]``.

    Raises:
        ValueError: no samples, or seconds that are not above 0.
    """
    if not len(seconds) or not bool((seconds > 0).all()):
        raise ValueError("a fit needs at least one sample, and seconds above 0")
    relative = terms / seconds[:, None]
    scale = relative.abs().amax(dim=0).clamp(min=torch.finfo(torch.float64).tiny)
    scaled, wanted = relative / scale, torch.ones_like(seconds)
    best, least = torch.zeros_like(scale), float(len(seconds))
    for count in range(1, terms.shape[1] + 1):
        for chosen in map(list, itertools.combinations(range(terms.shape[1]), count)):
            found = torch.linalg.lstsq(scaled[:, chosen], wanted[:, None], driver="gelsd").solution[:, 0]
            missed = float((scaled[:, chosen] @ found - wanted).square().sum())
            if bool((found >= 0).all()) and missed < least * (1 - 1e-12):
                best, least = torch.zeros_like(scale), missed
                best[chosen] = found
    return best / scale


def held_out_errors(terms: Tensor, seconds: Tensor, parts: int = 5) -> Tensor:
    """Relative errors ``[samples]`` of each sample by a fit to the others: every ``parts``-th is left out at a time."""
    errors = torch.ones_like(seconds)
    parts = min(parts, len(seconds))
    for part in range(parts if parts > 1 else 0):
        out = torch.arange(len(seconds), device=seconds.device) % parts == part
        errors[out] = (terms[out] @ fit(terms[~out], seconds[~out]) / seconds[out] - 1).abs()
    return errors
