"""Numbers by layer and head: fields of methods that a training or a search made for one model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from gossamer.methods.base import Method
from gossamer.methods.ranks import heads_of_rank
from gossamer.plan.plan import WHOLE

__all__ = ["Table", "full_heads", "gates_of_rank", "of_layer", "require_table", "windows"]

Table = Sequence[Sequence[float]]
"""``[layer][head]``, the same number of heads in each layer; nothing where a method was made without."""
Entry = TypeVar("Entry")


def require_table(method: Method, *names: str) -> None:
    """Validate fields that are a `Table`, and keep them as tuples of floats.

    Raises:
        TypeError: a field holds something else than lists of numbers.
        ValueError: a number is not finite, or layers have different numbers of heads.
    """
    for name in names:
        layers = getattr(method, name)
        what = f"{method.name}.{name}"
        if isinstance(layers, str) or not isinstance(layers, Sequence):
            raise TypeError(f"{what} must be a list (layers) of lists (heads) of numbers, got {type(layers).__name__}")
        for layer, heads in enumerate(layers):
            if isinstance(heads, str) or not isinstance(heads, Sequence):
                raise TypeError(f"{what} must hold a list of numbers for layer {layer}, got {type(heads).__name__}")
            for head, number in enumerate(heads):
                if not isinstance(number, (int, float)) or isinstance(number, bool):
                    raise TypeError(f"{what}, layer {layer}, head {head}: expected a number, got {number!r}")
                if not math.isfinite(number):
                    raise ValueError(f"{what}, layer {layer}, head {head}: expected a finite number, got {number}")
        counts = sorted({len(heads) for heads in layers})
        if len(counts) > 1 or counts == [0]:
            raise ValueError(f"{what} must have the same number of heads in each layer, got {counts}")
        object.__setattr__(method, name, tuple(tuple(map(float, heads)) for heads in layers))


def of_layer(
    table: Sequence[Sequence[Entry]], layer: int | None, heads: Sequence[int], what: str = "the methods"
) -> Sequence[Entry]:
    """What a table has for one layer.

    Args:
        heads: numbers of heads that fit.
        what: the table has, for messages.

    Raises:
        ValueError: no layer was given, there is none such, or the number of heads does not fit.
    """
    if layer is None:
        raise ValueError(f"{what} differ between layers: pass layer=, the index of the model's layer")
    had = len(table[0]) if table else 0
    if not 0 <= layer < len(table) or had not in heads:
        asked = " or ".join(str(number) for number in sorted(set(heads)))
        raise ValueError(
            f"{what} are for {len(table)} layers of {had} heads, but layer {layer} with {asked} heads was asked for; "
            "use a file made for this model"
        )
    return table[layer]


def full_heads(gates: Table, sparsity: float) -> tuple[tuple[bool, ...], ...]:
    """The heads that stay full when the share ``sparsity`` with the lowest gates does not: ``[layer][head]``.

    A head is full if its gate is at least the quantile ``sparsity`` of all gates of the model (linear between two
    of them): with n gates, ``ceil(sparsity * (n - 1))`` are not. 1 leaves none. Of equal gates the first are full.
    """
    ranked = sorted((-gate, layer, head) for layer, heads in enumerate(gates) for head, gate in enumerate(heads))
    # Rounded, since a product such as 0.07 * 100 lies above the integer that it means.
    below = math.ceil(round(sparsity * (len(ranked) - 1), 9)) if sparsity < 1 else len(ranked)
    full = {(layer, head) for _, layer, head in ranked[: len(ranked) - below]}
    return tuple(tuple((layer, head) in full for head in range(len(heads))) for layer, heads in enumerate(gates))


def gates_of_rank(full: Sequence[Sequence[bool]], rank: int, ranks: int, heads: int, groups: int) -> dict[str, Any]:
    """Gates and sparsity of one tensor-parallel rank, by which its `full_heads` are those that are full in the whole.

    Which heads are full depends on the gates of all: 1 and 0 stand for what was chosen among them.
    """
    part = [layer[heads_of_rank(len(layer), rank, ranks, heads, groups)] for layer in full]
    count = sum(len(layer) for layer in part)
    streaming = count - sum(sum(layer) for layer in part)
    some = 0 < streaming < count
    sparsity = (streaming - 0.5) / (count - 1) if some else float(streaming > 0)
    return {"gates": tuple(tuple(map(float, layer)) for layer in part), "sparsity": sparsity}


def windows(full: Sequence[bool], window: int) -> Tensor:
    """A plan's ``window``: all for full heads, else ``window`` tokens; int32 ``[heads]``."""
    return torch.tensor([WHOLE if whole else window for whole in full], dtype=torch.int32, device="cpu")
