"""The mask function: what transformers says about padding, caches and windows, in its smallest form.

| returned | meaning |
|---|---|
| None | nothing to say, where ``sdpa`` says nothing either: causal if the layer is, else every pair; S = T |
| int64 ``[B, T]`` | the live keys; every live one holds the same number, which says the rest (`Compact`) |
| bool ``[B, 1, S, T]`` | anything else, pair by pair; attention runs dense unless `compact_of` reads it |

A compact mask names its own causality: layers that are not causal by themselves (prefix language models) rely on the
mask where ``sdpa`` gets one. Its numbers are never below 0 and 0 where a key is dead, because ``generate`` hands a mask
that it made for a static cache back as an ``attention_mask``. Columns count from the first token then, so that keys
which a rolling cache has dropped keep columns in front; a layer's keys are the last T columns.

The window travels with the mask because several models (Qwen2-MoE, PhiMoE, Doge) mask with a window and do not pass
``sliding_window`` to their attention function. Bidirectional masks are compact under the name
``gossamer_bidirectional`` alone, which ``enable(bidirectional=True)`` asks for.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.jit import is_tracing  # pyright: ignore[reportPrivateImportUsage]
from torch.utils.weak import WeakIdKeyDictionary
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    blockwise_overlay,
    causal_mask_function,
    or_masks,
    sdpa_mask,
    sliding_window_bidirectional_overlay,
    sliding_window_overlay,
)

from gossamer.integrations.transformers.owners import former_of
from gossamer.plan import Extent
from gossamer.plan.integers import MOST

__all__ = [
    "Compact",
    "compact_mask",
    "compact_mask_bidirectional",
    "compact_of",
    "extent_of",
    "extent_of_one_query",
    "is_compact",
    "pairs_of",
    "plain_window",
    "read",
]

_INTERSECTION = and_masks().__code__
_UNION = or_masks().__code__
_WINDOW = sliding_window_overlay(1).__code__
_TWO_SIDED_WINDOW = sliding_window_bidirectional_overlay(1).__code__
_BLOCKS = blockwise_overlay(torch.zeros(0, device="cpu")).__code__

# A live key holds `end * _END + window`; a window of `MOST` tokens is none. `_OWN` more says that attention is not
# causal and that the queries are the keys' own tokens.
_END = MOST + 1
_OWN = 1 << 62
# What configs say where there is cross-attention, or may be.
_OF_CROSS_ATTENTION = ["is_encoder_decoder", "is_decoder", "add_cross_attention", "cross_attention_frequency"]


@dataclass(frozen=True, slots=True)
class Compact:
    """What a compact mask says.

    Fields:
        live: bool ``[B, T]`` on the CPU, the keys that are live.
        end: the slot after the last query's own; None where attention is not causal.
        window: tokens that a query sees on a side, its own included; None for all.
        own: without causality, whether each query is the token of the key slot of its number (encoders); else nothing
            says which queries are padding (cross-attention).
    """

    live: Tensor
    end: int | None
    window: int | None
    own: bool = False


def plain_window(mask_function: Callable[..., Any]) -> tuple[bool, int | None]:
    """Whether a mask function is plainly causal, and its sliding window if it has one.

    A whitelist: `causal_mask_function` itself, or its intersection with `sliding_window_overlay`, each in union with
    blocks that hold no token (Gemma 3 for prompts without images). Packed sequences, chunked attention and image blocks
    are none of these, whatever they look like.
    """
    return _window_on(mask_function, causal_mask_function, _WINDOW, _without_empty_blocks)


def _window_in_graph(mask_function: Callable[..., Any], mask: dict[str, Any]) -> tuple[bool, int | None]:
    """As `plain_window` while a graph is made, where closures can't be looked into, for masks that may be skipped.

    transformers says ``local_size`` of windows and of chunked attention alone, names chunks in the config, and wants
    whole masks for whatever else it puts on top.
    """
    if mask_function is causal_mask_function:
        return True, None
    size, chunk = mask.get("local_size"), getattr(mask.get("config"), "attention_chunk_size", None)
    plain = mask_function.__code__ is _INTERSECTION and size is not None and chunk is None
    return plain, size if plain else None


def _window_on(
    mask_function: Callable[..., Any],
    base: Callable[..., Any],
    window: Any,
    simpler: Callable[..., Any] = lambda mask_function: mask_function,
) -> tuple[bool, int | None]:
    """Whether a mask function is `base`, or that with a window of a given kind on it; and the window."""
    mask_function = simpler(mask_function)
    if mask_function is base:
        return True, None
    parts = [simpler(part) for part in _closure(mask_function, _INTERSECTION).get("mask_functions", ())]
    windows = [_closure(part, window).get("sliding_window") for part in parts if part is not base]
    if len(parts) == 2 and len(windows) == 1 and isinstance(windows[0], int):
        return True, windows[0]
    return False, None


def _without_empty_blocks(mask_function: Callable[..., Any]) -> Callable[..., Any]:
    """The other part of a union with blocks to none of which a token belongs."""
    parts = _closure(mask_function, _UNION).get("mask_functions", ())
    others = [part for part in parts if not _is_empty(_closure(part, _BLOCKS).get("block_sequence_ids"))]
    return others[0] if len(parts) == 2 and len(others) == 1 else mask_function


def _is_empty(block_ids: Tensor | None) -> bool:
    return block_ids is not None and bool((block_ids < 0).all())


def _closure(function: Callable[..., Any], code: Any) -> dict[str, Any]:
    """The closure variables of a function that was compiled from `code`; empty for any other function."""
    if not inspect.isfunction(function) or function.__code__ is not code:
        return {}
    cells = function.__closure__ or ()
    return dict(zip(code.co_freevars, (cell.cell_contents for cell in cells), strict=True))


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
    """The mask of one forward pass, in one of the three forms above. transformers calls it with keywords.

    A single query, and a caller that wants the whole mask of a plain function (``allow_is_causal_skip=False``: a
    compiled decode step, masks that are then joined), get what ``sdpa`` gets. Outside graphs, reading ``q_offset`` and
    ``attention_mask`` synchronises with the device, once a forward pass.

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
    compiling = torch.compiler.is_compiling()
    # An overlay asks for the whole mask by itself, even where it turns out to hold nothing.
    asked = not allow_is_causal_skip and (compiling or _window_on(mask_function, causal_mask_function, _WINDOW)[0])
    whole = bool(q_length == 1) or asked or is_tracing()
    plain, window = False, None
    if not whole:
        plain, window = _window_in_graph(mask_function, mask) if compiling else plain_window(mask_function)
    if not plain or (kv_offset and window is None) or (attention_mask is not None and attention_mask.ndim != 2):
        return sdpa_mask(**mask, allow_is_causal_skip=allow_is_causal_skip and whole)
    end = q_offset + q_length - kv_offset  # the slot after the last query's own
    if not compiling:
        end = int(end)
        if not q_length <= end <= kv_length:
            return sdpa_mask(**mask, allow_is_causal_skip=False)
        # Where eager attention was replaced, layers that are not causal by themselves had a mask even then.
        eager = former_of(kwargs.get("config")) == "eager"
        if not eager and _says_nothing(q_length, kv_length, window, attention_mask):
            return None
    device = mask.get("device", "cpu")
    live = (torch.arange(kv_length, device=device) < end).expand(batch_size, -1)
    if attention_mask is not None:
        missing = kv_offset + kv_length - attention_mask.shape[1]
        seen = torch.nn.functional.pad(attention_mask.bool(), (0, max(missing, 0)))
        live = live & seen[:, kv_offset : kv_offset + kv_length].to(device)
    says = end * _END + (MOST if window is None else min(window, MOST))
    compact = live.to(torch.int64) * says
    return torch.nn.functional.pad(compact, (kv_offset, 0), value=1) if kv_offset else compact


