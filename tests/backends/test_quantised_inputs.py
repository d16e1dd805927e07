"""Inputs of linear layers in uint8, and what their scale cuts off, on every instruction set: as torch has it."""

from __future__ import annotations

import pytest
import torch

from gossamer.backends import cpu

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason="the C++ kernels are not built")
SCALE = 0.01


@pytest.fixture(params=cpu.supported_isas() or ["none"])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(cpu.ENVIRONMENT, request.param)
    return request.param


def given(dtype: torch.dtype, rows: int = 67, features: int = 37) -> torch.Tensor:
    x = torch.randn(rows, features, generator=torch.Generator().manual_seed(0))
    x[1] *= 1e-3  # a row that is all within, one that is all beyond, and numbers half way between two steps
    x[2] = torch.where(x[2] < 0, -3.0, 3.0)
    x[3] = (torch.arange(features) - 18.5) * SCALE
    x[4, 0], x[4, 1] = 127 * SCALE, -127 * SCALE
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_are_the_definitions(isa: str, dtype: torch.dtype) -> None:
    x = given(dtype)
    made = cpu.QuantisedInputs(x, SCALE)
    expected = (x.float() / SCALE).round().clamp(-127, 127) + 128
    torch.testing.assert_close(made.numbers, expected.to(torch.uint8), rtol=0, atol=0)
    limit = torch.tensor(127 * SCALE)  # in fp32, as the kernels have it
    assert made.beyond == int((x.float().abs() > limit).sum()) > 37
    assert made.lost == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("outputs", [1, 5, 130])
def test_what_is_beyond_is_added(isa: str, dtype: torch.dtype, outputs: int) -> None:
    x = given(torch.float32)
    torch.manual_seed(outputs)
    weight = torch.randint(-127, 128, (outputs, 37)).to(torch.int8)
    by_row = 0.01 + 0.01 * torch.rand(outputs)
    out = torch.randn(67, outputs + 3).to(dtype)[:, :outputs]  # rows with something between them
    before = out.clone()
    cpu.QuantisedInputs(x, SCALE).add_to(out, weight, by_row)
    beyond = x - x.clamp(-127 * SCALE, 127 * SCALE)
    expected = before.float() + beyond @ (weight.float() * by_row[:, None]).T
    torch.testing.assert_close(out, expected.to(dtype), rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=2e-5)
    assert torch.equal(out[1], before[1])
    assert not torch.equal(out[2], before[2])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 20, 36])  # in a whole vector of any width, and in what is left
def test_rows_that_are_not_finite_are_named(isa: str, value: float, place: int) -> None:
    x = given(torch.float32)
    x[5, place] = x[66, place] = value
    made = cpu.QuantisedInputs(x, SCALE)
    assert made.lost == [5, 66]
    assert bool((made.numbers[[5, 66]] == 128).all())
    out = torch.zeros(67, 4)
    made.add_to(out, torch.ones(4, 37, dtype=torch.int8), torch.ones(4))
    assert bool(out.isfinite().all())
    assert bool((out[[5, 66]] == 0).all())


def test_strides_threads_and_empty_inputs() -> None:
    x = given(torch.float32)
    made = cpu.QuantisedInputs(x, SCALE)
    for other in (x.T.contiguous().T, torch.cat([x, x], 1)[:, :37]):
        assert torch.equal(cpu.QuantisedInputs(other, SCALE).numbers, made.numbers)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(cpu.QuantisedInputs(x, SCALE).numbers, made.numbers)
    finally:
        torch.set_num_threads(threads)
    none = cpu.QuantisedInputs(x[:0], SCALE)
    assert (none.numbers.shape, none.beyond, none.lost) == ((0, 37), 0, [])
    none.add_to(torch.zeros(0, 3), torch.ones(3, 37, dtype=torch.int8), torch.ones(3))


def test_bad_input() -> None:
    x = given(torch.float32)
    with pytest.raises(ValueError, match=r"rows, features"):
        cpu.QuantisedInputs(x[None], SCALE)
    for scale in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="scale"):
            cpu.QuantisedInputs(x, scale)
    made = cpu.QuantisedInputs(x, SCALE)
    with pytest.raises(ValueError, match="weight"):
        made.add_to(torch.zeros(67, 4), torch.ones(4, 36, dtype=torch.int8), torch.ones(4))
    with pytest.raises(ValueError, match="scales"):
        made.add_to(torch.zeros(67, 4), torch.ones(4, 37, dtype=torch.int8), torch.ones(3))
    with pytest.raises(ValueError, match="rows"):
        made.add_to(torch.zeros(66, 4), torch.ones(4, 37, dtype=torch.int8), torch.ones(4))
    with pytest.raises(ValueError, match="contiguous"):
        made.add_to(torch.zeros(4, 67).T, torch.ones(4, 37, dtype=torch.int8), torch.ones(4))
    with pytest.raises(TypeError, match="float64"):
        cpu.QuantisedInputs(x.double(), SCALE)
    with pytest.raises(TypeError, match="int8"):
        made.add_to(torch.zeros(67, 4), torch.ones(4, 37), torch.ones(4))
