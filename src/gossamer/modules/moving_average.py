"""Mega's exponential moving average (2209.10655, Section 3): the state space model of a SeqBoat layer."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["MovingAverage", "truncated_normal"]


def truncated_normal(tensor: Tensor, std: float) -> Tensor:
    """Draws of a normal distribution, none beyond two deviations, in place: what SeqBoat's code starts from."""
    return nn.init.trunc_normal_(tensor, std=std, a=-2 * std, b=2 * std)


class MovingAverage(nn.Module):
    """Damped averages of each channel by itself, N of them a channel, and their sum.

    With ``p = sigmoid(delta)`` and ``r = 1 - p sigmoid(alpha)``, for each channel and each of its N averages::

        h_t = r h_(t-1) + p beta x_t          y_t = omega x_t + sum over N of gamma h_t / sqrt(N)

    A convolution with a kernel as long as the sequence, by FFT in fp32 (fp64 for fp64): O(T log T). An FFT mixes all
    tokens, so that an output depends on later tokens in its rounding, and in nothing else. `step` has none of that.

    Without causality a second set of averages runs backwards; both hold a token's own term, as in Mega's code. That
    code can cut the kernel off (``truncation``), which has no step; this one does not.

    Args:
        width: E.
        averages: N (16).
        causal: whether a token sees those before it and itself alone.
    """

    def __init__(
        self,
        width: int,
        averages: int = 16,
        *,
        causal: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if averages < 1:
            raise ValueError(f"averages must be 1 or more, got {averages}")
        self.width, self.causal = width, causal
        shape = (width if causal else 2 * width, averages)
        self.delta, self.alpha, self.beta, self.gamma = (
            nn.Parameter(truncated_normal(torch.empty(shape, device=device, dtype=dtype), std))
            for std in (0.2, 0.2, 0.02, 1.0)
        )
        with torch.no_grad():
            self.beta.add_(1.0 - 2.0 * (torch.arange(averages, device=device) % 2))  # 1, -1, 1, ..: Mega's start
        self.omega = nn.Parameter(truncated_normal(torch.empty(width, device=device, dtype=dtype), 1.0))

    def _rates(self) -> tuple[Tensor, Tensor]:
        """``p`` and ``r``, ``[K, N]``, K twice E without causality; in fp32 at least, as rates near 1 need."""
        wide = torch.promote_types(self.delta.dtype, torch.float32)
        p = self.delta.to(wide).sigmoid()
        return p, 1 - p * self.alpha.to(wide).sigmoid()

    def _powers(self, length: int) -> Tensor:
        """``r`` to the power of 0, 1, .., ``[K, N, length]``."""
        rate = self._rates()[1]
        return rate[..., None] ** torch.arange(length, device=rate.device, dtype=rate.dtype)

    def kernel(self, length: int) -> Tensor:
        """What a token adds to the outputs that many tokens later (and earlier), ``[K, length]``."""
        weight = self._rates()[0] * self.beta * self.gamma / math.sqrt(self.gamma.shape[1])
        return torch.einsum("kn,knt->kt", weight, self._powers(length))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, E]`` to the same. Tokens that do not count must be zeros."""
        length = x.shape[1]
        if not length:
            return x
        wide = torch.promote_types(x.dtype, torch.float32)
        kernel = self.kernel(length).to(wide)
        if not self.causal:
            kernel, back = kernel.split(self.width)
            kernel = torch.cat([kernel[:, :1] + back[:, :1], kernel[:, 1:]], 1)
            # Offsets below 0 stand at the end of a circle of 2 T.
            kernel = torch.cat([kernel, torch.zeros_like(back[:, :1]), back[:, 1:].flip(1)], 1)
        size = 2 * length
        product = torch.fft.rfft(x.transpose(1, 2).to(wide), n=size) * torch.fft.rfft(kernel, n=size)
        out = torch.fft.irfft(product, n=size)[..., :length].transpose(1, 2).to(x.dtype)
        return out + x * self.omega

    def state(self, x: Tensor) -> Tensor:
        """``h`` after the last token of ``[B, T, E]``: ``[B, E, N]``. Causal alone."""
        powers = self._powers(x.shape[1]).flip(-1)
        return torch.einsum("bte,ent->ben", x.to(powers), powers) * self._rates()[0] * self.beta

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One more token ``[B, E]`` and the state before it: its output, and the state after it. Causal alone."""
        p, rate = self._rates()
        state = rate * state + p * self.beta * x[..., None]
        out = (state * self.gamma).sum(-1) / math.sqrt(self.gamma.shape[1])
        return out.to(x.dtype) + x * self.omega, state
