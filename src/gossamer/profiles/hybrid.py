"""LongGen's hybrids (2410.01485) as profiles: some layers attend everything, the others by a static pattern."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields, replace
from fractions import Fraction
from typing import Literal

from gossamer.methods import Dense, Method
from gossamer.profiles.profile import Profile, Provenance

__all__ = ["PLACEMENTS", "Placement", "full_layers", "hybrid_profile"]

Placement = Literal["middle", "first", "last", "interleaved"]
PLACEMENTS: tuple[Placement, ...] = ("middle", "first", "last", "interleaved")


def full_layers(layers: int, full: int | float | Fraction, placement: Placement = "middle") -> tuple[int, ...]:
    """Which of a model's layers keep full attention.

    Args:
        layers: of the model.
        full: how many; or, below 1, their share, rounded to the nearest number and to at least one.
        placement: ``middle``, the paper's; ``first``; ``last``; or ``interleaved``, evenly, from the middle of each
            stretch.

    Raises:
        ValueError: more than there are, a share outside [0, 1], or an unknown placement.
    """
    whole = isinstance(full, int) and not isinstance(full, bool)
    if not (0 <= full <= layers if whole else 0 <= full <= 1):
        raise ValueError(f"full layers must be 0 to {layers}, or a share in [0, 1], got {full}")
    count = int(full) if whole else (max(1, math.floor(full * layers + Fraction(1, 2))) if full else 0)
    first = {"middle": (layers - count) // 2, "first": 0, "last": layers - count}
    if placement in first:
        return tuple(range(first[placement], first[placement] + count))
    if placement != "interleaved":
        raise ValueError(f"placement must be one of {', '.join(PLACEMENTS)}, got {placement!r}")
    return tuple((2 * i + 1) * layers // (2 * count) for i in range(count))


def hybrid_profile(layers: int, heads: int, full: Sequence[int], pattern: Method) -> Profile:
    """A profile whose ``full`` layers are dense, and whose others have a pattern.

    Args:
        layers, heads: of the model; query heads.
        full: numbers of layers, from 0.
        pattern: of all other layers' heads. One with a ``stride`` and an offset of 0 (`gossamer.methods.LongGen`) gets
            offsets that spread the heads over the stride, so that together they reach every block, or as many as there
            are heads.

    Raises:
        ValueError: a layer that the model does not have, or one named twice.
    """
    given = sorted(full)
    if len(set(given)) < len(given) or not all(0 <= layer < layers for layer in given):
        raise ValueError(f"full layers must be different numbers from 0 to {layers - 1}, got {_listed(full)}")
    sparse = tuple(_of_head(pattern, head, heads) for head in range(heads))
    dense: tuple[Method, ...] = (Dense(),) * heads
    rows = tuple(dense if layer in given else sparse for layer in range(layers))
    return Profile(rows, provenance=Provenance(samples=f"LongGen's hybrid: layers {_listed(given)} are full"))


def _of_head(pattern: Method, head: int, heads: int) -> Method:
    known = {field.name for field in fields(pattern)}
    stride = getattr(pattern, "stride", 0) if {"stride", "offset"} <= known else 0
    if not stride or getattr(pattern, "offset", 0):
        return pattern
    return replace(pattern, **{"offset": head * stride // heads % stride})


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers)) or "none"
