"""InfLLM: blocks by a few representative keys, sinks and a local window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from gossamer.call import AttentionCall
from gossamer.methods.base import Method, Settings, require_at_least
from gossamer.methods.pages import plan_of_blocks
from gossamer.plan import SparsePlan, ceil_div, on_device
from gossamer.rules import top_k
from gossamer.summaries import Representatives, Summary

__all__ = ["InfLLM"]


@dataclass(frozen=True)
class InfLLM(Method):
    """InfLLM (2402.04617): a decode step reads sinks, a local window, and the blocks whose representatives answer best.

    Tokens are in blocks of ``block``, counted from a row's first one. A block that lies ``local`` tokens back, behind
    the first ``init`` tokens, is represented in each query head by the ``count`` keys that later queries attended to
    most (`Representatives`). Its score is the sum over all query heads of the query's product with the mean of these
    keys: all heads of a layer read the same ``blocks`` blocks. Sinks, and what is no such block yet, are read too.

    A prompt is read densely, or by the method for prompts; its queries vote while it is read, if the model is enabled
    with this method by then. With a cache in tiers (``cache="tiers"``) what is chosen is what comes from the file.

    Fields:
        init: the first tokens, which are read in any case, rounded up to whole blocks.
        local: the last tokens, which are, up to a block more.
        every: only queries at multiples of it vote.

    Defaults are the authors': blocks of 128 tokens, 16 of them, 4 representatives, 128 sinks, a window of 4,096.

    Deviations: tokens keep their positions, and a prompt is read as the model reads it (`InfLLMLong` gives far tokens
    another distance, and reads prompts too, as published); votes are of each eighth query of prompts, normalised over
    the window, and blocks of an answer are represented by the mean of all of their keys; the first blocks are sinks
    whole.
    """

    name: ClassVar[str] = "infllm"
    needs: ClassVar[frozenset[str]] = frozenset({"store", "causal", "one query"})
    decodes: ClassVar[bool] = True
    apart: ClassVar[bool] = False
    settings: ClassVar[Settings] = tuple({"blocks": blocks} for blocks in (4, 8, 16, 32))
    blocks: int = 16
    block: int = 128
    count: int = 4
    init: int = 128
    local: int = 4096
    every: int = 8

    def __post_init__(self) -> None:
        require_at_least(self, 0, "blocks", "init")
        require_at_least(self, 1, "block", "count", "local", "every")

    @property
    def represents(self) -> Representatives:
        return Representatives(self.block, self.count, self.local, self.every)

    def watches(self, call: AttentionCall) -> tuple[Summary[Any], ...]:
        del call
        return (self.represents,)

    def summaries(self) -> tuple[Representatives]:
        return (self.represents,)

    def beside(self, dim: int, itemsize: int) -> float:
        return itemsize * dim * self.count / self.block

    def least_density(self, call: AttentionCall) -> float:
        init, local = self._always(call)
        keys, most = call.extent.key_count, init + local + self.blocks * self.block
        return float(keys.clamp(max=most).sum() / keys.sum().clamp(min=1))

    def plan(self, call: AttentionCall) -> SparsePlan:
        assert call.store is not None
        means = call.store.summary(self.represents)
        blocks = ceil_div(call.extent.longest, self.block)
        block = torch.arange(blocks, device=call.device)
        init, local = self._always(call)
        back = on_device((call.extent.key_count - local).clamp(min=0) // self.block, call.device)[:, None]
        chosen = (block < ceil_div(init, self.block)) | (block >= back)
        if means.shape[2] and self.blocks:
            scores = self._scores(call, means)
            scores = scores.masked_fill(chosen[:, : scores.shape[1]], float("-inf"))
            chosen[:, : scores.shape[1]] |= top_k(scores, self.blocks)
        return plan_of_blocks(call, chosen[:, None].expand(-1, call.groups, -1), self.block)

    def _always(self, call: AttentionCall) -> tuple[int, int]:
        """First and last tokens that every step reads: its own, and those that the store asks for."""
        sinks, recent = (0, 0) if call.store is None else (call.store.sinks, call.store.recent)
        return max(self.init, sinks), max(self.local, recent)

    def _scores(self, call: AttentionCall, means: Tensor) -> Tensor:
        """Of the blocks that are represented, fp32 ``[B, N]``; a scale below 0 turns them round."""
        q = call.q[:, :, 0].float().unflatten(1, (means.shape[1], -1)).sum(dim=2)
        q = -q if call.scale < 0 else q
        return torch.einsum("bhd,bhnd->bn", q, means.float())
