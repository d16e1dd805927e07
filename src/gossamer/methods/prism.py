"""Prism: mean-pooled attention in two bands of rotary frequencies, so that what a mean cancels is not lost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gossamer import scores
from gossamer.blocks import Blocks
from gossamer.call import AttentionCall
from gossamer.methods.base import Method, Settings, require_at_least, require_share
from gossamer.plan import SparsePlan, ceil_div
from gossamer.rules import Either, TopP

__all__ = ["Prism"]


@dataclass(frozen=True)
class Prism(Method):
    """Prism's selection (2602.08426): the union of two top-p choices, of high and of low rotary frequencies.

    Taking the mean of a block is a low-pass filter: dimensions that rotate fast cancel, and drown in those that do not.
    So a high band (the first ``high`` of the frequencies, at least one) and a low one (the last ``low``; they may
    overlap) are scored apart: a softmax over the key blocks that a query block sees of ``q . k / (sqrt(d_band) t)``,
    with q and k the means of blocks, cut to the band. The temperature makes up for what the mean took from a band:
    over all blocks of a head, ``t = sqrt(d_band / d) * (rms(q_band) / rms(q)) * (rms(k_band) / rms(k))``. So the
    logit is ``scale * q . k`` over the root of the product of the band's shares in the energies of q and k. Each band
    keeps its best blocks that hold the share p, the one that crosses p among them; the first block and a query
    block's own are kept, too.

    Defaults: the authors', 64 and 96 of 128 dimensions as shares, p 0.95 in both, blocks of 128.

    Deviations: means run over live tokens (the authors' last block counts zeros). Dimensions i and i + d/2 are taken
    to rotate together, as in transformers' models, over the whole head; where a model rotates some of them alone, the
    others count as low frequencies of the second half, or high ones of the first. Energies are those of the call:
    a chunk of a prefill has others than the whole prompt.
    """

    name: ClassVar[str] = "prism"
    settings: ClassVar[Settings] = tuple({"p_high": p, "p_low": p} for p in (0.6, 0.8, 0.9, 0.95))
    high: float = 0.5
    low: float = 0.75
    p_high: float = 0.95
    p_low: float = 0.95
    sink_blocks: int = 1
    block: int = 128

    def __post_init__(self) -> None:
        require_share(self, "high", "low", "p_high", "p_low")
        require_at_least(self, 0, "sink_blocks")
        require_at_least(self, 1, "block")

    def plan(self, call: AttentionCall) -> SparsePlan:
        blocks = Blocks(call, self.block, self.block)
        blocks.keep(first=self.sink_blocks)
        queries, keys = scores.pool_queries(call, blocks.grid), scores.pool_keys(call, blocks.grid)
        pairs = ceil_div(call.q.shape[-1], 2)
        frequency = torch.arange(call.q.shape[-1], device=call.device) % pairs  # 0 rotates fastest
        fast, slow = max(1, round(self.high * pairs)), pairs - max(1, round(self.low * pairs))
        bands = [
            scores.pooled_mass(call, blocks.grid, _calibrated(queries, band), _calibrated(keys, band))
            for band in (frequency < fast, frequency >= slow)
        ]
        for (part, high), (_, low) in zip(*bands, strict=True):
            blocks.choose(part, high, Either(TopP(self.p_high), TopP(self.p_low), low))
        return blocks.plan()


def _calibrated(means: Tensor, band: Tensor) -> Tensor:
    """Means of blocks ``[B, heads, blocks, D]``, 0 outside a band, over the root of the band's share in the energy."""
    cut = means * band
    energy = means.square().sum(dim=(2, 3), keepdim=True)
    share = cut.square().sum(dim=(2, 3), keepdim=True) / energy.clamp(min=torch.finfo(energy.dtype).tiny)
    return cut / share.sqrt().clamp(min=1e-6)
