"""Products with packed weights in C++ against the whole weight, on every instruction set."""

from __future__ import annotations

import pytest
import torch
from cpu_checks import every_kernel, needs_kernels, poisoned, same_on_threads
from torch import Tensor

from gossamer.backends import cpu
from gossamer.backends.cpu import linear
from gossamer.compressed.billm import Binarised
from gossamer.compressed.int8 import row_scale
from gossamer.compressed.packed import OneBitLinear, SparseLinear

pytestmark = [needs_kernels, poisoned]
SHAPES = [(1, 1), (3, 7), (5, 31), (4, 32), (9, 33), (70, 45), (6, 128), (13, 200), (2, 577)]


@pytest.fixture(autouse=True)
def force(monkeypatch, request):
    if "isa" in request.fixturenames:
        monkeypatch.setenv(cpu.ENVIRONMENT, request.getfixturevalue("isa"))


def drawn(rows: int, columns: int, share: float, seed: int = 0) -> Tensor:
    """A weight with zeros, among them a whole row, and a row without any."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=draw)
    weight = weight.masked_fill(torch.rand(rows, columns, generator=draw) < share, 0.0)
    weight[rows // 2] = 0.0
    weight[rows // 3] = torch.randn(columns, generator=draw)
    return weight


def inputs(count: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(count)).to(dtype)


def close(found: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """To the product in fp64, but for fp32 sums and the rounding of the output."""
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    size = x.double().abs() @ weight.double().abs().T + 1
    allowed = 4 * torch.finfo(torch.float32).eps * size + torch.finfo(found.dtype).eps * expected.abs()
    assert found.dtype == x.dtype
    assert bool(((found.double() - expected).abs() <= allowed).all())


def binarised(rows: int, columns: int, block: int, seed: int = 0) -> Binarised:
    draw = torch.Generator().manual_seed(seed)
    some = [torch.rand(rows, columns, generator=draw) < 0.5 for _ in range(3)]
    salient = torch.rand(columns, generator=draw) < 0.2
    mean, scale = (torch.randn(4, rows, -(-columns // block), generator=draw) for _ in range(2))
    return Binarised(some[0], some[1] & ~salient, salient, some[2] & salient, mean, scale.abs(), block)


def product(layer: SparseLinear | OneBitLinear, x: Tensor) -> Tensor:
    return linear.multiply(x, layer.view(), layer.out_features, layer.bias)


@every_kernel
@pytest.mark.parametrize("values", ["same", "int8", "float32"])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 13])
def test_sparse(isa: str, dtype: torch.dtype, values: str, count: int) -> None:
    """Columns that fill no vector, one output, rows of zeros and full ones, several inputs, and a bias."""
    for rows, columns in SHAPES:
        weight = drawn(rows, columns, 0.7)
        bias = torch.randn(rows, generator=torch.Generator().manual_seed(1)).to(dtype)
        scale = row_scale(weight) if values == "int8" else None
        layer = SparseLinear.of(weight.to(torch.float32 if values != "same" else dtype), bias, scale)
        exact = layer.weight if scale is None else layer.weight.float()
        x = inputs(count, columns, dtype)
        close(product(layer, x), x, exact, bias)
        close(linear.multiply(x, layer.view(), rows, None), x, exact)


@every_kernel
@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 13])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_one_bit(isa: str, dtype: torch.dtype, count: int, kind: torch.dtype) -> None:
    """Blocks of any length, the last one shorter, and rows that come in fours and alone."""
    for rows, columns, block in [(1, 1, 128), (7, 37, 8), (5, 300, 128), (4, 128, 128), (9, 700, 150), (3, 260, 256)]:
        bias = torch.randn(rows, generator=torch.Generator().manual_seed(1)).to(dtype)
        layer = OneBitLinear.of(binarised(rows, columns, block), bias, kind)
        weight = layer.weight.to(torch.bfloat16) if dtype == torch.bfloat16 else layer.weight
        x = inputs(count, columns, dtype)
        close(product(layer, x), x, weight, bias)


@every_kernel
def test_inputs_that_are_not_contiguous(isa: str, dtype: torch.dtype) -> None:
    layer = SparseLinear.of(drawn(9, 45, 0.5))
    wide = inputs(6, 90, dtype)
    for x in (
        wide[:, ::2],
        wide[:, 3:48],
        wide[::3, :45],
        wide[:, :3].T.repeat(1, 8)[:, :45],
        wide[:1, :45].expand(4, -1),
    ):
        close(product(layer, x), x, layer.weight)


@every_kernel
def test_an_input_has_the_same_output_alone(isa: str, dtype: torch.dtype) -> None:
    """But for the order of sums, which goes by how many are multiplied at once."""
    layer = SparseLinear.of(drawn(9, 200, 0.7).to(dtype))
    x = inputs(5, 200, dtype)
    together = product(layer, x)
    for n in range(5):
        torch.testing.assert_close(product(layer, x[n : n + 1])[0], together[n], rtol=1e-2, atol=1e-4)


def test_threads_change_nothing() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        sparse = SparseLinear.of(drawn(300, 500, 0.7).to(dtype))
        one_bit = OneBitLinear.of(binarised(301, 500, 128), None, dtype)
        x = inputs(3, 500, dtype)
        same_on_threads(lambda layers=(sparse, one_bit), x=x: [product(one, x) for one in layers])


@every_kernel
@pytest.mark.parametrize("first", [0, 3])
def test_whole_rows(isa: str, dtype: torch.dtype, first: int) -> None:
    if dtype == torch.float16:
        pytest.skip("tiles are fp32 or bf16")
    for rows, columns in SHAPES:
        if rows <= first:
            continue
        weight = drawn(rows, columns, 0.6)
        for layer in (
            SparseLinear.of(weight.to(dtype)),
            SparseLinear.of(weight, None, row_scale(weight), dtype),
            OneBitLinear.of(binarised(rows, columns, 128), None, dtype),
            OneBitLinear.of(binarised(rows, columns, 150), None, dtype),
        ):
            out = torch.full((rows - first, columns), float("nan"), dtype=dtype)
            assert torch.equal(linear.make_whole(layer.view(), first, out), layer.weight[first:])


@every_kernel
def test_nothing_is_read_behind_the_last_number(isa: str, dtype: torch.dtype) -> None:
    """Whatever a bitmap and starts say after they were checked, rows read numbers that are there, or zeros."""
    weight = drawn(40, 333, 0.9).to(dtype)
    layer, x = SparseLinear.of(weight), inputs(2, 333, dtype)
    layer.bitmap.fill_(255)
    assert product(layer, x).shape == (2, 40)
    for start in (-1, 2**62, -(2**62), len(layer.values), len(layer.values) + 1):
        layer.starts.fill_(start)
        assert torch.equal(product(layer, x), torch.zeros(2, 40, dtype=dtype))
        linear.make_whole(layer.view(), 0, torch.empty(40, 333))


def test_misfits_are_refused() -> None:
    layer = SparseLinear.of(drawn(4, 40, 0.5))
    parts = [layer.bitmap, layer.values, layer.starts, None]
    for at, wrong, error in (
        (0, layer.bitmap[:, :4].contiguous(), ValueError),
        (0, layer.bitmap.T, ValueError),
        (0, layer.bitmap.short(), TypeError),
        (1, layer.values.double(), TypeError),
        (1, layer.values.to(torch.int8), ValueError),
        (1, torch.ones(161), ValueError),
        (2, layer.starts[:-1], ValueError),
        (2, layer.starts.int(), TypeError),
        (3, torch.ones(4), ValueError),
    ):
        given = [*parts[:at], wrong, *parts[at + 1 :]]
        with pytest.raises(error):
            linear.sparse_weight(40, *given)  # pyright: ignore[reportArgumentType]
    one_bit = OneBitLinear.of(binarised(4, 40, 128))
    codes, levels, salient = one_bit.codes, one_bit.levels, one_bit.salient
    for columns, block, misfits in (
        (40, 0, (codes, levels, salient)),
        (300, 128, (codes, levels, salient)),
        (40, 2**40, (codes, levels, salient)),
        (40, 128, (codes[:, :-1].contiguous(), levels, salient)),
        (40, 128, (codes, levels[:, :, :4].contiguous(), salient)),
        (40, 128, (codes, levels, salient[:-1])),
    ):
        with pytest.raises(ValueError, match="must"):
            linear.level_weight(columns, block, *misfits, rounded=False)
    with pytest.raises(ValueError, match="inputs"):
        linear.multiply(torch.ones(3, 39), layer.view(), 4, None)
    with pytest.raises(ValueError, match="bias"):
        linear.multiply(torch.ones(3, 40), layer.view(), 4, torch.ones(3))
    with pytest.raises(ValueError, match="outputs"):
        linear.multiply(torch.ones(3, 40), layer.view(), 5, None)
    with pytest.raises(ValueError, match="row"):
        linear.make_whole(layer.view(), 1, torch.empty(4, 40))
