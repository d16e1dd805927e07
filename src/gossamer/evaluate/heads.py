"""What the heads of a model do under dense attention, from the exact masses of their queries and keys.

The patterns are those of MInference (2407.02490, section 2) and StreamingLLM (2309.17453): first tokens (sink), a
window (local), some keys for all queries (vertical), some distances for all queries (slash), blocks. Each may choose
as many pairs as a local window of a thirty-second of the prompt computes, and is judged by the attention mass that
it then explains; so the numbers compare.
"""

from __future__ import annotations

import base64
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gossamer.call import AttentionCall
from gossamer.evaluate._attention_map import attention_map, chosen_heads, one_row
from gossamer.integrations.transformers import Observation, enable
from gossamer.oracle import ExactMasses, exact_masses, visible_pairs
from gossamer.plan import Extent, Grid

__all__ = ["PATTERNS", "HeadReport", "attention_map", "describe_heads", "heads_record", "inspect_model"]

# From the simplest: a name goes to the first that explains nearly what the best one does. Columns can take the sink
# tokens, diagonals the window, and blocks a little of everything; the order undoes that advantage.
PATTERNS = ("sink", "local", "vertical", "slash", "block")
NEARLY = 0.75
DIFFUSE_BELOW = 0.5
BLOCK = 64
SINK = 64
_WINDOW_SHARE, _LEAST_WINDOW, _MOST_WINDOW = 32, 64, 1024
_COVERED = 0.9
_LEAST_SAMPLE = 4  # blocks of queries


@dataclass(frozen=True, slots=True)
class HeadReport:
    """What one head does with one prompt. Masses are shares of the head's attention mass on keys, 0 to 1.

    Fields:
        layer, head: the model's indices.
        pattern: one of `PATTERNS`, or ``diffuse`` where none explains `DIFFUSE_BELOW` of the mass.
        mass: what each of `PATTERNS` explains with ``budget``.
        budget: share of the allowed pairs that each pattern may choose.
        sink_tokens, local_tokens: first tokens that ``sink`` stands for, and latest ones that ``local`` does.
        first_token, first_tokens: mass of the first token, and of the first 64.
        window: the least number of latest tokens that hold 90% of the mass.
        sink_logit: share of the softmax that a learned sink takes from the keys; 0 without one.
        columns: heaviest keys, as position and mass. diagonals: heaviest distances, as distance and mass.
        blocks: heaviest blocks of 64 beyond the first block and the local window, as query block, key block, mass. They
            count from the row's first live key.
        map: uint8 ``[n, n]`` from `attention_map`, where it was asked for.
    """

    layer: int | None
    head: int
    pattern: str
    mass: dict[str, float]
    budget: float
    sink_tokens: int
    local_tokens: int
    first_token: float
    first_tokens: float
    window: int
    sink_logit: float
    columns: tuple[tuple[int, float], ...]
    diagonals: tuple[tuple[int, float], ...]
    blocks: tuple[tuple[int, int, float], ...]
    map: Tensor | None = field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """One head of a ``heads`` record, without the map. Lists of pairs become lists of objects."""
        return {
            "layer": self.layer,
            "head": self.head,
            "pattern": self.pattern,
            "mass": dict(self.mass),
            "budget": self.budget,
            "sink_tokens": self.sink_tokens,
            "local_tokens": self.local_tokens,
            "first_token": self.first_token,
            "first_tokens": self.first_tokens,
            "window": self.window,
            "sink_logit": self.sink_logit,
            "columns": [{"position": position, "mass": mass} for position, mass in self.columns],
            "diagonals": [{"distance": distance, "mass": mass} for distance, mass in self.diagonals],
            "blocks": [{"query_block": m, "key_block": n, "mass": mass} for m, n, mass in self.blocks],
        }


