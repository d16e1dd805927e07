"""What the docstrings say of extents, plans and attention, pair by pair in Python numbers; and calls to say it of."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from gossamer import AttentionCall, Extent, SparsePlan
from gossamer.backends import cpu
from gossamer.testing import SITUATIONS, make_call, random_extent

WITHOUT_TOKENS = "rows without tokens"
EVERYWHERE = (*SITUATIONS, WITHOUT_TOKENS, *(f"random {seed}" for seed in range(8)))

everywhere = pytest.mark.parametrize("situation", EVERYWHERE)


@dataclass(frozen=True)
class Row:
    """One batch row of an extent."""

    query_start: int
    query_count: int
    key_start: int
    key_count: int
    causal: bool
    limit: int | None

    @property
    def padding(self) -> int:
        """Dead query rows before the first live one."""
        return max(0, -self.query_start)

    def live_queries(self) -> list[int]:
        """Query rows that are live."""
        return list(range(self.padding, self.padding + self.query_count))

    def live_keys(self) -> list[int]:
        """Key slots that are live."""
        return list(range(self.key_start, self.key_start + self.key_count))

    def positions(self) -> list[int]:
        """Of the live queries."""
        return [self.query_start + i for i in self.live_queries()]

    def allows(self, query: int, key: int) -> bool:
        """Whether a live query may attend a live key, by their positions."""
        if self.causal and key > query:
            return False
        return self.limit is None or abs(query - key) < self.limit

    def allowed(self, i: int, j: int) -> bool:
        """Whether query row i may attend key slot j."""
        if i not in self.live_queries() or j not in self.live_keys():
            return False
        return self.allows(self.query_start + i, j - self.key_start)


def rows_of(extent: Extent) -> list[Row]:
    starts, counts = extent.query_start.tolist(), extent.query_count.tolist()
    slots, keys = extent.key_start.tolist(), extent.key_count.tolist()
    return [Row(*row, extent.causal, extent.limit) for row in zip(starts, counts, slots, keys, strict=True)]


def allowed_pairs(extent: Extent, query_len: int, key_len: int) -> Tensor:
    """bool ``[B, S, T]``."""
    pairs = torch.zeros(extent.batch, query_len, key_len, dtype=torch.bool)
    for b, row in enumerate(rows_of(extent)):
        keys = row.live_keys()
        for i in row.live_queries():
            seen = [j for j in keys if row.allows(row.query_start + i, j - row.key_start)]
            pairs[b, i, seen] = True
    return pairs


def plan_pairs(plan: SparsePlan) -> Tensor:
    """What a plan computes, bool ``[B, heads, S, T]``."""
    pairs = torch.zeros(plan.batch, plan.heads, plan.query_len, plan.key_len, dtype=torch.bool)
    sinks, windows = torch.as_tensor(plan.sink).tolist(), torch.as_tensor(plan.window).tolist()
    for b, row in enumerate(rows_of(plan.extent)):
        first_block = max(row.query_start, 0) // plan.block_q
        for h in range(plan.heads):
            head = b * plan.heads + h
            blocks = lists_of(plan.block_indptr, plan.block_indices, head, plan.num_query_blocks)
            columns = lists_of(plan.column_indptr, plan.column_indices, head, plan.num_column_groups)
            q_order = None if plan.q_order is None else plan.q_order[b, h].tolist()
            k_order = None if plan.k_order is None else plan.k_order[b, h].tolist()
            keys = [(j, j - row.key_start) for j in row.live_keys()]
            k_blocks = {key: (key if k_order is None else k_order.index(key)) // plan.block_k for _, key in keys}
            for i in row.live_queries():
                query = row.query_start + i
                q_block = query // plan.block_q - first_block
                if q_order is not None:
                    q_block = q_order.index(i - row.padding) // plan.block_q
                chosen = [
                    j
                    for j, key in keys
                    if row.allows(query, key)
                    and (
                        k_blocks[key] in blocks[q_block]
                        or key in columns[q_block // plan.column_group]
                        or key < sinks[h]
                        or abs(query - key) < windows[h]
                    )
                ]
                pairs[b, h, i, chosen] = True
    return pairs


def lists_of(indptr: Tensor, indices: Tensor, head: int, rows: int) -> list[list[int]]:
    """The ``rows`` CSR lists of one head."""
    ends, members = indptr.tolist(), indices.tolist()
    return [members[ends[head * rows + m] : ends[head * rows + m + 1]] for m in range(rows)]


def products(call: AttentionCall) -> list:
    """``q . k`` of all rows and slots, ``[B][H][S][T]``; those of what is dead mean nothing."""
    q, k = (t.double().nan_to_num() for t in (call.q, call.k))
    return (q @ k.repeat_interleave(call.share, dim=1).transpose(-1, -2)).tolist()


def attention(call: AttentionCall, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax attention over the pairs bool ``[B, H, S, T]``: out and lse in fp64."""
    out = torch.zeros(*call.q.shape[:3], call.values.shape[-1], dtype=torch.float64)
    lse = torch.full(call.q.shape[:3], -math.inf, dtype=torch.float64)
    raw, chosen = products(call), pairs.tolist()
    for b in range(call.batch):
        for h in range(call.heads):
            values = call.values[b, h // call.share].double()
            for i in range(call.query_len):
                keys = [j for j in range(call.key_len) if chosen[b][h][i][j]]
                bias = [0.0 if call.bias is None else float(call.bias[b, h // call.share, j]) for j in keys]
                weights = [math.exp(_logit(call, raw[b][h][i][j]) + extra) for j, extra in zip(keys, bias, strict=True)]
                total = sum(weights) + (0.0 if call.sinks is None else math.exp(float(call.sinks[h])))
                if total:
                    lse[b, h, i] = math.log(total)
                    out[b, h, i] = torch.tensor(weights, dtype=torch.float64) @ values[keys] / total
    return out, lse


def _logit(call: AttentionCall, product: float) -> float:
    logit = product * call.scale
    return logit if call.softcap is None else call.softcap * math.tanh(logit / call.softcap)


def call_in(
    situation: str,
    *,
    length: int = 20,
    heads: int = 4,
    groups: int = 2,
    dim: int = 4,
    dtype: torch.dtype = torch.float32,
) -> AttentionCall:
    """A call in one of `EVERYWHERE`, with a scale that is not the default, values wider than keys, NaN where dead."""
    if situation in SITUATIONS:
        call = make_call(situation, length=length, heads=heads, groups=groups, dim=dim, dtype=dtype, seed=length)
        wide = torch.cat([call.values, call.values[..., :1] + 1], dim=-1)
        return replace(call, v=wide, scale=1.3 * call.scale)
    if situation == WITHOUT_TOKENS:
        live, third = length - 2, length // 3
        # No queries; no keys; neither; queries behind all keys; and one row of both, beside them.
        extent = Extent([0, -2, 0, third, 0], [0, live, 0, live, length], [2, 3, 0, 0, 0], [live, 0, 0, third, length])
        query_len = key_len = length
    else:
        seed = int(situation.split()[1])
        query_len, key_len = (length, length + 7) if seed % 2 else (length - 3, length)
        limit = (None, 5, None, 9, 1, length)[seed % 6]
        size = {"batch": 3, "query_len": query_len, "key_len": key_len}
        extent = random_extent(seed, **size, causal=seed % 4 != 1, limit=limit)
    generator = torch.Generator().manual_seed(length)
    q = torch.randn(extent.batch, heads, query_len, dim, generator=generator)
    k = torch.randn(extent.batch, groups, key_len, dim, generator=generator)
    v = torch.randn(extent.batch, groups, key_len, dim + 1, generator=generator)
    for b, row in enumerate(rows_of(extent)):
        q[b, :, [i for i in range(query_len) if i not in row.live_queries()]] = math.nan
        for tensor in (k, v):
            tensor[b, :, [j for j in range(key_len) if j not in row.live_keys()]] = math.nan
    return AttentionCall(q.to(dtype), k.to(dtype), v.to(dtype), extent, scale=0.9)


def random_extents(seeds: range, query_len: int, key_len: int, batch: int = 3) -> Iterator[Extent]:
    """With and without causality, and with limits from the smallest to one that excludes nothing."""
    for seed in seeds:
        limit = (None, 1, 4, key_len + query_len)[seed // 2 % 4]
        size = {"batch": batch, "query_len": query_len, "key_len": key_len}
        yield random_extent(seed, **size, causal=seed % 2 == 0, limit=limit)


def of_each_head(plan: SparsePlan, heads: int, pairs: Tensor) -> Tensor:
    """A plan's pairs for every query head."""
    return torch.stack([pairs[:, h * plan.heads // heads] for h in range(heads)], dim=1)


def set_planner(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The definitions, and what runs here in their place."""
    name, _, pieces = request.param.partition(" ")
    if name == "cpu" and not cpu.is_available():
        pytest.skip(str(cpu.why_unavailable()))
    monkeypatch.setenv("GOSSAMER_PLANNER", name)
    if pieces:
        request.getfixturevalue("smallest_constants")


def raised(x: Tensor) -> Tensor:
    """Of fp32: the smallest bf16 that is no smaller, by its bits. Others are as they are."""
    if x.dtype != torch.float32:
        return x
    bits = x.contiguous().view(torch.int32)
    up = torch.where((bits >= 0) & (bits & 0xFFFF != 0), bits + 0x10000, bits)
    return (up & ~0xFFFF).view(torch.float32)
