"""Heads of the pattern files that MInference publishes: ``[type, number, number, score]``."""

from __future__ import annotations

import math
from typing import Any

from gossamer.methods import AShape, BlockSparse, Method, VerticalSlash
from gossamer.plan.integers import MOST
from gossamer.profiles.files import shown

__all__ = ["from_entry", "is_number", "to_entry"]

# A type, and the fields that its numbers fill.
_TYPES: dict[str, tuple[type[Method], tuple[str, ...]]] = {
    "vertical_and_slash": (VerticalSlash, ("vertical_size", "slash_size")),
    "stream_llm": (AShape, ("sink", "window")),
    "block_sparse": (BlockSparse, ("blocks",)),
}
# Files of the authors' training library: shares of the mass with a most of each, which no method here has.
_FLEXIBLE = "flex_vertical_and_slash"


def from_entry(entry: Any, where: str) -> tuple[Method, float | None]:
    """One head, with its score if it has one.

    Args:
        where: the layer and head, for messages.

    Raises:
        ValueError: it is something else, or a type that no method here is; the message says what to do.
    """
    kind = entry[0] if isinstance(entry, list | tuple) and entry else None
    if kind == _FLEXIBLE:
        raise ValueError(
            f"{where}: MInference's format has {_FLEXIBLE} here, columns and slashes by a share of the mass, "
            f"{shown(entry[1:3])}, where a profile has numbers of them; give a file with {_known()}, or run "
            "the whole model by the method flexprefill, whose gamma is such a share"
        )
    if isinstance(kind, list | tuple):
        raise ValueError(
            f"{where}: a list of candidates, from a search of MInference's that did not choose; keep the best of "
            f"them, [type, number, number, score], got {shown(entry)}"
        )
    if isinstance(kind, str) and kind not in _TYPES:
        raise ValueError(f"{where}: unknown type {shown(kind)} of MInference's format; known: {_known()}")
    if kind not in tuple(_TYPES) or len(entry) < 3 or not all(map(is_number, entry[1:])):
        raise ValueError(
            f"{where}: MInference's format has [type, number, number, score] here, with a type of {_known()} and "
            f"numbers of at most {MOST}, got {shown(entry)}"
        )
    method, names = _TYPES[kind]
    budgets = dict(zip(names, entry[1:], strict=False))
    for number in budgets.values():
        if number != int(number):
            raise ValueError(f"{where}: budgets of MInference's {kind} are whole numbers of tokens, got {shown(entry)}")
    try:
        made = method.from_fields({name: int(number) for name, number in budgets.items()})
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from error
    return made, float(entry[3]) if len(entry) > 3 else None


def to_entry(method: Method, score: float | None, where: str) -> list[Any]:
    """Inverse of `from_entry`; a score that is not there becomes 0.

    Raises:
        ValueError: a head that the format cannot hold.
    """
    for kind, (known, names) in _TYPES.items():
        if type(method) is known:
            numbers = [getattr(method, name) for name in names]
            if known.from_fields(dict(zip(names, numbers, strict=True))) == method:
                return [kind, *numbers, *[0] * (2 - len(numbers)), 0.0 if score is None else score]
    raise ValueError(
        f"{where}: MInference's format holds {', '.join(kind.name for kind, _ in _TYPES.values())} with their "
        f"budgets alone, not {shown(method.to_dict())}"
    )


def is_number(value: Any) -> bool:
    """A number that is neither NaN nor infinite, and that a float can hold."""
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) <= MOST
    return isinstance(value, float) and math.isfinite(value)


def _known() -> str:
    return ", ".join(_TYPES)