def _says_nothing(q_length: int, kv_length: int, window: int | None, attention_mask: Tensor | None) -> bool:
    """Whether ``sdpa`` gets None for a plain mask of several queries against their own keys alone."""
    if q_length != kv_length or (window is not None and kv_length >= window):
        return False
    return attention_mask is None or (attention_mask.shape[1] == kv_length and bool(attention_mask.all()))


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
    """`compact_mask`, for models whose plainly bidirectional attention may run sparse too.

    Arguments are those of `compact_mask`. ``allow_is_bidirectional_skip=False`` asks for a whole mask, to be joined.
    """
    plain, window = _window_on(mask_function, bidirectional_mask_function, _TWO_SIDED_WINDOW)
    joined = kwargs.get("allow_is_bidirectional_skip") is False
    if not plain or joined or kv_offset or (attention_mask is not None and attention_mask.ndim != 2):
        return compact_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, **kwargs
        )
    device = kwargs.get("device", "cpu")
    # transformers' window of this kind counts the distance, ours the tokens.
    says = (MOST if window is None else window + 1) + _OWN * _is_of_encoder(kwargs.get("config"))
    holds = torch.full((batch_size, kv_length), says, dtype=torch.int64, device=device)
    if attention_mask is None:
        return holds
    seen = torch.nn.functional.pad(attention_mask.bool(), (0, max(0, kv_length - attention_mask.shape[1])), value=True)
    return holds * seen[:, :kv_length].to(device)


