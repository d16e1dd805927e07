"""Which backend serves which call, plan and tensor: `gossamer.backends.backend_of` and what stands on it."""

from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from definitions import call_in

from gossamer import AttentionCall, Extent, SparsePlan, backends
from gossamer.backends import cpu, triton
from gossamer.backends import torch as definition

VERBS = (
    "ListWriter",
    "attend_backward",
    "antidiagonal_means",
    "antidiagonal_peaks",
    "antidiagonal_scores",
    "attend_rows",
    "block_attention",
    "block_mass",
    "collisions",
    "count",
    "count_top_p",
    "exact_slashes",
    "finish",
    "forget_slots",
    "group_differences",
    "group_shares",
    "keep_bounds",
    "key_similarity",
    "label_scores",
    "last_query_probe",
    "last_query_products",
    "mean_row_maxima",
    "near_keys",
    "page_scores",
    "page_tokens",
    "pool_before_rotary",
    "pool_key_bounds",
    "pool_keys",
    "pool_queries",
    "pooled_scores",
    "query_similarity",
    "row_block_energy",
    "value_norms",
)
every_verb = pytest.mark.parametrize("verb", ["attend", *VERBS])


@pytest.fixture(autouse=True)
def nothing_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (backends.ATTEND, backends.PLAN):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both backends with kernels, whatever is built."""
    for backend in (cpu, triton):
        monkeypatch.setattr(backend, "is_available", lambda: True)


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for backend in (cpu, triton):
        monkeypatch.setattr(backend, "is_available", lambda: False)


class OnCuda(torch.Tensor):
    """A tensor that says that it lies on a CUDA device."""

    @property
    def device(self) -> torch.device:  # pyright: ignore[reportIncompatibleVariableOverride]
        return torch.device("cuda")


def tensor(dim: int = 64, dtype: torch.dtype = torch.bfloat16, *, on_cuda: bool = False) -> torch.Tensor:
    plain = torch.empty(1, 1, 1, dim, dtype=dtype)
    return plain.as_subclass(OnCuda) if on_cuda else plain


def name_of(backend: ModuleType) -> str:
    return backend.__name__.rpartition(".")[2]


def test_the_definition_has_every_verb() -> None:
    assert all(hasattr(definition, verb) for verb in ("attend", *VERBS))
    assert {*definition.__all__} - {"NEAR_BYTES", "PART_BYTES"} == {"attend", *VERBS}


@every_verb
@pytest.mark.usefixtures("there")
def test_tensors_on_the_cpu_are_served_in_cpp(verb: str) -> None:
    expected = "cpu" if hasattr(cpu, verb) else "torch"
    assert name_of(backends.backend_of(tensor(), verb)) == expected


@every_verb
@pytest.mark.usefixtures("there")
def test_tensors_on_cuda_are_served_by_triton(verb: str) -> None:
    expected = "triton" if hasattr(triton, verb) else "torch"
    assert name_of(backends.backend_of(tensor(on_cuda=True), verb)) == expected


@every_verb
@pytest.mark.usefixtures("missing")
@pytest.mark.parametrize("on_cuda", [False, True])
def test_without_kernels_torch_serves(verb: str, on_cuda: bool) -> None:
    assert name_of(backends.backend_of(tensor(on_cuda=on_cuda), verb)) == "torch"


@pytest.mark.usefixtures("there")
def test_a_verb_that_a_backend_lacks_is_served_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(cpu, "pool_keys", raising=False)
    assert name_of(backends.backend_of(tensor(), "pool_keys")) == "torch"


@pytest.mark.usefixtures("there")
@pytest.mark.parametrize("on_cuda", [False, True])
@pytest.mark.parametrize("verb", ["attend", "pool_keys"])
@pytest.mark.parametrize(
    ("dtype", "kernels"),
    [(torch.float32, True), (torch.float16, True), (torch.bfloat16, True), (torch.float64, False)],
)
def test_kernels_serve_three_dtypes(dtype: torch.dtype, kernels: bool, verb: str, on_cuda: bool) -> None:
    got = name_of(backends.backend_of(tensor(dtype=dtype, on_cuda=on_cuda), verb))
    assert (got != "torch") is kernels


@pytest.mark.usefixtures("there")
@pytest.mark.parametrize(
    ("dim", "on_cuda", "attends", "plans"),
    [
        (256, False, "cpu", "cpu"),
        (257, False, "torch", "torch"),
        (256, True, "triton", "triton"),
        (257, True, "flex", "torch"),
    ],
)
def test_wide_heads_are_served_elsewhere(dim: int, on_cuda: bool, attends: str, plans: str) -> None:
    wide = tensor(dim, on_cuda=on_cuda)
    assert [name_of(backends.backend_of(wide, verb)) for verb in ("attend", "pool_keys")] == [attends, plans]


@pytest.mark.usefixtures("there")
@pytest.mark.parametrize(("dim", "value_dim"), [(64, 257), (257, 64)])
def test_keys_and_values_count_as_wide(dim: int, value_dim: int) -> None:
    q = torch.empty(1, 1, 2, dim)
    assert name_of(backends.backend_of(AttentionCall(q, q, torch.empty(1, 1, 2, value_dim)), "attend")) == "torch"


@pytest.mark.usefixtures("there")
@pytest.mark.parametrize("verb", ["attend", "attend_rows", "attend_backward"])
def test_a_bias_is_served_by_the_kernels_that_have_dimensions_for_it(verb: str) -> None:
    q = tensor()
    call = AttentionCall(q, q, q, bias=torch.zeros(1, 1, 1))
    assert name_of(backends.backend_of(call, verb)) == ("torch" if verb == "attend_rows" else "cpu")
    for other in (replace(call, softcap=2.0), replace(call, q=q.half(), k=q.half(), v=q.half())):
        assert name_of(backends.backend_of(other, verb)) == "torch"
        assert backends.why_slow(other) == "no kernel for a bias"


@pytest.mark.usefixtures("there")
def test_a_plan_is_served_where_it_lies() -> None:
    plan = SparsePlan(1, 4, 4, Extent.full(1, 4, 4))
    assert name_of(backends.backend_of(plan, "count")) == "cpu"
    assert name_of(backends.backend_of(plan.to("meta"), "count")) == "torch"


@pytest.mark.usefixtures("there")
def test_while_torch_compiles_it_plans_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gossamer.backends.compiler.is_compiling", lambda: True)
    assert [name_of(backends.backend_of(tensor(), verb)) for verb in ("pool_keys", "attend")] == ["torch", "cpu"]


# Forced


@pytest.mark.usefixtures("missing")
@pytest.mark.parametrize("name", ["torch", "cpu", "triton", "flex"])
def test_any_backend_can_be_forced_to_attend(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("GOSSAMER_BACKEND", name)
    assert name_of(backends.backend_of(tensor(dtype=torch.float64), "attend")) == name
    assert name_of(backends.backend_of(tensor(), "pool_keys")) == "torch"


@pytest.mark.usefixtures("missing")
@pytest.mark.parametrize("name", ["torch", "cpu", "triton"])
def test_any_backend_that_plans_can_be_forced_to(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("GOSSAMER_PLANNER", name)
    assert name_of(backends.backend_of(tensor(), "pool_keys")) == name
    assert name_of(backends.backend_of(tensor(), "attend")) == "torch"


@pytest.mark.parametrize(
    ("variable", "verb", "name", "known"),
    [
        ("GOSSAMER_BACKEND", "attend", "cuda", "torch, cpu, triton, flex"),
        ("GOSSAMER_PLANNER", "count", "flex", "torch, cpu, triton"),
    ],
)
def test_an_unknown_backend_is_named(
    monkeypatch: pytest.MonkeyPatch, variable: str, verb: str, name: str, known: str
) -> None:
    monkeypatch.setenv(variable, name)
    with pytest.raises(ValueError, match=f"{variable}='{name}' is not known; use one of: {known}$"):
        backends.backend_of(tensor(), verb)


# What stands on it


@pytest.mark.usefixtures("there")
def test_the_name_of_cpp_has_its_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "active_isa", lambda dtype: f"isa of {dtype}")
    assert backends.name_of(tensor()) == "cpu/isa of torch.bfloat16"
    q = tensor(dtype=torch.float16)
    assert backends.name_of(AttentionCall(q, q)) == "cpu/isa of torch.float16"
    assert backends.name_of(tensor(on_cuda=True)) == "triton"
    assert backends.name_of(tensor(300)) == "torch"


@pytest.mark.parametrize(
    ("failure", "expected"),
    [("no compiler", "no compiler"), (None, "no kernel for this device, dtype or head dimension")],
)
def test_why_calls_are_slow(monkeypatch: pytest.MonkeyPatch, failure: str | None, expected: str) -> None:
    monkeypatch.setattr(cpu, "why_unavailable", lambda: failure)
    assert backends.why_slow(call_in("no padding")) == expected


def test_why_calls_are_slow_on_a_device_without_kernels() -> None:
    q = torch.empty(1, 1, 2, 8, device="meta")
    assert backends.why_slow(AttentionCall(q, q)) == "no kernel for this device, dtype or head dimension"


@pytest.mark.parametrize("name", ["torch", "cpu", "triton", "flex"])
def test_attend_runs_on_the_backend_that_is_chosen(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("GOSSAMER_BACKEND", name)
    call = call_in("left padding")
    plan = SparsePlan(2, call.query_len, call.key_len, call.extent, window=9)
    seen: list[Any] = []

    def attend(*given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(given)
        return call.q, call.k

    monkeypatch.setattr(backends.backend_of(call, "attend"), "attend", attend)
    out, lse = backends.attend(call, plan)
    assert (out is call.q, lse is call.k) == (True, True)
    assert seen == [(call, plan)]
