"""Encoded keys and values, decoded as a tile of them is loaded: codes with a scale and a zero, and bitmaps."""

# Triton compiles these functions; their parameters and constants are not what Python sees.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

__all__ = ["BITMAP", "BY_CHANNELS", "BY_TOKENS", "PLAIN", "Coded", "load_coded"]

# How tokens are encoded: not at all; elements behind a bitmap; codes whose scales belong to groups of tokens of a
# channel, or of channels of a token.
PLAIN = tl.constexpr(0)
BITMAP = tl.constexpr(1)
BY_TOKENS = tl.constexpr(2)
BY_CHANNELS = tl.constexpr(3)


class Coded(NamedTuple):
    """The ``count`` first tokens of one key/value head, which are encoded: pointers to what its slot 0 has, and strides
    of a token, or of a group of tokens.

    ``codes`` are bytes, of bitmaps or of codes with ``BITS`` each; ``scale`` has scales, or what a bitmap leaves.
    """

    codes: Any
    scale: Any
    zero: Any
    stride: Any
    scale_stride: Any
    count: Any
    CODING: Any
    BITS: Any
    GROUP: Any


@triton.jit
def load_coded(coded, tail, tail_stride, slots, keep, BEGIN: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Tokens ``slots`` from dimension ``BEGIN`` on, decoded where they are encoded, else from the ``tail``; zero beyond
    ``DIM`` and where ``keep`` is False."""
    column = BEGIN + tl.arange(0, BLOCK_DIM)
    inside = keep[:, None] & (column < DIM)[None, :]
    encoded = inside & (slots < coded.count)[:, None]
    wide = slots.to(tl.int64)[:, None]
    own = tail + (wide - coded.count) * tail_stride + column[None, :]
    plain = tl.load(own, mask=inside & (slots >= coded.count)[:, None], other=0.0)
    codes = coded.codes + wide * coded.stride
    if coded.CODING == BITMAP:
        byte = tl.load(codes + column[None, :] // 8, mask=encoded, other=0).to(tl.int32)
        there = (byte >> (column % 8)[None, :]) & 1
        place = tl.cumsum(there, 1) - there
        if BEGIN > 0:
            earlier = tl.arange(0, BEGIN)
            known = keep & (slots < coded.count)
            byte = tl.load(codes + earlier[None, :] // 8, mask=known[:, None] & (earlier < DIM)[None, :], other=0)
            place += tl.sum((byte.to(tl.int32) >> (earlier % 8)[None, :]) & 1, 1)[:, None]
        numbers = tl.load(coded.scale + wide * coded.scale_stride + place, mask=encoded & (there != 0), other=0.0)
    else:
        bit = column * coded.BITS
        byte = tl.load(codes + bit[None, :] // 8, mask=encoded, other=0).to(tl.int32)
        code = (byte >> (bit % 8)[None, :]) & ((1 << coded.BITS) - 1)
        if coded.CODING == BY_TOKENS:
            group = (wide // coded.GROUP) * coded.scale_stride + column[None, :]
        else:
            group = wide * coded.scale_stride + column[None, :] // coded.GROUP
        scale = tl.load(coded.scale + group, mask=encoded, other=0.0).to(tl.float32)
        zero = tl.load(coded.zero + group, mask=encoded, other=0.0).to(tl.float32)
        numbers = (code.to(tl.float32) * scale + zero).to(plain.dtype)
    return tl.where(encoded, numbers, plain)