def _is_of_encoder(config: Any) -> bool:
    """Whether a model has no cross-attention, so that keys are the queries' own. Masks are made for both alike."""
    return config is not None and not any(getattr(config, name, False) for name in _OF_CROSS_ATTENTION)


def is_compact(mask: Tensor | None) -> bool:
    return mask is not None and mask.dtype == torch.int64 and mask.ndim == 2


def pairs_of(mask: Tensor, query_len: int, key_len: int, window: int | None = None) -> Tensor:
    """The pairs that a compact mask names, bool ``[B, 1, S, T]``, on its device and without waiting for it.

    A window that the mask carries comes before ``window``. Queries that would attend nothing are padding and must not
    become NaN: they attend everything.
    """
    mask = mask[:, mask.shape[1] - key_len :]
    says = (mask.amax() if mask.numel() else mask.sum()) % _OWN
    end, width = says // _END, says % _END
    if window is not None:
        width = torch.where((width == MOST) & (end > 0), window, width)
    query = torch.arange(query_len, device=mask.device)[:, None]
    query = torch.where(end > 0, query + end - query_len, query)
    key = torch.arange(key_len, device=mask.device)
    near = ((query - key).abs() < width) | (width == MOST)
    pairs = (mask > 0)[:, None, None] & near & ((key <= query) | (end == 0))
    return pairs | ~pairs.any(dim=-1, keepdim=True)


# Of masks pair by pair, what `compact_of` found.
_recognized: WeakIdKeyDictionary = WeakIdKeyDictionary()
COMPARED_BYTES = 64 << 20


def compact_of(mask: Tensor) -> Tensor | None:
    """The compact mask that names the same pairs as a bool mask ``[B, 1, S, T]``, or None if there is none.

    Callers bring plain masks of their own, and transformers makes whole ones in graphs, where it can't look whether
    sequences are packed. Reads the mask once, however many layers ask.
    """
    if mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[1] != 1 or 0 in mask.shape:
        return None
    found = _recognized.get(mask, mask)
    if found is mask:
        found = _recognized[mask] = _recognize(mask[:, 0])
    return found


