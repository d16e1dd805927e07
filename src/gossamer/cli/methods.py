"""``gossamer methods``: what ``--method`` accepts, with fields and defaults."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Any

from gossamer import methods
from gossamer.cli.common import add_command, first_line, print_json
from gossamer.cli.specs import takes_profile
from gossamer.methods.registry import GROUP, class_of

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    add_command(commands, "methods", execute, "list the methods with their fields and defaults")


def execute(arguments: argparse.Namespace) -> int:
    entries = [_entry(name) for name in methods.available()]
    steps = [_entry(name) for name in methods.decoding()]
    denoising = [_entry(name) for name in methods.denoising()]
    if arguments.json:
        print_json({"methods": entries, "decoding": steps, "denoising": denoising})
        return 0
    _print(entries)
    print("\nof decoding (--decode):")
    _print(steps)
    print("\nof models that denoise (gossamer.enable(pipeline, ...)):")
    _print(denoising)
    return 0


def _print(entries: Sequence[dict[str, Any]]) -> None:
    for entry in entries:
        print(f"{entry['method']}: {entry.get('error') or entry['summary']}")
        if "error" not in entry:
            print(f"    {_fields(entry)}")
        if entry["package"]:
            print(f"    from {entry['package']}")


def _entry(name: str) -> dict[str, Any]:
    """One method as JSON types. A package's method that does not load has an ``error`` instead of fields."""
    try:
        known = class_of(name)
    except ValueError as error:
        return {"method": name, "error": first_line(error), "package": _package(name)}
    defaults = {field.name: _default(field) for field in dataclasses.fields(known)}
    given = {name: value for name, value in defaults.items() if value is not dataclasses.MISSING}
    return {
        "method": name,
        "summary": " ".join((inspect.getdoc(known) or "").split("\n\n")[0].split()),
        "fields": json.loads(json.dumps(given, default=_plain)),
        "required": [name for name in defaults if name not in given],
        "profile": takes_profile(known),
        "package": None if known.__module__.partition(".")[0] == "gossamer" else _package(name),
    }


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _plain(value: Any) -> Any:
    return value.to_dict() if isinstance(value, methods.Method) else str(value)


def _package(name: str) -> str | None:
    """The installed package that offers a method."""
    offered = (entry.dist for entry in entry_points(group=GROUP, name=name))
    return next((f"{package.name} {package.version}" for package in offered if package), None)


def _fields(entry: dict[str, Any]) -> str:
    """As they are given on a command line."""
    by_profile = {"layers"} if entry["profile"] else set()
    shown = [f"{name}={_shown(value)}" for name, value in entry["fields"].items() if name not in by_profile]
    shown += [f"{name} (required)" for name in entry["required"]]
    shown += [f"{name} by --profile" for name in by_profile]
    return " ".join(shown) or "no fields"


def _shown(value: Any) -> str:
    if isinstance(value, dict) and "method" in value:  # with its defaults
        return value["method"]
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
