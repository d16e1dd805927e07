"""Gradients through `sparse_attention`: of plans and of dense attention, once, in graphs and under checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from definitions import call_in
from gradients import NAMES, Reaching, assert_near, plan_under, reaching, with_extras
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gossamer import AttentionCall, Method, Policy, SparsePlan, backends, methods, sparse_attention
from gossamer.attention import CallRecord
from gossamer.backends.torch.backward import Needs
from gossamer.plan.parts import plan_of, plan_parts
from gossamer.policy import TRAINING

pytestmark = pytest.mark.filterwarnings("ignore:gossamer runs its torch reference path:RuntimeWarning")

SITUATIONS = ("no padding", "padded chunk", "bidirectional", "random 1")
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


@dataclass(frozen=True)
class Planted(Method):
    """The plan that it is given, and how often it was asked."""

    name: ClassVar[str] = "planted"
    given: tuple[SparsePlan, ...] = ()
    asked: tuple[list[AttentionCall], ...] = ()

    def plan(self, call: AttentionCall) -> SparsePlan:
        for calls in self.asked:
            calls.append(call)
        return self.given[0]


def planted(plan: SparsePlan, *asked: list[AttentionCall], **fields: Any) -> Policy:
    return Policy(Planted((plan,), asked), min_tokens=0, max_density=1.0, **fields)


def leaves_of(call: AttentionCall, *names: str) -> dict[str, Tensor]:
    given = {name: getattr(call, name) for name in names or NAMES}
    return {name: x.detach().clone().requires_grad_() for name, x in given.items() if x is not None}


def keywords(call: AttentionCall) -> dict[str, Any]:
    names = ("extent", "scale", "sinks", "softcap", "bias")
    return {name: getattr(call, name) for name in names if getattr(call, name) is not None}


def train(
    call: AttentionCall, given: Reaching, policy: Any, attend: Callable[..., Any] = sparse_attention
) -> dict[str, Tensor | None]:
    leaves = leaves_of(call)
    live = replace(call, **leaves)
    out, lse = attend(live.q, live.k, live.values, policy, return_lse=True, **keywords(live))
    loss = (out * given.out).sum()
    if given.lse is not None:
        loss = loss + (lse * given.lse)[lse.isfinite()].sum()
    loss.backward()
    return {name: None if name not in leaves else leaves[name].grad for name in NAMES}


def quiet(given: Reaching, call: AttentionCall) -> Reaching:
    """What reaches dead rows says nothing."""
    live = call.extent.live_queries(call.query_len)[:, None]
    return Reaching(given.out, None if given.lse is None else given.lse.masked_fill(~live, 0.0))


@every_dtype
@pytest.mark.parametrize("keep_plans", [True, False], ids=["kept", "remade"])
@pytest.mark.parametrize("situation", SITUATIONS)
def test_a_plan_trains(situation: str, keep_plans: bool, dtype: torch.dtype) -> None:
    call = with_extras(call_in(situation, dim=8, dtype=dtype), bias=False)
    plan, given = plan_under(call), quiet(reaching(call), call)
    asked: list[AttentionCall] = []
    found = train(call, given, planted(plan, asked, keep_plans=keep_plans))
    assert len(asked) == (1 if keep_plans else 2)
    assert_near(call, plan, given, found)


@pytest.mark.parametrize("kind", [{"permuted": True}, {"pruned_mean": True}, {"heads": 2}], ids=str)
def test_other_plans_train(kind: dict[str, Any]) -> None:
    call = call_in("padded chunk", dim=8)
    plan, given = plan_under(call, **kind), quiet(reaching(call), call)
    assert_near(call, plan, given, train(call, given, planted(plan)))


@pytest.mark.parametrize("keep_plans", [True, False], ids=["kept", "remade"])
def test_a_bias_trains(keep_plans: bool) -> None:
    call = with_extras(call_in("padded chunk", dim=8), sinks=False)
    plan, given = plan_under(call), quiet(reaching(call), call)
    assert_near(call, plan, given, train(call, given, planted(plan, keep_plans=keep_plans)))


@pytest.mark.parametrize("extras", [False, True], ids=["plain", "sinks and soft-cap"])
@pytest.mark.parametrize("policy", ["a_shape", Policy(methods.create("dense", kernel="gossamer"))], ids=str)
@pytest.mark.parametrize("situation", SITUATIONS)
def test_dense_attention_trains_with_its_lse(situation: str, policy: Any, extras: bool) -> None:
    """A short prompt, and our own kernel."""
    call = call_in(situation, dim=8)
    call = with_extras(call, bias=False) if extras else call
    plan, given = SparsePlan.dense(2, call.query_len, call.key_len, call.extent), quiet(reaching(call), call)
    assert_near(call, plan, given, train(call, given, policy))


def test_without_training_a_call_that_needs_a_gradient_is_dense() -> None:
    call, records = call_in("no padding", dim=8), list[CallRecord]()
    policy = planted(plan_under(call), training=False)
    sparse_attention(call.q.requires_grad_(), call.k, call.values, policy, record=records.append)
    with torch.no_grad():
        sparse_attention(call.q, call.k, call.values, policy, record=records.append)
    assert [(record.path, record.reason) for record in records] == [("dense", TRAINING), ("sparse", None)]


def test_training_is_recorded_as_sparse() -> None:
    call, records = call_in("no padding", dim=8), list[CallRecord]()
    sparse_attention(call.q.requires_grad_(), call.k, call.values, planted(plan_under(call)), record=records.append)
    assert [(record.path, record.reason) for record in records] == [("sparse", None)]


@pytest.mark.parametrize("chosen", NAMES)
@pytest.mark.parametrize("keep_plans", [True, False], ids=["kept", "remade"])
def test_inputs_that_need_no_gradient_get_none_computed(
    monkeypatch: pytest.MonkeyPatch, chosen: str, keep_plans: bool
) -> None:
    monkeypatch.setenv("GOSSAMER_BACKEND", "torch")
    call, asked = with_extras(call_in("no padding", dim=8)), list[Needs]()
    definition = backends.backend_of(call, "attend").attend_backward

    def spy(*given: Any) -> Any:
        asked.append(given[-1])
        return definition(*given)

    monkeypatch.setattr("gossamer.backends.torch.attend_backward", spy)
    plan, given = plan_under(call), reaching(call)
    whole = train(call, given, planted(plan, keep_plans=keep_plans))
    leaf = leaves_of(call, chosen)
    live = replace(call, **leaf)
    policy = planted(plan, keep_plans=keep_plans)
    out, lse = sparse_attention(live.q, live.k, live.values, policy, return_lse=True, **keywords(live))
    assert given.lse is not None
    ((out * given.out).sum() + (lse * given.lse).sum()).backward()
    assert asked == [Needs(), Needs(*(name == chosen for name in NAMES))]
    assert torch.equal(torch.as_tensor(leaf[chosen].grad), torch.as_tensor(whole[chosen]))


@pytest.mark.parametrize("used", ["out", "lse"])
def test_one_result_may_be_used_alone(used: str) -> None:
    call = call_in("no padding", dim=8)
    plan, given = plan_under(call), reaching(call)
    leaves = leaves_of(call)
    live = replace(call, **leaves)
    out, lse = sparse_attention(live.q, live.k, live.values, planted(plan), scale=call.scale, return_lse=True)
    assert given.lse is not None
    loss = (out * given.out).sum() if used == "out" else (lse * given.lse)[lse.isfinite()].sum()
    loss.backward()
    alone = Reaching(given.out, None) if used == "out" else Reaching(torch.zeros_like(given.out), given.lse)
    assert_near(call, plan, alone, {name: leaf.grad for name, leaf in leaves.items()})


def test_a_selection_is_a_constant() -> None:
    """Planners work on numbers: they leave no graph behind, and choose what they choose without a gradient."""
    graphs: list[bool] = []

    class Watching(Planted):
        def plan(self, call: AttentionCall) -> SparsePlan:
            graphs.append((call.q * 2).requires_grad)
            return super().plan(call)

    call = call_in("no padding", dim=8)
    policy = Policy(Watching((plan_under(call),)), min_tokens=0, max_density=1.0)
    sparse_attention(call.q.requires_grad_(), call.k, call.values, policy)
    assert graphs == [False]


@pytest.mark.parametrize("keep_plans", [True, False], ids=["kept", "remade"])
def test_a_second_derivative_is_refused(keep_plans: bool) -> None:
    call = call_in("no padding", dim=8)
    q = call.q.requires_grad_()
    out = sparse_attention(q, call.k, call.values, planted(plan_under(call), keep_plans=keep_plans))
    (first,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises((NotImplementedError, RuntimeError), match=r"gradient of a gradient|once_differentiable"):
        first.sum().backward()


def test_a_plan_that_skips_is_refused() -> None:
    call = call_in("no padding", length=70, dim=8)
    plan = SparsePlan(2, 70, 70, call.extent).with_attributes(skip=1.0)
    with pytest.raises(ValueError, match="a plan with skip has no gradient"):
        sparse_attention(call.q.requires_grad_(), call.k, call.values, planted(plan))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("keep_plans", [True, False], ids=["kept", "remade"])
def test_checkpointing_is_exact(reentrant: bool, keep_plans: bool) -> None:
    call = call_in("padded chunk", dim=8)
    asked: list[AttentionCall] = []
    policy = planted(plan_under(call), asked, keep_plans=keep_plans)
    given = quiet(reaching(call), call)

    def checkpointed(q: Tensor, k: Tensor, v: Tensor, policy: Policy, **fields: Any) -> Any:
        return checkpoint(lambda q, k, v: sparse_attention(q, k, v, policy, **fields), q, k, v, use_reentrant=reentrant)

    expected = train(call, given, policy)
    before = len(asked)
    found = train(call, given, policy, checkpointed)
    assert len(asked) > before + 1
    for name in "qkv":
        assert torch.equal(torch.as_tensor(found[name]), torch.as_tensor(expected[name]))


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_a_graph_has_the_same_gradient(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    monkeypatch.setenv("GOSSAMER_BACKEND", backend)
    call = with_extras(call_in("padded chunk", dim=8), bias=False)
    plan, given = plan_under(call), quiet(reaching(call), call)
    tensors, sizes = plan_parts(plan)

    def attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
        given = (tensors, sizes, call.scale, call.softcap, backend)
        return torch.ops.gossamer.attend(q, k, v, sinks, None, *given)

    expected = train(call, given, planted(plan))
    leaves = leaves_of(call)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    out, lse = compiled(*leaves.values())
    assert given.lse is not None
    ((out * given.out).sum() + (lse * given.lse)[lse.isfinite()].sum()).backward()
    torch.compiler.reset()
    for name, leaf in leaves.items():
        assert torch.equal(torch.as_tensor(leaf.grad), torch.as_tensor(expected[name])), name


@pytest.mark.parametrize("bias", [False, True])
def test_the_operator_is_registered_properly(bias: bool) -> None:
    call = with_extras(call_in("no padding", dim=8), bias=bias)
    plan = plan_under(call)
    given = (call.q, call.k, call.values, call.sinks, call.bias, *plan_parts(plan), call.scale, call.softcap, "torch")
    live = [x.clone().requires_grad_() if isinstance(x, Tensor) else x for x in given]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(torch.ops.gossamer.attend.default, tuple(live), test_utils=tests)


def test_a_plan_comes_back_from_its_parts() -> None:
    call = call_in("padded chunk", dim=8)
    for kind in ({}, {"permuted": True}, {"pruned_mean": True}):
        plan = plan_under(call, **kind)
        again = plan_of(*plan_parts(plan))
        assert torch.equal(again.to_mask(), plan.to_mask())
        assert again.pruned_mean == plan.pruned_mean
        assert (again.q_order is None) == (plan.q_order is None)


@pytest.mark.parametrize("name", ["training", "keep_plans"])
def test_a_policy_takes_yes_or_no(name: str) -> None:
    with pytest.raises(TypeError, match=rf"Policy\.{name} must be True or False, got 1"):
        Policy(methods.create("dense"), **{name: 1})  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["dense", "a_shape"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", [torch.float64, torch.float32, torch.bfloat16])
def test_a_bias_may_be_of_any_dtype(method: str, dtype: torch.dtype, given: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, heads, 40, 8, generator=generator).to(dtype) for heads in (4, 2))
    numbers = torch.linspace(-2, 2, 80).view(1, 2, 40).to(torch.bfloat16)  # the same in all of them
    policy = Policy(methods.create(method), min_tokens=0)
    out = []
    for bias in (numbers.to(given, copy=True).requires_grad_(), numbers.float().requires_grad_()):
        result = sparse_attention(q, k, k, policy, bias=bias)
        result.float().sum().backward()
        assert bias.grad is not None
        assert bias.grad.dtype == bias.dtype
        out.append(result.detach())
    assert torch.equal(*out)
