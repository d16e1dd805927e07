"""Channels by head as files: those of Double Sparsity's authors. Read without trust."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from gossamer.profiles.files import MOST_BYTES, parse_json, read_file, shown, write_whole

__all__ = ["read_channels", "write_channels"]

_NAME = re.compile(r"model\.layers\.(\d{1,6})\.self_attn\.(q|k|qk)_proj")
# The first that a file has is taken: labels of key/value heads cost the least.
_KINDS = ("k", "qk", "q")

Channels = tuple[tuple[tuple[int, ...], ...], ...]


def read_channels(path: str | os.PathLike[str], kind: str | None = None) -> Channels:
    """Channels ``[layer][head]`` by falling weight, for `gossamer.methods.DoubleSparsity`.

    Args:
        path: JSON that has lists of channels for each head under ``model.layers.N.self_attn.k_proj`` (key/value heads),
            ``q_proj`` or ``qk_proj`` (query heads), as the authors' files have. Other keys are passed over.
        kind: ``k``, ``q`` or ``qk``; None: the first of k, qk and q that the file has.

    Raises:
        OSError: it cannot be read.
        ValueError: it is something else, or has no tables of this kind for all layers from 0 on.
    """
    if kind is not None and kind not in _KINDS:
        raise ValueError(f"kind must be one of {', '.join(_KINDS)}, got {kind!r}")
    try:
        data = parse_json(read_file(Path(path), MOST_BYTES))
    except ValueError as error:
        raise ValueError(f"{path} is {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold an object of tables by layer, got {shown(data)}")
    tables: dict[str, dict[int, object]] = {}
    for name, table in data.items():
        found = _NAME.fullmatch(name)
        if found is not None:
            tables.setdefault(found[2], {})[int(found[1])] = table
    chosen = kind or next((one for one in _KINDS if one in tables), _KINDS[0])
    layers = tables.get(chosen, {})
    missing = next((layer for layer in range(max(layers, default=0) + 1) if layer not in layers), None)
    if missing is not None:
        raise ValueError(f"{path} has no model.layers.{missing}.self_attn.{chosen}_proj")
    return tuple(_checked(layers[layer], f"{path}: layer {layer}") for layer in range(len(layers)))


def write_channels(path: str | os.PathLike[str], channels: Sequence[Sequence[Sequence[int]]], kind: str = "k") -> None:
    """Write what `read_channels` reads, to a temporary name first.

    Raises:
        OSError: it cannot be written.
    """
    data = {
        f"model.layers.{layer}.self_attn.{kind}_proj": [list(row) for row in heads]
        for layer, heads in enumerate(channels)
    }
    write_whole(Path(path), json.dumps(data) + "\n")


def _checked(heads: object, what: str) -> tuple[tuple[int, ...], ...]:
    if not isinstance(heads, list) or not heads or not all(isinstance(row, list) and row for row in heads):
        raise ValueError(f"{what} must be a list (heads) of lists of channels, got {shown(heads)}")
    for head, row in enumerate(heads):
        if not all(type(channel) is int and 0 <= channel < len(row) for channel in row) or len(set(row)) < len(row):
            raise ValueError(f"{what}, head {head}: expected each channel from 0 on once, got {shown(row)}")
    return tuple(map(tuple, heads))
