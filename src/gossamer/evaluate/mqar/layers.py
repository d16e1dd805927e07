"""Layers to compare with: attention under a mask, and the gated convolution of Zoology (2312.04927, BaseConv).

At the lengths of associative recall a mask over all logits is the right form: nothing is saved by leaving keys out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.modules import DynamicMask
from gossamer.modules.tokens import Heads

__all__ = ["SELECTIONS", "GatedConvolution", "MaskedAttention", "MaskedByValues"]

_NONE = float("-inf")
_SEED = 0
SELECTIONS = ("all", "window", "fixed", "largest", "random")


class MaskedAttention(nn.Module):
    """Causal attention with some of the keys, by a mask over all logits.

    Args:
        width: E.
        select: ``all`` keys; a ``window`` of the last ``keep``, the query's own with them; ``fixed``, the span of
            ``keep`` tokens so far and the last token of each span before it (Sparse Transformer, 1904.10509, which
            Combiner completes); the ``keep`` with the ``largest`` logits, which is the oracle; or ``keep`` at
            ``random``, drawn for each query and each call in training, and always the same outside of it. A query that
            has fewer than ``keep`` keys reads all.
        heads: H, each with keys of its own where they are ranked.
        dropout: of the weights.

    Raises:
        ValueError: ``keep`` is below 1, or ``select`` is not known.
    """

    def __init__(self, width: int, select: str, keep: int, *, heads: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        if select not in SELECTIONS:
            raise ValueError(f"select must be one of {', '.join(SELECTIONS)}, got {select!r}")
        if keep < 1:
            raise ValueError(f"keep must be 1 or more, got {keep}")
        self.select, self.keep, self.dropout = select, keep, dropout
        self.projections = Heads(width, heads, bias=True)

    def mask(self, q: Tensor, k: Tensor) -> Tensor:
        """Which keys are read, of queries and keys ``[B, H, T, D]``: bool, ``[B, H, T, T]`` or ``[T, T]``."""
        place = torch.arange(q.shape[2], device=q.device)
        seen = place[:, None] >= place
        if self.select == "all":
            return seen
        if self.select == "window":
            return seen & (place[:, None] - place < self.keep)
        if self.select == "fixed":
            span = place // self.keep
            return seen & ((span[:, None] == span) | (place % self.keep == self.keep - 1))
        ranks = self._ranks(q, k).masked_fill(~seen, _NONE)
        chosen = ranks.topk(min(self.keep, len(place)), dim=-1).indices
        return seen & torch.zeros_like(ranks, dtype=torch.bool).scatter_(-1, chosen, True)

    @torch.no_grad()
    def _ranks(self, q: Tensor, k: Tensor) -> Tensor:
        if self.select == "largest":
            return q @ k.transpose(-1, -2)
        tokens = q.shape[2]
        if self.training:
            return torch.rand(*q.shape[:2], tokens, tokens, device=q.device)
        return torch.rand(tokens, tokens, generator=torch.Generator().manual_seed(_SEED)).to(q.device)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, E]`` to the same."""
        q, k, v = self.projections.split(x)
        dropout = self.dropout if self.training else 0.0
        if self.select == "all":
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        else:
            out = F.scaled_dot_product_attention(q, k, v, self.mask(q, k), dropout_p=dropout)
        return self.projections.merge(out)


class MaskedByValues(nn.Module):
    """`gossamer.modules.DynamicMaskAttention` of one head with Doge's selection, by a mask over all logits.

    Without a rotary embedding. Of equal scores the later key counts as the larger, as there: at first a window.

    Args:
        width: E.
        keep: keys that a query computes at most.

    Raises:
        ValueError: ``keep`` is below 1.
    """

    def __init__(self, width: int, keep: int) -> None:
        super().__init__()
        if keep < 1:
            raise ValueError(f"keep must be 1 or more, got {keep}")
        self.keep = keep
        self.projections = Heads(width, 1, bias=True)
        self.q_norm, self.k_norm = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
        self.scores = DynamicMask(1, width, proj_bias=True)

    @torch.no_grad()
    def mask(self, scores: Tensor) -> Tensor:
        """Which keys are read by scores ``[B, 1, T]``: bool ``[B, 1, T, T]``."""
        tokens = scores.shape[-1]
        order = tokens - 1 - scores.flip(-1).argsort(dim=-1, descending=True, stable=True)  # the best first
        seen = order[..., None, :] <= torch.arange(tokens, device=scores.device)[:, None]
        kept = seen & (seen.cumsum(-1) <= self.keep)
        return torch.zeros_like(kept).scatter_(-1, order[..., None, :].expand_as(kept), kept)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, E]`` to the same."""
        q, k, v = self.projections.split(x)
        scores = self.scores(v)
        added = scores[..., None, :].masked_fill(~self.mask(scores), _NONE)
        return self.projections.merge(F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, added))


class GatedConvolution(nn.Module):
    """A linear map of the input times a causal convolution of it, each channel with a filter of its own.

    Args:
        width: E.
        taps: length of the filters; long ones are convolved by FFT.
    """

    def __init__(self, width: int, taps: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, width)
        self.taps = nn.Parameter(torch.randn(width, taps) * taps**-0.5)
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, E]`` to the same."""
        tokens = x.shape[1]
        size = tokens + self.taps.shape[1]
        spectrum = torch.fft.rfft(x.transpose(1, 2), n=size) * torch.fft.rfft(self.taps, n=size)
        mixed = torch.fft.irfft(spectrum, n=size)[..., :tokens].transpose(1, 2)
        return self.gate(x) * (mixed + self.bias)
