"""What one query reads of a cache, in C++. The definitions are in `gossamer.backends.torch.pages`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gossamer.backends.cpu.native import MAX_HEAD_DIM, active_isa, check_tensors, kernels
from gossamer.backends.cpu.views import arrays, dense_rows, dtype_of, tensor_view, tokens_view
from gossamer.backends.torch.pages import page_scores as definition
from gossamer.backends.torch.pages import signed_parts
from gossamer.call import AttentionCall
from gossamer.paged import Paged

__all__ = ["forget_slots", "keep_bounds", "page_scores", "page_tokens"]


def page_scores(call: AttentionCall, bounds: Tensor, size: int) -> Tensor:
    """See `gossamer.backends.torch.page_scores`. Bounds are read once, in their dtype, and summed up in fp32.

    Those that lie in pages themselves, as rows, are read there.

    Above 128 channels, of which bounds are twice as many as the kernels take, the definition serves.
    """
    check_tensors(call.q)
    if bounds.shape[-1] > MAX_HEAD_DIM:
        return definition(call, bounds, size)
    bounds, queries = dense_rows(bounds), signed_parts(call).unsqueeze(2)
    pages = bounds.shape[2]
    scores = torch.empty(call.batch, call.heads, pages, device="cpu")
    keys = call.extent.key_count
    kernels().page_scores(
        active_isa(torch.float32),
        tensor_view(queries),
        tokens_view(bounds),
        _choice(keys, call.heads, pages, size),
        out=scores.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return scores


def page_tokens(call: AttentionCall, scores: Tensor, size: int, count: int, heads: int) -> tuple[Tensor, Tensor]:
    """See `gossamer.backends.torch.page_tokens`. Agrees but for pages whose shares differ by rounding."""
    assert call.store is not None
    scores = scores.contiguous()
    sinks, recent, pages = call.store.sinks, call.store.recent, scores.shape[2]
    keys = call.extent.key_count * (call.extent.query_count > 0)
    room = max((_most(row, size, count, sinks, recent) for row in keys.tolist()), default=0)
    tokens = torch.empty(call.batch, heads, room, dtype=torch.int32, device="cpu")
    counts = torch.empty(call.batch, heads, dtype=torch.int64, device="cpu")
    given, taken, numbers = arrays((scores, tokens, counts), (torch.float32, torch.int32, torch.int64))
    kernels().page_tokens(
        active_isa(torch.float32),
        given,
        query_heads=call.heads,
        choice=_choice(keys, heads, pages, size, sinks, recent, count),
        room=room,
        tokens=taken,
        counts=numbers,
        threads=torch.get_num_threads(),
    )
    if all(number == room for number in counts.flatten().tolist()):
        return tokens.flatten(), counts
    return tokens[torch.arange(room, device="cpu") < counts[..., None]], counts


def keep_bounds(keys: Paged, counts: Tensor, bounds: Tensor, held: Tensor) -> None:
    """See `gossamer.backends.torch.keep_bounds`, with which it agrees."""
    given, kept, to = arrays((counts, held, bounds), (torch.int64, torch.int32, bounds.dtype))
    kernels().keep_bounds(
        active_isa(torch.float32),
        tokens_view(keys),
        counts=given,
        bounds=to,
        dtype=dtype_of(bounds),
        size=keys.page // bounds.shape[2],
        held=kept,
        threads=torch.get_num_threads(),
    )


def forget_slots(slots: Tensor, page: int, held: Tensor) -> None:
    """See `gossamer.backends.torch.forget_slots`, with which it agrees."""
    given, kept = arrays((slots, held), (torch.int64, torch.int32))
    kernels().forget_slots(given, page=page, held=kept)


def _most(keys: int, size: int, count: int, sinks: int, recent: int) -> int:
    """Tokens of the pages that a row reads at most."""
    pages = -(-keys // size)
    first = min(pages, -(-max(sinks, 0) // size))
    last = min(pages, max(keys - max(recent, 1), 0) // size)
    held = first + pages - max(first, last)
    return min(keys, min(pages, max(count, held)) * size)


def _choice(keys: Tensor, heads: int, pages: int, size: int, sinks: int = 0, recent: int = 0, count: int = 0) -> Any:
    (given,) = arrays((keys,), (torch.int64,))
    return kernels().PageChoice(
        heads=heads, pages=pages, size=size, keys=given, sinks=sinks, recent=recent, count=count
    )