def heads_record(reports: Sequence[HeadReport], **fields: Any) -> dict[str, Any]:
    """A record of kind ``heads`` of the results format, with the maps that the reports have.

    ``fields`` go in front: ``run``, ``task``, ``length``, ``index``; and ``model``, an object with ``name`` and
    ``fingerprint``, by which a report tells whose heads these are.
    """
    maps = [
        {
            "layer": report.layer,
            "head": report.head,
            "size": report.map.shape[0],
            "data": base64.b64encode(report.map.cpu().numpy().tobytes()).decode("ascii"),
        }
        for report in reports
        if report.map is not None
    ]
    return {"kind": "heads", **fields, "heads": [report.to_dict() for report in reports], "maps": maps}


def describe_heads(
    call: AttentionCall,
    *,
    row: int = 0,
    rows: int | None = None,
    top: int = 5,
    heads: Collection[int] | None = None,
    map_size: int | None = None,
) -> list[HeadReport]:
    """What each head of one attention call does, from its exact attention.

    The budget is the pairs of a local window of a thirty-second of the keys, at least 64 and at most 1024 of them
    (an eighth of the keys, where that is less). ``sink`` is the first 64 tokens, or as many as the window has where
    that is less, and may stay below the budget; ``local`` is that window; ``vertical``, ``slash`` and ``block`` are
    the heaviest columns, diagonals and blocks of 64, the last one in part, so that the budget is met exactly.

    Args:
        row: of the batch.
        rows: look at about this many queries, in evenly spaced blocks of 64, at least four; all, unless given. Columns
            and diagonals are then chosen by one half of them and judged by the other.
        top: how many columns, diagonals and blocks to list.
        heads: describe these; all, unless given.
        map_size: also make maps of this size.

    Raises:
        ValueError: a row or head that the call does not have, no live query in the row, a count below 1, or queries
            and keys that are not finite.
    """
    if top < 0 or (rows is not None and rows < 1):
        raise ValueError(f"describe_heads needs rows >= 1 and top >= 0, got rows={rows}, top={top}")
    call = one_row(call, row)
    chosen = chosen_heads(call, heads)
    if not bool(call.extent.count_allowed()):
        raise ValueError(f"row {row} of this call has no live query that sees a key: there is nothing to describe")
    samples = _samples(call, rows)
    counted = sum(sample.queries for sample in samples)
    columns = _sum(sample.columns for sample in samples)
    diagonals = _sum(sample.diagonals for sample in samples)
    explained = {name: _sum(sample.explained[name] for sample in samples) for name in PATTERNS}
    budget = sum(sample.budget for sample in samples) / sum(sample.allowed for sample in samples)
    on_keys = columns.sum(-1)
    if not bool(on_keys.isfinite().all()):
        raise ValueError(f"the attention of layer {call.layer} is not finite (NaN): there is nothing to describe")
    within = diagonals.cumsum(-1) >= _COVERED * diagonals.sum(-1, keepdim=True)
    grid = Grid(call.extent, BLOCK, BLOCK)
    rows_of_grid = [block for sample in samples for block in sample.query_blocks]
    query_blocks = [int(grid.first_block) + block for block in rows_of_grid]
    blocks = torch.cat([sample.blocks for sample in samples], dim=1)
    blocks = blocks * _beyond_window(grid, rows_of_grid, samples[0].window)
    reports = []
    for head in chosen:
        mass = {name: min(1.0, float(explained[name][head] / on_keys[head])) for name in PATTERNS}
        heaviest = _heaviest(blocks[head].flatten() / on_keys[head], top)
        reports.append(
            HeadReport(
                layer=call.layer,
                head=head,
                pattern=_name(mass),
                mass=mass,
                budget=budget,
                sink_tokens=min(SINK, samples[0].window),
                local_tokens=samples[0].window,
                first_token=float(columns[head, 0] / on_keys[head]),
                first_tokens=float(columns[head, :SINK].sum() / on_keys[head]),
                window=int(within[head].int().argmax()) + 1,
                sink_logit=max(0.0, 1.0 - float(on_keys[head]) / counted) if call.sinks is not None else 0.0,
                columns=_heaviest(columns[head] / on_keys[head], top),
                diagonals=_heaviest(diagonals[head] / on_keys[head], top),
                blocks=tuple(
                    (query_blocks[cell // blocks.shape[-1]], cell % blocks.shape[-1], share) for cell, share in heaviest
                ),
                map=None if map_size is None else attention_map(call, head, map_size),
            )
        )
    return reports


def _sum(parts: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(parts)).sum(dim=0)


@dataclass(slots=True)
class _Sample:
    """The masses of some query blocks of one batch row, in fp64 on the CPU, by position."""

    query_blocks: range  # rows of the grid
    queries: int
    window: int
    columns: Tensor
    diagonals: Tensor
    blocks: Tensor
    budget: float  # pairs
    allowed: float
    column_pairs: Tensor
    diagonal_pairs: Tensor
    explained: dict[str, Tensor]


def _samples(call: AttentionCall, rows: int | None) -> list[_Sample]:
    """All queries; or two samples of them, each of which chooses the columns and diagonals for the other to judge.

    A column near a sampled block is seen by few of the sampled rows, and looks like a line to those that choose it.
    """
    grid = Grid(call.extent, BLOCK, BLOCK)
    step = 1 if rows is None else max(1, round(int(call.extent.query_count) / rows))
    step = max(1, min(step, grid.query_blocks // _LEAST_SAMPLE))
    offsets = (0,) if step == 1 else (step // 2, step // 2 + step)
    found = [
        exact_masses(call, block_q=BLOCK, block_k=BLOCK, step=step * len(offsets), offset=offset) for offset in offsets
    ]
    samples = [_sample(grid, masses) for masses in found]
    for sample, other in zip(samples, samples[::-1], strict=True):
        for name, mass, pairs, by in (
            ("vertical", sample.columns, sample.column_pairs, other.columns),
            ("slash", sample.diagonals, sample.diagonal_pairs, other.diagonals),
        ):
            sample.explained[name] = _explained(mass, pairs, sample.budget, by)
    return samples


def _sample(grid: Grid, masses: ExactMasses) -> _Sample:
    """What `exact_masses` counted, with what the columns, diagonals and a local window cost."""
    extent, keys = grid.extent, grid.extent.longest
    positions = torch.cat([torch.arange(*grid.queries[0, m].tolist()) for m in masses.query_blocks])
    low, high = _seen(extent, positions, extent.limit)
    window = _local_window(keys)
    near_low, near_high = _seen(extent, positions, min(window, extent.limit or window))
    budget = float((near_high - near_low).sum())
    distances = torch.arange(keys)
    columns, diagonals, blocks = (mass[0].double().cpu() for mass in (masses.columns, masses.diagonals, masses.blocks))
    # A key at p is seen by the queries whose first key is not after p and whose last one is not before it.
    column_pairs = torch.searchsorted(low, distances, right=True) - torch.searchsorted(high, distances, right=True)
    block_pairs = visible_pairs(grid, masses.query_blocks)[0]
    return _Sample(
        query_blocks=masses.query_blocks,
        queries=len(positions),
        window=window,
        columns=columns,
        diagonals=diagonals,
        blocks=blocks,
        budget=budget,
        allowed=float((high - low).sum()),
        column_pairs=column_pairs,
        diagonal_pairs=_diagonal_pairs(extent, positions),
        explained={
            "sink": columns[:, : min(SINK, window)].sum(-1),
            "local": diagonals[:, :window].sum(-1),
            "block": _explained(blocks.flatten(1), block_pairs.flatten(), budget),
        },
    )


def _seen(extent: Extent, positions: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
    """Keys that queries at these positions see within a window, half-open, of one batch row."""
    keys, far = int(extent.key_count), int(extent.key_count) + int(positions.max()) + 1
    window = far if window is None else window
    high = (positions + (1 if extent.causal else window)).clamp(max=keys)
    return (positions - window + 1).clamp(min=0).minimum(high), high


def _diagonal_pairs(extent: Extent, positions: Tensor) -> Tensor:
    """Allowed pairs at each distance, of queries in ascending order."""
    keys = int(extent.key_count)
    distances = torch.arange(keys)
    pairs = torch.searchsorted(positions, distances + keys) - torch.searchsorted(positions, distances)
    if not extent.causal:
        pairs[1:] += torch.searchsorted(positions, keys - distances[1:])
    return pairs if extent.limit is None else pairs * (distances < extent.limit)


def _local_window(tokens: int) -> int:
    """Tokens of the window that sets the budget of a prompt of ``tokens`` keys."""
    return max(1, min(max(tokens // _WINDOW_SHARE, _LEAST_WINDOW), _MOST_WINDOW, tokens // 8))


def _explained(mass: Tensor, pairs: Tensor, budget: float, by: Tensor | None = None) -> Tensor:
    """Mass of the heaviest of ``mass [H, n]``, which cost ``pairs [n]``, that a budget pays for; the last one in part.

    Heaviest as a whole, not by the pair: else a few short columns at the end of the prompt would pass for lines.
    ``by [H, n]`` decides which are the heaviest, if it is not the mass itself.
    """
    order = (mass if by is None else by).argsort(dim=-1, descending=True, stable=True)
    mass, cost = mass.gather(-1, order), pairs.double().expand_as(mass).gather(-1, order)
    left = budget - (cost.cumsum(-1) - cost)
    return (mass * (left / cost.clamp(min=1.0)).clamp(0.0, 1.0)).sum(-1)


def _name(mass: dict[str, float]) -> str:
    best = max(mass.values())
    if best < DIFFUSE_BELOW:
        return "diffuse"
    return next(name for name in PATTERNS if mass[name] >= NEARLY * best)


def _beyond_window(grid: Grid, query_blocks: list[int], window: int) -> Tensor:
    """Blocks whose every pair is farther apart than the window, without the first key block: bool ``[m, N]``."""
    queries = grid.queries[0, query_blocks]
    first_key, end = (edge[0] for edge in grid.key_block_ends())
    before = queries[:, :1] - (end - 1) >= window
    after = first_key - (queries[:, 1:] - 1) >= window
    return (before | after) & (torch.arange(grid.key_blocks) > 0)


def _heaviest(shares: Tensor, count: int) -> tuple[tuple[int, float], ...]:
    """The largest members above 0, by index and share; the lower index first between equals."""
    order = shares.argsort(descending=True, stable=True)[:count]
    return tuple((int(at), float(shares[at])) for at in order if shares[at] > 0)


def inspect_model(
    model: Any,
    input_ids: Tensor,
    *,
    rows: int | None = None,
    top: int = 5,
    layers: Collection[int] | None = None,
    heads: Collection[int] | None = None,
    map_size: int | None = None,
) -> list[HeadReport]:
    """What the heads of a transformers model do with a prompt: one dense forward pass, one layer described at a time.

    Layers without causal softmax attention over a plain mask (linear attention, chunked attention) are left out.

    Args:
        model: as for `gossamer.enable`; it is given back as it was.
        input_ids: integers ``[1, S]``.
        layers: describe these; all, unless given.
        rows, top, heads, map_size: see `describe_heads`.

    Returns:
        reports by layer, then by head.

    Raises:
        ValueError: a prompt of another shape, a head out of range, or none of the layers could be described.
        TypeError: token ids that are no integers, or no transformers model.
    """
    if not isinstance(input_ids, Tensor) or input_ids.is_floating_point():
        raise TypeError(f"input_ids must be a tensor of integers, got {getattr(input_ids, 'dtype', type(input_ids))}")
    if input_ids.ndim != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] < 2:
        raise ValueError(f"inspect_model takes one prompt of two or more tokens, [1, S], got {tuple(input_ids.shape)}")
    reports: list[HeadReport] = []

    def visit(observed: Observation) -> None:
        if layers is None or observed.call.layer in layers:
            reports.extend(describe_heads(observed.call, rows=rows, top=top, heads=heads, map_size=map_size))

    with enable(model, "dense", min_tokens=0) as handle, torch.inference_mode():
        handle.observe(visit)
        # Without the language model's head: its logits are not looked at.
        model.base_model(input_ids=input_ids.to(model.device), use_cache=False)
        reasons = ", ".join(handle.stats().fallbacks()) or "no such layer was called"
    if not reports:
        raise ValueError(
            f"no attention of {type(model).__name__} could be described"
            f"{'' if layers is None else f' in layers {sorted(layers)}'}: {reasons}"
        )
    return reports
