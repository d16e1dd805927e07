"""The mask function: what transformers says about padding, caches and windows, in its smallest form.

| returned | meaning |
|---|---|
| None | causal; the queries are the last S keys, and every key is live |
| bool ``[B, T]`` | causal; the live keys. The last column that is live in any row is the last query's own slot |
| int32 ``[B, T]`` | the same under a sliding window: a live key holds the window, a dead one 0; the last T columns |
| bool ``[B, 1, S, T]`` | anything else, pair by pair; attention then runs dense |

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
from transformers.masking_utils import and_masks, causal_mask_function, sdpa_mask, sliding_window_overlay

from gossamer.plan import Extent

__all__ = ["compact_mask", "explicit_mask", "extent_of", "extent_of_one_query", "plain_window", "window_of"]

_INTERSECTION = and_masks().__code__
_WINDOW = sliding_window_overlay(1).__code__


def plain_window(mask_function: Callable[..., Any]) -> tuple[bool, int | None]:
    """Whether a mask function is plainly causal, and its sliding window if it has one.

    A whitelist: `causal_mask_function` itself, or its intersection with `sliding_window_overlay`. Packed sequences,
    chunked attention and image blocks are none of these, whatever they look like.
    """
    if mask_function is causal_mask_function:
        return True, None
    parts = _closure(mask_function, _INTERSECTION).get("mask_functions", ())
    windows = [_closure(part, _WINDOW).get("sliding_window") for part in parts if part is not causal_mask_function]
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


def extent_of(mask: Tensor | None, batch: int, query_len: int, key_len: int) -> tuple[Extent, int]:
    """What a mask in one of the first three forms describes: the extent, and the number of key slots in use.

    The slots after those are a static cache's empty tail; the extent holds for the keys without them.

    Raises:
        ValueError: the mask is for other keys than these.
    """
    if mask is None:
        return Extent.full(batch, query_len, key_len), key_len
    mask = _on_host(mask)
    if mask.dtype == torch.int32:
        mask = mask[:, -key_len:]
    if mask.shape != (batch, key_len):
        raise ValueError(
            f"the mask is for batch and keys {tuple(mask.shape)}, but the attention has {(batch, key_len)}: "
            "this model builds its keys after its mask; use attn_implementation='sdpa' for it"
        )
    live = mask.bool()
    count = live.sum(dim=1)
    start = live.int().argmax(dim=1)
    end = int((start + count).max())
    return Extent(end - query_len - start, start, count), end


def extent_of_one_query(mask: Tensor | None, batch: int, key_len: int) -> tuple[Extent, int] | None:
    """As `extent_of`, for what a single query sees, in the fourth form. None where that is no single run of keys."""
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
    return Extent(count - 1, start, count), int((start + count).max())


def window_of(mask: Tensor | None) -> int | None:
    """The sliding window that a mask carries."""
    return int(_on_host(mask).max()) if mask is not None and mask.dtype == torch.int32 else None


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


def explicit_mask(extent: Extent, query_len: int, key_len: int, limit: int | None, device: Any) -> Tensor:
    """The causal pairs of an extent, bool ``[B, 1, S, T]``."""
    kpos = extent.key_positions(key_len).to(device)[:, None, None, :]
    qpos = extent.query_positions(query_len).to(device)[:, None, :, None]
    pairs = (kpos >= 0) & (kpos < extent.key_count.to(device)[:, None, None, None]) & (kpos <= qpos)
    return pairs if limit is None else pairs & (qpos - kpos < limit)
