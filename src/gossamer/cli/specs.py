"""Lists of methods and tasks on a command line: ``dense,max_relative(alpha=0.02),needle_multikey(turns=4)``."""

from __future__ import annotations

import dataclasses
import enum
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from gossamer import methods
from gossamer.methods.registry import class_of
from gossamer.policy import Policy
from gossamer.profiles import Profile, read_channels, read_table
from gossamer.profiles.files import parse_json

if typing.TYPE_CHECKING:
    from gossamer.cache import CachePolicy

__all__ = [
    "field_values",
    "make_policy",
    "parse_cache",
    "parse_method",
    "parse_policies",
    "parse_policy",
    "parse_task",
    "parse_variant",
    "split_specs",
    "takes_profile",
    "task_names",
]

_SPEC = re.compile(r"\s*(\w+)\s*(?:\((.*)\)|:(.*))?\s*", re.DOTALL)
_OPENING, _CLOSING = "([{", ")]}"


def split_specs(text: str) -> list[str]:
    """The parts of a list, split at commas outside brackets.

    Raises:
        ValueError: a bracket too many or too few, or an empty part.
    """
    parts = _split(text, ",")
    if not all(parts):
        raise ValueError(f"an empty name in {text!r}; separate names by single commas")
    return parts


def _split(text: str, separator: str) -> list[str]:
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in _OPENING) - (letter in _CLOSING)
        if depth < 0:
            break
        if letter == separator and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    if depth != 0:
        raise ValueError(f"parentheses do not match in {text!r}; write name(field=value,field=value)")
    return [part.strip() for part in parts]


def parse_method(spec: str) -> methods.Method:
    """``name``, ``name(field=value,...)`` or ``name:field=value:...`` as a method.

    Raises:
        ValueError: an unknown name or field, or a value of another type.
        TypeError: a field without a default is not given.
    """
    name, pairs = _parse_spec(spec)
    return methods.create(name, **field_values(class_of(name), pairs))


def parse_cache(spec: str) -> CachePolicy:
    """As `parse_method`, of what a cache keeps: ``keep(sinks=4)``.

    Raises:
        ValueError, TypeError: as `parse_method`.
    """
    from gossamer.cache import registry

    name, pairs = _parse_spec(spec)
    return registry.create(name, **field_values(registry.class_of(name), pairs))


def parse_policy(spec: str, profile: Profile | None, min_tokens: int | None) -> Policy:
    """As `make_policy`, of a method as `parse_method` reads it."""
    return make_policy(*_parse_spec(spec), profile, min_tokens)


def parse_policies(
    specs: str, steps: str | None, profile: Profile | None, min_tokens: int | None, kept: str | None = None
) -> list[Policy]:
    """A policy for each of a list of methods, of methods for decoding and of caches; ``none`` is one of the latter two.

    Without a list of methods for decoding, a profile's own holds.

    Raises:
        ValueError, TypeError: as `parse_policy`; or a method that does not choose what a step reads.
    """
    chosen = [None if spec == "none" else parse_method(spec) for spec in split_specs(steps or "none")]
    policies = [parse_policy(spec, profile, min_tokens) for spec in split_specs(specs)]
    caches = [None if spec == "none" else parse_cache(spec) for spec in split_specs(kept or "none")]
    return [
        dataclasses.replace(policy, decode=step, cache=cache)
        for policy in policies
        for step in ([policy.decode] if steps is None else chosen)
        for cache in caches
    ]


def make_policy(name: str, pairs: Sequence[str], profile: Profile | None, min_tokens: int | None) -> Policy:
    """A method by name, with its fields as ``FIELD=VALUE``; a profile in place of one that `takes_profile`.

    Raises:
        ValueError: as `parse_method`, or fields beside a profile.
        TypeError: as `parse_method`.
    """
    known = class_of(name)
    fields = field_values(known, pairs)
    if profile is None or not takes_profile(known):
        return Policy(methods.create(name, **fields), min_tokens)
    if fields:
        raise ValueError(f"a profile names a method for each head; leave {', '.join(fields)} of {name} out")
    return dataclasses.replace(Policy.of(profile), min_tokens=min_tokens)


def takes_profile(method: type[methods.Method]) -> bool:
    """Whether a method is one of methods per head, which a file names."""
    return issubclass(method, methods.PerHead)


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


def parse_variant(spec: str) -> Any:
    """As `parse_method`, for a variant of associative recall (`gossamer.evaluate.mqar.VARIANTS`)."""
    from gossamer.evaluate.mqar import VARIANTS

    name, pairs = _parse_spec(spec)
    if name not in VARIANTS:
        raise ValueError(f"unknown variant {name!r}; known: {', '.join(VARIANTS)}")
    return VARIANTS[name](**field_values(VARIANTS[name], pairs))


