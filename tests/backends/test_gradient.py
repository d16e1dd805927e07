"""Backends without a backward say so when a gradient is asked of them, and not before."""

from types import ModuleType

import pytest
import torch

from gossamer import AttentionCall, SparsePlan
from gossamer.backends import cpu, gradient, triton

needs_kernels = pytest.mark.skipif(not cpu.is_available(), reason=f"no C++ kernels: {cpu.why_unavailable()}")
needs_triton = pytest.mark.skipif(
    not triton.is_available() or not triton.interprets(), reason="runs on Triton's interpreter"
)


def test_the_refusal_says_what_to_do() -> None:
    with pytest.raises(NotImplementedError, match=r"has no backward; use gossamer\.backends\.attend or"):
        gradient.refuse(None, torch.ones(1))


@pytest.mark.parametrize(
    "backend", [pytest.param(cpu, marks=needs_kernels, id="cpu"), pytest.param(triton, marks=needs_triton, id="triton")]
)
def test_a_gradient_is_refused_where_it_is_asked_for(backend: ModuleType) -> None:
    q, k, v = (torch.rand(1, 1, 16, 16, requires_grad=True) for _ in range(3))
    call = AttentionCall(q, k, v)
    plan = SparsePlan.dense(1, 16, 16, call.extent)
    for result in backend.attend(call, plan):
        with pytest.raises(NotImplementedError, match="has no backward"):
            result.sum().backward(retain_graph=True)
    with torch.no_grad():
        assert not backend.attend(call, plan)[0].requires_grad
