"""Packed weights are the weights."""

from __future__ import annotations

import pytest
import torch

from gossamer.compressed.billm import binarise
from gossamer.compressed.packed import OneBitLinear, SparseLinear, bits_of, bools_of


@pytest.mark.parametrize("number", [1, 7, 8, 9, 63, 130])
def test_bits_come_back(number: int) -> None:
    some = torch.rand(3, number, generator=torch.Generator().manual_seed(number)) < 0.4
    bits = bits_of(some)
    assert bits.shape == (3, -(-number // 8))
    assert torch.equal(bools_of(bits, number), some)
    assert [int(bits[0, 0]) >> i & 1 for i in range(min(8, number))] == some[0, :8].int().tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 1.0])
def test_sparse_weights_are_exact(dtype: torch.dtype, share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(7, 45, generator=generator).masked_fill(torch.rand(7, 45, generator=generator) < share, 0)
    weight, bias, x = weight.to(dtype), torch.randn(7, generator=generator).to(dtype), torch.randn(2, 3, 45).to(dtype)
    layer = SparseLinear.of(weight, bias)
    assert torch.equal(layer.weight, weight)
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, weight, bias))
    assert layer.starts.tolist() == [0, *(weight != 0).sum(1).cumsum(0).tolist()]
    assert layer.nbytes == 7 * 6 + int((weight != 0).sum()) * dtype.itemsize + 8 * 8


@pytest.mark.parametrize("block", [8, 19, 128])
def test_binarised_weights_are_what_was_found(block: int) -> None:
    generator = torch.Generator().manual_seed(1)
    weight, x = torch.randn(6, 37, generator=generator), torch.randn(4, 37, generator=generator)
    found = binarise(weight, None, block=block)
    layer = OneBitLinear.of(found, None)
    # Means and scales are fp16.
    torch.testing.assert_close(layer.weight, found.dequantised(), rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(layer(x), x @ layer.weight.T)
    assert layer.second.shape == (6, -(-int(found.salient.sum()) // 8))
