"""The command ``gossamer``: one file a subcommand, ``--json`` on each.

Exit codes: 0 done, 2 bad input (one line on stderr says what and what to do), 130 interrupted.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

from gossamer import __version__
from gossamer.cli import (
    bench,
    calibrate,
    compare,
    compress,
    convert_hybrid,
    doctor,
    eval,
    eval_masked,
    eval_video,
    find_channels,
    inspect,
    methods,
    mqar,
    profile,
    report,
    run,
    serve,
    train_gates,
)
from gossamer.cli.common import BadInput, one_line

__all__ = ["main"]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise BadInput(f"{message} (see {self.prog} --help)")


def make_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="gossamer", description="Dynamic sparse attention for long prompts.")
    parser.add_argument("--version", action="version", version=f"gossamer {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    parts = (
        run,
        serve,
        eval,
        eval_video,
        eval_masked,
        compare,
        calibrate,
        compress,
        report,
        inspect,
        train_gates,
        find_channels,
        convert_hybrid,
        profile,
    )
    for module in (*parts, mqar, bench, doctor, methods):
        module.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; ``argv`` without the program's name. Returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        # What their encoding lacks, such as the odd byte of a file's name, is no reason to fail.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        arguments = make_parser().parse_args(argv)
        with warnings.catch_warnings():
            # One line for a user; Python's own form names a file and quotes its source.
            warnings.showwarning = lambda message, *_args, **_more: print(f"warning: {message}", file=sys.stderr)
            return arguments.execute(arguments)
    except BadInput as error:
        print(f"gossamer: {one_line(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of a pipe is gone; keep Python from complaining about it again when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
