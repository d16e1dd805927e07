"""All cells of a setting, one after the other, into one file of results that is whole at any moment.

The file is one of ``gossamer eval``'s kind (``results-format``): a line ``run`` for each time that a sweep was started,
with machine, versions and setting, and a line ``mqar`` for each cell that is done. It is written under a temporary name
and then takes its place, as does the file beside it, ``<name>.partial``, with which the cell that was stopped goes on.
"""

from __future__ import annotations

import datetime
import json
import platform
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from gossamer import __version__
from gossamer.evaluate.mqar.settings import Cell, Setting, describe
from gossamer.evaluate.mqar.training import Outcome, train
from gossamer.evaluate.records import read_own
from gossamer.evaluate.schema import FORMAT
from gossamer.profiles.files import write_whole
from gossamer.profiles.machine import cpu_model

__all__ = ["RecallFile", "left", "sweep"]

Record = dict[str, Any]


class RecallFile:
    """The results so far, and the file that they stand in.

    Raises:
        ValueError: the file is there and holds something else than results.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path, setting: Setting) -> None:
        self.path = path
        self.header = header_of(setting)
        self.partial = path.with_name(path.name + ".partial")
        self._text, self.records = "", list[Record]()
        self._headed = False
        if path.exists():
            records, whole = read_own(path)
            self.records = [record for record in records if record["kind"] == "mqar"]
            self._text = path.read_bytes()[:whole].decode()

    def of(self, cell: Cell, setting: Setting) -> Record | None:
        """The cell's line, of the same training."""
        wanted = line_of(cell, setting)
        return next((record for record in self.records if wanted.items() <= record.items()), None)

    def append(self, record: Record) -> Record:
        """Write the file anew with one more line, and before the first the line of this run."""
        lines = [] if self._headed else [self.header]
        record = {"kind": "mqar", "run": self.header["run"]} | record
        text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in [*lines, record])
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, self._text + text)
        self._text, self._headed = self._text + text, True
        self.records.append(record)
        return record


def header_of(setting: Setting) -> Record:
    return {
        "kind": "run",
        "format": FORMAT,
        "run": uuid.uuid4().hex[:8],
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {"processor": cpu_model(), "threads": torch.get_num_threads()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "gossamer": __version__},
        "mqar": json.loads(json.dumps(describe(setting))),
    }


def line_of(cell: Cell, setting: Setting) -> Record:
    """What a line is the result of."""
    return json.loads(json.dumps(cell.to_dict() | {"setting": setting.name, "training": setting.training()}))


def left(setting: Setting, results: RecallFile) -> Iterator[Cell]:
    """Cells that are to be trained still, found as they are asked for: a rate may make those after it needless."""
    for cell in setting.cells():
        if results.of(cell, setting) is None and not _needless(cell, setting, results):
            yield cell


def _needless(cell: Cell, setting: Setting, results: RecallFile) -> bool:
    if not setting.first_enough:
        return False
    before = setting.rates[: setting.rates.index(cell.rate)]
    found = (results.of(Cell(cell.mixer, cell.task, cell.width, rate, cell.seed), setting) for rate in before)
    return any(record is not None and record["accuracy"] >= setting.enough for record in found)


def sweep(
    setting: Setting,
    results: RecallFile,
    *,
    begin: Callable[[Cell], None] = lambda cell: None,
    progress: Callable[[int, int, Outcome], None] = lambda epoch, epochs, outcome: None,
) -> Iterator[Record]:
    """Train what is left, and give each line once it stands in the file.

    Args:
        begin: called before each cell.
        progress: as `train` has it.

    Raises:
        ValueError: the file of a stopped training is none; OSError: a file cannot be written.
    """
    for cell in left(setting, results):
        begin(cell)
        found = train(cell, setting, kept=results.partial, progress=progress)
        yield results.append(line_of(cell, setting) | found)
        results.partial.unlink(missing_ok=True)
