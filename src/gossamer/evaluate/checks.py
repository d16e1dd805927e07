"""Checks of one value of a line of results: its type, its range, its fields, one within the other.

A check takes a value and the field's name, and returns the first thing that is wrong with it, if anything is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gossamer.profiles.files import shown

__all__ = [
    "MISSING",
    "OBJECT",
    "Check",
    "Fields",
    "Misfit",
    "first_misfit",
    "integer",
    "is_integer",
    "leaf",
    "list_of",
    "mapping_of",
    "number",
    "or_null",
]

MISSING = object()


@dataclass(frozen=True, slots=True)
class Misfit:
    """A field that is not what it should be: which one, what it should be, and what it is."""

    field: str
    expected: str
    found: str

    def __str__(self) -> str:
        return f"{self.field} must be {self.expected}, found {self.found}"


Check = Callable[[Any, str], Misfit | None]


def leaf(expected: str, fits: Callable[[Any], bool]) -> Check:
    def check(value: Any, where: str) -> Misfit | None:
        return None if fits(value) else Misfit(where, expected, "nothing" if value is MISSING else shown(value))

    return check


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def integer(low: int, high: int = 2**63 - 1) -> Check:
    above = f" to {high:,}" if high < 2**63 - 1 else " or more"
    return leaf(f"an integer, {low:,}{above}", lambda value: is_integer(value) and low <= value <= high)


def number(expected: str, fits: Callable[[float], bool]) -> Check:
    return leaf(expected, lambda value: (is_integer(value) or isinstance(value, float)) and fits(value))


def list_of(check: Check, least: int = 0) -> Check:
    itself = leaf(
        "a list that is not empty" if least else "a list", lambda value: isinstance(value, list) and len(value) >= least
    )

    def check_all(value: Any, where: str) -> Misfit | None:
        return itself(value, where) or first_misfit(check(item, f"{where}[{i}]") for i, item in enumerate(value))

    return check_all


OBJECT = leaf("an object", lambda value: isinstance(value, dict))


def mapping_of(check: Check) -> Check:
    """An object with any names."""

    def check_all(value: Any, where: str) -> Misfit | None:
        return OBJECT(value, where) or first_misfit(
            check(item, f"{where}[{shown(name)}]") for name, item in value.items()
        )

    return check_all


@dataclass(frozen=True, slots=True)
class Fields:
    """An object with the fields of ``needed``, and with those of ``more`` or without.

    Fields:
        whole: what the fields must be together; asked when each is as it should be.
    """

    needed: Mapping[str, Check]
    more: Mapping[str, Check] = field(default_factory=dict)
    whole: tuple[Check, ...] = ()

    def __call__(self, value: Any, where: str) -> Misfit | None:
        if wrong := OBJECT(value, where):
            return wrong
        inside = f"{where}." if where else ""
        return (
            first_misfit(check(value.get(name, MISSING), f"{inside}{name}") for name, check in self.needed.items())
            or first_misfit(check(value[name], f"{inside}{name}") for name, check in self.more.items() if name in value)
            or first_misfit(check(value, where) for check in self.whole)
        )


def or_null(check: Check) -> Check:
    return lambda value, where: None if value is None else check(value, where)


def first_misfit(found: Any) -> Misfit | None:
    return next((wrong for wrong in found if wrong is not None), None)
