"""The bias of each key as more dimensions of queries and keys, so that the kernels' product adds it.

Queries get a 1 and keys their bias over the scale: then ``scale q . k`` is the logit with its bias, and the gradient of
the bias is that of the key's number, over the scale. In bf16 three numbers whose sum is the bias hold it as exactly as
fp32 does.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from gossamer.backends.cpu.native import MAX_HEAD_DIM
from gossamer.call import AttentionCall

__all__ = ["gradient_of_bias", "takes_bias", "with_bias_as_dimensions"]

_DIMENSIONS = {torch.float32: 1, torch.bfloat16: 3}
# Numbers beyond these are infinite once they are divided by the scale, or in powers of two.
_MOST = 2e38


def takes_bias(call: AttentionCall) -> bool:
    """Whether a call's bias, if it has one, can be dimensions: not after a soft-cap, nor in fp16's range."""
    if call.bias is None:
        return True
    more = _DIMENSIONS.get(call.q.dtype)
    fits = more is not None and call.q.shape[-1] + more <= MAX_HEAD_DIM
    return fits and call.softcap is None and call.scale != 0


def with_bias_as_dimensions(call: AttentionCall) -> AttentionCall:
    """The same call without a bias, with wider queries and keys."""
    if call.bias is None:
        return call
    dtype, dimensions = call.q.dtype, _DIMENSIONS[call.q.dtype]
    given = call.bias.detach().float()
    rest = (given.clamp(-_MOST, _MOST) / call.scale).clamp(-_MOST, _MOST)
    # Infinite ones stay so: a key with -inf is attended by nobody.
    rest = torch.where(given.isinf(), given * (1.0 if call.scale > 0 else -1.0), rest)
    columns = []
    for _ in range(dimensions):
        column = rest.to(dtype)
        columns.append(column)
        rest = torch.where(rest.isinf(), 0.0, rest - column.float())
    ones = call.q.new_ones(*call.q.shape[:3], dimensions)
    k = torch.cat([call.k.detach(), torch.stack(columns, dim=-1)], dim=-1)
    return replace(call, q=torch.cat([call.q.detach(), ones], dim=-1), k=k, bias=None)


def gradient_of_bias(call: AttentionCall, keys: Tensor) -> Tensor:
    """From the gradient of the wider keys of a call with a bias: ``[B, G, T]``, fp32."""
    return keys[..., call.q.shape[-1]].float() / call.scale
