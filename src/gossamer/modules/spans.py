"""Combiner's summaries, and its attention where summaries differ by row of a grid, by level of a tree, or by query."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["attend_clusters", "attend_grid", "attend_tree", "summarise"]

_NONE = float("-inf")


def summarise(q: Tensor, k: Tensor, v: Tensor, live: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Key and value that stand for a span: its largest key, and what its largest query attends in it.

    Args:
        q, k, v: ``[.., s, D]``, the tokens of each span.
        live: bool ``[.., s]``. A span with no live token gets zeros.

    Returns:
        ``[.., D]`` and ``[.., Dv]``.
    """
    empty = ~live.any(-1, keepdim=True)
    most_q, most_k = (x.masked_fill(~live[..., None], _NONE).amax(-2).masked_fill(empty, 0.0) for x in (q, k))
    logits = (most_q[..., None, :] @ k.transpose(-1, -2))[..., 0, :] * scale
    weights = logits.masked_fill(~live, _NONE).masked_fill(empty, 0.0).softmax(-1)
    return most_k, (weights[..., None, :] @ v)[..., 0, :].masked_fill(empty, 0.0)


def _softmax(parts: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Weights of one softmax over the last dimensions of all logits, where they are seen; none seen: zeros."""
    logits = torch.cat([x.masked_fill(~seen, _NONE) for x, seen in parts], dim=-1)
    empty = (logits == _NONE).all(-1, keepdim=True)
    weights = logits.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
    return list(weights.split([x.shape[-1] for x, _ in parts], dim=-1))


def _of_size(seen: Tensor, sizes: Tensor, by_size: bool) -> Tensor | float:
    return sizes.clamp(min=1).log().where(seen, 0.0) if by_size else 0.0


def _most_of_others(x: Tensor, dim: int, *, before: bool) -> Tensor:
    """Largest of what stands before each place along a dimension, and, unless ``before``, after it; none: -inf."""
    none = torch.full_like(x.narrow(dim, 0, 1), _NONE)
    most = torch.cat([none, x.narrow(dim, 0, x.shape[dim] - 1).cummax(dim).values], dim)
    return most if before else torch.maximum(most, _most_of_others(x.flip(dim), dim, before=True).flip(dim))


def attend_grid(
    q: Tensor, k: Tensor, v: Tensor, live: Tensor, *, width: int, order: str, causal: bool, scale: float, by_size: bool
) -> Tensor:
    """Combiner-Axial of ``[B, H, T, D]`` in rows of ``width`` tokens; ``live`` is ``[B, T]``.

    Memory and time O(T (T / width + width)); see `gossamer.modules.combiner.Axial` for the orders.
    """
    tokens = q.shape[2]
    pad = -tokens % width
    q, k, v = (torch.nn.functional.pad(x, (0, 0, 0, pad)).unflatten(2, (-1, width)) for x in (q, k, v))
    live = torch.nn.functional.pad(live, (0, pad)).view(len(live), 1, -1, width)  # [B, 1, rows, columns]
    row, column = (torch.arange(n, device=q.device) for n in live.shape[2:])
    rows = row[:, None] > row if causal else row[:, None] != row  # [r, a]: other rows that r sees
    columns = column[:, None] != column  # [c, e]
    ahead = column[:, None] >= column if causal else torch.ones_like(columns)
    parts = [(torch.einsum("bhrcd,bhred->bhrce", q, k) * scale, ahead & live[..., None, :])]
    in_column = rows[:, None] & live.movedim(2, 3)[:, :, None]  # [B, 1, r, c, a]
    if order != "rowmajor":
        parts.append((torch.einsum("bhrcd,bhacd->bhrca", q, k) * scale, in_column.expand(-1, -1, -1, width, -1)))
    dead = ~live[..., None]
    by_row = order == "horizontal"
    given = {"dim": 3, "before": False} if by_row else {"dim": 2, "before": causal}
    most_q, most_k = (_most_of_others(x.masked_fill(dead, _NONE), **given) for x in (q, k))
    most_q, most_k = (x.masked_fill(x == _NONE, 0.0) for x in (most_q, most_k))
    if by_row:  # of row a without column c
        inside = columns & live[..., None, :]  # [B, 1, a, c, e]
        logits = torch.einsum("bhacd,bhaed->bhace", most_q, k) * scale
        mean = torch.einsum("bhace,bhaed->bhacd", _softmax([(logits, inside)])[0], v)
        size = inside.sum(-1).movedim(2, 3)[:, :, None]  # [B, 1, 1, c, a]
        seen = rows[:, None] & (size > 0)
        logits = torch.einsum("bhrcd,bhacd->bhrca", q, most_k) * scale
    else:  # of column e in the other rows
        logits = torch.einsum("bhred,bhaed->bhrea", most_q, k) * scale
        mean = torch.einsum("bhrea,bhaed->bhred", _softmax([(logits, in_column)])[0], v)
        size = in_column.sum(-1)[..., None, :]  # [B, 1, r, 1, e]
        seen = (size > 0) & (columns if order == "vertical" else torch.ones_like(columns))
        logits = torch.einsum("bhrcd,bhred->bhrce", q, most_k) * scale
    parts.append((logits + _of_size(size > 0, size.to(q.dtype), by_size), seen))
    weights = _softmax(parts)
    out = torch.einsum("bhrce,bhred->bhrcd", weights[0], v)
    if order != "rowmajor":
        out = out + torch.einsum("bhrca,bhacd->bhrcd", weights[1], v)
    out = out + torch.einsum("bhrca,bhacd->bhrcd" if by_row else "bhrce,bhred->bhrcd", weights[-1], mean)
    return out.flatten(2, 3)[:, :, :tokens]


def attend_tree(q: Tensor, k: Tensor, v: Tensor, live: Tensor, *, causal: bool, scale: float, by_size: bool) -> Tensor:
    """Combiner-Logsparse: each token itself, and at each level of a binary tree the other half of its node.

    Time O(T log T); T times log T summaries are gathered.
    """
    tokens = q.shape[2]
    levels = max(0, tokens - 1).bit_length()
    pad = (1 << levels) - tokens
    whole = [torch.nn.functional.pad(x, (0, 0, 0, pad)) for x in (q, k, v)]
    alive = torch.nn.functional.pad(live, (0, pad))[:, None]
    place = torch.arange(tokens, device=q.device)
    logits, seen, values = [(q * k).sum(-1) * scale], [live[:, None].expand(q.shape[:3])], [v]
    for level in range(levels):
        inside = alive.unflatten(-1, (-1, 1 << level))
        key, value = summarise(*(x.unflatten(2, (-1, 1 << level)) for x in whole), live=inside, scale=scale)
        sibling = (place >> level) ^ 1
        size = inside.sum(-1)[..., sibling]
        allowed = (size > 0) & ((place >> level & 1 == 1) if causal else torch.ones_like(place, dtype=torch.bool))
        logit = (q * key[:, :, sibling]).sum(-1) * scale
        logits.append(logit + _of_size(size > 0, size.to(q.dtype), by_size))
        seen.append(allowed.expand(q.shape[:3]))
        values.append(value[:, :, sibling])
    (weights,) = _softmax([(torch.stack(logits, -1), torch.stack(seen, -1))])
    return sum((weights[..., n, None] * value for n, value in enumerate(values)), torch.zeros_like(v))


def attend_clusters(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    live: Tensor,
    of_query: Tensor,
    of_key: Tensor,
    *,
    clusters: int,
    causal: bool,
    scale: float,
    by_size: bool,
) -> Tensor:
    """Combiner-Learnable: keys of a query's own cluster by themselves, each other cluster by a summary.

    The definition, masked and dense, as a causal summary differs from query to query: O(T^2 clusters) time, and T
    times ``clusters`` summaries at once.

    Args:
        of_query, of_key: int64 ``[B, H, T]``, clusters of queries and keys.
    """
    place = torch.arange(q.shape[2], device=q.device)
    seen = live[:, None, None] & (place[:, None] >= place if causal else torch.ones_like(place[:, None] + place) > 0)
    own = seen & (of_query[..., None] == of_key[..., None, :])
    logits, shown, values = [], [], []
    for cluster in range(clusters):
        members = live[:, None] & (of_key == cluster)
        masked_q, masked_k = (x.masked_fill(~members[..., None], _NONE) for x in (q, k))
        if causal:
            most_q, most_k = masked_q.cummax(2).values, masked_k.cummax(2).values
        else:
            most_q, most_k = (x.amax(2, keepdim=True).expand_as(q) for x in (masked_q, masked_k))
        most_q, most_k = (x.masked_fill(x == _NONE, 0.0) for x in (most_q, most_k))
        inside = seen & members[..., None, :]
        (weights,) = _softmax([(most_q @ k.transpose(-1, -2) * scale, inside)])
        size = inside.sum(-1)
        logits.append((q * most_k).sum(-1) * scale + _of_size(size > 0, size.to(q.dtype), by_size))
        shown.append((size > 0) & (of_query != cluster))
        values.append(weights @ v)
    direct, summed = _softmax(
        [(q @ k.transpose(-1, -2) * scale, own), (torch.stack(logits, -1), torch.stack(shown, -1))]
    )
    return direct @ v + torch.einsum("bhtc,bhtcd->bhtd", summed, torch.stack(values, 3))