def _recognize(pairs: Tensor) -> Tensor | None:
    batch, queries, keys = pairs.shape
    row = torch.arange(queries, device=pairs.device)
    some = pairs.any(dim=-1)
    if not bool(some.any()):
        return None
    last = keys - 1 - pairs.flip(-1).to(torch.uint8).argmax(dim=-1)
    # Queries of padding behind the last key see fewer keys than their place allows.
    offset = int((last - row).masked_fill(~some, -keys - queries).max())
    if not 0 <= offset <= keys - queries:
        return None
    first = pairs.to(torch.uint8).argmax(dim=-1)
    window = int((row + offset - first + 1).masked_fill(~some, 0).max())
    live, key = pairs.any(dim=1), torch.arange(keys, device=pairs.device)
    step = max(1, COMPARED_BYTES // (batch * keys))
    for start in range(0, queries, step):
        own = row[start : start + step, None] + offset
        expected = live[:, None] & (key <= own) & (key > own - window)
        if not torch.equal(pairs[:, start : start + step], expected):
            return None
    begins = live.to(torch.uint8).argmax(dim=-1, keepdim=True)
    window = MOST if bool(((first == begins) | ~some).all()) else window
    return live.to(torch.int64) * ((queries + offset) * _END + window)


# Of compact masks: all layers of a forward pass get the same one, and only the first should wait for its device.
_read: WeakIdKeyDictionary = WeakIdKeyDictionary()


def read(mask: Tensor, batch: int, key_len: int) -> Compact:
    """What a compact mask says. Nobody changes a mask after it is made: it is read once.

    Raises:
        ValueError: the mask is for other keys than these.
    """
    found = _read.get(mask)
    if found is None:
        held = mask.cpu()
        own, says = divmod(int(held.max()) if held.numel() else MOST, _OWN)
        window = says % _END if says % _END < MOST else None
        found = _read[mask] = Compact(held > 0, says // _END or None, window, bool(own))
    dropped = found.live.shape[1] - key_len
    if found.live.shape[0] != batch or dropped < 0 or (dropped and found.window is None):
        raise ValueError(
            f"the mask is for batch and keys {tuple(mask.shape)}, but the attention has {(batch, key_len)}: "
            "this model builds its keys after its mask; use attn_implementation='sdpa' for it"
        )
    return Compact(found.live[:, dropped:], found.end, found.window, found.own)


def extent_of(
    mask: Tensor | None, batch: int, query_len: int, key_len: int, window: int | None = None
) -> tuple[Extent | None, int]:
    """What a compact mask, or none, describes to a causal layer, and the number of key slots in use.

    The slots after those are a static cache's empty tail; the extent holds for the keys without them. A window that
    the mask carries comes before ``window``. None for keys with a hole, and for queries of cross-attention where the
    keys have left padding: all of them are taken to be live, and nothing says at which positions.

    Raises:
        ValueError: the mask is for other keys than these.
    """
    if mask is None:
        return Extent.full(batch, query_len, key_len, limit=_below(window, key_len)), key_len
    said = read(mask, batch, key_len)
    if said.end is None:
        count, rows = said.live.sum(dim=1), torch.ones(batch, dtype=torch.int64, device="cpu")
        limit = _below(said.window, max(query_len, key_len))
        if said.own and query_len == key_len and not _has_hole(said.live):
            return Extent.from_key_mask(said.live, query_len, causal=False, limit=limit), key_len
        if not torch.equal(said.live, torch.arange(key_len, device="cpu") < count[:, None]):
            return None, key_len
        return Extent(rows * 0, rows * query_len, rows * 0, count, causal=False, limit=limit), key_len
    live = said.live[:, : said.end]
    if not query_len <= said.end <= key_len or _has_hole(live):
        return None, key_len
    limit = _below(window if said.window is None else said.window, said.end)
    return Extent.from_key_mask(live, query_len, limit=limit), said.end


def _has_hole(live: Tensor) -> bool:
    runs = (live[:, 1:] & ~live[:, :-1]).sum(dim=1) + live[:, :1].sum(dim=1)
    return bool((runs > 1).any())


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
    run = torch.arange(key_len, device="cpu")
    if not torch.equal(live, (run >= start[:, None]) & (run < (start + count)[:, None])):
        return None
    return Extent(count - 1, (count > 0).long(), start, count), int((start + count).max())
