"""What `gossamer calibrate` tries for each head."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gossamer.call import AttentionCall
from gossamer.evaluate.settings import settings_of
from gossamer.methods import Dense, Method
from gossamer.methods.merging import merge_plans
from gossamer.methods.registry import class_of

__all__ = ["METHODS", "candidates"]

METHODS = ("a_shape", "vertical_slash", "block_sparse", "xattention", "max_relative")
_TRIED = 300  # tokens of the call by which it shows


def candidates(of: Sequence[str | Method] = METHODS) -> list[Method]:
    """What methods of these names declare for single heads (`Method.candidates`), these methods, and first dense.

    Raises:
        ValueError: an unknown name, or a method that is none for a single head among others of a layer.
    """
    found: dict[Method, None] = {}
    for one in of:
        for method in [one] if isinstance(one, Method) else _declared(class_of(one)):
            if not isinstance(method, Dense):
                _check(method)
                found[method] = None
    return [Dense(), *found]


def _check(method: Method) -> None:
    """That its plan can stand beside the dense plan of another head."""
    if hasattr(method, "layers"):
        raise ValueError(f"{method.name} is made of methods for each head, and is none for a single one; leave it out")
    if not method.apart:
        raise ValueError(
            f"{method.name} has numbers that belong to heads by their place, and is none for a single one; leave it out"
        )
    q = torch.zeros(1, 1, _TRIED, 16, device="cpu")
    call = AttentionCall(q, q, q, layer=0)
    try:
        merge_plans([Dense().plan(call), method.plan(call)], [0], [[0], [0]])
    except ValueError as error:
        raise ValueError(
            f"{method.name} cannot be one of several methods of a layer ({error}); leave it out, run it alone, or name "
            "it with fields under which it can, such as flash_prefill(version=1)"
        ) from error


def _declared(known: type[Method]) -> list[Method]:
    return [known.from_fields(dict(f)) for f in known.candidates] if known.candidates else settings_of(known)
