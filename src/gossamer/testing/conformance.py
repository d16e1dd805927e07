"""What every method and every executor must satisfy, as cases and assertions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer.plan import Extent, SparsePlan

__all__ = ["SITUATIONS", "Case", "assert_accurate", "assert_keeps_diagonal", "make_case", "reference_rows"]

SITUATIONS = ("no padding", "left padding", "chunked", "static cache")
_STATIC_TAIL = 37


@dataclass(frozen=True)
class Case:
    """Inputs of one attention call, with where the tokens sit."""

    q: Tensor
    k: Tensor
    v: Tensor
    extent: Extent
    scale: float

    @property
    def query_len(self) -> int:
        return self.q.shape[2]

    @property
    def key_len(self) -> int:
        return self.k.shape[2]


def make_case(
    situation: str,
    *,
    length: int,
    heads: int,
    groups: int,
    dim: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Case:
    """Fresh random inputs in one of `SITUATIONS`.

    ``left padding`` has two rows, the first padded by a third; ``chunked`` asks for the second half of the queries;
    ``static cache`` has an empty tail, filled with NaN, which must never be read.
    """
    generator = torch.Generator().manual_seed(seed)
    batch, query_len, key_len = 1, length, length
    if situation == "no padding":
        extent = Extent.full(1, length, length)
    elif situation == "left padding":
        batch, pad = 2, length // 3
        extent = Extent([-pad, 0], [pad, 0], [length - pad, length])
    elif situation == "chunked":
        query_len = length - length // 2
        extent = Extent.full(1, query_len, length)
    elif situation == "static cache":
        key_len = length + _STATIC_TAIL
        extent = Extent([0], [0], [length])
    else:
        raise ValueError(f"unknown situation {situation!r}; known: {', '.join(SITUATIONS)}")
    q = torch.randn(batch, heads, query_len, dim, generator=generator) * 1.5
    k = torch.randn(batch, groups, key_len, dim, generator=generator)
    v = torch.randn(batch, groups, key_len, dim, generator=generator)
    if situation == "static cache":
        k[:, :, length:] = float("nan")
        v[:, :, length:] = float("nan")
    return Case(q.to(dtype), k.to(dtype), v.to(dtype), extent, dim**-0.5)


def reference_rows(case: Case, plan: SparsePlan, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The definition in fp64 for some query rows, and torch SDPA's own result for them in the input's dtype.

    Returns:
        out fp64 ``[B, H, R, D]``, lse fp64 ``[B, H, R]``, and SDPA's out under the same mask, as fp64.
    """
    batch, heads, _, dim = case.q.shape
    groups = case.k.shape[1]
    q = case.q[:, :, rows]
    mask = plan.rows_mask(rows)
    mask = mask.repeat_interleave(heads // plan.heads, dim=1)
    kpos = case.extent.key_positions(case.key_len)
    live = ((kpos >= 0) & (kpos < case.extent.key_count[:, None]))[:, None, :, None]
    k, v = torch.where(live, case.k, 0.0), torch.where(live, case.v, 0.0)
    wide_q = q.double().reshape(batch, groups, -1, dim)
    logits = (wide_q @ k.double().transpose(-1, -2) * case.scale).view(mask.shape)
    logits = logits.masked_fill(~mask, float("-inf"))
    lse = logits.logsumexp(-1)
    weights = (logits - lse.masked_fill(lse == float("-inf"), 0.0)[..., None]).exp()
    out = (weights.view(batch, groups, -1, case.key_len) @ v.double()).view(batch, heads, len(rows), -1)
    share = heads // groups
    sdpa = F.scaled_dot_product_attention(
        q, k.repeat_interleave(share, 1), v.repeat_interleave(share, 1), attn_mask=mask, scale=case.scale
    )
    return out, lse, torch.where(mask.any(-1, keepdim=True), sdpa.double(), 0.0)


def assert_accurate(case: Case, plan: SparsePlan, out: Tensor, lse: Tensor, *, most_rows: int = 100) -> None:
    """The executor's result against the definition, on all rows or an even sample with the block edges.

    fp32: at most 1e-5 of the largest output. bf16 and fp16: at most 1.5 times the error that torch's SDPA makes under
    the same mask and dtype, both against fp64.
    """
    rows = torch.arange(case.query_len)
    if case.query_len > most_rows:
        edges = torch.tensor([0, 1, 62, 63, 64, 65, 127, 128, case.query_len - 2, case.query_len - 1])
        spread = torch.linspace(0, case.query_len - 1, most_rows - len(edges)).long()
        rows = torch.cat([edges, spread]).clamp(max=case.query_len - 1).unique()
    expected, expected_lse, sdpa = reference_rows(case, plan, rows)
    got, got_lse = out[:, :, rows].double(), lse[:, :, rows].double()
    empty = expected_lse == float("-inf")
    assert torch.equal(got_lse == float("-inf"), empty), "rows that attend nothing must have lse = -inf, others not"
    assert bool((got[empty] == 0).all()), "rows that attend nothing must have out = 0"
    assert bool(got.isfinite().all()), "the output has NaN or infinity"
    size = max(float(expected.norm()), 1e-30)
    if case.q.dtype == torch.float32:
        worst = float((got - expected).abs().max()) / max(float(expected.abs().max()), 1e-30)
        assert worst <= 1e-5, f"relative error {worst:.2e} exceeds 1e-5"
    else:
        own, theirs = float((got - expected).norm()) / size, float((sdpa - expected).norm()) / size
        # Where SDPA happens to be exact (one key a row), a rounding of the last bit is still allowed.
        assert own <= 1.5 * theirs + 1e-4, f"error {own:.2e} exceeds 1.5 times SDPA's {theirs:.2e}"
    tolerance = 1e-4 if case.q.dtype == torch.float32 else 2e-2
    assert bool(((got_lse - expected_lse)[~empty].abs() <= tolerance).all()), "lse is off"


def assert_keeps_diagonal(case: Case, plan: SparsePlan) -> None:
    """Every live query attends at least its own key."""
    own = case.extent.query_positions(case.query_len) + case.extent.key_start[:, None]
    live = (own >= case.extent.key_start[:, None]) & (own < (case.extent.key_start + case.extent.key_count)[:, None])
    step = max(1, (1 << 25) // max(1, plan.heads * case.key_len))
    for at in range(0, case.query_len, step):
        stop = min(at + step, case.query_len)
        mask = plan.rows_mask(torch.arange(at, stop))
        index = own[:, at:stop].clamp(0, case.key_len - 1)[:, None, :, None].expand(*mask.shape[:3], 1)
        kept = mask.gather(3, index)[..., 0] | ~live[:, None, at:stop]
        if not bool(kept.all()):
            b, h, row = (int(n) for n in (~kept).nonzero()[0])
            raise AssertionError(f"batch row {b}, head {h}: query {at + row} does not attend its own key")
