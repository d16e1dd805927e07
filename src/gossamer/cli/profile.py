"""``gossamer profile``: what a profile holds, how two differ, and files of other projects as profiles."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from gossamer.cli.common import BadInput, add_command, first_line, one_line, print_json, table
from gossamer.cli.specs import parse_method
from gossamer.evaluate.records import label_of
from gossamer.methods import Dense, Method
from gossamer.policy import Policy
from gossamer.profiles import Profile
from gossamer.profiles.files import write_whole
from gossamer.profiles.imports import FORMATS, import_profile

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("profile", help="show, compare and convert profiles of methods per head")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    show = add_command(actions, "show", _show, "say what a profile holds")
    show.add_argument("file", type=Path)
    diff = add_command(actions, "diff", _diff, "say which heads differ between two profiles")
    diff.add_argument("file", type=Path)
    diff.add_argument("other", type=Path)
    convert = add_command(actions, "convert", _convert, "read a file of another project, or write MInference's")
    convert.add_argument("file", type=Path)
    convert.add_argument("-o", "--out", type=Path, required=True)
    convert.add_argument("--to", choices=("profile", "minference"), default="profile")
    convert.add_argument("--decode", metavar="METHOD", help="what decode steps read, into the profile; none for all")
    for action in (show, diff, convert):
        action.add_argument("--from", dest="form", choices=FORMATS, help="default: as the file shows")
        action.add_argument("--heads", type=int, help="query heads, for DuoAttention's gates of key/value heads")
        action.add_argument("--sparsity", type=float, default=0.5, help="of DuoAttention (default: %(default)s)")
        action.add_argument("--length", type=int, help="of prompts, for MoA's spans")


def _read(path: Path, arguments: argparse.Namespace) -> Profile:
    if not 0 <= arguments.sparsity <= 1:
        raise BadInput(f"--sparsity must lie in [0, 1], got {arguments.sparsity}")
    if arguments.heads is not None and arguments.heads < 1:
        raise BadInput(f"--heads must be at least 1, got {arguments.heads}")
    given = {"heads": arguments.heads, "sparsity": arguments.sparsity, "length": arguments.length}
    try:
        return import_profile(path, arguments.form, **given)
    except OSError as error:
        raise BadInput(f"cannot read {error.filename or path}: {error.strerror}") from error
    except (ValueError, TypeError) as error:
        message = first_line(error)
        raise BadInput(message if str(path) in message else f"{path}: {message}") from error


def _label(method: Method) -> str:
    return one_line(label_of(Policy(method)))


def _label_of_steps(profile: Profile) -> str:
    """What decode steps read: all of the cache, or what a method chooses."""
    return (
        "all"
        if profile.decode is None
        else one_line(label_of(Policy(Dense(), decode=profile.decode)).partition("+")[2])
    )


def _show(arguments: argparse.Namespace) -> int:
    profile = _read(arguments.file, arguments)
    if arguments.json:
        print_json(profile.to_dict())
        return 0
    print(f"{len(profile.layers)} layers of {profile.heads} heads")
    for name, value in profile.to_dict()["provenance"].items():
        if value:
            print(one_line(f"{name}: {', '.join(map(str, value)) if isinstance(value, list) else value}"))
    for name in ("scores", "errors", "costs"):
        numbers = [number for row in getattr(profile, name) or () for number in row if number is not None]
        if numbers:
            print(f"{name}: mean {fmean(numbers):.4g}, from {min(numbers):.4g} to {max(numbers):.4g}")
    if profile.decode is not None:
        print(f"decode: {_label_of_steps(profile)}")
    counts = Counter(_label(method) for layer in profile.layers for method in layer)
    print(table([("method", "heads"), *((label, str(count)) for label, count in counts.most_common())]))
    return 0


def _diff(arguments: argparse.Namespace) -> int:
    """The exit code is 1 if they differ."""
    one, other = (_read(path, arguments) for path in (arguments.file, arguments.other))
    if (len(one.layers), one.heads) != (len(other.layers), other.heads):
        shapes = " and ".join(f"{len(p.layers)} layers of {p.heads} heads" for p in (one, other))
        raise BadInput(f"the profiles are for different models: {shapes}")
    found = [
        {"layer": i, "head": j, "one": one.layers[i][j].to_dict(), "other": other.layers[i][j].to_dict()}
        for i in range(len(one.layers))
        for j in range(one.heads)
        if one.layers[i][j] != other.layers[i][j]
    ]
    steps = [_label_of_steps(profile) for profile in (one, other)]
    differ = bool(found) or one.decode != other.decode
    if arguments.json:
        print_json({"heads": len(one.layers) * one.heads, "differing": found, "decode": steps})
        return int(differ)
    print(f"{len(found)} of {len(one.layers) * one.heads} heads differ")
    if one.decode != other.decode:
        print(f"decode: {steps[0]} and {steps[1]}")
    if found:
        pairs = [(d["layer"], d["head"]) for d in found]
        rows = [(f"{i}:{j}", _label(one.layers[i][j]), _label(other.layers[i][j])) for i, j in pairs]
        print(table([("layer:head", "one", "other"), *rows]))
    return int(differ)


def _check_place(path: Path) -> None:
    """Refuse to write over what is neither a profile nor a list of MInference's."""
    try:
        if not path.exists() or (path.is_file() and not path.stat().st_size):
            return
        Profile.load(path)
    except (OSError, ValueError, TypeError) as error:
        raise BadInput(f"{path} exists and is no profile: it would be lost; give another --out") from error


def _convert(arguments: argparse.Namespace) -> int:
    profile = _read(arguments.file, arguments)
    _check_place(arguments.out)
    try:
        if arguments.decode is not None:
            steps = None if arguments.decode == "none" else parse_method(arguments.decode)
            profile = replace(profile, decode=steps)
        data = profile.to_minference() if arguments.to == "minference" else profile.to_dict()
    except ValueError as error:
        raise BadInput(f"{arguments.file}: {first_line(error)}") from error
    try:
        write_whole(arguments.out, json.dumps(data, indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise BadInput(f"cannot write {arguments.out}: {error.strerror or first_line(error)}") from error
    except ValueError as error:
        raise BadInput(f"cannot write {arguments.out}: {first_line(error)}") from error
    if arguments.json:
        print_json({"out": str(arguments.out), "layers": len(profile.layers), "heads": profile.heads})
    return 0
