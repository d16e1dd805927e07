"""What the subcommands share: bad input, JSON, tables."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["BadInput", "add_command", "first_line", "one_line", "print_json", "table", "unicode"]


class BadInput(Exception):
    """The user's input cannot be used; the message is one line that says what to do."""


def add_command(
    commands: Any, name: str, execute: Callable[[argparse.Namespace], int], description: str
) -> argparse.ArgumentParser:
    """A subcommand with ``--json``; ``execute`` takes its arguments and returns the exit code."""
    parser = commands.add_parser(name, help=description, description=description)
    parser.set_defaults(execute=execute)
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    return parser


def print_json(data: dict[str, Any]) -> None:
    print(json.dumps(data, indent=1))


def table(rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, the first to the left and the others to the right; the first row is the header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


def one_line(message: str) -> str:
    """A message on one line, without characters that a terminal acts on: names of files may hold any."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in message)


def unicode(name: str) -> str:
    """A name as UTF-8 can hold it: bytes of a command line that are none become question marks."""
    return name.encode("utf-8", "replace").decode()


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
