"""The mask function: what transformers says about padding, caches and windows, in its smallest form.

| returned | meaning |
|---|---|
| None | causal; the queries are the last S keys, and every key is live |
| bool ``[B, T]`` | causal; the live keys. The last column that is live in any row is the last query's own slot |
| int32 ``[B, T]`` | the same under a sliding window: a live key holds the window, a dead one 0; the last T columns |
| int64 ``[B, T]`` | every live key for every query (encoders, cross-attention), within the window that it holds |
| bool ``[B, 1, S, T]`` | anything else, pair by pair; attention then runs dense |

The fifth form is made under the name ``gossamer_bidirectional`` alone, which ``enable(bidirectional=True)`` asks for.

The window travels with the mask because several models (Qwen2-MoE, PhiMoE, Doge) mask with a window and do not pass
``sliding_window`` to their attention function. Keys that a rolling cache has dropped keep columns in front, because
``generate`` hands a mask that it made for a static cache back as an ``attention_mask``, whose columns count from the
first token.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
    sliding_window_bidirectional_overlay,
    sliding_window_overlay,
)

from gossamer.plan import Extent
from gossamer.plan.integers import MOST

__all__ = [
    "compact_mask",
    "compact_mask_bidirectional",
    "extent_of",
    "extent_of_one_query",
    "is_bidirectional",
    "plain_window",
    "two_sided_pairs",
]

_INTERSECTION = and_masks().__code__
_WINDOW = sliding_window_overlay(1).__code__
_TWO_SIDED_WINDOW = sliding_window_bidirectional_overlay(1).__code__


def plain_window(mask_function: Callable[..., Any]) -> tuple[bool, int | None]:
    """Whether a mask function is plainly causal, and its sliding window if it has one.

    A whitelist: `causal_mask_function` itself, or its intersection with `sliding_window_overlay`. Packed sequences,
    chunked attention and image blocks are none of these, whatever they look like.
    """
    return _window_on(mask_function, causal_mask_function, _WINDOW)


def _window_on(mask_function: Callable[..., Any], base: Callable[..., Any], window: Any) -> tuple[bool, int | None]:
    """Whether a mask function is `base`, or that with a window of a given kind on it; and the window."""
    if mask_function is base:
        return True, None
    parts = _closure(mask_function, _INTERSECTION).get("mask_functions", ())
    windows = [_closure(part, window).get("sliding_window") for part in parts if part is not base]
    if len(parts) == 2 and len(windows) == 1 and isinstance(windows[0], int):
        return True, windows[0]
    return False, None


def _closure(function: Callable[..., Any], code: Any) -> dict[str, Any]:
    """The closure variables of a function that was compiled from `code`; empty for any other function."""
    if not inspect.isfunction(function) or function.__code__ is not code:
        return {}
    return dict(inspect.getclosurevars(function).nonlocals)


def compact_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    *,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Tensor | None:
    """The mask of one forward pass, in one of the four forms above. transformers calls it with keywords.

    A single query, and a caller that wants the whole mask (``allow_is_causal_skip=False``: packed sequences,
    overlays, a compiled decode step), get what ``sdpa`` gets. Reading ``q_offset`` and ``attention_mask`` synchronises
    with the device, once a forward pass, so that a prefill leaves the graph of ``torch.compile`` here.

    Args:
        batch_size, q_length, kv_length: B, S, T.
        q_offset, kv_offset: position of the first query and of the first key slot.
        mask_function: transformers' rule for a pair of positions.
        attention_mask: ``[B, tokens seen so far]``, True where a token is no padding.
    """
    mask: dict[str, Any] = {
        "batch_size": batch_size,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": mask_function,
        "attention_mask": attention_mask,
        **kwargs,
        "allow_is_bidirectional_skip": False,
    }
    if q_length == 1 or not allow_is_causal_skip:
        return sdpa_mask(**mask, allow_is_causal_skip=allow_is_causal_skip)
    return cast(Any, _prefill_mask)(**mask)


@torch.compiler.disable
def _prefill_mask(**mask: Any) -> Tensor | None:
    plain, window = plain_window(mask["mask_function"])
    first, given = mask["kv_offset"], mask["attention_mask"]
    if plain and (first == 0 or window is not None) and (given is None or given.ndim == 2):
        live = _live_keys(
            mask["batch_size"],
            mask["q_length"],
            mask["kv_length"],
            int(mask["q_offset"]),
            first,
            given,
            mask.get("device", "cpu"),
        )
        if live is not None and window is not None and window < first + mask["kv_length"]:
            return torch.nn.functional.pad(live.to(torch.int32) * window, (first, 0), value=window)
        if live is not None:
            return None if bool(live.all()) else live
    return sdpa_mask(**mask, allow_is_causal_skip=False)


def _live_keys(
    batch: int, q_length: int, kv_length: int, q_offset: int, kv_offset: int, attention_mask: Tensor | None, device: Any
) -> Tensor | None:
    """The live keys, bool ``[B, T]``; None where they do not say everything about a causal mask."""
    end = q_offset + q_length - kv_offset  # the slot after the last query's own
    if not q_length <= end <= kv_length:
        return None
    live = (torch.arange(kv_length, device=device) < end).expand(batch, -1)
    if attention_mask is not None:
        missing = kv_offset + kv_length - attention_mask.shape[1]
        seen = torch.nn.functional.pad(attention_mask.bool(), (0, max(missing, 0)))
        live = live & seen[:, kv_offset : kv_offset + kv_length].to(live.device)
    runs = (live[:, 1:] & ~live[:, :-1]).sum(dim=1) + live[:, 0]
    # Two things cannot be read off the live keys: a hole, and where the queries end if every row ends in padding.
    readable = (runs <= 1).all() & live[:, end - 1].any()
    return live if bool(readable) else None


def compact_mask_bidirectional(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """`compact_mask`, for models whose plainly bidirectional attention may run sparse too: the fifth form for that.

    Arguments are those of `compact_mask`.
    """
    plain, window = _window_on(mask_function, bidirectional_mask_function, _TWO_SIDED_WINDOW)
    if plain and kv_offset == 0 and (attention_mask is None or attention_mask.ndim == 2):
        return cast(Any, _bidirectional_mask)(
            batch_size, kv_length, window, attention_mask, kwargs.get("device", "cpu")
        )
    return compact_mask(
        batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, **kwargs
    )  # fmt: skip


@torch.compiler.disable
def _bidirectional_mask(
    batch: int, keys: int, window: int | None, attention_mask: Tensor | None, device: Any
) -> Tensor:
    # transformers' window of this kind counts the distance, ours the tokens.
    holds = torch.full((batch, keys), MOST if window is None else window + 1, dtype=torch.int64, device=device)
    if attention_mask is None:
        return holds
    seen = torch.nn.functional.pad(attention_mask.bool(), (0, max(0, keys - attention_mask.shape[1])), value=True)
    return holds * seen[:, :keys].to(device)


def is_bidirectional(mask: Tensor | None) -> bool:
    """Whether a mask is in the fifth form."""
    return mask is not None and mask.dtype == torch.int64 and mask.ndim == 2


def two_sided_pairs(mask: Tensor, query_len: int) -> Tensor:
    """The pairs that a mask in the fifth form names, bool ``[B, 1, S, T]``; its windows go by slots."""
    live = (mask > 0)[:, None, None]
    distance = torch.arange(query_len, device=mask.device)[:, None] - torch.arange(mask.shape[1], device=mask.device)
    return live & (distance.abs() < mask.amax())


def extent_of(
    mask: Tensor | None, batch: int, query_len: int, key_len: int, window: int | None = None
) -> tuple[Extent | None, int]:
    """What a mask in one of the first four forms describes, and the number of key slots in use.

    The slots after those are a static cache's empty tail; the extent holds for the keys without them. A window that
    the mask carries comes before ``window``. None for keys with a hole, and for queries without causality whose
    positions are unknown: they are all taken to be live, so where keys have left padding there is no telling.

    Raises:
        ValueError: the mask is for other keys than these.
    """
    if mask is None:
        return Extent.full(batch, query_len, key_len, limit=_below(window, key_len)), key_len
    mask = _on_host(mask)
    if mask.dtype == torch.int32:
        window, mask = int(mask.max()), mask[:, -key_len:]
    if mask.shape != (batch, key_len):
        raise ValueError(
            f"the mask is for batch and keys {tuple(mask.shape)}, but the attention has {(batch, key_len)}: "
            "this model builds its keys after its mask; use attn_implementation='sdpa' for it"
        )
    live = mask.bool()
    if is_bidirectional(mask):
        count, rows = live.sum(dim=1), torch.ones(batch, dtype=torch.int64)
        if not torch.equal(live, torch.arange(key_len) < count[:, None]):
            return None, key_len
        limit = _below(int(mask.max()) if mask.numel() else None, max(query_len, key_len))
        return Extent(rows * 0, rows * query_len, rows * 0, count, causal=False, limit=limit), key_len
    end = int((live * torch.arange(1, key_len + 1)).max())
    return Extent.from_key_mask(live[:, :end], query_len, limit=_below(window, end)), end


def _below(window: int | None, keys: int) -> int | None:
    return window if window is not None and window < keys else None


def extent_of_one_query(mask: Tensor | None, batch: int, key_len: int) -> tuple[Extent, int] | None:
    """As `extent_of`, for what a single query sees, in the last form. None where that is no single run of keys."""
    if mask is None:
        return Extent.full(batch, 1, key_len), key_len
    if mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[1:] != (1, 1, key_len):
        return None
    live = mask[:, 0, 0].cpu().expand(batch, -1)
    count = live.sum(dim=1)
    start = live.int().argmax(dim=1)
    run = torch.arange(key_len)
    if not torch.equal(live, (run >= start[:, None]) & (run < (start + count)[:, None])):
        return None
    return Extent(count - 1, (count > 0).long(), start, count), int((start + count).max())


# Of masks on a device: all layers of a forward pass get the same one, and only the first should wait for it.
_host_copies: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _on_host(mask: Tensor) -> Tensor:
    """The mask on the CPU, copied once. Nobody changes a mask after it is made."""
    if mask.device.type == "cpu":
        return mask
    copy = _host_copies.get(mask)
    if copy is None:
        copy = _host_copies[mask] = mask.cpu()
    return copy
