"""Random plans: every part of the union, empty rows, overlaps, padding, all reproducible from a seed."""

from __future__ import annotations

import random

import torch

from gossamer.plan import Extent, SparsePlan, ceil_div
from gossamer.selectors import CsrBuilder

__all__ = ["random_plan"]


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
) -> SparsePlan:
    """A plan whose parts are present or absent by chance.

    Args:
        padded: rows get left padding, dead tail slots and queries that start anywhere; else all keys are live and
            the queries are the last ones.
        permuted: gives it random query and key orders.
    """
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    if padded:
        starts = [rng.randint(0, key_len) for _ in range(batch)]
        counts = [rng.randint(0, key_len - start) for start in starts]
        extent = Extent([rng.randint(-query_len // 2, key_len) for _ in range(batch)], starts, counts)
    else:
        extent = Extent.full(batch, query_len, key_len)
    blocks_q, blocks_k = ceil_div(query_len, block_q), ceil_div(key_len, block_k)
    group = rng.choice([1, 2, max(1, blocks_q)])

    def bits(*shape: int, share: float) -> torch.Tensor:
        return torch.rand(*shape, generator=generator) < share

    columns = CsrBuilder()
    columns.add(bits(batch, heads, ceil_div(blocks_q, group), key_len, share=rng.choice([0.0, 0.02, 0.3])))
    column_indptr, column_indices = columns.build()

    def order(length: int) -> torch.Tensor:
        keys = torch.rand(batch, heads, length, generator=generator)
        return keys.argsort(dim=-1).to(torch.int32)

    return SparsePlan.from_block_mask(
        bits(batch, heads, blocks_q, blocks_k, share=rng.choice([0.0, 0.2, 0.7])),
        query_len,
        key_len,
        extent=extent,
        block_q=block_q,
        block_k=block_k,
        column_group=group,
        column_indptr=column_indptr,
        column_indices=column_indices,
        sink=[rng.choice([0, 0, 1, 5, 70]) for _ in range(heads)],
        window=[rng.choice([0, 0, 1, 3, 40, 150]) for _ in range(heads)],
        q_order=order(query_len) if permuted else None,
        k_order=order(key_len) if permuted else None,
        causal=causal,
        limit=limit,
    )
