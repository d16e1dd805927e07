"""Dense attention under an explicit mask: what gradients, dropout-free fallbacks and short calls run on."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gossamer.backends.gradient import in_forward_mode
from gossamer.backends.torch.attend import cleared, cleared_queries, wide
from gossamer.call import AttentionCall
from gossamer.plan import Extent

__all__ = ["dense", "is_plain", "needs_mask", "sdpa", "under_mask"]


def dense(call: AttentionCall) -> Tensor:
    """Every pair that the call's extent allows: ``[B, H, S, Dv]``, 0 for rows that attend nothing. Differentiable.

    torch's scaled_dot_product_attention, or plain torch where there are sinks, a soft-cap or a bias, which it lacks.
    Holds a bool mask ``[B, 1, S, T]`` unless the same keys are live in all rows and the queries are all or the last of
    them. Dead rows and slots may hold anything.
    """
    call = _trimmed(call)
    if not needs_mask(call):
        causal = call.extent.causal and call.query_len > 1
        return sdpa(call.q, call.k, call.values, call.scale, is_causal=causal)
    mask = call.extent.allowed(torch.arange(call.query_len, device="cpu"), call.key_len)[:, None].to(call.device)
    some = mask.any(dim=-1, keepdim=True)
    # Rows without any key attend all of them, so that neither they nor their gradients are NaN; then they count as 0.
    q, k, v = cleared_queries(call), cleared(call.k, call), cleared(call.values, call)
    bias = None if call.bias is None else cleared(call.bias[..., None], call)[..., 0]
    out = under_mask(q, k, v, mask | ~some, call.scale, call.sinks, call.softcap, bias)
    return out if bool(some.all()) else torch.where(some, out, 0.0)


def _trimmed(call: AttentionCall) -> AttentionCall:
    """Without the slots before and behind the live keys of all rows, as a static cache has: views, not copies."""
    extent = call.extent
    some = extent.key_count > 0
    if not bool(some.any()):
        return call
    begin, end = int(extent.key_start[some].min()), int((extent.key_start + extent.key_count)[some].max())
    if end - begin == call.key_len:
        return call
    starts = (extent.key_start - begin).clamp(min=0)  # of rows without keys, anywhere
    counts, keys = extent.query_count, extent.key_count
    inner = Extent(extent.query_start, counts, starts, keys, causal=extent.causal, limit=extent.limit)
    bias = None if call.bias is None else call.bias[:, :, begin:end]
    return replace(call, k=call.k[:, :, begin:end], v=call.values[:, :, begin:end], extent=inner, bias=bias)


def is_plain(call: AttentionCall) -> bool:
    """Whether the logits are those of SDPA: no sinks, no soft-cap, no bias."""
    return call.sinks is None and call.softcap is None and call.bias is None


def needs_mask(call: AttentionCall) -> bool:
    """Whether SDPA's own causality does not describe the call."""
    extent = call.extent
    if not is_plain(call) or not extent.is_trivial(call.query_len, call.key_len):
        return True
    first = extent.query_start  # anywhere, where attention is not causal
    reach = torch.maximum(first + call.query_len, call.key_len - first)
    if extent.limit is not None and bool((reach > extent.limit).any()):
        return True
    return extent.causal and call.query_len != 1 and call.query_len != call.key_len


def under_mask(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Dense attention under a bool mask ``[B, 1, S, T]`` (or broadcastable); None means no mask. Differentiable.

    A bias is of each key, ``[B, G, T]``.
    """
    if sinks is None and softcap is None and bias is None:
        return sdpa(q, k, v, scale, attn_mask=mask)
    batch, heads, query_len, dim = q.shape
    groups, key_len = k.shape[1], k.shape[2]
    rows = q.reshape(batch, groups, -1, dim)
    logits = wide(rows @ k.transpose(-1, -2)).mul(scale).view(batch, heads, query_len, key_len)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if bias is not None:
        logits = logits + bias.to(logits).repeat_interleave(heads // groups, dim=1)[:, :, None]
    if mask is not None:
        logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
    if sinks is not None:
        extra = sinks.to(logits).clamp(max=torch.finfo(logits.dtype).max)  # infinity takes all, and is not subtracted
        extra = extra.view(1, heads, 1, 1).expand(batch, heads, query_len, 1)
        weights = torch.cat([logits, extra], dim=-1).softmax(dim=-1)[..., :-1]
    else:
        weights = logits.softmax(dim=-1)
    weights = weights.to(v.dtype).view(batch, groups, -1, key_len)
    return (weights @ v).view(batch, heads, query_len, v.shape[-1])


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """torch's scaled_dot_product_attention; also where derivatives are computed forward, which its kernels lack."""
    # Sizes are tensors while torch.jit traces.
    grouped = bool(q.shape[1] != k.shape[1])
    with sdpa_kernel(SDPBackend.MATH) if in_forward_mode() else nullcontext():
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=attn_mask, dropout_p=dropout, is_causal=is_causal, scale=scale, enable_gqa=grouped
        )
