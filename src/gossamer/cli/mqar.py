"""``gossamer mqar``: which attention learns associative recall, at which width and which cost."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gossamer.cli.common import BadInput, add_command, first_line, print_json, table
from gossamer.cli.inputs import number_list
from gossamer.cli.specs import parse_variant, split_specs

if TYPE_CHECKING:
    from gossamer.evaluate.mqar.settings import Cell, Setting
    from gossamer.evaluate.mqar.sweep import RecallFile

__all__ = ["add_parser"]

_SAID = 60.0  # seconds without a line, at most, where a cell takes longer


def add_parser(commands: Any) -> None:
    parser = add_command(
        commands, "mqar", execute, "train small models to look pairs up, with one kind of attention after the other"
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--setting",
        choices=("quick", "small", "routers", "figure2"),
        default="quick",
        help="what is trained (default: %(default)s)",
    )
    which.add_argument("--quick", action="store_const", dest="setting", const="quick", help="as --setting quick")
    parser.add_argument(
        "--mixers",
        metavar="LIST",
        help="name, name(budget), or a+b for layers that differ, such as dense,window(16)+dense (default: "
        "the setting's; --list names them)",
    )
    parser.add_argument(
        "--task",
        metavar="LIST",
        help="plain, forgetting, compositional, stacked or scattered, with fields: "
        "plain(length=64,pairs=8,vocabulary=256)",
    )
    parser.add_argument("--widths", metavar="LIST", help="of the models (default: the setting's)")
    parser.add_argument("--rates", metavar="LIST", help="learning rates, the best of which counts (default: likewise)")
    parser.add_argument("--seeds", metavar="LIST", help="such as 0-2 (default: likewise)")
    parser.add_argument("--epochs", type=int, help="at most (default: likewise)")
    parser.add_argument("--examples", type=int, help="sequences of an epoch (default: likewise)")
    parser.add_argument("--mlp", type=int, help="add MLPs, of this many times the width (default: likewise, 0)")
    parser.add_argument("--threads", type=int, help="of torch (default: torch's own number)")
    parser.add_argument("--out", type=Path, default=Path("mqar.jsonl"), help="results; an existing file goes on")
    parser.add_argument("--list", action="store_true", help="print the mixers and what their budgets are, and stop")


def execute(arguments: argparse.Namespace) -> int:
    if arguments.list:
        return _print_mixers(arguments)
    from gossamer.evaluate.mqar.sweep import RecallFile, left, sweep
    from gossamer.evaluate.records import check_out

    try:
        setting = _setting(arguments)
        _set_threads(arguments.threads)
        check_out(arguments.out)
        results = RecallFile(arguments.out, setting)
        waiting = [cell.group for cell in left(setting, results)]
        say = _Progress(waiting)
        for _ in sweep(setting, results, begin=say.begin, progress=say.epoch):
            say.end()
    except (ValueError, TypeError) as error:
        raise BadInput(first_line(error)) from error
    except OSError as error:
        raise BadInput(f"cannot write {arguments.out}: {error.strerror or first_line(error)}") from error
    _print(arguments, setting, results)
    return 0


def _setting(arguments: argparse.Namespace) -> Setting:
    """The named setting with what the command line says otherwise; its name then says so.

    Raises:
        ValueError, TypeError: as `Setting`, its tasks and its mixers.
    """
    from gossamer.evaluate.mqar.mixers import parse_mixer
    from gossamer.evaluate.mqar.settings import SETTINGS

    changes: dict[str, Any] = {}
    if arguments.mixers is not None:
        changes["mixers"] = tuple(parse_mixer(spec).label for spec in split_specs(arguments.mixers))
    if arguments.task is not None:
        changes["tasks"] = tuple(parse_variant(spec) for spec in split_specs(arguments.task))
    for name in ("widths", "seeds"):
        if (given := getattr(arguments, name)) is not None:
            changes[name] = number_list(name, given, None)
    if arguments.rates is not None:
        changes["rates"] = tuple(map(_rate, split_specs(arguments.rates)))
    changes |= {n: v for n in ("epochs", "examples", "mlp") if (v := getattr(arguments, n)) is not None}
    setting = SETTINGS[arguments.setting]
    # Of the others each value is a cell of its own, and changes no other.
    other = changes.keys() & {"epochs", "examples", "mlp"}
    return replace(setting, **changes, name=f"{setting.name}, changed" if other else setting.name)


def _rate(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"--rates must be numbers such as 0.001,0.003, got {text!r}") from None


def _set_threads(threads: int | None) -> None:
    import torch

    if threads is None:
        return
    if not 1 <= threads <= 4096:
        raise ValueError(f"--threads must be 1 to 4096, got {threads}")
    torch.set_num_threads(threads)


class _Progress:
    """A line for each cell on standard error, and one a minute within a long one."""

    def __init__(self, groups: list[Any]) -> None:
        self._cells, self._done = len(groups), 0
        self._begun = self._said = time.monotonic()
        self._what, self._last = "", ""

    def begin(self, cell: Cell) -> None:
        self._what = str(cell)

    def epoch(self, epoch: int, epochs: int, outcome: Any) -> None:
        self._last = f"accuracy {outcome.accuracy:.3f} after {epoch} of {epochs} epochs"
        if time.monotonic() - self._said >= _SAID:
            self._say(f"{self._what}: {self._last}")

    def end(self) -> None:
        self._done += 1
        spent = time.monotonic() - self._begun
        self._say(f"{self._done} of at most {self._cells}: {self._what}: {self._last}; {spent:.0f} s so far")

    def _say(self, line: str) -> None:
        self._said = time.monotonic()
        print(line, file=sys.stderr, flush=True)


def _print_mixers(arguments: argparse.Namespace) -> int:
    from gossamer.evaluate.mqar.mixers import MIXERS

    rows = [(name, kind.budget, kind.leaks) for name, kind in MIXERS.items()]
    if arguments.json:
        print_json({"mixers": [dict(zip(("name", "budget", "leaks"), row, strict=True)) for row in rows]})
        return 0
    for name, budget, leaks in rows:
        print(f"{name}{f'(budget): {budget}' if budget else ''}{f'; leaks: {leaks}' if leaks else ''}")
    return 0


def _print(arguments: argparse.Namespace, setting: Setting, results: RecallFile) -> None:
    from gossamer.evaluate.mqar.summary import recall_rows, recall_table

    rows = recall_rows(results.records)
    if arguments.json:
        print_json({"out": str(arguments.out), "rows": [row.to_dict() for row in rows]})
        return
    print(table(recall_table(rows)))
    print(f"\n{setting.about}\n{arguments.out}; for pictures: gossamer report {arguments.out}", file=sys.stderr)
