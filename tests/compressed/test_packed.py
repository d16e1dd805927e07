"""Packed weights are the weights."""

from __future__ import annotations

import copy

import pytest
import torch

from gossamer.backends.cpu import linear as kernels
from gossamer.compressed import packed
from gossamer.compressed.billm import binarise
from gossamer.compressed.int8 import row_scale
from gossamer.compressed.packed import MOST_ROWS, OneBitLinear, PackedLinear, SparseLinear, bits_of, bools_of


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
    # Levels are fp16.
    torch.testing.assert_close(layer.weight, found.dequantised(), rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(layer(x), x @ layer.weight.T)
    assert bools_of(layer.salient, 8 * len(layer.salient)).sum() == found.salient.sum()


def test_a_block_of_128_takes_three_bits_a_weight() -> None:
    weight = torch.randn(4, 512, generator=torch.Generator().manual_seed(1))
    layer = OneBitLinear.of(binarise(weight, None), None)
    assert layer.nbytes == 4 * 512 * 3 // 8 + 512 // 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.0, 0.7, 1.0])
def test_sparse_weights_in_int8_are_multiples_of_a_scale(dtype: torch.dtype, share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(7, 45, generator=generator).masked_fill(torch.rand(7, 45, generator=generator) < share, 0)
    scale, x = row_scale(weight), torch.randn(2, 3, 45, generator=generator).to(dtype)
    layer = SparseLinear.of(weight, None, scale, dtype)
    assert layer.values.dtype == torch.int8
    assert layer.weight.dtype == dtype
    exact = (weight / scale[:, None]).round() * scale[:, None]
    torch.testing.assert_close(layer.weight, exact.to(dtype))
    rounding = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(layer(x).float(), x.float() @ exact.T, rtol=rounding, atol=rounding)
    assert layer.nbytes == 7 * 6 + len(layer.values) + 8 * 8 + 7 * 4
    with pytest.raises(ValueError, match="above 0 and"):
        SparseLinear.of(weight, None, scale * 0)
    with pytest.raises(ValueError, match="one a row"):
        SparseLinear.of(weight, None, scale[:3])


def layers(dtype: torch.dtype) -> list[PackedLinear]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(70, 200, generator=generator).masked_fill(torch.rand(70, 200, generator=generator) < 0.6, 0)
    bias = torch.randn(70, generator=generator).to(dtype)
    return [
        SparseLinear.of(weight.to(dtype), bias),
        SparseLinear.of(weight, bias, row_scale(weight), dtype),
        OneBitLinear.of(binarise(weight, None), bias, dtype),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [0, 1, MOST_ROWS, MOST_ROWS + 1])
def test_few_and_many_inputs_get_what_the_whole_weight_gives(dtype: torch.dtype, count: int, monkeypatch) -> None:
    monkeypatch.setattr(packed, "TILE_BYTES", 20 * 200 * dtype.itemsize)
    x = torch.randn(2, count, 200, generator=torch.Generator().manual_seed(1)).to(dtype)[:, ::2]
    for layer in layers(dtype):
        found, expected = layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias)
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=0.1 if dtype != torch.float32 else 1e-4)


def test_without_kernels_and_for_gradients_the_weight_is_made_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 200, generator=torch.Generator().manual_seed(1))
    for layer in layers(torch.float32):
        expected = torch.nn.functional.linear(x, layer.weight, layer.bias)
        given = x.clone().requires_grad_()
        layer(given).sum().backward()
        torch.testing.assert_close(given.grad, layer.weight.sum(0).expand(3, -1))
        assert layer.bias is not None
        layer.bias.requires_grad_()
        layer(x).sum().backward()
        torch.testing.assert_close(layer.bias.grad, torch.full((70,), 3.0))
        layer.bias.requires_grad_(False)
        torch.testing.assert_close(torch.func.vmap(layer)(x), expected)
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "is_available", lambda: False)
            torch.testing.assert_close(layer(x), expected)
        with pytest.raises(RuntimeError):
            layer(x[:, :100])


def test_layers_see_buffers_that_are_replaced_and_can_be_copied() -> None:
    x = torch.randn(2, 200, generator=torch.Generator().manual_seed(1))
    for layer, other in zip(layers(torch.float32), layers(torch.bfloat16), strict=True):
        assert torch.equal(copy.deepcopy(layer)(x), layer(x))
        layer.load_state_dict(other.state_dict(), assign=True)
        assert layer.bias is not None
        torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, layer.weight.float(), layer.bias.float()))


def test_scales_and_levels_keep_their_dtype() -> None:
    for layer, name in zip(layers(torch.float32)[1:], ("scale", "levels"), strict=True):
        before = getattr(layer, name).clone()
        assert torch.equal(getattr(layer.to(torch.bfloat16), name), before)
        assert getattr(layer.to("meta"), name).dtype == before.dtype
        assert getattr(layer.to_empty(device="cpu"), name).dtype == before.dtype


@pytest.mark.parametrize("width", [80, 160, 360])
def test_layers_that_become_another_dtype_and_back_are_read_anew(width: int) -> None:
    """The allocator may give back the address that a view was made of."""
    layer = SparseLinear.of(torch.randn(width, width).bfloat16())
    x = torch.randn(1, width)
    layer(x.bfloat16())
    layer.float()
    layer.half()
    assert layer.dtype == torch.float16
    expected = x @ layer.weight.float().T
    torch.testing.assert_close(layer(x.half()).float(), expected, rtol=2e-2, atol=2e-1)
