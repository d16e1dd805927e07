"""What one query learns of tokens without their keys, in C++. Defined in `gossamer.backends.torch.tokens`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gossamer.backends.cpu.native import MAX_HEAD_DIM, active_isa, kernels
from gossamer.backends.cpu.views import arrays, dense_rows, tensor_view
from gossamer.backends.torch.tokens import label_queries
from gossamer.backends.torch.tokens import label_scores as definition
from gossamer.call import AttentionCall
from gossamer.summaries import LabelSet

__all__ = ["collisions", "label_scores"]


def label_scores(call: AttentionCall, labels: LabelSet) -> Tensor:
    """See `gossamer.backends.torch.label_scores`. Labels are read once, as they are, and summed up in fp32.

    Agrees but for rounding; a token's score depends on nothing but its own label and the query.
    """
    queries = label_queries(call, labels).unsqueeze(2)
    if queries.shape[-1] > MAX_HEAD_DIM:
        return definition(call, labels)
    codes, low, step = (None if x is None else dense_rows(x) for x in (labels.codes, labels.low, labels.step))
    assert codes is not None
    scores = torch.empty(call.batch, call.heads, codes.shape[3], device="cpu")
    (keys,) = arrays((call.extent.key_count,), (torch.int64,))
    native = kernels()
    view = native.Labels(
        codes=codes.data_ptr(),
        shape=list(codes.shape),
        strides=list(codes.stride()[:3]),
        type=getattr(native.LabelType, "uint4" if labels.packed else str(codes.dtype).removeprefix("torch.")),
    )
    native.label_scores(
        active_isa(torch.float32),
        tensor_view(queries),
        view,
        low=_side(low),
        step=_side(step),
        keys=keys,
        out=scores.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return scores


def _side(x: Tensor | None) -> Any:
    return None if x is None else tensor_view(x.unsqueeze(3))


def collisions(queries: Tensor, codes: Tensor) -> Tensor:
    """See `gossamer.backends.torch.collisions`, with which it agrees."""
    batch, groups, tiles, tables, _ = codes.shape
    queries = queries.contiguous()
    if not codes[0, 0].is_contiguous():
        codes = codes.contiguous()
    counts = torch.empty(*queries.shape[:2], tiles * 64, dtype=torch.int16, device="cpu")
    asked, given, found = arrays((queries, codes, counts), (torch.int16,) * 3)
    kernels().collisions(
        active_isa(torch.float32),
        queries=asked,
        heads=[queries.shape[1], groups],
        codes=given[0],
        shape=[batch, tiles, tables],
        strides=list(codes.stride()[:2]),
        out=found,
        threads=torch.get_num_threads(),
    )
    return counts
