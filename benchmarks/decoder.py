"""Decoder layers with the shape of an 8B Llama and random weights, timed by part, on a CPU or a CUDA device."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer import Policy, sparse_attention
from gossamer.attention import CallRecord

AKIN = 2.0  # times the key's weights, in the query's
MLP_ROWS = 4096  # tokens that the MLP takes at once
Result = TypeVar("Result")


@dataclass(frozen=True)
class Width:
    hidden: int = 4096
    heads: int = 32
    groups: int = 8
    dim: int = 128
    mlp: int = 14336


class Stopwatch:
    """Seconds by part. On CUDA the parts are marked by events, so that nothing waits until they are read."""

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    def time(self, part: str, call: Callable[[], Result]) -> Result:
        if self._on_cuda:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            result = call()
            end.record()
            self._events.append((part, begin, end))
            return result
        started = time.perf_counter()
        result = call()
        self._seconds[part] = self._seconds.get(part, 0.0) + time.perf_counter() - started
        return result

    def seconds(self) -> dict[str, float]:
        """Of each part since the start; waits for the device."""
        if self._on_cuda:
            torch.cuda.synchronize()
        found = dict(self._seconds)
        for part, begin, end in self._events:
            found[part] = found.get(part, 0.0) + begin.elapsed_time(end) / 1e3
        return found


@dataclass
class Layer:
    """One decoder layer. Keys and values are not kept.

    Args:
        akin: query heads project much as the key head of their group does, so that queries look for keys of tokens like
            their own; otherwise they look for none in particular.
    """

    width: Width
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    akin: bool = False
    watch: Stopwatch = field(init=False)
    records: list[CallRecord] = field(default_factory=list)

    def __post_init__(self) -> None:
        w = self.width
        self.reset()

        def weight(rows: int, columns: int) -> Tensor:
            return torch.randn(rows, columns, dtype=torch.bfloat16, device=self.device) * columns**-0.5

        self.qkv = weight((w.heads + 2 * w.groups) * w.dim, w.hidden)
        if self.akin:
            query, key, _ = self.qkv.split([w.heads * w.dim, w.groups * w.dim, w.groups * w.dim])
            query += AKIN * key.view(w.groups, 1, w.dim, -1).expand(-1, w.heads // w.groups, -1, -1).reshape_as(query)
        self.out = weight(w.hidden, w.heads * w.dim)
        self.gate, self.up = weight(w.mlp, w.hidden), weight(w.mlp, w.hidden)
        self.down = weight(w.hidden, w.mlp)

    def reset(self) -> None:
        """Forget what was timed."""
        self.watch, self.records = Stopwatch(self.device), []

    def run(self, x: Tensor, policy: Policy) -> Tensor:
        """Hidden states ``[S, hidden]`` after the layer."""
        w, tokens, timed = self.width, x.shape[0], self.watch.time
        projected = timed("projections", lambda: F.linear(F.rms_norm(x, (w.hidden,)), self.qkv))
        q, k, v = projected.split([w.heads * w.dim, w.groups * w.dim, w.groups * w.dim], dim=-1)
        q, k, v = (t.view(1, tokens, -1, w.dim).transpose(1, 2) for t in (q, k, v))
        q, k = timed("projections", lambda: (rotate(q), rotate(k)))
        attended = timed("attention", lambda: sparse_attention(q, k, v, policy, layer=0, record=self.records.append))
        attended = attended.transpose(1, 2).reshape(tokens, -1)
        x = timed("projections", lambda: x + F.linear(attended, self.out))
        return timed("mlp", lambda: self._mlp(x))

    def _mlp(self, x: Tensor) -> Tensor:
        for rows in x.split(MLP_ROWS):
            normed = F.rms_norm(rows, (self.width.hidden,))
            rows += F.linear(F.silu(F.linear(normed, self.gate)) * F.linear(normed, self.up), self.down)
        return x


def rotate(x: Tensor) -> Tensor:
    """Rotary positions, base 500,000, in float32."""
    half = x.shape[-1] // 2
    positions, pairs = torch.arange(x.shape[2], device=x.device), torch.arange(half, device=x.device)
    angle = positions[:, None] * 5e5 ** (-pairs / half)
    cos, sin = angle.cos(), angle.sin()
    turned = torch.empty_like(x)
    for head in range(x.shape[1]):  # a head at a time: float32 copies of all would not fit
        a, b = x[:, head, :, :half].float(), x[:, head, :, half:].float()
        turned[:, head, :, :half] = a * cos - b * sin
        turned[:, head, :, half:] = b * cos + a * sin
    return turned
