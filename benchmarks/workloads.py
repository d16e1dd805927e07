"""Inputs and plans of the CPU benchmarks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer import AttentionCall, Extent, SparsePlan
from gossamer.backends import cpu
from gossamer.plan import Grid, ceil_div
from gossamer.testing import assert_accurate

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Shape:
    """One attention call: all queries of a prompt, or ``queries`` of them at its end."""

    length: int
    heads: int
    groups: int
    dim: int
    dtype: str
    queries: int | None = None

    @property
    def query_len(self) -> int:
        return self.length if self.queries is None else self.queries

    def draw(self, seed: int) -> AttentionCall:
        """Fresh q, k and v for each seed."""
        generator = torch.Generator().manual_seed(seed)
        dtype = DTYPES[self.dtype]
        lengths = ((self.heads, self.query_len), (self.groups, self.length), (self.groups, self.length))
        q, k, v = (torch.randn(1, n, tokens, self.dim, generator=generator).to(dtype) for n, tokens in lengths)
        return AttentionCall(q, k, v, self.extent())

    def extent(self) -> Extent:
        return Extent.full(1, self.query_len, self.length)

    def causal_pairs(self) -> float:
        """Of one head."""
        return self.query_len * (self.length - (self.query_len - 1) / 2)

    def flops(self) -> float:
        """Of both products, over all causal pairs of all heads."""
        return 4.0 * self.heads * self.dim * self.causal_pairs()

    def run(self, plan: SparsePlan) -> Callable[[AttentionCall], object]:
        return lambda call: cpu.attend(call, plan)

    def sdpa(self, call: AttentionCall) -> Tensor:
        causal = self.query_len > 1
        return F.scaled_dot_product_attention(call.q, call.k, call.values, is_causal=causal, enable_gqa=True)


def random_blocks(shape: Shape, density: float | None, block_k: int = 64, seed: int = 0) -> SparsePlan:
    """Random blocks with the diagonal, one plan per key/value head, at a share of the causal pairs; None: dense."""
    if density is None:
        return SparsePlan.dense(shape.groups, shape.query_len, shape.length, shape.extent())
    return random_blocks_of(shape.groups, shape.length, density, block_k=block_k, queries=shape.query_len, seed=seed)


def random_blocks_of(
    heads: int,
    length: int,
    density: float,
    *,
    block_q: int = 64,
    block_k: int = 64,
    queries: int | None = None,
    seed: int = 0,
) -> SparsePlan:
    """Random blocks with the diagonal for the last ``queries`` tokens, at a share of the causal pairs."""
    query_len = length if queries is None else queries
    extent = Extent.full(1, query_len, length)
    grid = Grid(extent, block_q, block_k)
    rows, columns = grid.query_blocks, grid.key_blocks
    generator = torch.Generator().manual_seed(seed)
    first, end = grid.queries[0, :, :1], grid.queries[0, :, 1:]
    begin = torch.arange(columns)[None] * block_k
    diagonal = (begin < end) & (begin + block_k > first)
    below = begin + block_k <= first
    # The diagonal blocks count half: about that share of their pairs is causal.
    wanted = density * (float(below.sum()) + float(diagonal.sum()) / 2) - float(diagonal.sum()) / 2
    share = max(0.0, wanted / max(1, int(below.sum())))
    chosen = torch.rand(1, heads, rows, columns, generator=generator) < share
    return SparsePlan.from_block_mask(
        chosen & below | diagonal, query_len, length, extent=extent, block_q=block_q, block_k=block_k
    )


def permuted_blocks(shape: Shape, density: float, segment: int = 256, seed: int = 0) -> SparsePlan:
    """`random_blocks` over keys that change places inside segments, of which a query's own is taken whole."""
    blocks = random_blocks(shape, density, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    moved = torch.rand(shape.groups, ceil_div(shape.length, segment), segment, generator=generator)
    tail = -shape.length % segment
    if tail:
        moved[:, -1, segment - tail :] = 2.0  # beyond the last key, and dropped
    order = moved.argsort(-1) + segment * torch.arange(moved.shape[1])[:, None]
    query = blocks.grid.queries[0, :, 0] // segment
    own = query[:, None] == torch.arange(blocks.num_key_blocks) * blocks.block_k // segment
    order = order.flatten(1)[None, :, : shape.length].to(torch.int32)
    sizes = {"extent": shape.extent(), "k_order": order}
    return SparsePlan.from_block_mask(blocks.block_mask() | own, shape.query_len, shape.length, **sizes)


def blocks_a_row(shape: Shape, count: int, seed: int = 0) -> SparsePlan:
    """That many blocks of 64 in every query block, the diagonal one among them."""
    blocks = -(-shape.length // 64)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(1, shape.groups, blocks, blocks, generator=generator).tril()
    scores += 2 * torch.eye(blocks)
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask.scatter_(3, scores.topk(min(count, blocks), dim=-1).indices, True)
    return SparsePlan.from_block_mask(mask & (scores > 0), shape.query_len, shape.length, extent=shape.extent())


def columns(shape: Shape, count: int, seed: int = 0, **more: object) -> SparsePlan:
    """That many random columns of each key/value head, for all queries."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.zeros(1, shape.groups, 1, shape.length, dtype=torch.bool)
    order = torch.rand(1, shape.groups, 1, shape.length, generator=generator).argsort(-1)[..., :count]
    chosen.scatter_(3, order, True)
    return _columns_of(shape, chosen, Grid(shape.extent(), 64, 64).query_blocks, **more)


def strips(shape: Shape, count: int, blocks: int = 16, seed: int = 0) -> SparsePlan:
    """About that many random columns for every ``blocks`` query blocks of each key/value head."""
    generator = torch.Generator().manual_seed(seed)
    groups = ceil_div(Grid(shape.extent(), 64, 64).query_blocks, blocks)
    chosen = torch.zeros(1, shape.groups, groups, shape.length, dtype=torch.bool)
    chosen.scatter_(3, torch.randint(shape.length, (1, shape.groups, groups, count), generator=generator), True)
    return _columns_of(shape, chosen, blocks)


def _columns_of(shape: Shape, chosen: Tensor, group: int, **more: object) -> SparsePlan:
    counts = chosen.sum(-1).flatten()
    return SparsePlan(
        shape.groups,
        shape.query_len,
        shape.length,
        shape.extent(),
        column_group=group,
        column_indptr=F.pad(counts.cumsum(0), (1, 0)),
        column_indices=chosen.flatten(0, 2).nonzero()[:, 1].to(torch.int32),
        **more,  # pyright: ignore[reportArgumentType]
    )


def slashes(shape: Shape, count: int, seed: int = 0) -> SparsePlan:
    """That many random diagonals of blocks of 64 in each key/value head, the main one among them."""
    blocks = -(-shape.length // 64)
    generator = torch.Generator().manual_seed(seed)
    order = 1 + torch.rand(shape.groups, blocks - 1, generator=generator).argsort(-1)[:, : count - 1]
    chosen = torch.zeros(shape.groups, blocks, dtype=torch.bool).scatter_(1, order, True)
    chosen[:, 0] = True
    distance = torch.arange(blocks)[:, None] - torch.arange(blocks)
    mask = chosen[:, distance.clamp(min=0)] & (distance >= 0)
    return SparsePlan.from_block_mask(mask[None], shape.query_len, shape.length, extent=shape.extent())


def united(blocks: SparsePlan, more: SparsePlan) -> SparsePlan:
    """The blocks of one plan with the columns of another."""
    return dataclasses.replace(
        blocks,
        column_group=more.column_group,
        column_indptr=more.column_indptr,
        column_indices=more.column_indices,
    )


def vertical_slash(shape: Shape, count: int, diagonals: int) -> SparsePlan:
    """Columns and diagonals of blocks, as the vertical-slash methods choose them."""
    return united(slashes(shape, diagonals), columns(shape, count))


def bands(shape: Shape, sink: int, window: int) -> SparsePlan:
    """The first tokens and a local window, token-exact."""
    return SparsePlan(shape.groups, shape.query_len, shape.length, shape.extent(), sink=sink, window=window)


def verify() -> None:
    """Raises AssertionError if a contender is wrong."""
    for dtype in DTYPES:
        for dim in (64, 128):
            for shape in (Shape(1024, 4, 1, dim, dtype), Shape(3000, 4, 1, dim, dtype, queries=1)):
                plans = [random_blocks(shape, density, block_k) for density, block_k in ((None, 64), (0.25, 128))]
                more = [] if shape.queries else [vertical_slash(shape, 200, 4), strips(shape, 100, 2)]
                call = shape.draw(0)
                more += [columns(shape, 200), bands(shape, 64, 200), permuted_blocks(shape, 0.25)]
                more += [plans[1].with_attributes(pruned_mean=True), plans[1].with_attributes(skip=2.0)]
                for plan in (*plans, *more):
                    assert_accurate(call, plan, *cpu.attend(call, plan))
                dense, _ = cpu.attend(call, plans[0])
                torch.testing.assert_close(shape.sdpa(call), dense, atol=3e-2, rtol=3e-2)
