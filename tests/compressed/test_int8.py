"""Linear layers in int8: what is clipped comes back, and the fast product is the plain one."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gossamer.compressed.int8 import InputScale, Int8Linear, has_product, int8_weight, overflow, product_by_definition

OUT, IN = 9, 70


def case(seed: int = 0, outliers: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 11, IN, generator=generator)
    x[..., :outliers] *= 60.0
    return torch.randn(OUT, IN, generator=generator), torch.randn(OUT, generator=generator), x


def scale_of(x: Tensor, share: float = 0.96) -> float:
    seen = InputScale(IN)
    seen.add(x)
    return seen.scale(share)


def test_what_is_clipped_and_what_is_beyond_make_the_whole() -> None:
    _, _, x = case()
    scale = scale_of(x)
    beyond = overflow(x, scale)
    torch.testing.assert_close(x.clamp(-127 * scale, 127 * scale) + beyond, x, rtol=2**-23, atol=0)
    assert {0, 1} <= set(beyond.flatten(0, 1).abs().sum(0).nonzero().flatten().tolist())
    assert (beyond == 0).float().mean() > 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_is_its_formula(dtype: torch.dtype, bias: bool) -> None:
    weight, shift, x = case()
    x = x.to(dtype)
    scale = scale_of(x)
    layer = Int8Linear.of(weight, shift if bias else None, scale)
    wide = x.double()
    clipped = wide.clamp(-127 * scale, 127 * scale)
    expected = ((clipped / scale).round() * scale + wide - clipped) @ layer.weight.double().T
    if bias:
        expected = expected + shift.double()
    found = layer(x)
    assert found.dtype == dtype
    torch.testing.assert_close(
        found.double(),
        expected,
        rtol=1e-5 if dtype == torch.float32 else 1e-2,
        atol=2e-3 if dtype == torch.float32 else 0.5,
    )


def test_outliers_apart_are_nearer_than_dropped_ones_or_a_wide_scale() -> None:
    weight, _, x = case()
    exact, scale = x @ weight.T, scale_of(x)
    apart = (Int8Linear.of(weight, None, scale)(x) - exact).norm()
    wide = (Int8Linear.of(weight, None, scale_of(x, 1.0))(x) - exact).norm()
    dropped = (Int8Linear.of(weight, None, scale, outliers=False)(x) - exact).norm()
    assert apart < 0.3 * wide
    assert wide < dropped


@pytest.mark.skipif(not has_product(torch.device("cpu")), reason="the processor has no instructions for int8")
@pytest.mark.parametrize("rows", [1, 2, 33])
def test_the_fast_product_is_the_definition(rows: int) -> None:
    weight, _, _ = case()
    quantised, by_row = int8_weight(weight)
    inputs = torch.randint(1, 256, (rows, IN), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    layer = Int8Linear.of(weight, None, 0.05)
    torch.testing.assert_close(layer._product(inputs, 0.05), product_by_definition(inputs, 0.05, quantised, by_row))


def test_layers_without_the_fast_product(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, shift, x = case()
    layer = Int8Linear.of(weight, shift, scale_of(x))
    fast = layer(x)
    monkeypatch.setattr("gossamer.compressed.int8.has_product", lambda device: False)
    torch.testing.assert_close(layer(x), fast, rtol=1e-5, atol=1e-3)


def test_scales_hold_their_share() -> None:
    _, _, x = case(3, 0)
    seen = InputScale(IN)
    for part in x:
        seen.add(part)
    for share in (0.5, 0.9, 0.99):
        within = float((x.abs() <= seen.scale(share) * 127).float().mean())
        assert share <= within < share + 0.05
    assert seen.scale(1.0) * 127 == pytest.approx(float(x.abs().max()))
    assert seen.importance(1.0) == pytest.approx(1.0)
    assert seen.importance(0.9) > seen.importance(0.99) > 1.0


def test_inputs_of_zeros_and_one_by_one() -> None:
    weight, shift, x = case()
    seen = InputScale(IN)
    seen.add(torch.zeros(2, IN))
    layer = Int8Linear.of(weight, shift, seen.scale())
    torch.testing.assert_close(layer(torch.zeros(2, IN)), shift.expand(2, -1))
    layer = Int8Linear.of(weight, shift, scale_of(x))
    torch.testing.assert_close(layer(x)[0, 0], layer(x[:1, :1])[0, 0], rtol=1e-5, atol=1e-4)
    assert layer(x[:, :0]).shape == (3, 0, OUT)


def test_a_saved_layer_is_the_same() -> None:
    weight, shift, x = case()
    layer, other = Int8Linear.of(weight, shift, scale_of(x)), Int8Linear.of(torch.zeros(OUT, IN), torch.zeros(OUT), 1.0)
    other(x)
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(other(x), layer(x), rtol=0, atol=0)


def test_layers_that_ran_can_be_copied_saved_and_moved(tmp_path: Path) -> None:
    weight, shift, x = case()
    layer = Int8Linear.of(weight, shift, scale_of(x))
    expected = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), expected)
    torch.save(layer, tmp_path / "layer.pt")
    assert torch.equal(torch.load(tmp_path / "layer.pt", weights_only=False)(x), expected)
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert half.by_row.dtype == half.scale.dtype == torch.float32
    assert half(x.bfloat16()).dtype == torch.bfloat16
    with torch.inference_mode():
        assert torch.equal(Int8Linear.of(weight, shift, scale_of(x))(x), expected)


@pytest.mark.parametrize("outliers", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite_stay_so(outliers: bool, value: float) -> None:
    weight, shift, x = case()
    layer = Int8Linear.of(weight, shift, scale_of(x), outliers)
    expected = layer(x)
    x = x.clone()
    x[1, 4, 30] = value
    found = layer(x)
    assert bool(found[1, 4].isnan().all())
    found[1, 4] = expected[1, 4]
    torch.testing.assert_close(found, expected)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="scale must be above 0"):
        Int8Linear.of(torch.ones(2, 2), None, 0.0)
    with pytest.raises(ValueError, match="\\[out, in\\]"):
        Int8Linear.of(torch.ones(2), None, 1.0)
    with pytest.raises(ValueError, match="share must be"):
        InputScale(2).scale(0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_stay_what_they_were_in_another_dtype(dtype: torch.dtype) -> None:
    weight = torch.randn(5, 16)
    weight[2] = 0.0  # whose scale is below all numbers of fp16
    layer = Int8Linear.of(weight, None, 0.0123)
    before = layer.by_row.clone(), layer.scale.clone()
    layer.to(dtype)
    assert torch.equal(layer.by_row, before[0])
    assert torch.equal(layer.scale, before[1])
    layer.check()


def test_a_gradient_and_another_width_are_refused() -> None:
    layer = Int8Linear.of(torch.randn(5, 16), None, 0.1)
    with pytest.raises(RuntimeError, match="no gradient"):
        layer(torch.randn(2, 16, requires_grad=True))
    with torch.no_grad():
        layer(torch.randn(2, 16, requires_grad=True))
    with pytest.raises(ValueError, match=r"16.*32"):
        layer(torch.randn(2, 32))