def field_values(owner: type, pairs: Sequence[str]) -> dict[str, Any]:
    """``FIELD=VALUE`` pairs by the types of a dataclass's fields; names that it lacks pass through as they are.

    Numbers, words, true, false and none stand for themselves, a method as it does in a list of methods; lists and
    objects are JSON: ``[1,2]``. Of numbers by layer and head, ``@FILE`` names a file
    (`gossamer.profiles.read_table`); of channels too (`gossamer.profiles.read_channels`).

    Raises:
        ValueError: a value that is not of its field's type.
    """
    hints = typing.get_type_hints(owner)
    kinds = {field.name: hints[field.name] for field in dataclasses.fields(owner)}
    values: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = (part.strip() for part in pair.partition("="))
        if not equals:
            raise ValueError(f"fields are given as FIELD=VALUE, got {pair!r}")
        if name == "layers" and takes_profile(owner):
            raise ValueError("methods per head come from a file: use --profile FILE instead of the field layers")
        kind = kinds.get(name, str)
        if value.startswith("@") and name in getattr(owner, "tables", ()):
            values[name] = _read_table(value[1:], name)
            continue
        try:
            values[name] = _parse_value(kind, value)
        except ValueError as error:
            known = getattr(owner, "name", owner.__name__)
            because = f" ({error})" if str(error) else ""
            raise ValueError(f"{known}.{name} takes {_name_of(kind)}, got {value!r}{because}") from None
    return values


def _read_table(path: str, field: str) -> Any:
    try:
        return read_channels(path) if field == "channels" else read_table(path, field)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error


def _parse_spec(spec: str) -> tuple[str, list[str]]:
    found = _SPEC.fullmatch(spec)
    if found is None:
        raise ValueError(f"{spec!r} is neither name nor name(field=value,field=value)")
    name, inside, after = found.groups()
    pairs = _split(inside, ",") if inside is not None else _split(after or "", ":")
    return name, [pair for pair in pairs if pair]


def _name_of(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return " or ".join(map(repr, typing.get_args(kind)))
    return kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "").replace("NoneType", "none")


def _parse_value(kind: Any, text: str) -> Any:
    """A value of a type, from a command line.

    Raises:
        ValueError: it is none, without a message where the type says all.
    """
    if _is_union(kind):
        return _first_that_fits(lambda member: _parse_value(member, text), typing.get_args(kind))
    if kind in (str, Any):
        return text
    if kind is types.NoneType:
        return _chosen({"none": None, "null": None}, text.lower())
    if kind is bool:
        return _chosen({"true": True, "false": False}, text.lower())
    if typing.get_origin(kind) is typing.Literal:
        return _chosen({str(choice): choice for choice in typing.get_args(kind)}, text)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return _chosen({str(member.value): member for member in kind} | dict(kind.__members__), text)
    if isinstance(kind, type) and issubclass(kind, methods.Method):
        return parse_method(text)
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            raise ValueError from None
    try:
        data = parse_json(text)
    except ValueError:
        raise ValueError("write it as JSON, such as [1,2]") from None
    return _typed(kind, data)


def _typed(kind: Any, data: Any) -> Any:
    """JSON as a value of a type."""
    origin, arguments = typing.get_origin(kind) or kind, typing.get_args(kind)
    if _is_union(kind):
        return _first_that_fits(lambda member: _typed(member, data), arguments)
    if origin is typing.Literal:
        return _chosen({choice: choice for choice in arguments}, data)
    if not isinstance(origin, type):
        return data
    if issubclass(origin, methods.Method):
        return methods.from_dict(data)
    if issubclass(origin, Mapping):
        _expect(isinstance(data, dict))
        return data
    if origin is not str and issubclass(origin, Sequence):
        _expect(isinstance(data, list))
        alike = origin is not tuple or not arguments or arguments[-1] is ...
        kinds = [arguments[0] if arguments else Any] * len(data) if alike else arguments
        _expect(len(kinds) == len(data))
        made = [_typed(one, item) for one, item in zip(kinds, data, strict=True)]
        return tuple(made) if origin is tuple else made
    if origin is float:
        _expect(isinstance(data, int | float) and not isinstance(data, bool))
        return float(data)
    _expect(type(data) is origin)
    return data


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (typing.Union, types.UnionType)


def _first_that_fits(parse: Any, members: Sequence[Any]) -> Any:
    """By the first member of a union that takes it; words stand last, since anything is one."""
    for member in sorted(members, key=lambda member: (member is str, member is not types.NoneType)):
        try:
            return parse(member)
        except ValueError:
            continue
    raise ValueError


def _chosen(choices: Mapping[Any, Any], given: Any) -> Any:
    _expect(given in choices)
    return choices[given]


def _expect(fits: bool) -> None:
    if not fits:
        raise ValueError
