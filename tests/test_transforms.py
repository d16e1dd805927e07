"""Derivatives forward and ``torch.func``: right where attention is dense, refused where a plan would be made."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_mode
from torch import Tensor, func

from gossamer import Extent, Policy, methods, sparse_attention
from gossamer.backends import is_transformed
from gossamer.call import AttentionCall

pytestmark = [
    pytest.mark.filterwarnings("ignore:gossamer runs its torch reference path:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),  # of torch's attention under vmap
]

SPARSE = Policy(methods.create("a_shape", sink=2, window=8), min_tokens=8)
SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0])
ON_KERNEL = Policy(methods.create("dense", kernel="gossamer"))

# What runs dense, by way of every piece of code that does it.
DENSE: dict[str, dict[str, Any]] = {
    "a short prompt": {"method": "a_shape"},
    "the dense method": {"method": "dense"},
    "the dense method on our kernel": {"method": ON_KERNEL},
    "left padding": {"method": "a_shape", "extent": Extent([0], 40, [3], [37])},
    "a window": {"method": "a_shape", "limit": 10},
    "both ways": {"method": "a_shape", "causal": False},
    "sinks": {"method": "a_shape", "sinks": SINKS},
    "a bias": {"method": "a_shape", "bias": torch.linspace(-1, 1, 80, dtype=torch.float64).view(1, 2, 40)},
    "a soft-cap": {"method": "a_shape", "softcap": 3.0},
    "a plan too dense": {"method": Policy(methods.create("a_shape", sink=2, window=40), min_tokens=8)},
}
everywhere = pytest.mark.parametrize("kind", DENSE)


def tensors(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(1, 4, 40, 8, generator=generator, dtype=dtype)
    k, v = torch.randn(2, 1, 2, 40, 8, generator=generator, dtype=dtype).unbind(0)
    return q, k, v


def attending(kind: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda q, k, v: sparse_attention(q, k, v, **DENSE[kind])


def slope_of(attend: Callable[..., Tensor], at: tuple[Tensor, ...], along: tuple[Tensor, ...]) -> Tensor:
    """By differences of float64."""
    step = 1e-6
    ahead = attend(*(point + step * way for point, way in zip(at, along, strict=True)))
    behind = attend(*(point - step * way for point, way in zip(at, along, strict=True)))
    return (ahead - behind) / (2 * step)


@everywhere
@pytest.mark.parametrize("by", ["dual tensors", "jvp"])
@torch.no_grad()
def test_dense_attention_has_its_derivative_forward(kind: str, by: str) -> None:
    attend, at = attending(kind), tensors()
    along = tuple(tensor.cos() for tensor in at)
    if kind == "a plan too dense":
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):  # the plan comes first
            func.jvp(attend, at, along)
        return
    if by == "jvp":
        out, slope, *_ = func.jvp(attend, at, along)
    else:
        with forward_mode.dual_level():
            dual = forward_mode.unpack_dual(attend(*map(forward_mode.make_dual, at, along)))
            out, slope = dual.primal, dual.tangent
    torch.testing.assert_close(out, attend(*at))
    torch.testing.assert_close(slope, slope_of(attend, at, along), atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_a_tangent_of_sinks_alone_counts() -> None:
    q, k, v = tensors()

    def attend(sinks: Tensor) -> Tensor:
        return sparse_attention(q, k, v, "dense", sinks=sinks)

    sinks = SINKS.double()
    torch.testing.assert_close(
        func.jvp(attend, (sinks,), (sinks.cos(),))[1], slope_of(attend, (sinks,), (sinks.cos(),)), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("kind", ["a short prompt", "left padding", "sinks", "a plan too dense"])
def test_second_derivatives(kind: str) -> None:
    """Forward over reverse: the inner transform hides the tangent; with a gradient, all runs dense."""
    attend, (q, k, v) = attending(kind), tensors()

    def gradient(at: Tensor) -> Tensor:
        return func.grad(lambda q: attend(q, k, v).square().sum())(at)

    along = q.cos()
    torch.testing.assert_close(
        func.jvp(gradient, (q,), (along,))[1], slope_of(gradient, (q,), (along,)), atol=1e-5, rtol=1e-5
    )


@everywhere
def test_dense_attention_runs_under_vmap(kind: str) -> None:
    attend, (q, k, v) = attending(kind), tensors(torch.float32)
    several = torch.stack([q, q.cos()])
    if kind == "a plan too dense":
        with pytest.raises(NotImplementedError, match="vmap"):
            torch.vmap(attend, (0, None, None))(several, k, v)
        return
    expected = torch.stack([attend(one, k, v) for one in several])
    torch.testing.assert_close(torch.vmap(attend, (0, None, None))(several, k, v), expected)


def test_a_sparse_method_refuses_tangents() -> None:
    q, k, v = tensors(torch.float32)
    with torch.no_grad(), forward_mode.dual_level():
        for place in range(3):
            a, b, c = (forward_mode.make_dual(t, t) if place == i else t for i, t in enumerate((q, k, v)))
            with pytest.raises(NotImplementedError, match=r"no forward-mode derivative .*; use .*create\('dense'\)"):
                sparse_attention(a, b, c, SPARSE)
        assert sparse_attention(q, k, v, SPARSE).shape == q.shape


def test_a_tangent_that_a_transform_hides_is_refused_too() -> None:
    q, k, v = tensors(torch.float32)
    with torch.no_grad(), forward_mode.dual_level():
        dual = forward_mode.make_dual(q, q)
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            func.grad(lambda factor: (sparse_attention(dual, k, v, SPARSE) * factor).sum())(torch.ones(()))


def test_a_sparse_method_refuses_vmap_and_says_what_works() -> None:
    q, k, v = tensors(torch.float32)
    several = torch.stack([q, q.cos()]), torch.stack([k, k.sin()]), torch.stack([v, v.cos()])
    with pytest.raises(NotImplementedError, match=r"under torch\.func\.vmap; put the extra dimension into the batch"):
        torch.vmap(lambda q, k, v: sparse_attention(q, k, v, SPARSE))(*several)
    flat_q, flat_k, flat_v = (tensor.flatten(0, 1) for tensor in several)
    got = sparse_attention(flat_q, flat_k, flat_v, SPARSE).view_as(several[0])
    expected = [sparse_attention(a, b, c, SPARSE) for a, b, c in zip(*several, strict=True)]
    assert torch.equal(got, torch.stack(expected))


def test_an_lse_under_a_transform_is_refused() -> None:
    q, k, v = tensors(torch.float32)
    with pytest.raises(ValueError, match=r"return_lse=True is not supported .* under torch\.func"):
        torch.vmap(lambda q: sparse_attention(q, k, v, "dense", return_lse=True))(torch.stack([q, q]))


def test_plain_tensors_are_not_transformed() -> None:
    q, k, v = tensors()
    assert not is_transformed(AttentionCall(q, k, v, sinks=SINKS))
    with forward_mode.dual_level():
        assert not is_transformed(AttentionCall(q, k, v))
        assert is_transformed(AttentionCall(q, k, v, sinks=forward_mode.make_dual(SINKS, SINKS)))


@pytest.mark.parametrize("name", ["sinks", "bias"])
@torch.no_grad()
def test_tangents_of_sinks_and_bias_alone_are_seen(name: str) -> None:
    """A sparse plan would lose them without a word."""
    given = {"sinks": SINKS.double(), "bias": torch.zeros(1, 2, 40, dtype=torch.float64)}[name]
    with forward_mode.dual_level():
        dual = {name: forward_mode.make_dual(given, torch.ones_like(given))}
        with pytest.raises(NotImplementedError, match=r"no forward-mode derivative .* which sparse methods have"):
            sparse_attention(*tensors(), SPARSE, sinks=dual.get("sinks"), bias=dual.get("bias"))
