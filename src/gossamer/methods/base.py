"""What a method is: a frozen dataclass of hyperparameters with one verb, ``plan``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import Tensor

from gossamer.plan import Extent, SparsePlan

__all__ = ["Method", "require_at_least"]


@dataclass(frozen=True)
class Method(ABC):
    """Turns ``(q, k)`` into a `SparsePlan`. Subclasses are frozen dataclasses; their fields are the configuration."""

    name: ClassVar[str]

    @abstractmethod
    def plan(self, q: Tensor, k: Tensor, *, scale: float, extent: Extent, layer: int | None = None) -> SparsePlan:
        """Choose what to compute for ``q [B, H, S, D]`` against ``k [B, G, T, D]``, all heads and rows at once.

        Args:
            scale: factor of the logits.
            extent: where the tokens sit; S < T from the second chunk of a prefill on.
            layer: the model's layer, for methods whose patterns differ between layers.

        Returns:
            A causal plan that keeps the diagonal: every live query attends at least itself.
        """

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON types, with the discriminator ``method``."""
        return {"method": self.name} | {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def from_fields(cls, values: dict[str, Any]) -> Method:
        """Build from field values.

        Raises:
            ValueError: an unknown field, with the known ones; or a value out of range.
        """
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(
                f"method {cls.name!r} has no field {unknown[0]!r}; its fields are: {', '.join(known) or 'none'}"
            )
        return cls(**values)


def require_at_least(method: Method, minimum: int, *names: str) -> None:
    """Validate integer fields of a method.

    Raises:
        TypeError: a field is no integer.
        ValueError: a field is below the minimum.
    """
    for name in names:
        value = getattr(method, name)
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{method.name}.{name} must be an integer, got {value!r}")
        if value < minimum:
            raise ValueError(f"{method.name}.{name} must be at least {minimum}, got {value}")
