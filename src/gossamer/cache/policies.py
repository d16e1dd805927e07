"""What a policy of a cache is: what is kept of each layer's keys and values, and how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from gossamer.cache.layer import StoreLayer

__all__ = ["CachePolicy", "Keep", "require_choice", "require_tokens"]


@dataclass(frozen=True)
class CachePolicy:
    """Makes the layers of a cache. Subclasses are frozen dataclasses; their fields are the configuration.

    Class attributes:
        name: what `gossamer.cache.create`, ``gossamer.enable(cache=...)`` and the command line know it by.

    Fields:
        sinks, recent: so many first and last tokens are in everything that a method chooses to read.
    """

    name: ClassVar[str]
    sinks: int = 0
    recent: int = 0

    def __post_init__(self) -> None:
        for name in ("sinks", "recent"):
            require_tokens(self, name)

    def layer(self, index: int, layers: int) -> StoreLayer:
        """The store of layer ``index`` of ``layers``, empty."""
        raise NotImplementedError

    def needs_rotary(self) -> bool:
        """Whether calls must say how the model turned its keys by position."""
        return False

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON types, with the discriminator ``cache``."""
        return {"cache": self.name} | {f.name: getattr(self, f.name) for f in fields(self)}


def require_tokens(policy: CachePolicy, name: str, least: int = 0) -> None:
    """Validate a field that is a number of tokens.

    Raises:
        TypeError, ValueError: it is no integer, or too small.
    """
    value = getattr(policy, name)
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{policy.name}.{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{policy.name}.{name} must be at least {least}, got {value}")


def require_choice(policy: CachePolicy, name: str, choices: Sequence[Any]) -> None:
    """Validate a field that is one of a few values.

    Raises:
        ValueError: it is none of them.
    """
    if getattr(policy, name) not in choices:
        known = ", ".join(map(str, choices))
        raise ValueError(f"{policy.name}.{name} must be one of {known}, got {getattr(policy, name)!r}")


@dataclass(frozen=True)
class Keep(CachePolicy):
    """All tokens, as they are."""

    name: ClassVar[str] = "keep"

    def layer(self, index: int, layers: int) -> StoreLayer:
        return StoreLayer(sinks=self.sinks, recent=self.recent)
