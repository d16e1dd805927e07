"""A ring of any size on one machine: who works how much at each step, what is sent, and how long it should take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gossamer.distributed.layout import Layout
from gossamer.distributed.selection import Selection, VerticalSlashes
from gossamer.plan import ceil_div

__all__ = ["Layer", "Machine", "Simulation", "planted", "simulate", "work_of", "work_of_units"]

_ENTRIES = 1 << 24  # of a mask of blocks, held at once


@dataclass(frozen=True)
class Layer:
    """Query heads, key/value heads, head dimension and bytes of a number of one layer; its batch is the selection's."""

    heads: int
    groups: int
    head_dim: int
    itemsize: int = 2


@dataclass(frozen=True)
class Machine:
    """What a rank can do.

    Fields:
        pairs_per_second: of a query and a key of one head, forward; pairs_per_second_backward: backward.
        bandwidth: bytes a second from one rank to the next of its node, or of the ring that is no nested one.
        between_nodes: the same between nodes; None: as ``bandwidth``.
        latency: seconds that each message takes besides.
    """

    pairs_per_second: float
    pairs_per_second_backward: float
    bandwidth: float
    between_nodes: float | None = None
    latency: float = 0.0

    def __post_init__(self) -> None:
        for name in ("pairs_per_second", "pairs_per_second_backward", "bandwidth"):
            if not getattr(self, name) > 0:
                raise ValueError(f"Machine.{name} must be above 0, got {getattr(self, name)}")
        if self.between_nodes is not None and not self.between_nodes > 0:
            raise ValueError(f"Machine.between_nodes must be above 0 or None, got {self.between_nodes}")


@dataclass(frozen=True, eq=False)
class Simulation:
    """One layer, forward and backward.

    Fields:
        work: pairs that each rank computes at each step, fp64 ``[ranks, steps]``.
        sent_forward, sent_backward: bytes of the rank that sends most.
        forward_s, backward_s: when the last rank is done; alone_s, alone_backward_s: of the work of all ranks by one.
    """

    layout: Layout
    work: Tensor
    sent_forward: int
    sent_backward: int
    forward_s: float
    backward_s: float
    alone_s: float
    alone_backward_s: float

    @property
    def imbalance(self) -> list[float]:
        """Largest over mean work of the ranks, of each step; 1 where nobody works."""
        mean = self.work.mean(dim=0)
        return torch.where(mean > 0, self.work.amax(dim=0) / mean.clamp(min=1e-300), 1.0).tolist()

    @property
    def mean_imbalance(self) -> float:
        """Largest work of each step, summed, over the mean one: what waiting for the slowest costs."""
        total = float(self.work.mean(dim=0).sum())
        return float(self.work.amax(dim=0).sum()) / total if total else 1.0

    @property
    def efficiency(self) -> float:
        """Seconds of one rank for all the work, over ranks times the ring's; forward and backward."""
        alone, ring = self.alone_s + self.alone_backward_s, self.forward_s + self.backward_s
        return alone / (self.layout.ranks * ring) if ring else 1.0

    def to_dict(self) -> dict[str, Any]:
        numbers = ("mean_imbalance", "sent_forward", "sent_backward", "forward_s", "backward_s", "efficiency")
        about = {"layout": self.layout.kind, "ranks": self.layout.ranks, "length": self.layout.length}
        return about | {name: getattr(self, name) for name in numbers} | {"imbalance": self.imbalance}


def planted(
    length: int, heads: int, *, verticals: int = 1000, slashes: int = 64, block: int = 64, seed: int = 0
) -> VerticalSlashes:
    """A vertical-slash plan by chance: of each head so many columns, anywhere, and diagonals, denser near the query.

    Distances are drawn evenly in their logarithm; the first two block diagonals are among them, as in
    `gossamer.methods.VerticalSlash`.
    """
    draw = torch.Generator().manual_seed(seed)
    blocks = ceil_div(length, block)
    logs = torch.rand(heads, slashes, generator=draw, device="cpu") * torch.tensor(max(2, blocks), device="cpu").log()
    chosen = torch.zeros(1, heads, blocks, dtype=torch.bool, device="cpu")
    chosen[0].scatter_(1, logs.exp().long().clamp(max=blocks - 1), True)
    chosen[..., :2] = True
    count = min(verticals, length)
    columns = torch.stack([torch.randperm(length, generator=draw, device="cpu")[:count] for _ in range(heads)])
    nothing = torch.zeros(heads, dtype=torch.int64, device="cpu")
    counts = torch.full((1, heads), count, dtype=torch.int64, device="cpu")
    lengths = torch.tensor([length], device="cpu")
    return VerticalSlashes(
        heads, lengths, block, nothing, nothing, None, chosen, columns.sort(dim=1).values.flatten(), counts
    )


