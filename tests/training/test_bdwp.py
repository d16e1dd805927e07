"""BDWP beside its definition: masks written out, and the formulas of the three products."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.training import BDWPLinear, Macs, bdwp, count_macs, largest


def naive(weight: Tensor, n: int, m: int, dim: int) -> Tensor:
    """One number after the other, in lists."""
    rows = (weight if dim == 1 else weight.T).abs().tolist()
    kept = [
        [sorted(range(start, start + m), key=lambda i, row=row: (-row[i], i))[:n] for start in range(0, len(row), m)]
        for row in rows
    ]
    mask = torch.tensor([[i in set(itertools.chain(*groups)) for i in range(len(rows[0]))] for groups in kept])
    return mask if dim == 1 else mask.T


@pytest.mark.parametrize("pattern", ["2:8", "1:4", "3:4"])
@pytest.mark.parametrize("dim", [0, 1])
def test_the_largest_of_each_group(pattern: str, dim: int) -> None:
    n, m = map(int, pattern.split(":"))
    weight = torch.randn(16, 24, generator=torch.Generator().manual_seed(0))
    found = largest(weight, pattern, dim)
    assert torch.equal(found, naive(weight, n, m, dim))
    assert bool((found.unflatten(dim, (-1, m)).sum(dim + 1) == n).all())
    rounded = (2 * weight).round()  # many ties
    assert torch.equal(largest(rounded, pattern, dim), naive(rounded, n, m, dim))


def test_of_equal_ones_the_first() -> None:
    for weight in (torch.ones(2, 8), torch.zeros(2, 8), torch.tensor([[1.0, -1.0] * 4] * 2)):
        assert largest(weight, "2:8").tolist() == [[True] * 2 + [False] * 6] * 2
    assert largest(torch.tensor([0.0, 3.0, -3.0, 3.0]), "2:4").tolist() == [False, True, True, False]


def expected(layer: BDWPLinear, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """The formulas, in fp64 and with whole masks."""
    w, n, m = layer.weight.detach().double(), layer.pattern.keep, layer.pattern.of
    x, grad = x.detach().double().flatten(0, -2), grad.double().flatten(0, -2)
    ahead = naive(w, n, m, 1)
    back = {"bdwp": naive(w, n, m, 0) if layer.backward_weight == "bdwp" else None, "shared": ahead, "dense": None}
    mask = back[layer.backward_weight]
    return {
        "y": x @ (w * ahead).T + (0 if layer.bias is None else layer.bias.detach().double()),
        "dx": grad @ (w if mask is None else w * mask),
        "dw": grad.T @ x + layer.decay * w * ~ahead,
        "db": grad.sum(0),
    }


@pytest.mark.parametrize("backward", ["bdwp", "dense", "shared"])
@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize(
    ("shape", "bias", "dtype"),
    [((7,), True, torch.float32), ((2, 3, 5), False, torch.float64), ((2, 5), True, torch.bfloat16)],
)
def test_the_three_products(
    backward: Any, decay: float, shape: tuple[int, ...], bias: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(1)
    layer = BDWPLinear(24, 16, bias, dtype=dtype, pattern="2:8", backward=backward, decay=decay)
    x = torch.randn(*shape, 24, dtype=dtype, requires_grad=True)
    grad = torch.randn(*shape, 16, dtype=dtype)
    y = layer(x)
    y.backward(grad)
    wanted = expected(layer, x, grad)
    assert x.grad is not None
    assert y.shape == (*shape, 16)
    found = {"y": y.detach(), "dx": x.grad, "dw": layer.weight.grad}
    if layer.bias is not None:
        found["db"] = layer.bias.grad
    # Sums of some 24 products, rounded once in bfloat16.
    error = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 3e-2}[dtype]
    for name, value in found.items():
        assert value is not None
        assert value.dtype == dtype
        torch.testing.assert_close(value.double().view_as(wanted[name]), wanted[name], rtol=error, atol=error)


def test_one_vector_and_inputs_without_a_gradient() -> None:
    layer = BDWPLinear(8, 8, pattern="1:2")
    layer(torch.randn(8)).sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.shape == (8, 8)
    layer.weight.requires_grad_(False)
    layer.weight.grad = None
    x = torch.randn(3, 8, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad is None
    assert x.grad is not None


def test_a_shared_mask_is_what_autograd_makes_of_a_masked_weight() -> None:
    torch.manual_seed(2)
    layer = BDWPLinear(16, 8, pattern="2:8", backward="shared")
    weight = layer.weight.detach().clone().requires_grad_()
    mask = largest(weight, "2:8", 1)
    x, other = (torch.randn(5, 16, requires_grad=True) for _ in range(2))
    other.data = x.data
    straight = weight + (weight * mask - weight).detach()
    layer(x).square().sum().backward()
    F.linear(other, straight, layer.bias.detach()).square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad)
    torch.testing.assert_close(layer.weight.grad, weight.grad)


def test_masks_are_chosen_anew_of_the_dense_weight() -> None:
    layer = BDWPLinear(4, 4, False, pattern="1:4")
    layer.weight.data = torch.tensor([[4.0, 3.0, 0.0, 0.0]]).repeat(4, 1)
    steps = torch.optim.SGD(layer.parameters(), lr=1.0)
    layer(torch.tensor([[2.0, -1.0, 0.0, 0.0]])).sum().backward()
    steps.step()  # the weight that was left out moves too: 4 - 2, 3 + 1
    assert layer.weight[0].tolist() == [2.0, 4.0, 0.0, 0.0]
    assert layer(torch.eye(4))[:, 0].tolist() == [0.0, 4.0, 0.0, 0.0]


def test_under_autocast_products_are_in_its_dtype() -> None:
    torch.manual_seed(3)
    layer = BDWPLinear(16, 8, pattern="2:8")
    x = torch.randn(4, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    wanted = expected(layer, x, torch.ones(4, 8))
    assert x.grad is not None
    assert x.grad.dtype == layer.weight.grad.dtype == torch.float32  # type: ignore[union-attr]
    torch.testing.assert_close(x.grad.double(), wanted["dx"], rtol=3e-2, atol=3e-2)


def test_a_second_derivative_is_refused() -> None:
    layer = BDWPLinear(8, 8, pattern="2:8")
    x = torch.randn(2, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_what_was_trained_is_stored_as_a_pruned_layer() -> None:
    torch.manual_seed(4)
    layer = BDWPLinear(16, 8, pattern="2:8")
    x = torch.randn(3, 16)
    stored = layer.sparse()
    assert len(stored.values) == 8 * 4
    torch.testing.assert_close(stored(x), layer(x))


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 4)))


def test_layers_of_a_model_keep_their_parameters() -> None:
    model = small()
    parameters = dict(model.named_parameters())
    names = bdwp(model, "2:8", only=lambda name, linear: linear.out_features % 8 == 0, decay=2e-4)
    assert names == ["0", "2.0"]
    assert type(model[2][1]) is nn.Linear  # type: ignore[index]
    assert isinstance(model[0], BDWPLinear)
    assert model[0].decay == 2e-4
    assert all(found is parameters[name] for name, found in model.named_parameters())
    with pytest.raises(ValueError, match="no linear layer"):
        bdwp(model, only=lambda name, linear: name != "2.1")


def test_a_layer_at_two_places_stays_one() -> None:
    linear = nn.Linear(8, 8)
    model = nn.Sequential(linear, linear)
    assert bdwp(model, "2:4") == ["0", "1"]
    assert model[0] is model[1]


def test_training_lowers_the_loss_on_sparse_weights() -> None:
    torch.manual_seed(5)
    x = torch.randn(256, 16)
    y = torch.tanh(x @ torch.randn(16, 4))
    for backward in ("bdwp", "dense", "shared"):
        model = small()
        bdwp(model, "2:8", backward=backward, only=lambda name, _: name != "2.1")
        steps = torch.optim.AdamW(model.parameters(), 1e-2)
        losses = []
        for _ in range(60):
            loss = F.mse_loss(model(x), y)
            steps.zero_grad()
            loss.backward()
            steps.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < 0.5 * losses[0], backward


def test_two_of_three_products_are_sparse() -> None:
    model = small()
    plain = count_macs(model, 10)
    whole = 10 * (16 * 32 + 32 * 16 + 16 * 4)
    assert plain == dict.fromkeys(("dense", "forward", "bdwp"), Macs(whole, whole, whole))
    bdwp(model, "2:8", only=lambda name, _: name != "2.1")
    kept = 10 * (16 * 32 // 4 + 32 * 16 // 4 + 16 * 4)
    found = count_macs(model, 10)
    assert found == {
        "dense": Macs(whole, whole, whole),
        "forward": Macs(kept, whole, whole),
        "bdwp": Macs(kept, kept, whole),
    }
    assert count_macs(model, 10, "4:8")["forward"].forward == 10 * (512 + 64)
    layer = count_macs(nn.Sequential(BDWPLinear(64, 64)), 1)
    assert layer["bdwp"].total * 2 == layer["dense"].total  # 2:8 of two products: (1/4 + 1/4 + 1) / 3


def test_sizes_that_have_no_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="2:8 needs inputs in multiples of 8, and the layer has 12"):
        BDWPLinear(12, 16)
    with pytest.raises(ValueError, match="2:8 needs outputs in multiples of 8, and the layer has 12"):
        BDWPLinear(16, 12)
    BDWPLinear(16, 12, backward="shared")
    with pytest.raises(ValueError, match="8 does not divide 12: dimension 0"):
        largest(torch.zeros(12, 16), "2:8", 0)
    model = small()
    with pytest.raises(ValueError, match=r"needs outputs in multiples of 8, and 2\.1 has 4"):
        bdwp(model)
    assert not any(isinstance(module, BDWPLinear) for module in model.modules())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"pattern": "0.5"}, "a pattern is N:M here"),
        ({"pattern": "8:8"}, "a pattern is the share"),
        ({"pattern": "x"}, "a pattern is the share"),
        ({"backward": "both"}, "backward must be one of bdwp, dense, shared; got 'both'"),
        ({"decay": -1.0}, "decay must be 0 or more"),
        ({"decay": float("nan")}, "decay must be 0 or more"),
    ],
)
def test_options_that_are_none(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        BDWPLinear(16, 16, **options)
    with pytest.raises(ValueError, match=said):
        bdwp(small(), **options)
