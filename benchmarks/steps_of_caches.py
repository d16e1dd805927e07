"""Seconds of a decode step of each cache beside one that keeps everything as it came: the part `steps` of caches.py.

One layer of 32 query heads on 8 with 128 channels. A round draws a token and its queries, and every cache takes them in
turn, in an order that moves on; *ratio* is the median over rounds of the plain cache's seconds over a cache's. A step
adds the token, attends all that the cache holds on our own kernel, and lets the cache encode what is due, so that what
is done once in many steps (a pack of tokens) is in those rounds that it falls into.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from timing import timed, wake_threads
from torch import Tensor

from gossamer.attention import attend
from gossamer.cache import StoreLayer
from gossamer.call import AttentionCall
from gossamer.cli.specs import parse_cache
from gossamer.methods import Dense
from gossamer.plan import Extent
from gossamer.policy import Policy

__all__ = ["HEADS", "step_rows"]

HEADS, GROUPS, DIM = 32, 8, 128
# Tokens of a call that fills a cache.
CHUNK = 8192


class _Steps:
    """A cache of one layer, and a step on it."""

    def __init__(self, name: str, length: int, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
        self.layer = StoreLayer() if name == "keep" else parse_cache(name).layer(2, 4)
        self._policy, (heads, groups, dim) = Policy(Dense("gossamer")), shape
        generator = torch.Generator().manual_seed(0)
        for first in range(0, length, CHUNK):
            count = min(CHUNK, length - first)
            k, v = (torch.randn(1, groups, count, dim, generator=generator).to(dtype) for _ in range(2))
            # What a prompt's attention gives is of no interest: one query stands for those of the chunk.
            self(torch.zeros(1, heads, 1, dim, dtype=dtype), k, v)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        keys, values = self.layer.update(k, v)
        extent = Extent.full(1, 1, keys.shape[2])
        self.layer.place(extent)
        call = AttentionCall(q, keys, values, extent, layer=2, store=self.layer, state=self.layer.state)
        attend(call, self._policy)
        self.layer.attended(call)


def step_rows(
    caches: Sequence[str],
    lengths: Sequence[int],
    dtypes: Sequence[str],
    rounds: int,
    shape: tuple[int, int, int] = (HEADS, GROUPS, DIM),
) -> list[dict[str, Any]]:
    """A row for each cache, length and dtype; ``keep`` comes first.

    Args:
        caches: as the command line takes them; those that encode.
        shape: query heads, key/value heads, head dimension.
    """
    rows = []
    for length in lengths:
        for dtype in dtypes:
            rows += _rows(["keep", *caches], length, dtype, rounds, shape)
            for row in rows[-len(caches) - 1 :]:
                print(*row.values(), flush=True)
    return rows


@torch.inference_mode()
def _rows(names: list[str], length: int, dtype: str, rounds: int, shape: tuple[int, int, int]) -> list[dict[str, Any]]:
    heads, groups, dim = shape
    steps = {name: _Steps(name, length, getattr(torch, dtype), shape) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(rounds + 1):
        q, k, v = (torch.randn(1, n, 1, dim).to(getattr(torch, dtype)) for n in (heads, groups, groups))
        wake_threads()
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
            taken, _ = timed(steps[name], q, k, v)
            if round_:
                seconds[name].append(taken)
    whole = steps["keep"].layer.nbytes
    return [
        {
            "cache": name,
            "length": length,
            "dtype": dtype,
            "ratio": round(statistics.median(a / b for a, b in zip(seconds["keep"], own, strict=True)), 3),
            "median_s": round(statistics.median(own), 6),
            "share": round(steps[name].layer.nbytes / whole, 4),
            "each_s": [round(one, 6) for one in own],
        }
        for name, own in seconds.items()
    ]
