"""Methods: ``(q, k) -> SparsePlan``. One file a paper; a new one joins by one line in `_METHODS`."""

from __future__ import annotations

from typing import Any

from gossamer.methods.a_shape import AShape, TriShape
from gossamer.methods.base import Method
from gossamer.methods.block_sparse import BlockSparse
from gossamer.methods.dense import Dense
from gossamer.methods.max_relative import MaxRelative
from gossamer.methods.minference import MInference
from gossamer.methods.vertical_slash import VerticalSlash

__all__ = [
    "AShape",
    "BlockSparse",
    "Dense",
    "MInference",
    "MaxRelative",
    "Method",
    "TriShape",
    "VerticalSlash",
    "available",
    "create",
    "from_dict",
]

_METHODS: tuple[type[Method], ...] = (
    Dense,
    AShape,
    TriShape,
    VerticalSlash,
    BlockSparse,
    MInference,
    MaxRelative,
)


def available() -> list[str]:
    """Names that `create` and ``gossamer.enable`` accept."""
    return [method.name for method in _METHODS]


def create(name: str, **fields: Any) -> Method:
    """A method by name, with any of its fields.

    Raises:
        ValueError: an unknown name or field (the message lists the known ones), or a value out of range.
    """
    for method in _METHODS:
        if method.name == name:
            return method.from_fields(fields)
    raise ValueError(f"unknown method {name!r}; known: {', '.join(available())}")


def from_dict(data: dict[str, Any]) -> Method:
    """Inverse of `Method.to_dict`.

    Raises:
        ValueError: as `create`; or no ``method`` key.
    """
    if "method" not in data:
        raise ValueError(f"a method's dictionary needs the key 'method', one of: {', '.join(available())}")
    return create(data["method"], **{key: value for key, value in data.items() if key != "method"})
