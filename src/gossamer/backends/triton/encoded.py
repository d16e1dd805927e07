"""Encoded keys and values as the forward kernel takes them: tensors, strides and constants. Imports Triton."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gossamer.backends.triton.kernels.coded import BITMAP, BY_CHANNELS, BY_TOKENS, PLAIN
from gossamer.encoded import EncodedTokens

__all__ = ["coded_arguments", "plain"]


def plain(x: Tensor) -> Tensor:
    """Those rows of keys or values that lie in memory as they are."""
    return x.tail if isinstance(x, EncodedTokens) else x


def coded_arguments(name: str, x: Tensor) -> dict[str, Any]:
    """Of keys (``k``) or values (``v``) ``[B, G, T, D]``; of plain ones, nothing that a kernel reads."""
    coding, bits, group = PLAIN, 8, 1
    codes = scales = zeros = plain(x)
    count = 0
    if isinstance(x, EncodedTokens):
        encoded, count = x.encoded, x.encoded.tokens
        if encoded.coding == "bitmap":
            coding, codes, scales = BITMAP, encoded.bitmap, encoded.packed
            zeros = scales
        else:
            coding = BY_TOKENS if encoded.over == "tokens" else BY_CHANNELS
            codes, scales, zeros = encoded.codes, encoded.scale, encoded.zero
            bits, group = encoded.bits, encoded.group
        codes, scales, zeros = (_dense_last(t) for t in (codes, scales, zeros))
        if zeros.stride() != scales.stride():
            zeros, scales = zeros.contiguous(), scales.contiguous()
    arguments: dict[str, Any] = {f"{name}_codes": codes, f"{name}_scales": scales, f"{name}_zeros": zeros}
    for of, tensor in ((f"{name}_codes", codes), (f"{name}_scales", scales)):
        places = (f"{of}_batch_stride", f"{of}_head_stride", f"{of}_stride")
        arguments |= dict(zip(places, tensor.stride()[:3], strict=True))
    of = name.upper()
    constants = {f"{of}_CODING": coding.value, f"{of}_BITS": bits, f"{of}_GROUP": group}
    return arguments | constants | {f"{name}_coded": count}


def _dense_last(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
