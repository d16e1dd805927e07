"""What every method and every backend must satisfy, as calls and assertions."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from gossamer.backends.torch.attend import attend_rows
from gossamer.backends.torch.dense import under_mask
from gossamer.call import AttentionCall
from gossamer.plan import Extent, SparsePlan
from gossamer.rotary import Rotary

__all__ = ["SITUATIONS", "assert_accurate", "assert_keeps_diagonal", "make_call"]

SITUATIONS = (
    "no padding",
    "left padding",
    "right padding",
    "chunk",
    "padded chunk",
    "static cache",
    "scale, sinks and soft-cap",
    "model window",
    "bidirectional",
    "cross-attention",
)
_STATIC_TAIL = 37


def _extent(situation: str, length: int) -> tuple[Extent, int, int]:
    """The extent of a situation, and its numbers of query rows and key slots."""
    pad, half = length // 3, length // 2
    live, chunk, short = length - pad, length - half, (length - half + 1) // 2
    whole = Extent.full(1, length, length)
    extents = {
        "no padding": (whole, length, length),
        "left padding": (Extent([-pad, 0], [live, length], [pad, 0], [live, length]), length, length),
        "right padding": (Extent([0, 0], [length, live], [0, 0], [length, live]), length, length),
        "chunk": (Extent.full(1, chunk, length), chunk, length),
        # Row 0 has left padding in the cache, row 1 right padding in the chunk.
        "padded chunk": (
            Extent([half - pad, half], [chunk, short], [pad, 0], [live, half + short]),
            chunk,
            length,
        ),
        "static cache": (Extent([0], [length], [0], [length]), length, length + _STATIC_TAIL),
        "scale, sinks and soft-cap": (whole, length, length),
        "model window": (Extent.full(1, length, length, limit=pad + 1), length, length),
        "bidirectional": (Extent([-pad, 0], [live, live], [pad, 0], [live, live], causal=False), length, length),
        "cross-attention": (Extent.full(1, chunk, length, causal=False), chunk, length),
    }
    if situation not in extents:
        raise ValueError(f"unknown situation {situation!r}; known: {', '.join(SITUATIONS)}")
    return extents[situation]


def make_call(
    situation: str,
    *,
    length: int,
    heads: int,
    groups: int,
    dim: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> AttentionCall:
    """Fresh random inputs in one of `SITUATIONS`, on about ``length`` keys.

    Padded ones have two batch rows, of which one is short by a third; chunks ask for the second half of the queries,
    from a position that is no multiple of a block. Whatever is dead holds NaN, and must never be read.
    """
    generator = torch.Generator().manual_seed(seed)
    extent, query_len, key_len = _extent(situation, length)
    q = torch.randn(extent.batch, heads, query_len, dim, generator=generator) * 1.5
    k = torch.randn(extent.batch, groups, key_len, dim, generator=generator)
    v = torch.randn(extent.batch, groups, key_len, dim, generator=generator)
    q.masked_fill_(~extent.live_queries(query_len)[:, None, :, None], float("nan"))
    for tensor in (k, v):
        tensor.masked_fill_(~extent.live_keys(key_len)[:, None, :, None], float("nan"))
    tensors = q.to(dtype), k.to(dtype), v.to(dtype)
    call = AttentionCall(*tensors, extent, layer=0, rotary=Rotary.of_base(dim))
    if situation == "scale, sinks and soft-cap":
        sinks = torch.randn(heads, generator=generator)
        return replace(call, scale=1.7 * call.scale, softcap=4.0, sinks=sinks)
    return call


def assert_accurate(call: AttentionCall, plan: SparsePlan, out: Tensor, lse: Tensor, *, most_rows: int = 100) -> None:
    """A backend's result against the definition in fp64, on all rows or an even sample with the block edges.

    fp32: at most 1e-5 of the largest output. bf16 and fp16: at most 1.5 times the error that torch's dense attention
    makes under the same mask and dtype, both against fp64; 1% where the plan has attributes, which torch has not. A
    backend may round products of a plan that is quantised to int8 or not: it is held to the one that it is nearer to,
    as closely as any other.
    """
    rows = torch.arange(call.query_len)
    if call.query_len > most_rows:
        edges = torch.tensor([0, 1, 62, 63, 64, 65, 127, 128, call.query_len - 2, call.query_len - 1])
        spread = torch.linspace(0, call.query_len - 1, most_rows - len(edges)).long()
        rows = torch.cat([edges, spread]).clamp(max=call.query_len - 1).unique()
    got, got_lse = out[:, :, rows].double(), lse[:, :, rows].double()
    plan, expected, expected_lse = _meant(call, plan, rows, got)
    mask = plan.rows_mask(rows).repeat_interleave(call.heads // plan.heads, dim=1)
    empty = ~mask.any(dim=-1) & (expected == 0).all(dim=-1)  # one without pairs may have means
    assert torch.equal(got_lse == float("-inf"), expected_lse == float("-inf")), "lse is -inf where nothing is attended"
    assert bool((got[empty] == 0).all()), "rows that attend nothing must have out = 0"
    assert bool(got.isfinite().all()), "the output has NaN or infinity"
    if call.q.dtype == torch.float32:
        worst = float((got - expected).abs().max()) / max(float(expected.abs().max()), 1e-30)
        assert worst <= 1e-5, f"relative error {worst:.2e} exceeds 1e-5"
    elif plan.pruned_mean or plan.skip is not None or plan.quantised:
        own = float((got - expected).norm()) / max(float(expected.norm()), 1e-30)
        assert own <= 1e-2, f"relative error {own:.2e} exceeds 1e-2"
    else:
        q, k, v = (torch.where(t.isnan(), 0.0, t) for t in (call.q[:, :, rows], call.k, call.values))
        theirs = under_mask(q, k, v, mask | empty[..., None], call.scale, call.sinks, call.softcap).double()
        theirs = torch.where(empty[..., None], 0.0, theirs)
        size = max(float(expected.norm()), 1e-30)
        own, other = float((got - expected).norm()) / size, float((theirs - expected).norm()) / size
        # Where dense attention happens to be exact (one key a row), a rounding of the last bit is still allowed.
        assert own <= 1.5 * other + 1e-4, f"error {own:.2e} exceeds 1.5 times dense attention's {other:.2e}"
    tolerance = 1e-4 if call.q.dtype == torch.float32 else 2e-2
    some = expected_lse > float("-inf")
    assert bool(((got_lse - expected_lse)[some].abs() <= tolerance).all()), "lse is off"


def _meant(call: AttentionCall, plan: SparsePlan, rows: Tensor, got: Tensor) -> tuple[SparsePlan, Tensor, Tensor]:
    """The plan and what some rows should be, out and lse: of a quantised plan with integers or without them, whichever
    is nearer to what was got."""
    ordinary = plan.with_attributes(skip=plan.skip) if plan.quantised else plan
    expected, lse = attend_rows(_cast(call, torch.float64), ordinary, rows)
    if not plan.quantised:
        return plan, expected, lse
    # In fp32, as backends have it: numbers next to a half round alike.
    rounded, lse_of_rounded = (x.double() for x in attend_rows(_cast(call, torch.float32), plan, rows))
    if float((got - rounded).norm()) < float((got - expected).norm()):
        return plan, rounded, lse_of_rounded
    return ordinary, expected, lse


def _cast(call: AttentionCall, dtype: torch.dtype) -> AttentionCall:
    """In a dtype, with zeros for what is dead."""
    q, k, v = (torch.where(t.isnan(), 0.0, t.to(dtype)) for t in (call.q, call.k, call.values))
    return replace(call, q=q, k=k, v=v, sinks=None if call.sinks is None else call.sinks.to(dtype))


def assert_keeps_diagonal(call: AttentionCall, plan: SparsePlan) -> None:
    """In causal self-attention every live query attends at least its own key; in any other, at least one key."""
    extent = call.extent
    own = extent.query_positions(call.query_len) + extent.key_start[:, None]
    live = extent.live_queries(call.query_len) & extent.allowed(torch.arange(call.query_len), call.key_len).any(-1)
    step = max(1, (1 << 25) // max(1, plan.heads * call.key_len))
    for start in range(0, call.query_len, step):
        stop = min(start + step, call.query_len)
        mask = plan.rows_mask(torch.arange(start, stop))
        if extent.causal:
            index = own[:, start:stop].clamp(0, call.key_len - 1)[:, None, :, None].expand(*mask.shape[:3], 1)
            mask = mask.gather(3, index)
        kept = mask.any(dim=-1) | ~live[:, None, start:stop]
        if not bool(kept.all()):
            b, h, row = (int(n) for n in (~kept).nonzero()[0])
            what = "its own key" if extent.causal else "any key"
            raise AssertionError(f"batch row {b}, head {h}: query {start + row} does not attend {what}")
