"""Policies of a cache: what is kept of each layer's keys and values, and how. By name, as methods are."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

from gossamer.cache.layer import StoreLayer

__all__ = ["CachePolicy", "Keep", "available", "create"]


@dataclass(frozen=True)
class CachePolicy:
    """Makes the layers of a cache. Subclasses are frozen dataclasses; their fields are the configuration.

    Class attributes:
        name: what `create`, ``gossamer.enable(cache=...)`` and the command line know it by.

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


@dataclass(frozen=True)
class Keep(CachePolicy):
    """All tokens, as they are."""

    name: ClassVar[str] = "keep"

    def layer(self, index: int, layers: int) -> StoreLayer:
        return StoreLayer(sinks=self.sinks, recent=self.recent)


_POLICIES: tuple[type[CachePolicy], ...] = (Keep,)


def available() -> list[str]:
    """Names that `create` accepts."""
    return [policy.name for policy in _POLICIES]


def create(name: str, /, **given: Any) -> CachePolicy:
    """A policy by name, with any of its fields.

    Raises:
        ValueError: an unknown name or field (the message lists the known ones), or a value out of range.
    """
    for policy in _POLICIES:
        if policy.name == name:
            known = [f.name for f in fields(policy)]
            unknown = sorted(set(given) - set(known))
            if unknown:
                raise ValueError(f"cache {name!r} has no field {unknown[0]!r}; its fields are: {', '.join(known)}")
            return policy(**given)
    raise ValueError(f"unknown cache {name!r}; known: {', '.join(available())}")
