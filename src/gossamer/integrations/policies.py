"""What ``enable`` is asked for, as a policy."""

from __future__ import annotations

import dataclasses
from typing import Any

from gossamer import methods
from gossamer.methods import Method
from gossamer.policy import Policy
from gossamer.profiles import Profile

__all__ = ["policy_of"]


def policy_of(
    method: str | Method | Policy,
    profile: Profile | None,
    min_tokens: int | None,
    max_density: float | None,
    fields: dict[str, Any],
) -> Policy:
    """The policy that ``enable`` is asked for, by a method or a profile.

    Raises:
        ValueError: an unknown method or field, or fields beside a finished method or a profile.
    """
    thresholds: dict[str, Any] = {"min_tokens": min_tokens, "max_density": max_density}
    thresholds = {name: value for name, value in thresholds.items() if value is not None}
    if profile is not None:
        method = _of_profile(method, profile, fields)
        fields = {}
        thresholds |= {"profile": profile.name, "decode": profile.decode}
    if isinstance(method, str):
        return Policy(methods.create(method, **fields), **thresholds)
    if fields:
        raise ValueError(
            f"{', '.join(sorted(fields))} given beside a finished {type(method).__name__}; "
            "pass the method by its name, or set its fields where it is made"
        )
    if isinstance(method, Policy):
        return dataclasses.replace(method, **thresholds)
    return Policy(method, **thresholds)


def _of_profile(method: str | Method | Policy, profile: Profile, fields: dict[str, Any]) -> Method:
    named = profile.method
    if method not in ("minference", named.name, "per_head") or fields:
        raise ValueError(
            f"a profile names a method for each head, got one beside {method!r}"
            + (f" with {', '.join(sorted(fields))}" if fields else "")
            + "; leave the method and its fields out"
        )
    return named
