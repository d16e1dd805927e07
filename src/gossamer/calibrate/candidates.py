"""What `gossamer calibrate` tries for each head."""

from __future__ import annotations

from collections.abc import Sequence

from gossamer.evaluate.settings import settings_of
from gossamer.methods import Dense, Method
from gossamer.methods.registry import class_of

__all__ = ["METHODS", "candidates"]

METHODS = ("a_shape", "vertical_slash", "block_sparse", "xattention", "max_relative")


def candidates(of: Sequence[str | Method] = METHODS) -> list[Method]:
    """What methods of these names declare for single heads (`Method.candidates`), these methods, and first dense.

    Raises:
        ValueError: an unknown name, or a method of methods.
    """
    found: dict[Method, None] = {}
    for one in of:
        for method in [one] if isinstance(one, Method) else _declared(class_of(one)):
            if hasattr(method, "layers"):
                raise ValueError(
                    f"{method.name} is made of methods for each head, and is none for a single one; leave it out"
                )
            if not isinstance(method, Dense):
                found[method] = None
    return [Dense(), *found]


def _declared(known: type[Method]) -> list[Method]:
    return [known.from_fields(dict(f)) for f in known.candidates] if known.candidates else settings_of(known)
