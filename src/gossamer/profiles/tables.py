"""Numbers by layer and head as files: those of DuoAttention's and MoA's authors, and plain JSON. Read without trust."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gossamer.methods import DuoAttention, MoA
from gossamer.profiles.files import MOST_BYTES, parse_json, read_file, shown, write_whole

__all__ = ["GATES", "MOST_HEADS", "read_duo", "read_moa", "read_table", "write_duo", "write_moa"]

GATES = "full_attention_heads.tsv"
_CONFIG = "config.json"
_MOST_LAYERS = MOST_HEADS = 100_000  # more than any model has

Rows = tuple[tuple[float, ...], ...]


def read_table(path: str | os.PathLike[str], field: str) -> Rows:
    """The numbers ``[layer][head]`` of a file, for a method's field of that name.

    Args:
        path: a JSON file of lists of numbers, or of an object that has such lists under the name of the field (as MoA's
            ``alphas`` and ``betas``); or tab-separated numbers, a layer a line, or the folder of such a file (as
            DuoAttention's).

    Raises:
        OSError: it cannot be read.
        ValueError: it is something else, or more than 64 MiB; the message says where.
    """
    path = Path(path)
    if path.is_dir():
        path = path / GATES
    content = read_file(path, MOST_BYTES)
    if content.lstrip()[:1] not in (b"[", b"{"):
        return _separated(content, path)
    data = _json(content, path)
    if isinstance(data, dict):
        if field not in data:
            raise ValueError(f"{path} has no {field}; it has {', '.join(map(shown, list(data)[:5])) or 'nothing'}")
        data = data[field]
    return _checked(data, f"{path}: {field}")


def read_duo(folder: str | os.PathLike[str], **fields: Any) -> DuoAttention:
    """DuoAttention from a folder as its authors publish them: ``full_attention_heads.tsv`` and ``config.json``.

    Gates are brought into [0, 1]. The config's ``sink_size`` and ``recent_size`` are those of the training; where
    ``sink`` and ``recent`` are not given in ``fields``, they are taken.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is something else; or a field that `DuoAttention` does not know or take.
    """
    folder = Path(folder)
    gates = tuple(tuple(min(max(gate, 0.0), 1.0) for gate in layer) for layer in read_table(folder / GATES, "gates"))
    config = _json(read_file(folder / _CONFIG, MOST_BYTES), folder / _CONFIG)
    sizes: dict[str, Any] = {"gates": gates}
    for field, name in (("sink", "sink_size"), ("recent", "recent_size")):
        size = config.get(name) if isinstance(config, dict) else None
        if not isinstance(size, int) or isinstance(size, bool):
            raise ValueError(f"{folder / _CONFIG}: {name} must be an integer, got {shown(size)}")
        sizes[field] = size
    try:
        return DuoAttention(**sizes | fields)
    except TypeError as error:
        raise ValueError(f"{folder}: {error}") from error


def write_duo(folder: str | os.PathLike[str], gates: Sequence[Sequence[float]], *, sink: int, recent: int) -> None:
    """Write what `read_duo` reads; each file to a temporary name first. The folder is made if there is none.

    Raises:
        OSError: it cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / GATES, "".join("\t".join(repr(float(gate)) for gate in layer) + "\n" for layer in gates))
    write_json(folder / _CONFIG, {"sink_size": sink, "recent_size": recent})


def read_moa(path: str | os.PathLike[str], **fields: Any) -> MoA:
    """MoA from a file as its authors publish them: JSON with ``alphas`` and ``betas``, ``[layer][query head]``.

    Other keys, such as the order of heads in their caches, are passed over.

    Raises:
        OSError: it cannot be read.
        ValueError: it is something else; or a field that `MoA` does not know or take.
    """
    tables: dict[str, Any] = {name: read_table(path, name) for name in ("alphas", "betas")}
    try:
        return MoA(**tables | fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def write_moa(path: str | os.PathLike[str], method: MoA) -> None:
    """Write the spans of a method as `read_moa` reads them, to a temporary name first.

    Raises:
        OSError: it cannot be written.
    """
    write_json(Path(path), {"alphas": method.alphas, "betas": method.betas})


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    write_whole(path, json.dumps(data, indent=1, allow_nan=False) + "\n")


def _json(content: bytes, path: Path) -> Any:
    try:
        return parse_json(content)
    except ValueError as error:
        raise ValueError(f"{path} is {error}") from None


def _separated(content: bytes, path: Path) -> Rows:
    try:
        lines = content.decode("ascii").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no table of numbers: it is not ASCII text") from None
    rows: list[list[float]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            rows.append([float(cell) for cell in line.split("\t")])
        except ValueError:
            raise ValueError(f"{path}, line {number}: expected numbers between tabs, got {shown(line)}") from None
    return _checked(rows, str(path))


def _checked(data: Any, what: str) -> Rows:
    if not isinstance(data, list) or not data or not all(isinstance(row, list) and row for row in data):
        raise ValueError(f"{what} must be a list (layers) of lists (heads) of numbers, got {shown(data)}")
    if len({len(row) for row in data}) > 1:
        raise ValueError(f"{what} must have the same number of heads in each layer, got {len(data[0])} first")
    if len(data) > _MOST_LAYERS or len(data[0]) > MOST_HEADS:
        raise ValueError(f"{what} has {len(data)} layers of {len(data[0])} heads: more than any model")
    for layer, row in enumerate(data):
        for head, number in enumerate(row):
            if not isinstance(number, (int, float)) or isinstance(number, bool) or not math.isfinite(number):
                raise ValueError(f"{what}, layer {layer}, head {head}: expected a finite number, got {shown(number)}")
    return tuple(tuple(float(number) for number in row) for row in data)
