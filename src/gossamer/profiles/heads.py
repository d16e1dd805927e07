"""That what a method holds by layer and head is there, and for this model."""

from __future__ import annotations

from collections.abc import Callable

from gossamer.methods import Method, PerHead

__all__ = ["check_heads"]


def check_heads(
    method: Method,
    layers: int | None,
    heads: int | None,
    groups: int | None,
    *,
    ways: Callable[[str], str] = lambda name: "give a file of them",
) -> None:
    """Of methods per head and of each of `Method.tables`, in a method and in those that it holds.

    Args:
        layers, heads, groups: layers, query heads and key/value heads of the model; None where it does not say.
        ways: how a missing one is given, by the name of its field, for the message.

    Raises:
        ValueError: nothing is there, or it is for another model.
    """
    shared = f" ({groups} for keys and values)" if groups else ""
    for part in method.parts():
        if isinstance(part, PerHead):
            if not part.layers and type(part).plan is PerHead.plan:
                raise ValueError(f"{part.name} has no methods for this model's heads; {ways('layers')}")
            shape = len(part.layers), len(part.layers[0]) if part.layers else 0
            if part.layers and layers and heads and shape != (layers, heads):
                raise ValueError(
                    f"the profile is for {shape[0]} layers of {shape[1]} heads, but this model has {layers} layers of "
                    f"{heads}; use a profile made for it"
                )
        for name in part.tables:
            table = getattr(part, name)
            if not table:
                raise ValueError(f"{part.name} has no {name} for this model's heads; {ways(name)}")
            fits = heads is None or len(table[0]) in (heads, groups)
            if (layers is not None and len(table) != layers) or not fits:
                raise ValueError(
                    f"{part.name}.{name} is for {len(table)} layers of {len(table[0])} heads, but this model has "
                    f"{layers} layers of {heads}{shared}; use a file made for it"
                )
