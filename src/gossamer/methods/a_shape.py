"""A-shape and tri-shape: fixed bands at the first tokens and around the diagonal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.estimators import BlockVisibility
from gossamer.methods.base import Method, require_at_least
from gossamer.plan import Extent, SparsePlan, ceil_div

__all__ = ["AShape", "TriShape"]


@dataclass(frozen=True)
class AShape(Method):
    """Attention sinks and a local window (StreamingLLM, 2309.17453; MInference's A-shape, 2407.02490, 3.2).

    Pairs with ``pos(j) < sink`` or ``pos(i) - pos(j) < window``, exact to the token; the window counts the token
    itself. Defaults are MInference's library values, 128 + 3968.
    """

    name: ClassVar[str] = "a_shape"
    sink: int = 128
    window: int = 3968

    def __post_init__(self) -> None:
        require_at_least(self, 0, "sink")
        require_at_least(self, 1, "window")

    def plan(self, q: Tensor, k: Tensor, *, scale: float, extent: Extent, layer: int | None = None) -> SparsePlan:
        return SparsePlan(k.shape[1], q.shape[2], k.shape[2], extent, sink=self.sink, window=self.window)


@dataclass(frozen=True)
class TriShape(Method):
    """A-shape, with the last queries of the call dense (MInference's tri-shape; TriangleMix, 2507.21526).

    Deviation: the dense tail of ``last`` live queries is widened to whole query blocks, so up to ``block - 1`` more
    rows are dense; and it attends the sinks and window rows as any dense row does, in one softmax. In a chunked
    prefill every chunk has its dense tail.
    """

    name: ClassVar[str] = "tri_shape"
    sink: int = 128
    window: int = 3968
    last: int = 100
    block: int = 64

    def __post_init__(self) -> None:
        require_at_least(self, 0, "sink", "last")
        require_at_least(self, 1, "window", "block")

    def plan(self, q: Tensor, k: Tensor, *, scale: float, extent: Extent, layer: int | None = None) -> SparsePlan:
        query_len, key_len = q.shape[2], k.shape[2]
        tail = tail_blocks(extent, query_len, self.last, self.block)
        # On the CPU, whatever q's device: where the tokens sit is known there, and nothing waits for a device.
        visible = BlockVisibility(extent, query_len, key_len, self.block, self.block, tail.device)
        heads, query_blocks = k.shape[1], ceil_div(query_len, self.block)
        counts = torch.zeros(extent.batch, heads, query_blocks, dtype=torch.int64)
        indices = []
        for row in range(extent.batch):  # only its last few query blocks, not all of all heads
            ours = tail[row].nonzero()[:, 0].tolist()
            if ours:
                chosen = visible.any_pair(ours[0], ours[-1] + 1)[row]
                counts[row, :, ours[0] : ours[-1] + 1] = chosen.sum(dim=-1)
                indices.append(chosen.nonzero()[:, 1].repeat(heads))
        return SparsePlan(
            heads,
            query_len,
            key_len,
            extent,
            block_q=self.block,
            block_k=self.block,
            block_indptr=torch.nn.functional.pad(counts.flatten().cumsum(0), (1, 0)),
            block_indices=torch.cat([torch.empty(0, dtype=torch.int64), *indices]).to(torch.int32),
            sink=self.sink,
            window=self.window,
        )


def tail_blocks(extent: Extent, query_len: int, last: int, block_q: int) -> Tensor:
    """Query blocks that hold one of the ``last`` live queries of each row: bool ``[B, M]``, on the CPU."""
    end = (extent.key_count - extent.query_start).clamp(0, query_len)[:, None]
    first_row = torch.arange(ceil_div(query_len, block_q)) * block_q
    return (first_row < end) & (first_row + block_q > end - last) if last else (first_row < 0).expand(len(end), -1)
