"""``gossamer bench``: seconds of dense attention and of methods by length, and the costs of this machine's kernel."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import torch

from gossamer.calibrate.bench import Row, Shape, bench, costs_of, kernel_cost, planning_costs
from gossamer.calibrate.candidates import METHODS, candidates
from gossamer.call import AttentionCall
from gossamer.cli import ring
from gossamer.cli.common import BadInput, add_command, first_line, print_json, table
from gossamer.cli.inputs import check_environment, read_model, text_config
from gossamer.cli.pretrained import model_folder
from gossamer.cli.specs import parse_method, split_specs
from gossamer.cli.subjects import check_device
from gossamer.evaluate.records import label_of
from gossamer.methods import Dense, Method, available, create, from_dict
from gossamer.policy import Policy
from gossamer.profiles.costs import Costs, KernelCost, default_path, forget
from gossamer.profiles.files import write_whole
from gossamer.profiles.machine import cpu_model, device_name

__all__ = ["add_parser"]

_ALL = "all"
_LENGTHS = "512,1024,2048,4096,8192"
_TRIED = 256  # tokens of the call by which it shows whether a method needs more than a call


def add_parser(commands: Any) -> None:
    parser = add_command(commands, "bench", execute, "time methods against dense attention, and fit a cost model")
    parser.add_argument(
        "model", nargs="?", type=Path, help="folder or GGUF file of a model, for its heads (only its config is read)"
    )
    parser.add_argument("--heads", type=int, help="query heads (default: 8, or the model's)")
    parser.add_argument("--groups", type=int, help="key/value heads (default: 2, or the model's)")
    parser.add_argument("--head-dim", type=int, help="default: 64, or the model's")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--lengths", help=f"default: {_LENGTHS}; with --ring {ring.LENGTHS}")
    parser.add_argument(
        "--methods",
        default="a_shape(sink=64,window=1024),vertical_slash(vertical_size=256,slash_size=512)",
        help="separated by commas; all: each with its defaults, but those made for one model (default: %(default)s)",
    )
    parser.add_argument("--picture", type=Path, metavar="FILE", help="also draw seconds and planning by length, as SVG")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument(
        "--cost-model", nargs="?", const="", metavar="FILE", help="also fit and write costs (default: the user's cache)"
    )
    ring.add_arguments(parser)


def execute(arguments: argparse.Namespace) -> int:
    check_device(arguments.device)
    check_environment(arguments.device)
    shape = _shape(arguments)
    if arguments.ring is not None:
        return ring.execute(arguments, shape, _lengths(arguments.lengths or ring.LENGTHS))
    lengths = _lengths(arguments.lengths or _LENGTHS)
    if arguments.rounds < 1:
        raise BadInput(f"--rounds must be at least 1, got {arguments.rounds}")
    path = (
        None if arguments.cost_model is None else Path(arguments.cost_model) if arguments.cost_model else default_path()
    )
    if arguments.cost_model is not None and path is None:
        raise BadInput("there is no place for a cost model: GOSSAMER_COST_MODEL=off, or no home; name a file")
    _check_picture(arguments.picture)
    if path is not None:
        _known(path)
    try:
        methods = _methods(arguments.methods, shape)
        with torch.inference_mode():
            rows = list(bench(shape, methods, lengths, rounds=arguments.rounds))
            rounds = min(3, arguments.rounds)
            kernels = [] if path is None else [kernel_cost(shape, lengths, rounds=rounds)]
            tried = [] if path is None else _search_space(arguments.methods, methods)
            costs = costs_of(shape, rows, kernels, planning_costs(shape, tried, lengths, rounds=rounds))
    except (ValueError, TypeError) as error:
        raise BadInput(first_line(error)) from error
    kept = None if path is None else _write(path, costs)
    if arguments.picture is not None:
        _draw(arguments.picture, rows, shape)
    if arguments.json:
        print_json({"rows": [row.to_dict() for row in rows], "costs": costs.to_dict(), "file": path and str(path)})
        return 0
    print(_table(rows))
    for point in costs.break_even:
        known, label = point.tokens, label_of(Policy(from_dict(dict(point.method))))
        found = f"not up to {point.longest} tokens" if known is None else f"from about {known:.0f} tokens"
        print(f"{label} is faster than dense: {found}")
    for cost in costs.kernels:
        print(
            f"{cost.kernel}: held-out error {cost.error:.0%} (median), {cost.worst:.0%} (worst); "
            f"planning of {len(costs.planning)} candidates; {_where(cost, kept)} {path}"
        )
    return 0


def _methods(specs: str, shape: Shape) -> list[Method]:
    """Those named; of ``all``, those that can plan a call by itself, and the others are named on standard error.

    Raises:
        ValueError, TypeError: an unknown name or field, a value out of range, or a method that is dense or for a model.
    """
    every = specs == _ALL
    named = map(create, available()) if every else map(parse_method, split_specs(specs))
    call, methods = shape.draw(_TRIED), []
    for method in dict.fromkeys(named):
        lacking = _lacking(method, call)
        if lacking is None:
            methods.append(method)
        elif not every:
            raise ValueError(f"{method.name} cannot be timed by itself: {lacking}; leave it out")
        elif not isinstance(method, Dense):
            print(f"note: {method.name} is left out: {lacking}", file=sys.stderr)
    return methods


def _lacking(method: Method, call: AttentionCall) -> str | None:
    """Why a method is not timed, or None."""
    if isinstance(method, Dense):
        return "it is what the others are timed beside"
    try:
        lacking = method.lacks(call)
        if lacking is None:
            method.plan(call)
    except ValueError as error:
        lacking = first_line(error)
    return lacking and f"it needs a model ({lacking})"


def _search_space(specs: str, methods: list[Method]) -> list[Method]:
    """Whose planning is measured: what `gossamer calibrate` tries, and the candidates of what is named besides."""
    names = [m.name for m in methods] if specs == _ALL else [s for s in split_specs(specs) if s in available()]
    single = [method for method in methods if not hasattr(method, "layers") and method.apart]
    return candidates([*METHODS, *(name for name in names if any(m.name == name for m in single)), *single])[1:]


def _shape(arguments: argparse.Namespace) -> Shape:
    sizes: dict[str, Any] = {"heads": 8, "groups": 2, "head_dim": 64}
    if arguments.model is not None:
        config = text_config(read_model(model_folder(arguments.model)))
        heads = config.get("num_attention_heads")
        sizes |= {"heads": heads, "groups": config.get("num_key_value_heads") or heads}
        hidden = config.get("hidden_size")
        sizes["head_dim"] = config.get("head_dim") or (
            hidden // heads if isinstance(heads, int) and isinstance(hidden, int) and heads else None
        )
    sizes |= {name: value for name in sizes if (value := getattr(arguments, name)) is not None}
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 100_000:
            raise BadInput(f"--{name.replace('_', '-')} must be an integer, 1 to 100,000, got {value!r:.60}")
    if sizes["heads"] % sizes["groups"]:
        raise BadInput(f"the {sizes['heads']} query heads must be a multiple of the {sizes['groups']} key/value heads")
    return Shape(**sizes, dtype=getattr(torch, arguments.dtype), device=arguments.device)


def _lengths(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and 1 <= len(part) < 8 and int(part) for part in parts):
        raise BadInput(f"--lengths takes numbers of tokens such as 512,4096, got {text!r:.60}")
    return sorted(set(map(int, parts)))


def _check_picture(path: Path | None) -> None:
    """Before anything is timed."""
    if path is None:
        return
    if path.suffix.lower() != ".svg":
        raise BadInput(f"--picture draws SVG; name a file that ends in .svg, got {path}")
    if not path.parent.is_dir():
        raise BadInput(f"cannot write into {path.parent}: no such folder; give another --picture")


def _draw(path: Path, rows: list[Row], shape: Shape) -> None:
    from gossamer.report.svg import svg_file
    from gossamer.report.timings import timings

    device, dtype = torch.device(shape.device), str(shape.dtype).removeprefix("torch.")
    where = cpu_model() if device.type == "cpu" else device_name(device)
    about = f"{shape.heads} heads of {shape.head_dim}, {shape.groups} of keys, {dtype}, {where}"
    try:
        write_whole(path, svg_file(timings(rows, about)))
    except OSError as error:
        raise BadInput(f"cannot write {path}: {error.strerror}") from error


def _known(path: Path) -> Costs | None:
    """The costs that a file holds already, if it is there; before anything is timed, and once more after it."""
    try:
        if path.exists():
            return Costs.load(path)
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
            raise BadInput(f"cannot write into {folder}; name another file for the cost model")
        return None
    except OSError as error:
        raise BadInput(f"cannot write {path}: {error.strerror}") from error
    except ValueError as error:  # not ours to overwrite
        raise BadInput(f"{first_line(error)}; it is left as it is, name another file") from error


def _write(path: Path, costs: Costs) -> Costs:
    """What the file holds then."""
    forget()
    old = _known(path)
    kept = costs if old is None else old.updated(costs)
    try:
        kept.save(path)
    except OSError as error:
        raise BadInput(f"cannot write {path}: {error.strerror}") from error
    return kept


def _where(cost: KernelCost, kept: Costs | None) -> str:
    """Whether a file took a fit, or kept one of longer calls."""
    found = None if kept is None else kept.kernel(cost.kernel)
    if found is None or found == cost:
        return "written to"
    return f"not written, for one up to {max(found.lengths)} tokens stands in"


def _table(rows: list[Row]) -> str:
    header = ("method", "length", "density", "plan s", "attend s", "planning", "dense s", "times as fast")
    lines = [
        (
            label_of(Policy(row.method)),
            str(row.length),
            f"{row.density:.3f}",
            f"{row.plan_s:.4f}",
            f"{row.attend_s:.4f}",
            f"{row.planning:.0%}",
            f"{row.dense_s:.4f}",
            f"{row.dense_s / max(row.seconds, 1e-12):.2f}",
        )
        for row in rows
    ]
    return table([header, *lines])
