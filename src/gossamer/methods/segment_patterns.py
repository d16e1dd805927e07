"""What a pattern keeps for the queries of one modality, found from the last of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.call import AttentionCall
from gossamer.methods.a_shape import AShape
from gossamer.methods.base import Method
from gossamer.methods.grid_lines import GridLines, Lines
from gossamer.methods.probed_rows import by_distance, probed_rows
from gossamer.methods.vertical_slash import FORCED_BANDS, FORCED_COLUMNS, VerticalSlash, at_least, band_mass
from gossamer.plan import ceil_div
from gossamer.rules import top_k

__all__ = ["BLOCK", "Chosen", "choose"]

BLOCK = 64


@dataclass(frozen=True, eq=False)
class Chosen:
    """What queries of one group compute of some keys, for each of H heads.

    Fields:
        columns: single keys, bool ``[H, keys]``.
        bands: block diagonals by distance in blocks of positions, bool ``[H, bands]``; None: none.
        lines: a grid, and ``slash`` and ``hline``, which of its lines are kept beside the columns; None: none.
    """

    columns: Tensor
    bands: Tensor | None = None
    lines: Lines | None = None
    slash: bool = False
    hline: bool = False


def choose(call: AttentionCall, row: int, pattern: Method, queries: Tensor, keys: Tensor) -> Chosen:
    """Choose for the ``queries`` of a batch row among the ``keys``: bool, by position, on the CPU.

    Raises:
        TypeError: a pattern of another kind than `AShape`, `VerticalSlash` or `GridLines`.
    """
    if isinstance(pattern, AShape):
        first = keys & (keys.cumsum(0) <= pattern.sink)
        bands = torch.arange(len(keys) // BLOCK + 2, device=call.device) <= ceil_div(pattern.window - 1, BLOCK)
        first, bands = (x.to(call.device).expand(call.heads, -1) for x in (first, bands))
        return Chosen(first, bands)
    if not isinstance(pattern, VerticalSlash | GridLines):
        raise TypeError(f"a pattern must be a_shape, vertical_slash or grid, got {pattern.name}")
    (positions,) = queries[: int(call.extent.query_count[row])].nonzero(as_tuple=True)
    positions = positions[-pattern.last :]
    if isinstance(pattern, VerticalSlash):
        return _vertical_slash(call, row, pattern, positions, keys)
    lines = pattern.lines(call, row, positions, keys)
    columns = torch.zeros(call.heads, len(keys), dtype=torch.bool, device=call.device)
    if pattern.vline:
        columns = _of_class(lines.column, lines.stride, len(keys)) & keys.to(call.device)
    return Chosen(columns, lines=lines, slash=pattern.slash, hline=pattern.hline)


def _of_class(phase: Tensor, stride: Tensor, count: int) -> Tensor:
    return (torch.arange(count, device=phase.device) - phase[:, None]) % stride[:, None] == 0


def _vertical_slash(call: AttentionCall, row: int, pattern: VerticalSlash, positions: Tensor, keys: Tensor) -> Chosen:
    ours = keys.to(call.device)
    columns, distances = [], []
    for _, weights in probed_rows(call, row, positions):
        columns.append(weights.sum(dim=1))
        distances.append(by_distance(weights * ours, positions))
    first = (keys & (keys.cumsum(0) <= FORCED_COLUMNS)).to(call.device)
    mass = torch.cat(columns).masked_fill(first, float("inf")).masked_fill(~ours, float("-inf"))
    bands = band_mass(torch.cat(distances)[None])[0]
    return Chosen(
        top_k(mass, at_least(pattern.vertical_size, FORCED_COLUMNS)),
        top_k(bands, at_least(pattern.slash_size, FORCED_BANDS * BLOCK, BLOCK)),
    )
