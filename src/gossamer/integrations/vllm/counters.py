"""What the layers of a server did: counted in its workers, told in its log and on ``/metrics``."""

from __future__ import annotations

import atexit
import itertools
import json
import multiprocessing
import os
import secrets
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

from gossamer.attention import CallRecord
from gossamer.profiles.files import MOST_BYTES, parse_json, read_file, write_whole

__all__ = ["FOLDER", "Counters", "announce", "collected"]

FOLDER = "GOSSAMER_VLLM_METRICS"
"""Variable that names the folder into which workers write their counters, a file a process."""
SECONDS_BETWEEN_FILES = 1.0

Key = tuple[str, tuple[tuple[str, str], ...]]
# Metric: what it counts.
METRICS = {
    "gossamer_rows": "Rows of attention calls, by layer, method and path: a plan (sparse), our kernel over all pairs "
    "(dense), or vLLM's own kernel (stock).",
    "gossamer_dense_rows": "Rows that ran no plan, by reason.",
    "gossamer_planning_seconds": "Time spent on plans, by layer and method.",
    "gossamer_attention_seconds": "Time spent on attention with or without a plan, vLLM's own kernel not counted.",
    "gossamer_pairs": "Pairs of query and key that dense attention would compute for the rows on our kernel.",
    "gossamer_computed_pairs": "Pairs of query and key that were computed for them.",
}


_numbers = itertools.count()
_announced: set[int] = set()  # processes: a fork has what its parent's set has


def _key(metric: str, labels: dict[str, str]) -> Key:
    return metric, tuple(sorted(labels.items()))


class Counters:
    """The counters of one process. Threads may share it."""

    def __init__(self, rank: int = 0) -> None:
        self._rank = str(rank)
        self._values: dict[Key, float] = {}
        self._stock_keys: dict[int | None, dict[str, tuple[Key, Key]]] = {}
        self._lock = threading.Lock()
        self._changed = threading.Event()
        self._writer: threading.Thread | None = None
        self._told: dict[Key, float] = {}

    def add(self, record: CallRecord, method: str, pairs: float, rows: int = 1) -> None:
        """Rows that ran here, and the pairs of query and key that dense attention computes for them."""
        layer = "-" if record.layer is None else str(record.layer)
        where = {"layer": layer, "method": method}
        with self._lock:
            self._add("gossamer_rows", rows, path=record.path, **where)
            if record.reason is not None:
                self._add("gossamer_dense_rows", rows, layer=layer, reason=record.reason)
            self._add("gossamer_planning_seconds", record.plan_seconds, **where)
            self._add("gossamer_attention_seconds", record.attention_seconds, **where)
            self._add("gossamer_pairs", pairs, **where)
            self._add("gossamer_computed_pairs", pairs * record.density, **where)
        self._changed.set()

    def add_stock(self, layer: int | None, reasons: Iterable[tuple[str, int]]) -> None:
        """Rows that ran on vLLM's own kernel, and why."""
        known = self._stock_keys.setdefault(layer, {})
        with self._lock:
            for reason, rows in reasons:
                keys = known.get(reason)
                if keys is None:  # each layer of each step comes here
                    name = "-" if layer is None else str(layer)
                    labels = {"layer": name, "rank": self._rank}
                    keys = known[reason] = (
                        _key("gossamer_rows", labels | {"method": "stock", "path": "stock"}),
                        _key("gossamer_dense_rows", labels | {"reason": reason}),
                    )
                for key in keys:
                    self._values[key] = self._values.get(key, 0.0) + rows
        if not self._changed.is_set():
            self._changed.set()

    def _add(self, metric: str, value: float, **labels: str) -> None:
        key = _key(metric, labels | {"rank": self._rank})
        self._values[key] = self._values.get(key, 0.0) + value

    def rows(self) -> list[tuple[str, dict[str, str], float]]:
        """``(metric, labels, value)`` of all."""
        with self._lock:
            return [(metric, dict(labels), value) for (metric, labels), value in self._values.items()]

    def news(self) -> str | None:
        """One line of what was done since the last call, over all layers; None if nothing ran here."""
        with self._lock:
            values = dict(self._values)
        since = {key: value - self._told.get(key, 0.0) for key, value in values.items()}
        self._told = values
        ours: dict[str, dict[str, float]] = {}
        for (metric, labels), value in since.items():
            method = dict(labels).get("method")
            if method is not None and method != "stock" and value:
                name = metric if metric != "gossamer_rows" else dict(labels)["path"]
                of_method = ours.setdefault(method, {})
                of_method[name] = of_method.get(name, 0.0) + value
        if not ours:
            return None
        parts = [_told(method, found) for method, found in ours.items()]
        reasons: dict[str, float] = {}
        for (metric, labels), value in since.items():
            if metric == "gossamer_dense_rows" and value:
                reason = dict(labels)["reason"]
                reasons[reason] = reasons.get(reason, 0.0) + value
        why = ", ".join(f"{reason} x{count:.0f}" for reason, count in sorted(reasons.items()))
        return "; ".join(parts) + (f"; no plan: {why}" if why else "") + " (rows times layers)"

    def write_in(self, folder: Path) -> None:
        """Have a thread keep a file of this process's in the folder up to date. A second call does nothing."""
        if self._writer is not None:
            return
        path = folder / f"{os.getpid()}-{next(_numbers)}.json"

        def write() -> None:
            self._changed.wait()
            try:
                folder.mkdir(mode=0o700, exist_ok=True)
                while True:
                    self._changed.clear()
                    write_whole(path, json.dumps(self.rows()))
                    threading.Event().wait(SECONDS_BETWEEN_FILES)
                    self._changed.wait()
            except OSError:  # the server's front has ended and taken the folder along
                return

        self._writer = threading.Thread(target=write, name="gossamer-metrics", daemon=True)
        self._writer.start()


