"""``gossamer bench --ring N``: what a ring of N processes would do with a plan, simulated on this machine."""

from __future__ import annotations

import argparse
import re
import sys
from typing import Any

import torch

from gossamer.calibrate.bench import Shape
from gossamer.cli.common import BadInput, first_line, print_json, table
from gossamer.cli.specs import parse_method, split_specs
from gossamer.distributed import KINDS, Layer, Layout, Machine, Selection, Simulation, planted, selection_of, simulate
from gossamer.distributed.simulate import work_of_units
from gossamer.distributed.speed import pairs_per_second
from gossamer.methods import Dense
from gossamer.plan import Extent, SparsePlan

__all__ = ["LENGTHS", "add_arguments", "execute"]

LENGTHS = "131072"
_TIMED = 4096  # tokens whose plan is timed
_PLANTED = re.compile(r"planted(?:\((.*)\))?")
_GIGABYTE = 1e9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    ring = parser.add_argument_group("a ring of processes, simulated in place of all else")
    ring.add_argument("--ring", type=int, metavar="N", help="processes that share each prompt")
    ring.add_argument(
        "--plan",
        default="planted",
        help="dense, a method of --methods' kind (which plans the whole prompt here), or planted(verticals=1000,"
        "slashes=64), a vertical-slash plan by chance (default: %(default)s)",
    )
    ring.add_argument("--layouts", help=f"of {', '.join(KINDS)} (default: those that fit)")
    ring.add_argument("--inner", type=int, help="ranks of a node, for hierarchical")
    ring.add_argument("--unit", type=int, default=128, help="positions that stay together (default: %(default)s)")
    ring.add_argument(
        "--bandwidth", type=float, default=12.5, help="GB/s from a rank to the next (default: %(default)s)"
    )
    ring.add_argument("--between-nodes", type=float, help="GB/s between nodes (default: as --bandwidth)")
    ring.add_argument("--latency", type=float, default=0.0, help="seconds a message takes besides (default: 0)")
    ring.add_argument(
        "--pairs-per-second",
        metavar="FORWARD,BACKWARD",
        help="speed of a rank's kernel (default: measured here, on a plan of 4096 tokens of the same kind)",
    )


def execute(arguments: argparse.Namespace, shape: Shape, lengths: list[int]) -> int:
    if not 1 <= arguments.ring <= 4096:
        raise BadInput(f"--ring must be 1 to 4096 processes, got {arguments.ring}")
    if not 1 <= arguments.unit <= 1 << 20:
        raise BadInput(f"--unit must be 1 to {1 << 20}, got {arguments.unit}")
    try:
        speed = _speed(arguments, shape)
        between = None if arguments.between_nodes is None else arguments.between_nodes * _GIGABYTE
        machine = Machine(*speed, arguments.bandwidth * _GIGABYTE, between, arguments.latency)
        found = [one for length in lengths for one in _simulated(arguments, shape, length, machine)]
    except (ValueError, TypeError) as error:
        raise BadInput(first_line(error)) from error
    if arguments.json:
        speeds = dict(zip(("forward", "backward"), speed, strict=True))
        print_json({"plan": arguments.plan, "pairs_per_second": speeds, "rows": [one.to_dict() for one in found]})
        return 0
    print(_table(found))
    print(
        f"one layer of {shape.heads} heads; a rank computes {speed[0]:.3g} pairs of a head a second forward and "
        f"{speed[1]:.3g} backward; imbalance is the largest over the mean work of a step"
    )
    return 0


def _speed(arguments: argparse.Namespace, shape: Shape) -> tuple[float, float]:
    if arguments.pairs_per_second is None:
        with torch.no_grad():
            return pairs_per_second(_selection(arguments, shape, _TIMED), shape.draw(_TIMED))
    parts = arguments.pairs_per_second.split(",")
    try:
        forward, backward = (float(part) for part in parts)
    except ValueError:
        raise BadInput(f"--pairs-per-second takes two numbers, such as 1e11,4e10, got {parts!r:.60}") from None
    return forward, backward


def _selection(arguments: argparse.Namespace, shape: Shape, length: int) -> Selection:
    match = _PLANTED.fullmatch(arguments.plan.strip())
    if match is not None:
        return planted(length, shape.heads, **_numbers(match[1] or ""))
    method = parse_method(arguments.plan)
    if isinstance(method, Dense):
        plan = SparsePlan.dense(shape.groups, length, length, Extent.full(1, length, length))
    else:
        call = shape.draw(length)
        lacking = method.lacks(call)
        if lacking is not None:
            raise ValueError(f"{method.name} needs {lacking}, which a simulated prompt does not have")
        plan = method.plan(call)
    return selection_of(plan, arguments.unit)


def _numbers(text: str) -> dict[str, int]:
    known, found = ("verticals", "slashes", "seed"), {}
    for part in split_specs(text) if text.strip() else []:
        name, _, value = (one.strip() for one in part.partition("="))
        if name not in known or not value.isdecimal() or len(value) > 9:
            raise ValueError(f"planted takes {', '.join(known)} as whole numbers, got {part!r:.60}")
        found[name] = int(value)
    return found


def _simulated(arguments: argparse.Namespace, shape: Shape, length: int, machine: Machine) -> list[Simulation]:
    given: dict[str, Any] = {"length": length, "ranks": arguments.ring, "unit": arguments.unit}
    if arguments.layouts is None:
        kinds = [kind for kind in KINDS if kind != "hierarchical" or arguments.inner is not None]
    else:
        kinds = [kind.strip() for kind in arguments.layouts.split(",")]
    layouts = [Layout(kind, inner=arguments.inner if kind == "hierarchical" else None, **given) for kind in kinds]
    selection = _selection(arguments, shape, length)
    if arguments.unit % selection.block:
        raise ValueError(f"--unit must be a multiple of the plan's blocks of {selection.block}, got {arguments.unit}")
    layer = Layer(shape.heads, shape.groups, shape.head_dim, torch.empty(0, dtype=shape.dtype).element_size())
    units = work_of_units(selection, arguments.unit)
    if not float(units.sum()):
        print(f"note: the plan of {length} tokens computes nothing", file=sys.stderr)
    return [simulate(selection, layout, layer, machine, units=units) for layout in layouts]


def _table(found: list[Simulation]) -> str:
    header = ("layout", "length", "ranks", "imbalance", "worst step", "MB sent", "backward", "forward s", "backward s")
    lines = [
        (
            one.layout.kind,
            str(one.layout.length),
            str(one.layout.ranks),
            f"{one.mean_imbalance:.3f}",
            f"{max(one.imbalance):.2f}",
            f"{one.sent_forward / 1e6:.1f}",
            f"{one.sent_backward / 1e6:.1f}",
            f"{one.forward_s:.4f}",
            f"{one.backward_s:.4f}",
            f"{one.efficiency:.2f}",
        )
        for one in found
    ]
    return table([(*header, "efficiency"), *lines])