def work_of(selection: Selection, layout: Layout, units: Tensor | None = None) -> Tensor:
    """Pairs of all heads that each rank computes at each step, fp64 ``[ranks, steps]``.

    Args:
        units: `work_of_units`, where it is known already.
    """
    units = work_of_units(selection, layout.unit) if units is None else units
    owners, ranks = layout.unit_owners(), layout.ranks
    by_source = torch.zeros(len(owners), ranks, dtype=torch.float64, device="cpu").index_add_(1, owners, units)
    by_source = torch.zeros(ranks, ranks, dtype=torch.float64, device="cpu").index_add_(0, owners, by_source)
    sources = torch.tensor([[layout.source(r, step) for step in range(ranks)] for r in range(ranks)], device="cpu")
    return by_source.gather(1, sources)


def work_of_units(selection: Selection, unit: int) -> Tensor:
    """Pairs of all heads of each unit of queries with each unit of keys, fp64 ``[units, units]``.

    Counted by block: a selected one has all its pairs, the diagonal one half of them, another those of its columns
    or of a window, whichever are more. Exact where no band and no column meet in a block that is not selected.
    """
    blocks = ceil_div(int(selection.lengths.max()) if selection.batch else 0, selection.block)
    count = ceil_div(blocks * selection.block, unit)
    of_unit = torch.arange(blocks, device="cpu") // (unit // selection.block)
    total = torch.zeros(count, count, dtype=torch.float64, device="cpu")
    for rows, work in _rows(selection, blocks):
        sums = torch.zeros(len(rows), count, dtype=torch.float64, device="cpu").index_add_(1, of_unit, work.double())
        total.index_add_(0, of_unit[rows], sums)
    return total


