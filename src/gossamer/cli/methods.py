"""``gossamer methods``: what ``--method`` accepts, with fields and defaults."""

from __future__ import annotations

import argparse
import inspect
from typing import Any

from gossamer import methods
from gossamer.cli.common import add_command, print_json

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    add_command(commands, "methods", execute, "list the methods with their fields and defaults")


def execute(arguments: argparse.Namespace) -> int:
    known = [methods.create(name) for name in methods.available()]
    if arguments.json:
        print_json({"methods": [{**method.to_dict(), "summary": _summary(method)} for method in known]})
        return 0
    for method in known:
        fields = {name: value for name, value in method.to_dict().items() if name != "method"}
        print(f"{method.name}: {_summary(method)}")
        print(f"    {' '.join(f'{name}={value}' for name, value in fields.items()) or 'no fields'}")
    return 0


def _summary(method: methods.Method) -> str:
    """The first paragraph of a method's docstring, on one line."""
    return " ".join((inspect.getdoc(type(method)) or "").split("\n\n")[0].split())
