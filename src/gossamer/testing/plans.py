"""Random plans: every part of the union, empty rows, overlaps, padding, all reproducible from a seed."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from gossamer.plan import Extent, Grid, SparsePlan, ceil_div

__all__ = ["random_extent", "random_plan"]


def random_extent(
    seed: int, *, batch: int, query_len: int, key_len: int, causal: bool = True, limit: int | None = None
) -> Extent:
    """Rows with left padding, right padding, spare key slots and queries that start anywhere."""
    rng = random.Random(seed)
    rows = []
    for _ in range(batch):
        start = rng.randint(0, key_len)
        first = rng.randint(-query_len // 2, key_len)
        rows.append((first, rng.randint(0, query_len - max(-first, 0)), start, rng.randint(0, key_len - start)))
    columns = zip(*rows, strict=True) if rows else [[]] * 4
    return Extent(*(list(column) for column in columns), causal=causal, limit=limit)


def random_plan(
    seed: int,
    *,
    batch: int,
    heads: int,
    query_len: int,
    key_len: int,
    block_q: int = 64,
    block_k: int = 64,
    permuted: bool = False,
    causal: bool = True,
    limit: int | None = None,
    padded: bool = False,
    pruned_mean: bool = False,
    skip: float | None = None,
) -> SparsePlan:
    """A plan whose parts are present or absent by chance.

    Args:
        padded: an extent from `random_extent`; else all is live, and causal queries are the last ones.
        permuted: gives it random query and key orders.
        pruned_mean, skip: its attributes; a plan with one has blocks alone.
    """
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    size = {"batch": batch, "query_len": query_len, "key_len": key_len}
    extent = (random_extent if padded else _full)(seed, **size, causal=causal, limit=limit)
    grid = Grid(extent, block_q, block_k)
    rows = ceil_div(query_len, block_q) if permuted else grid.query_blocks
    width = ceil_div(key_len, block_k) if permuted else grid.key_blocks
    group = rng.choice([1, 2, max(1, rows)])

    def bits(*shape: int, share: float) -> Tensor:
        return torch.rand(*shape, generator=generator) < share

    alone = pruned_mean or skip is not None
    share = 0.0 if alone else rng.choice([0.0, 0.02, 0.3])
    listed = bits(batch, heads, ceil_div(rows, group), extent.longest, share=share)
    counts = listed.sum(dim=-1).flatten()

    def order(length: int) -> Tensor:
        keys = torch.rand(batch, heads, length, generator=generator)
        return keys.argsort(dim=-1).to(torch.int32)

    return SparsePlan.from_block_mask(
        bits(batch, heads, rows, width, share=rng.choice([0.0, 0.2, 0.7])),
        query_len,
        key_len,
        extent=extent,
        block_q=block_q,
        block_k=block_k,
        column_group=group,
        column_indptr=torch.nn.functional.pad(counts.cumsum(0), (1, 0)),
        column_indices=listed.flatten(0, 2).nonzero()[:, 1].to(torch.int32),
        sink=0 if alone else [rng.choice([0, 0, 1, 5, 70]) for _ in range(heads)],
        window=0 if alone else [rng.choice([0, 0, 1, 3, 40, 150]) for _ in range(heads)],
        q_order=order(query_len) if permuted else None,
        k_order=order(key_len) if permuted else None,
        pruned_mean=pruned_mean,
        skip=skip,
    )


def _full(seed: int, *, batch: int, query_len: int, key_len: int, causal: bool, limit: int | None) -> Extent:
    return Extent.full(batch, query_len, key_len, causal=causal, limit=limit)
