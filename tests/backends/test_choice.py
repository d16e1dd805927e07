"""Which executor `gossamer.backends` takes."""

import pytest
import torch

from gossamer import SparsePlan, backends
from gossamer.backends import cpu, flex, triton
from gossamer.backends import torch as reference
from gossamer.testing import assert_accurate, make_case


def test_cpu_tensors_run_in_cpp_where_it_can() -> None:
    narrow, wide = torch.empty(1, 1, 1, 64), torch.empty(1, 1, 1, 300)
    expected = f"cpu/{cpu.active_isa(torch.float32)}" if cpu.is_available() else "reference"
    assert backends.executor_for(narrow) == expected
    assert backends.executor_for(wide) == "reference"
    assert backends.executor_for(narrow.double()) == "reference"


def test_cuda_tensors_run_on_triton_and_wide_heads_on_flex(monkeypatch) -> None:
    class OnCuda:
        """A tensor as the choice sees it."""

        device = torch.device("cuda")

        def __init__(self, dim: int, dtype: torch.dtype = torch.bfloat16) -> None:
            self.shape, self.dtype = (1, 1, 1, dim), dtype

    monkeypatch.setattr(triton, "is_available", lambda: True)
    assert backends.executor_for(OnCuda(128)) == "triton"  # pyright: ignore[reportArgumentType]
    assert backends.executor_for(OnCuda(512)) == "flex"  # pyright: ignore[reportArgumentType]
    assert backends.executor_for(OnCuda(128, torch.float64)) == "reference"  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr(triton, "is_available", lambda: False)
    assert backends.executor_for(OnCuda(128)) == "reference"  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", ["cpu", "triton", "flex", "reference"])
def test_any_executor_can_be_forced(monkeypatch, name: str) -> None:
    modules = {"cpu": cpu, "triton": triton, "flex": flex, "reference": reference}
    if name in ("cpu", "triton") and not modules[name].is_available():
        pytest.skip(modules[name].why_unavailable())
    if name == "triton" and not triton.interprets():
        pytest.skip("Triton is not interpreted here")
    called = []

    def spy(*arguments, **options):
        called.append(name)
        return modules[name].execute(*arguments, **options)

    monkeypatch.setitem(backends._EXECUTORS, name, spy)
    monkeypatch.setenv(backends.ENVIRONMENT, name)
    case = make_case("left padding", length=150, heads=2, groups=1, dim=32)
    assert backends.executor_for(case.q).split("/")[0] == name
    plan = SparsePlan.dense(1, 150, 150, case.extent)
    assert_accurate(case, plan, *backends.execute(case.q, case.k, case.v, plan, scale=case.scale))
    assert called == [name]


def test_an_unknown_executor_is_named(monkeypatch) -> None:
    monkeypatch.setenv(backends.ENVIRONMENT, "cuda")
    with pytest.raises(ValueError, match=r"GOSSAMER_EXECUTOR='cuda' is not known; use one of: cpu, triton"):
        backends.executor_for(torch.empty(1, 1, 1, 64))
