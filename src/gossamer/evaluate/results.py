"""The results file: lines that are only ever appended, after one that says how they were made."""

from __future__ import annotations

import datetime
import json
import os
import platform
import uuid
from pathlib import Path
from typing import Any

import torch
import transformers

from gossamer import __version__
from gossamer.backends import cpu
from gossamer.evaluate.records import cell_of, read_own
from gossamer.evaluate.schema import FORMAT, KINDS
from gossamer.evaluate.subject import Subject

__all__ = ["ResultsFile", "machine_of", "make_header"]

Record = dict[str, Any]


class ResultsFile:
    """A JSONL file that is only ever appended to, one line at a time.

    Raises:
        ValueError: the file is of another model, haystack or seed, or is no results file.
    """

    def __init__(self, path: Path, header: Record) -> None:
        self.path = path
        self.header = header
        self.records: list[Record] = []
        self.headers: list[Record] = []
        if path.exists():
            self._read()
        self.done = {cell_of(record) for record in self.records}
        self._file: int | None = None

    def _read(self) -> None:
        records, whole = read_own(self.path)
        for record in records:
            if record["kind"] == "run":
                self._check(record)
                self.headers.append(record)
            elif record["kind"] in KINDS:
                self.records.append(record)
        if whole < self.path.stat().st_size:
            # A run was cut off within a line.
            with self.path.open("r+b") as file:
                file.truncate(whole)

    def _check(self, record: Record) -> None:
        for name, mine, theirs in (
            ("format", self.header["format"], record.get("format")),
            ("model", self.header["model"]["fingerprint"], record.get("model", {}).get("fingerprint")),
            ("haystack", self.header["haystack"]["sha256"], record.get("haystack", {}).get("sha256")),
            ("seed", self.header["seed"], record.get("seed")),
            ("setting of --chat", self.header.get("chat", False), record.get("chat", False)),
        ):
            if mine != theirs:
                raise ValueError(
                    f"{self.path} holds results of another {name} ({theirs}, now {mine}); choose another --out"
                )

    def has(self, record: Record) -> bool:
        return cell_of(record) in self.done

    def append(self, record: Record) -> Record:
        """Write one line; the circumstances go before the first, and without a line there is no file."""
        lines = []
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            lines = [self.header]
        record = {"kind": record["kind"], "run": self.header["run"]} | record
        data = "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in [*lines, record])
        encoded = data.encode()
        if os.write(self._file, encoded) != len(encoded):
            raise OSError(f"could not write a whole line to {self.path}: is the disk full?")
        os.fsync(self._file)
        self.records.append(record)
        self.done.add(cell_of(record))
        return record

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)

    def __enter__(self) -> ResultsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def make_header(subject: Subject, job: Any) -> Record:
    """The ``run`` line of a `Job`."""
    return {
        "kind": "run",
        "format": FORMAT,
        "run": uuid.uuid4().hex[:8],
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model": subject.to_dict(),
        "machine": machine_of(subject.device),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "gossamer": __version__,
        },
        "haystack": job.haystack.to_dict(),
        "seed": job.seed,
        "chat": subject.chat,
    }


def machine_of(device: torch.device) -> Record:
    if device.type == "cuda":
        return {"processor": torch.cuda.get_device_name(device)}
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    dtypes = (torch.float32, torch.bfloat16) if cpu.is_available() else ()
    isas = {str(dtype).removeprefix("torch."): cpu.active_isa(dtype) for dtype in dtypes}
    return {"processor": name, "threads": torch.get_num_threads(), "kernels": isas or None}
