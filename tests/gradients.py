"""What gradients must be: torch.autograd over dense attention in fp64 under a plan's boolean mask; and how near."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from definitions import of_each_head
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gossamer import AttentionCall, SparsePlan
from gossamer.plan import Grid, ceil_div

NAMES: tuple[str, ...] = ("q", "k", "v", "sinks", "bias")
# Of the gradient's norm: rounding of fp64; of fp32 sums; beyond those see `assert_near`.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


class Reaching(NamedTuple):
    """Gradients that reach the results of attention."""

    out: Tensor
    lse: Tensor | None


def plan_under(
    call: AttentionCall,
    *,
    seed: int = 3,
    heads: int | None = None,
    block: int = 4,
    permuted: bool | str = False,
    pruned_mean: bool = False,
) -> SparsePlan:
    """A plan by chance under a call's extent: blocks, and unless pruned blocks have means, columns and bands.

    Args:
        permuted: of queries and keys, or of ``"q"`` or ``"k"`` alone.
    """
    orders = permuted if isinstance(permuted, str) else "qk" * permuted
    heads, generator = heads or call.heads, torch.Generator().manual_seed(seed)
    grid = Grid(call.extent, block, block)
    rows = ceil_div(call.query_len, block) if "q" in orders else grid.query_blocks
    width = ceil_div(call.key_len, block) if "k" in orders else grid.key_blocks
    more: dict[str, Any] = {"pruned_mean": pruned_mean}
    if not pruned_mean:
        lists = call.batch * heads * ceil_div(rows, 2)
        columns = torch.rand(lists, call.extent.longest, generator=generator) < 0.2
        more |= {
            "column_group": 2,
            "column_indptr": torch.nn.functional.pad(columns.sum(dim=1).cumsum(0), (1, 0)),
            "column_indices": columns.nonzero()[:, 1].to(torch.int32),
            "sink": [n % 3 for n in range(heads)],
            "window": [n % 2 * 3 for n in range(heads)],
        }
    for name in orders:
        length = call.query_len if name == "q" else call.key_len
        keys = torch.rand(call.batch, heads, length, generator=generator)
        more[f"{name}_order"] = keys.argsort(dim=-1).to(torch.int32)
    mask = torch.rand(call.batch, heads, rows, width, generator=generator) < 0.3
    size = {"block_q": block, "block_k": block}
    return SparsePlan.from_block_mask(mask, call.query_len, call.key_len, extent=call.extent, **size, **more)


def reaching(call: AttentionCall, *, lse: bool = True, seed: int = 0) -> Reaching:
    generator = torch.Generator().manual_seed(seed)
    shape = (*call.q.shape[:3], call.values.shape[-1])
    out = torch.randn(shape, generator=generator, dtype=torch.float64).to(call.q.dtype)
    wide = torch.float64 if call.q.dtype == torch.float64 else torch.float32
    return Reaching(out, torch.randn(shape[:3], generator=generator, dtype=torch.float64).to(wide) if lse else None)


def with_extras(call: AttentionCall, *, sinks: bool = True, softcap: bool = True, bias: bool = True) -> AttentionCall:
    """With what else has a gradient; the bias of dead slots is NaN."""
    generator = torch.Generator().manual_seed(7)
    given = torch.randn(call.k.shape[:3], generator=generator, dtype=torch.float64)
    given.masked_fill_(~call.extent.live_keys(call.key_len)[:, None], math.nan)
    wide = torch.float64 if call.q.dtype == torch.float64 else torch.float32
    return replace(
        call,
        sinks=torch.randn(call.heads, generator=generator, dtype=torch.float64).to(wide) if sinks else None,
        softcap=2.5 if softcap else None,
        bias=given.to(wide) if bias else None,
    )


def attention(call: AttentionCall, plan: SparsePlan, leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Dense, with keys repeated for every query head, under the plan's mask; and as `SparsePlan.pruned_mean` says."""
    scores = _capped(leaves["q"] @ leaves["k"].repeat_interleave(call.share, dim=1).transpose(-1, -2), call)
    values = leaves["v"].repeat_interleave(call.share, dim=1)
    pairs = of_each_head(plan, call.heads, plan.to_mask())
    if plan.pruned_mean:
        more, more_values, more_pairs = _means(call, plan, leaves)
        scores, values = torch.cat([scores, more], dim=-1), torch.cat([values, more_values], dim=2)
        pairs = torch.cat([pairs, more_pairs], dim=-1)
    if "bias" in leaves:
        scores = scores + leaves["bias"].repeat_interleave(call.share, dim=1)[:, :, None]
    some = pairs.any(dim=-1, keepdim=True)
    scores = torch.where(pairs, scores, -math.inf)
    if "sinks" in leaves:
        sinks = leaves["sinks"].view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, sinks], dim=-1)
    else:
        weights = torch.where(some, scores, 0.0)
    lse = torch.logsumexp(weights, dim=-1)
    return torch.where(some, weights.softmax(dim=-1)[..., : scores.shape[-1]] @ values, 0.0), lse


def _capped(products: Tensor, call: AttentionCall) -> Tensor:
    logits = products * call.scale
    return logits if call.softcap is None else call.softcap * torch.tanh(logits / call.softcap)


