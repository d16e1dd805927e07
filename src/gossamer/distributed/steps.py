"""What a rank computes at each step of a ring: the pairs of its queries and the keys that have come, as plans.

Local tokens count from 0, so that blocks and columns need a new number and no more. A plan says nothing of where they
lie in the sequence; causality and bands do. Blocks of another rank's keys lie before a query block or after it as a
whole, and are selected where they lie before. Only where a band cuts through the pairs of two runs does a plan of these
two tell it exactly: such pairs are put side by side as rows of a batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.distributed.layout import Layout, Run
from gossamer.distributed.selection import Entries, Selection, blocks_of
from gossamer.plan import Extent, Grid, SparsePlan, ceil_div

__all__ = ["Part", "Piece", "pieces_of"]


@dataclass(frozen=True, eq=False)
class Part:
    """Some tokens of a rank: consecutive ones ``(first slot, tokens)``, put side by side as rows of a batch."""

    spans: tuple[tuple[int, int], ...]

    def of(self, x: Tensor) -> Tensor:
        """``[B, heads, tokens, D]`` as ``[B * spans, heads, tokens of a span, D]``."""
        if len(self.spans) == 1:
            return x.narrow(2, *self.spans[0])
        return torch.stack([x.narrow(2, *span) for span in self.spans], dim=1).flatten(0, 1)

    def of_rows(self, x: Tensor) -> Tensor:
        """The same of ``[B, heads, tokens]``."""
        return self.of(x[..., None])[..., 0]

    def add(self, to: Tensor, x: Tensor) -> None:
        """Adds what `of` would take, to where it takes it; spans may name tokens more than once."""
        for n, span in enumerate(self.spans):
            to.narrow(2, *span).add_(x.unflatten(0, (-1, len(self.spans)))[:, n])


@dataclass(frozen=True, eq=False)
class Piece:
    """Some queries of a rank against some keys that it has: pairs that no other piece has."""

    queries: Part
    keys: Part
    plan: SparsePlan


@dataclass(frozen=True, eq=False)
class _Runs:
    """How the runs of queries and those of keys lie to each other; bool ``[runs, runs]``, or one of each head."""

    queries: list[Run]
    keys: list[Run]
    whole: Tensor  # seen as a whole, or the run itself: no band cuts
    cut: Tensor  # seen, and some band cuts
    covered: Tensor  # [heads, runs, runs]: a window has all pairs

    @classmethod
    def of(cls, selection: Selection, queries: list[Run], keys: list[Run]) -> _Runs:
        def ends(runs: list[Run]) -> tuple[Tensor, Tensor]:
            table = torch.tensor([run[:2] for run in runs], dtype=torch.int64, device="cpu").view(-1, 2)
            return table[:, 0], table[:, 1]

        (first, past), (low, high) = ends(queries), ends(keys)
        seen = first[:, None] >= low
        nearest = (first[:, None] - high + 1).clamp(min=0)
        farthest = past[:, None] - 1 - low
        window = selection.window[:, None, None]
        cut = ((window > nearest) & (window <= farthest)).any(dim=0)
        if selection.limit is not None:
            seen = seen & (nearest < selection.limit)
            cut = cut | (farthest >= selection.limit)
        return cls(queries, keys, seen & ~cut, seen & cut, window > farthest)


def pieces_of(selection: Selection, layout: Layout, rank: int, source: int) -> list[Piece]:
    """What rank ``rank`` computes with the keys of rank ``source``; together over all sources, its rows of the plan."""
    queries, keys = layout.runs(rank), layout.runs(source)
    if not queries or not keys:
        return []
    runs = _Runs.of(selection, queries, keys)
    pieces = []
    if bool(runs.whole.any()):
        pieces.append(_whole(selection, layout, runs, source, own=rank == source))
    groups: dict[tuple[int, int, int], list[tuple[Run, Run]]] = {}
    for n, m in runs.cut.nonzero().tolist():
        one, other = queries[n], keys[m]
        groups.setdefault((one.start - other.start, one.tokens, other.tokens), []).append((one, other))
    pieces += [_cut(selection, pairs) for pairs in groups.values()]
    return [piece for piece in pieces if piece is not None]


def _whole(selection: Selection, layout: Layout, runs: _Runs, source: int, own: bool) -> Piece | None:
    """All pairs of runs that no band cuts, at once."""
    block, heads = selection.block, selection.heads
    q_spans, k_spans = ([(run.start, run.tokens) for run in side] for side in (runs.queries, runs.keys))
    q_tokens, k_tokens = (sum(tokens for _, tokens in spans) for spans in (q_spans, k_spans))
    rows, columns = blocks_of(q_spans, block), blocks_of(k_spans, block)
    q_run, k_run = (
        torch.repeat_interleave(torch.tensor([ceil_div(tokens, block) for _, tokens in spans], device="cpu"))
        for spans in (q_spans, k_spans)
    )
    seen = runs.whole[q_run][:, k_run] & (rows[:, None] >= columns)
    mask = selection.blocks(rows[None], columns[None])[:, :, 0] | runs.covered[:, q_run][:, :, k_run]
    mask = (mask | ((columns + 1) * block <= selection.sink[:, None])[:, None]) & seen
    nothing, live = 0 * selection.lengths, _live(selection, k_spans)
    extent = Extent(nothing, _live(selection, q_spans), nothing, live, causal=own)
    whole_parts = Part(((0, q_tokens),)), Part(((0, k_tokens),))
    if bool((mask | (rows[:, None] < columns if own else torch.tensor(False, device="cpu"))).all()):
        return Piece(*whole_parts, SparsePlan.dense(heads, q_tokens, k_tokens, extent))

    grid = Grid(extent, block, block)
    mask = mask[:, :, : grid.query_blocks, : grid.key_blocks]
    group = _group(selection, runs.queries, grid.query_blocks)
    firsts = torch.arange(0, grid.query_blocks, group, device="cpu")
    row, position = _columns(selection, rows[firsts])
    slot = layout.slots(source)[position.clamp(max=max(0, layout.length - 1))]
    run_of_slot = torch.repeat_interleave(torch.tensor([tokens for _, tokens in k_spans], device="cpu"))
    kept = (slot >= 0) & (slot < live[row // (len(firsts) * heads)])
    row, slot = row[kept], slot[kept]
    kept = runs.whole[q_run[firsts][row % len(firsts)], run_of_slot[slot]]
    lists = _csr(Entries(row[kept], slot[kept]), selection.batch * heads * len(firsts), k_tokens)
    plan = _plan(mask, extent, q_tokens, k_tokens, block, group, lists)
    return None if plan is None else Piece(*whole_parts, plan)


def _cut(selection: Selection, pairs: list[tuple[Run, Run]]) -> Piece | None:
    """Pairs of runs at one distance and of equal sizes, each a row of a batch, with all that the plan has there."""
    block, batch, count = selection.block, selection.batch, len(pairs)
    (one, other), distance = pairs[0], pairs[0][0].start - pairs[0][1].start
    q_start, k_start = (
        torch.tensor([pair[n].start for pair in pairs], dtype=torch.int64, device="cpu") for n in (0, 1)
    )
    live = [
        (selection.lengths[:, None] - start).clamp(0, run.tokens).flatten()
        for start, run in ((q_start, one), (k_start, other))
    ]
    extent = Extent([distance] * (batch * count), live[0], 0 * live[1], live[1], limit=selection.limit)
    grid = Grid(extent, block, block)
    height, width = ceil_div(one.tokens, block), ceil_div(other.tokens, block)
    rows = q_start[:, None] // block + torch.arange(height, device="cpu")
    columns = k_start[:, None] // block + torch.arange(width, device="cpu")
    sunk = (columns[:, None] + 1) * block <= selection.sink[:, None, None, None]  # [heads, P, 1, C]
    mask = (selection.blocks(rows, columns) | sunk).transpose(1, 2).flatten(0, 1)
    mask = mask & (rows[:, :, None] >= columns[:, None])[:, None].repeat(batch, 1, 1, 1)
    mask = mask[:, :, : grid.query_blocks, : grid.key_blocks]
    group = _group(selection, [one], grid.query_blocks)
    firsts = torch.arange(0, grid.query_blocks, group, device="cpu")
    row, position = _columns(selection, rows[:, firsts].flatten())
    # Lists of (batch row, head, pair, group) become those of (batch row, pair, head, group).
    row, local = row // len(firsts), row % len(firsts)
    pair, head, b = row % count, row // count % selection.heads, row // count // selection.heads
    place = position - k_start[pair]
    kept = (place >= 0) & (place < live[1][b * count + pair])
    row = ((b * count + pair) * selection.heads + head) * len(firsts) + local
    row, order = row[kept].sort(stable=True)
    lists = _csr(Entries(row, place[kept][order]), len(live[0]) * selection.heads * len(firsts), other.tokens)
    plan = _plan(mask, extent, one.tokens, other.tokens, block, group, lists, window=selection.window)
    if plan is None:
        return None
    parts = [Part(tuple((pair[n].slot, pair[n].tokens) for pair in pairs)) for n in (0, 1)]
    return Piece(parts[0], parts[1], plan)


def _live(selection: Selection, spans: list[tuple[int, int]]) -> Tensor:
    """Live tokens of a rank in each batch row, ``[B]``."""
    return sum(((selection.lengths - start).clamp(0, tokens) for start, tokens in spans), 0 * selection.lengths)


def _group(selection: Selection, runs: list[Run], rows: int) -> int:
    """Local query blocks that have a list of columns in common: of one run, and of one list of the selection."""
    group = max(1, rows)
    for run in runs[1:]:
        group = math.gcd(group, run.slot // selection.block)
    if selection.column_group is not None:
        for run in runs:
            group = math.gcd(group, math.gcd(selection.column_group, run.start // selection.block))
        group = math.gcd(group, selection.column_group)
    return group


def _columns(selection: Selection, blocks: Tensor) -> Entries:
    """Positions for groups that begin at these blocks of queries: listed ones, and what a sink has of a block."""
    group = selection.column_group
    row, position = selection.columns(blocks * 0 if group is None else blocks // group)
    sink = selection.sink
    if not bool((sink % selection.block > 0).any()):
        return Entries(row, position)
    longest = int(selection.lengths.max()) if selection.batch else 0
    begin = sink // selection.block * selection.block
    counts = (sink.clamp(max=longest) - begin).clamp(min=0)
    heads = torch.arange(selection.batch, device="cpu")[:, None] * selection.heads + torch.arange(
        selection.heads, device="cpu"
    )
    lists = (heads.flatten()[:, None] * len(blocks) + torch.arange(len(blocks), device="cpu")).flatten()
    counts, begin = (x.repeat(selection.batch).repeat_interleave(len(blocks)) for x in (counts, begin))
    sunk = torch.repeat_interleave(counts)
    more = torch.arange(len(sunk), device="cpu") - (counts.cumsum(0) - counts)[sunk] + begin[sunk]
    return Entries(torch.cat([row, lists[sunk]]), torch.cat([position, more]))


def _csr(entries: Entries, lists: int, width: int) -> tuple[Tensor, Tensor]:
    """Row pointers and indices of lists, ascending and each number once."""
    key = entries.row * width + entries.number
    if key.numel() > 1 and bool((key.diff() <= 0).any()):
        key = key.unique()
    counts = torch.bincount(key // max(1, width), minlength=lists)
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)), (key % max(1, width)).to(torch.int32)


def _plan(
    mask: Tensor,
    extent: Extent,
    q_tokens: int,
    k_tokens: int,
    block: int,
    group: int,
    lists: tuple[Tensor, Tensor],
    window: Tensor | None = None,
) -> SparsePlan | None:
    """None where it has no pairs."""
    if not mask.numel() or not (bool(mask.any()) or lists[1].numel() or window is not None):
        return None
    return SparsePlan.from_block_mask(
        mask,
        q_tokens,
        k_tokens,
        extent=extent,
        block_q=block,
        block_k=block,
        column_group=group,
        column_indptr=lists[0],
        column_indices=lists[1],
        window=0 if window is None else window.clamp(max=2**31 - 1).to(torch.int32),
    )
