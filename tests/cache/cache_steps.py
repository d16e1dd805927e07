"""A layer of a cache as a model would use it: calls of one or several tokens, and what they attend."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer import AttentionCall, Extent
from gossamer.backends.torch.dense import dense
from gossamer.cache import StoreLayer
from gossamer.rotary import Rotary


@dataclass(eq=False)
class Tokens:
    """Queries, keys and values of all tokens of a conversation, by position; rows have left padding ``starts``."""

    q: Tensor
    k: Tensor
    v: Tensor
    starts: list[int]

    @classmethod
    def random(cls, starts: list[int], length: int, heads: int, groups: int, dim: int, seed: int = 0) -> Tokens:
        generator = torch.Generator().manual_seed(seed)
        sizes = (heads, groups, groups)
        q, k, v = (torch.randn(len(starts), n, length, dim, generator=generator) for n in sizes)
        return cls(q * 2, k, v, starts)

    @property
    def length(self) -> int:
        return self.q.shape[2]

    @property
    def share(self) -> int:
        return self.q.shape[1] // self.k.shape[1]

    def alone(self, row: int) -> Tokens:
        """One row, without its padding."""
        start = self.starts[row]
        q, k, v = (t[row : row + 1, :, start:] for t in (self.q, self.k, self.v))
        return Tokens(q, k, v, [0])

    def run(
        self, layer: StoreLayer, *chunks: int, rotary: Rotary | None = None
    ) -> Iterator[tuple[AttentionCall, Tensor]]:
        """Calls of so many tokens each, with what they give, as the attention function makes them."""
        first = layer.length
        for count in chunks:
            part = slice(first, first + count)
            first += count
            keys, values = layer.update(self.k[:, :, part], self.v[:, :, part])
            extent = layer.extent(count)
            if extent is None:
                live = torch.arange(first)[None] >= torch.tensor(self.starts)[:, None]
                extent = Extent.from_key_mask(live, count)
                layer.place(extent)
            call = AttentionCall(self.q[:, :, part], keys, values, extent, rotary=rotary)
            out = dense(call)
            layer.attended(call)
            yield call, out

    def attend(self, row: int, head: int, query: int, tokens: list[int]) -> Tensor:
        """What a query gives that attends some tokens, by definition."""
        group = head // self.share
        k, v = self.k[row, group, tokens], self.v[row, group, tokens]
        logits = k @ self.q[row, head, query] * self.q.shape[-1] ** -0.5
        return logits.softmax(0) @ v
