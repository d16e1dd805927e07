"""What a decode step chooses by, in Triton: see `gossamer.backends.torch.pages` and ``tokens``, the definitions.

Nothing here waits for the device. **Not yet run on a GPU.**
"""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.backends.torch.pages import signed_parts
from gossamer.backends.torch.tokens import label_queries
from gossamer.backends.triton.config import power_of_two
from gossamer.backends.triton.device import check_call, check_device, integers_on, kernels, run
from gossamer.call import AttentionCall
from gossamer.plan import ceil_div
from gossamer.summaries import LabelSet

__all__ = ["collisions", "label_scores", "page_scores"]

_NUMBERS = 8192  # of a tile of bounds, which fits the registers of four warps
_TOKENS = 256  # of a tile of labels


def page_scores(call: AttentionCall, bounds: Tensor, size: int) -> Tensor:
    """See `gossamer.backends.torch.page_scores`. Bounds are read once, in their dtype, and summed up in fp32."""
    check_call(call)
    queries, bounds = signed_parts(call).contiguous(), _dense_last(bounds)
    pages, dim = bounds.shape[2:]
    scores = torch.empty(call.batch, call.heads, pages, device=call.device)
    block = power_of_two(dim)
    tile = max(1, _NUMBERS // block)
    tiles = ceil_div(pages, tile)
    run(
        kernels().page_products, call.batch * call.groups * tiles, queries, bounds,
        integers_on(call.extent.key_count, call.device), scores, *bounds.stride()[:3], call.groups, pages, tiles, size,
        SHARE=call.share, DIM=dim, BLOCK_D=block, TILE=tile, num_warps=4,
    )  # fmt: skip
    return scores


def label_scores(call: AttentionCall, labels: LabelSet) -> Tensor:
    """See `gossamer.backends.torch.label_scores`. Labels are read once, as they are, and summed up in fp32."""
    check_call(call)
    queries, codes = label_queries(call, labels), _dense_last(labels.codes)
    if labels.packed:  # the upper half of the last byte may be nobody's
        queries = torch.nn.functional.pad(queries, (0, queries.shape[2] % 2))
    queries, lists = queries.contiguous(), labels.channels.shape[1]
    tokens, share = codes.shape[3], call.heads // lists
    coded = labels.low is not None and labels.step is not None
    low, step = (_dense_last(x) if x is not None else codes[:, :, 0] for x in (labels.low, labels.step))
    scores = torch.empty(call.batch, call.heads, tokens, device=call.device)
    tiles = ceil_div(tokens, _TOKENS)
    run(
        kernels().label_products, call.batch * lists * tiles, queries, codes, low, step,
        integers_on(call.extent.key_count, call.device), scores, *codes.stride()[:3], *low.stride()[:2],
        *step.stride()[:2], lists, tokens, tiles, queries.shape[2],
        SHARE=share, HEADS=power_of_two(share), CODED=coded, PACKED=labels.packed, TILE=_TOKENS, num_warps=4,
    )  # fmt: skip
    return scores


def collisions(queries: Tensor, codes: Tensor) -> Tensor:
    """See `gossamer.backends.torch.collisions`, with which it agrees."""
    check_device(queries.device)
    queries = queries.contiguous()
    batch, groups, tiles, tables, tile = codes.shape
    if codes.stride()[2:] != (tables * tile, tile, 1):
        codes = codes.contiguous()
    share = queries.shape[1] // groups
    counts = torch.empty(*queries.shape[:2], tiles * tile, dtype=torch.int16, device=queries.device)
    run(
        kernels().hash_collisions, batch * groups * tiles, queries, codes, counts, *codes.stride()[:2], groups, tiles,
        tables, SHARE=share, HEADS=power_of_two(share), TILE=tile, num_warps=2,
    )  # fmt: skip
    return counts


def _dense_last(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
