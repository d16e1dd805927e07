"""Executors without a backward say so when a gradient is asked of them, and not before."""

import importlib.util

import pytest
import torch
from executor_checks import draw

from gossamer import Extent, SparsePlan
from gossamer.backends import cpu, triton

needs_kernels = pytest.mark.skipif(not cpu.is_available(), reason=f"no C++ kernels: {cpu.why_unavailable()}")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or torch.cuda.is_available(), reason="runs on Triton's interpreter"
)


@pytest.mark.parametrize(
    "executor",
    [pytest.param(cpu, marks=needs_kernels), pytest.param(triton, marks=needs_triton)],
    ids=["cpu", "triton"],
)
def test_a_gradient_is_refused_by_name(executor) -> None:
    plan = SparsePlan.dense(1, 16, 16, Extent.full(1, 16, 16))
    q, k, v = (x.requires_grad_() for x in draw(plan, heads=1, groups=1, dim=16))
    for result in executor.execute(q, k, v, plan, scale=1.0):
        with pytest.raises(NotImplementedError, match=r"has no backward; train with gossamer.sparse_attention"):
            result.sum().backward(retain_graph=True)
    with torch.no_grad():
        assert not executor.execute(q, k, v, plan, scale=1.0)[0].requires_grad
