"""Policies of a cache by name, as methods are."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from gossamer.cache.encodings import Int8, Kivi, Mustafar
from gossamer.cache.evictions import PyramidKV, SnapKV, StreamingLLM
from gossamer.cache.policies import CachePolicy, Keep
from gossamer.cache.split import DuoAttention
from gossamer.cache.tiers import Tiers

__all__ = ["available", "class_of", "create"]

_POLICIES: tuple[type[CachePolicy], ...] = (
    Keep,
    StreamingLLM,
    SnapKV,
    PyramidKV,
    DuoAttention,
    Kivi,
    Int8,
    Mustafar,
    Tiers,
)


def available() -> list[str]:
    """Names that `create` accepts."""
    return [policy.name for policy in _POLICIES]


def class_of(name: str) -> type[CachePolicy]:
    """The class of a policy.

    Raises:
        ValueError: no policy has this name.
    """
    for policy in _POLICIES:
        if policy.name == name:
            return policy
    raise ValueError(f"unknown cache {name!r}; known: {', '.join(available())}")


def create(name: str, /, **given: Any) -> CachePolicy:
    """A policy by name, with any of its fields.

    Raises:
        ValueError: an unknown name or field (the message lists the known ones), or a value out of range.
    """
    known = [f.name for f in fields(class_of(name))]
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(f"cache {name!r} has no field {unknown[0]!r}; its fields are: {', '.join(known)}")
    return class_of(name)(**given)
