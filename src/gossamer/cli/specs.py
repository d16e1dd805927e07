"""Lists of methods and tasks on a command line: ``dense,max_relative(alpha=0.02),needle_multikey(turns=4)``."""

from __future__ import annotations

import dataclasses
import re
import typing
from typing import Any

from gossamer import methods

__all__ = ["field_values", "parse_method", "parse_task", "split_specs", "task_names"]

_SPEC = re.compile(r"\s*(\w+)\s*(?:\((.*)\)|:(.*))?\s*", re.DOTALL)


def split_specs(text: str) -> list[str]:
    """The parts of a list, split at commas outside parentheses.

    Raises:
        ValueError: a parenthesis too many or too few, or an empty part.
    """
    parts, depth = [""], 0
    for letter in text:
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if depth < 0:
            break
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    if depth != 0:
        raise ValueError(f"parentheses do not match in {text!r}; write name(field=value,field=value)")
    if not all(part.strip() for part in parts):
        raise ValueError(f"an empty name in {text!r}; separate names by single commas")
    return [part.strip() for part in parts]


def parse_method(spec: str, **given: Any) -> methods.Method:
    """``name``, ``name(field=value,...)`` or ``name:field=value:...`` as a method; `given` are further fields.

    Raises:
        ValueError: an unknown name or field, or a value of another type.
    """
    name, pairs = _parse_spec(spec)
    known = type(methods.create(name))
    fields = field_values(known, pairs)
    return methods.create(name, **fields, **{key: value for key, value in given.items() if _has_field(known, key)})


def task_names(*more: str) -> list[str]:
    """The tasks of `gossamer.evaluate.tasks`, and what else can be named beside them."""
    from gossamer.evaluate import tasks

    return [*tasks.available(), *more]


def parse_task(spec: str, *more: str, **given: Any) -> Any:
    """As `parse_method`, for a task of `gossamer.evaluate.tasks`; `more` are other names that a message should list."""
    from gossamer.evaluate import tasks

    name, pairs = _parse_spec(spec)
    if name in more:
        raise ValueError(f"{name} takes no fields, got {spec!r}; write {name}")
    if name not in tasks.available():
        raise ValueError(f"unknown task {name!r}; known: {', '.join(task_names(*more))}")
    return tasks.create(name, **given | field_values(type(tasks.create(name)), pairs))


def field_values(owner: type, pairs: list[str]) -> dict[str, Any]:
    """``FIELD=VALUE`` pairs by the types of a dataclass's fields; names that it lacks pass through as they are.

    Raises:
        ValueError: a value that is not of its field's type.
    """
    types = typing.get_type_hints(owner)
    values: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        kind = types.get(name)
        if not equals:
            raise ValueError(f"fields are given as FIELD=VALUE, got {pair!r}")
        if name == "profile" and kind is not None:
            raise ValueError("a profile is a file: use --profile FILE instead of a field")
        try:
            values[name] = _parse_value(kind, value)
        except ValueError:
            known = getattr(owner, "name", owner.__name__)
            raise ValueError(f"{known}.{name} takes {kind.__name__ if kind else kind}, got {value!r}") from None
    return values


def _parse_spec(spec: str) -> tuple[str, list[str]]:
    found = _SPEC.fullmatch(spec)
    if found is None:
        raise ValueError(f"{spec!r} is neither name nor name(field=value,field=value)")
    name, inside, after = found.groups()
    pairs = (inside or "").split(",") if inside is not None else (after or "").split(":")
    return name, [pair.strip() for pair in pairs if pair.strip()]


def _parse_value(kind: type | None, value: str) -> Any:
    if kind is bool:
        if value.lower() not in ("true", "false"):
            raise ValueError(value)
        return value.lower() == "true"
    return kind(value) if kind in (int, float) else value


def _has_field(owner: Any, name: str) -> bool:
    return any(field.name == name for field in dataclasses.fields(owner))