def _means(call: AttentionCall, plan: SparsePlan, leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, values and pairs of the means of pruned blocks."""
    blocks = plan.grid.key_blocks
    scores = torch.zeros(*call.q.shape[:3], blocks, dtype=torch.float64)
    values = torch.zeros(call.batch, call.heads, blocks, call.values.shape[-1], dtype=torch.float64)
    pairs = torch.zeros(scores.shape, dtype=torch.bool)
    pruned = of_each_head(plan, call.heads, plan.pruned_blocks())
    columns, means = [], []
    for n in range(blocks):
        column, mean = [], []
        for b in range(call.batch):
            start, count = int(call.extent.key_start[b]), int(call.extent.key_count[b])
            low, high = start + min(n * plan.block_k, count), start + min((n + 1) * plan.block_k, count)
            k, v = (leaves[name][b, :, low:high].repeat_interleave(call.share, dim=0) for name in "kv")
            length = max(1, high - low)
            logits = _capped((leaves["q"][b] @ (k.sum(dim=1) / length)[..., None])[..., 0], call)
            column.append(logits + math.log(length))
            mean.append(v.sum(dim=1) / length)
            for i in range(call.query_len):
                if bool(call.extent.live_queries(call.query_len)[b, i]):
                    row = plan.row_blocks(torch.tensor([i]))[b, 0, 0]
                    pairs[b, :, i, n] = pruned[b, :, row, n]
        columns.append(torch.stack(column))
        means.append(torch.stack(mean))
    if blocks:
        scores, values = torch.stack(columns, dim=-1), torch.stack(means, dim=2)
    return scores, values, pairs


def expected_gradients(call: AttentionCall, plan: SparsePlan, given: Reaching) -> dict[str, Tensor]:
    """Of q, k, v, and of sinks and bias where the call has them, in fp64."""
    inputs = {name: getattr(call, name) for name in NAMES if getattr(call, name) is not None}
    leaves = {name: x.detach().double().nan_to_num().requires_grad_() for name, x in inputs.items()}
    out, lse = attention(call, plan, leaves)
    live = call.extent.live_queries(call.query_len)[:, None].expand(lse.shape)
    reached = of_each_head(plan, call.heads, plan.to_mask()).any(dim=-1) if call.sinks is None else live
    if plan.pruned_mean:
        reached = live
    loss = (out * given.out.double().nan_to_num()).sum()
    if given.lse is not None:
        loss = loss + torch.where(live & reached, lse, 0.0).mul(given.lse.double().nan_to_num()).sum()
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if one is None else one
        for (name, leaf), one in zip(leaves.items(), found, strict=True)
    }


def assert_near(
    call: AttentionCall, plan: SparsePlan, given: Reaching, found: dict[str, Tensor | None], *, more: float = 1.0
) -> None:
    """Gradients against `expected_gradients`.

    fp32: 1e-5 of the norm. bf16 and fp16: 1.5 times the error that torch's dense attention makes under the same mask
    and dtype, or 1% where it cannot be asked (means, the gradient of an LSE), and one rounding of the result.
    """
    expected = expected_gradients(call, plan, given)
    assert {name for name, x in found.items() if x is not None} == set(expected)
    for name, exact in expected.items():
        got = found[name]
        assert got is not None
        assert got.shape == exact.shape, name
        assert bool(got.isfinite().all()), f"d{name} has NaN or infinity"
        size = max(float(exact.norm()), 1e-30)
        allowed = TOLERANCE.get(call.q.dtype)
        if allowed is None:
            allowed = 1.5 * _error_of_sdpa(call, plan, given, name) + torch.finfo(call.q.dtype).eps / 2
        error = float((got.double() - exact).norm()) / size
        # Of gradients that cancel to nothing.
        floor = (1e-14 if call.q.dtype == torch.float64 else 1e-6) * exact.numel() ** 0.5 / size
        assert error <= more * allowed + floor, f"d{name}: error {error:.2e} of its norm, {allowed:.2e} allowed"


def _error_of_sdpa(call: AttentionCall, plan: SparsePlan, given: Reaching, name: str) -> float:
    """Of torch's flash kernel, which saves the output in the dtype of the call as we do; without sinks and the like."""
    if plan.pruned_mean or given.lse is not None or name not in "qkv":
        return 1e-2
    plain = replace(call, sinks=None, softcap=None, bias=None)
    exact = expected_gradients(plain, plan, given)[name]
    q, k, v = (x.detach().nan_to_num().requires_grad_() for x in (call.q, call.k, call.values))
    pairs = of_each_head(plan, call.heads, plan.to_mask())
    some = pairs.any(dim=-1, keepdim=True)
    wide = [F.pad(x, (0, call.values.shape[-1] - x.shape[-1])) for x in (q, k, v)]
    wide[1:] = [x.repeat_interleave(call.share, dim=1) for x in wide[1:]]
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = F.scaled_dot_product_attention(*wide, attn_mask=pairs | ~some, scale=call.scale)
    torch.where(some, out, 0.0).backward(given.out.nan_to_num())
    theirs = {"q": q, "k": k, "v": v}[name].grad
    assert theirs is not None
    return float((theirs.double() - exact).norm()) / max(float(exact.norm()), 1e-30)