def _rows(selection: Selection, blocks: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Some blocks of queries, and their pairs with each block of keys, ``[rows, blocks]``, of all heads."""
    block, every = selection.block, torch.arange(blocks, device="cpu")
    edges = (selection.lengths[:, None] - every * block).clamp(0, block) / block  # short ends
    step = max(1, _ENTRIES // max(1, selection.batch * selection.heads * blocks))
    for first in range(0, blocks, step):
        rows = torch.arange(first, min(first + step, blocks), device="cpu")
        before = rows[:, None] - every
        pairs = selection.blocks(rows[None], every[None])[:, :, 0].float().mul_(block**2)
        pairs = torch.maximum(pairs, _columns(selection, rows, blocks).mul_(block))
        if bool(selection.sink.any()):
            sunk = (selection.sink[:, None] - every * block).clamp(0, block)[:, None]
            pairs = torch.maximum(pairs, block * sunk.float())
        if bool(selection.window.any()):
            pairs = torch.maximum(pairs, _within(before, selection.window, block))
        if selection.limit is not None:
            pairs = torch.minimum(pairs, _within(before, torch.tensor([selection.limit], device="cpu"), block))
        most = torch.where(before == 0, block * (block + 1) / 2, float(block**2)).masked_fill(before < 0, 0.0)
        pairs = torch.minimum(pairs, most)
        if bool((edges == 1).all()):
            yield rows, pairs.sum(dim=(0, 1))
        else:
            yield rows, (pairs * edges[:, None, rows, None] * edges[:, None, None]).sum(dim=(0, 1))


def _columns(selection: Selection, rows: Tensor, blocks: int) -> Tensor:
    """Columns in each block of keys, for some blocks of queries."""
    group = selection.column_group
    groups, which = torch.unique(0 * rows if group is None else rows // group, return_inverse=True)
    entries = selection.columns(groups)
    count = selection.batch * selection.heads * len(groups)
    key = entries.row * blocks + entries.number // selection.block
    found = torch.bincount(key, minlength=count * blocks).float()
    return found.view(selection.batch, selection.heads, len(groups), blocks)[:, :, which]


def _within(before: Tensor, window: Tensor, block: int) -> Tensor:
    """Pairs at distances below a window, of blocks at so many blocks before; fp32 ``[1, windows, rows, blocks]``."""
    row = torch.arange(block, device="cpu")
    nearest = int(before.min()) if before.numel() else 0
    distances = torch.arange(nearest, int(before.max()) + 1 if before.numel() else 0, device="cpu")
    # Of query row x of a block, keys y with 0 <= before * block + x - y < window.
    last = distances[None, :, None] * block + row
    first = last - window[:, None, None] + 1
    counts = (last.clamp(max=block - 1) - first.clamp(min=0) + 1).clamp(min=0).float().sum(dim=-1)
    return counts[:, before - nearest][None]


def simulate(
    selection: Selection, layout: Layout, layer: Layer, machine: Machine, *, units: Tensor | None = None
) -> Simulation:
    """One layer in a ring: each rank begins a step when it is done with the last one and its keys have come.

    Keys of the next step are under way from the moment that both ends have begun this one, as `ring_attention` has it;
    gradients from the moment that they are summed, and are needed when the next step is computed.

    Args:
        units: `work_of_units`, which is the same for all layouts of a unit.

    Raises:
        ValueError: the plan is for another number of heads.
    """
    if selection.heads not in (layer.heads, layer.groups):
        raise ValueError(f"the plan has {selection.heads} heads, the layer {layer.heads} and {layer.groups} of keys")
    work = work_of(selection, layout, units) * (layer.heads // selection.heads)
    tokens = [layout.tokens(rank) * selection.batch for rank in range(layout.ranks)]
    keys = [2 * layer.groups * layer.head_dim * layer.itemsize * count for count in tokens]
    sums = [2 * layer.groups * layer.head_dim * 4 * count for count in tokens]
    forward = work / machine.pairs_per_second
    backward = work / machine.pairs_per_second_backward
    forward_s, sent = _run(layout, forward, machine, keys, None)
    backward_s, sent_backward = _run(layout, backward, machine, keys, sums)
    return Simulation(
        layout, work, sent, sent_backward, forward_s, backward_s, float(forward.sum()), float(backward.sum())
    )


def _run(
    layout: Layout, seconds: Tensor, machine: Machine, keys: list[int], sums: list[int] | None
) -> tuple[float, int]:
    """When the last rank is done, and the bytes of the one that sends most."""
    ranks, node = layout.ranks, layout.node
    took = seconds.tolist()
    begun = [[0.0] * ranks for _ in range(ranks)]
    ready = [0.0] * ranks  # sums of the keys that a rank has, after its step
    free = [0.0] * ranks
    sent = [0] * ranks
    for step in range(ranks):
        added = [0.0] * ranks
        for rank in range(ranks):
            source = layout.source(rank, step)
            begun[rank][step] = free[rank]
            if step:
                earlier = step - (node if step % node == 0 else 1)
                sender = layout.holder(source, earlier)
                posted = max(begun[sender][earlier], begun[rank][earlier])
                took_s = _seconds(machine, keys[source], sender, rank, node)
                begun[rank][step] = max(free[rank], posted + took_s)
                sent[sender] += keys[source]
            done = begun[rank][step] + took[rank][step]
            if sums is not None and step:
                before = layout.holder(source, step - 1)
                done = max(done, ready[before] + _seconds(machine, sums[source], before, rank, node))
                sent[before] += sums[source]
            added[rank] = done
        ready, free = added, list(added)
    if sums is None or ranks == 1:
        return max(free), max(sent)
    home = []
    for rank in range(ranks):
        last = layout.holder(rank, ranks - 1)
        sent[last] += sums[rank]
        home.append(max(free[rank], ready[last] + _seconds(machine, sums[rank], last, rank, node)))
    return max(home), max(sent)


def _seconds(machine: Machine, count: int, sender: int, rank: int, node: int) -> float:
    inside = sender // node == rank // node
    bandwidth = machine.bandwidth if inside or machine.between_nodes is None else machine.between_nodes
    return machine.latency + count / bandwidth
