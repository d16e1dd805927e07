"""Queries and keys as they were before the model turned them, in C++."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from gossamer.backends.cpu.native import active_isa, check_tensors, kernels
from gossamer.backends.cpu.views import arrays, dense_rows, tensor_view
from gossamer.call import AttentionCall
from gossamer.rotary import Rotary

__all__ = ["before_rotary"]

_TOKENS = 4096  # whose cosines and sines are held at once


def before_rotary(call: AttentionCall) -> AttentionCall:
    """See `gossamer.backends.torch.before_rotary`, which turns interleaved pairs, and what needs a gradient."""
    if call.rotary is None or call.rotary.interleaved or call.needs_gradient:
        return call.before_rotary()
    check_tensors(call.q, call.k)
    q = _turned_back(call.rotary, call.q, call.extent.query_positions(call.query_len))
    return replace(call, q=q, k=_turned_back(call.rotary, call.k, call.extent.key_positions(call.key_len)), rotary=None)


def _turned_back(rotary: Rotary, x: Tensor, positions: Tensor) -> Tensor:
    out, x = torch.empty(x.shape, dtype=x.dtype, device="cpu"), dense_rows(x)
    for start in range(0, x.shape[2] if x.numel() else 0, _TOKENS):
        part = slice(start, start + _TOKENS)
        cos, sin = (own.contiguous() for own in rotary.factors(positions[:, part], torch.float32, back=True))
        cosines, sines = arrays((cos, sin), (torch.float32, torch.float32))
        kernels().turn(
            active_isa(x.dtype),
            tensor_view(x[:, :, part]),
            cos=cosines,
            sin=sines,
            out=tensor_view(out[:, :, part]),
            threads=torch.get_num_threads(),
        )
    return out