def _told(method: str, found: dict[str, float]) -> str:
    density = found.get("gossamer_computed_pairs", 0.0) / max(found.get("gossamer_pairs", 0.0), 1.0)
    counts = ", ".join(f"{found[path]:.0f} {path}" for path in ("sparse", "dense") if path in found)
    planning = found.get("gossamer_planning_seconds", 0.0)
    return (
        f"{method}: {counts}, density {density:.3f}, planning {planning:.2f} s, "
        f"attention {found.get('gossamer_attention_seconds', 0.0):.2f} s"
    )


def announce() -> None:
    """Name a folder for the workers of this server, unless its front did; nothing is made until one writes.

    Workers are children of the front by `multiprocessing`. Any other child of a process with the plug-in is a server of
    its own, which has the parent's environment and must not write into the parent's folder.
    """
    if FOLDER in os.environ and (multiprocessing.parent_process() is not None or os.getpid() in _announced):
        return
    _announced.add(os.getpid())
    folder = Path(tempfile.gettempdir()) / f"gossamer-vllm-{os.getpid()}-{secrets.token_hex(4)}"
    os.environ[FOLDER] = str(folder)
    owner = os.getpid()

    def remove() -> None:
        if os.getpid() == owner:
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)


def collected(folder: Path) -> Iterator[tuple[str, dict[str, str], float]]:
    """The counters of all workers, added up."""
    total: dict[Key, float] = {}
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        for key, value in _read(path):
            total[key] = total.get(key, 0.0) + value
    for (metric, labels), value in total.items():
        yield metric, dict(labels), value


def _read(path: Path) -> list[tuple[Key, float]]:
    """The counters of a file; none where it is no such file."""
    try:
        return [
            ((str(metric), tuple(sorted((str(name), str(label)) for name, label in labels.items()))), float(value))
            for metric, labels, value in parse_json(read_file(path, MOST_BYTES))
        ]
    except (OSError, ValueError, TypeError, AttributeError):
        return []
