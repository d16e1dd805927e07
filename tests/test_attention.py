"""`sparse_attention`: it hands everything on, every path is right, and it says what was done."""

import inspect
import logging
import warnings
from dataclasses import dataclass, replace
from typing import Any, ClassVar, get_type_hints

import pytest
import torch
from definitions import allowed_pairs, attention, call_in, everywhere, plan_pairs
from torch import Tensor

from gossamer import AttentionCall, Extent, Method, Policy, Profile, SparsePlan, backends, methods, sparse_attention
from gossamer import attention as module
from gossamer.attention import CallRecord, attend
from gossamer.call import CallFields
from gossamer.layout import DenoisingStep, TokenLayout
from gossamer.methods import AShape, Dense
from gossamer.policy import TOO_DENSE
from gossamer.rotary import Rotary

SINKS = torch.tensor([0.3, -1.0, 2.0, 0.0])
TOLERANCE: dict[str, Any] = {"atol": 2e-5, "rtol": 2e-5}

pytestmark = pytest.mark.filterwarnings("ignore:gossamer runs its torch reference path:RuntimeWarning")


@dataclass(frozen=True)
class Spy(Method):
    """Takes note of calls."""

    name: ClassVar[str] = "spy"
    calls: tuple[list[AttentionCall], ...] = ()
    window: int = 3

    def plan(self, call: AttentionCall) -> SparsePlan:
        for calls in self.calls:
            calls.append(call)
        return SparsePlan(call.groups, call.query_len, call.key_len, call.extent, window=self.window)


def sparse(method: Method | None = None) -> Policy:
    """Never dense."""
    return Policy(method or Spy(), min_tokens=0, max_density=1.0)


def keywords(call: AttentionCall) -> dict[str, Any]:
    return {name: getattr(call, name) for name in CallFields.__annotations__ if name not in ("causal", "limit")}


def run(call: AttentionCall, policy: Any, **more: Any) -> tuple[Any, CallRecord]:
    records: list[CallRecord] = []
    out = sparse_attention(call.q, call.k, call.values, policy, record=records.append, **keywords(call) | more)
    assert len(records) == 1
    return out, records[0]


def dense_pairs(call: AttentionCall) -> Tensor:
    return allowed_pairs(call.extent, call.query_len, call.key_len)[:, None].expand(-1, call.heads, -1, -1)


# What is handed on


class Store:
    def summaries(self, layer: int | None) -> dict[str, Tensor]:
        return {}


FIELDS: dict[str, Any] = {
    "extent": Extent([3], [30], [1], [36], limit=20),
    "scale": 0.7,
    "sinks": SINKS,
    "softcap": 30.0,
    "layer": 3,
    "store": Store(),
    "layout": TokenLayout((2,), 2, 4, 4),
    "step": DenoisingStep(2, branch=1),
    "state": [{"seen": 1}],
    "rotary": Rotary.of_base(8),
    "bias": torch.ones(1, 2, 38),
}


def test_the_list_of_fields_is_whole() -> None:
    assert {*CallFields.__annotations__} == {*FIELDS, "causal", "limit"}
    assert {*get_type_hints(AttentionCall)} == {"q", "k", "v", *FIELDS}


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_reaches_the_method(name: str) -> None:
    calls: list[AttentionCall] = []
    q, k, v = torch.ones(1, 4, 33, 8), torch.ones(1, 2, 38, 8), torch.ones(1, 2, 38, 8)
    sparse_attention(q, k, v, sparse(Spy((calls,))), **{name: FIELDS[name]})
    (call,) = calls
    assert (call.q is q, call.k is k, call.v is v) == (True, True, True)
    got = getattr(call, name)
    assert got is FIELDS[name] or (isinstance(got, float) and got == FIELDS[name])


@pytest.mark.parametrize("given", [{"causal": False}, {"limit": 5}])
def test_causality_and_limit_reach_the_method(given: dict) -> None:
    calls: list[AttentionCall] = []
    q = torch.ones(1, 2, 33, 8)
    sparse_attention(q, q, q, sparse(Spy((calls,))), **given)
    assert {name: getattr(calls[0].extent, name) for name in given} == given


def test_an_unknown_field_is_an_error() -> None:
    q = torch.ones(1, 2, 3, 8)
    with pytest.raises(TypeError, match="windw"):
        sparse_attention(q, q, q, windw=3)  # type: ignore[call-arg]


def test_bad_tensors_are_named_before_any_work() -> None:
    calls: list[AttentionCall] = []
    q = torch.ones(1, 2, 3, 8)
    with pytest.raises(TypeError, match="must share a dtype"):
        sparse_attention(q, q.double(), q, sparse(Spy((calls,))))
    assert not calls


def test_minference_runs_unless_told_otherwise() -> None:
    assert inspect.signature(sparse_attention).parameters["method"].default == "minference"


@pytest.mark.parametrize("method", ["a_shape", AShape(), Profile.uniform(1, 2, AShape()), Policy(AShape())])
def test_methods_come_by_name_as_profiles_and_as_policies(method: Any) -> None:
    q = torch.rand(1, 2, 2050, 8)
    records: list[CallRecord] = []
    sparse_attention(q, q, q, method, layer=0, record=records.append)
    # Its window is longer than the prompt: a plan was made, which no other default does.
    assert [record.reason for record in records] == [TOO_DENSE]


# That it is right


@pytest.fixture(params=["torch", "what is fastest here"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "torch":
        monkeypatch.setenv("GOSSAMER_BACKEND", "torch")


@everywhere
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("extra", [{}, {"sinks": SINKS, "softcap": 1.5}], ids=["plain", "sinks and soft-cap"])
def test_a_sparse_call_computes_the_plan(situation: str, extra: dict) -> None:
    call = replace(call_in(situation, length=24, dim=8), **extra)
    (out, lse), record = run(call, sparse(), return_lse=True)
    plan = Spy().plan(call)
    pairs = plan_pairs(plan).repeat_interleave(call.share, dim=1)
    expected, expected_lse = attention(call, pairs)
    torch.testing.assert_close(out.double(), expected, **TOLERANCE)
    torch.testing.assert_close(lse.double(), expected_lse, **TOLERANCE)
    assert (record.path, record.reason, record.density) == ("sparse", None, plan.density())


@everywhere
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("extra", [{}, {"sinks": SINKS, "softcap": 1.5}], ids=["plain", "sinks and soft-cap"])
@pytest.mark.parametrize("policy", [Policy(Spy()), Policy(Dense("gossamer"))], ids=["short prompt", "our own kernel"])
def test_a_dense_call_computes_what_the_extent_allows(situation: str, extra: dict, policy: Policy) -> None:
    call = replace(call_in(situation, length=24, dim=8), **extra)
    expected, expected_lse = attention(call, dense_pairs(call))
    out, record = run(call, policy)
    torch.testing.assert_close(out.double(), expected, **TOLERANCE)
    assert (record.path, record.density) == ("dense", 1.0)
    (out, lse), _ = run(call, policy, return_lse=True)
    torch.testing.assert_close(out.double(), expected, **TOLERANCE)
    torch.testing.assert_close(lse.double(), expected_lse, **TOLERANCE)


@pytest.mark.parametrize("policy", [Policy(Spy()), Policy(Dense("gossamer"))], ids=["short prompt", "our own kernel"])
def test_a_single_query_attends_all_keys(policy: Policy) -> None:
    full = call_in("no padding", length=40, dim=8)
    call = replace(full, q=full.q[:, :, :1], extent=Extent.full(1, 1, 40, limit=9))
    out, _ = run(call, policy)
    torch.testing.assert_close(out.double(), attention(call, dense_pairs(call))[0], **TOLERANCE)


@pytest.mark.parametrize("extra", [{}, {"sinks": SINKS}])
def test_a_call_that_needs_gradients_has_those_of_dense_attention(extra: dict) -> None:
    call = replace(call_in("no padding", dim=8), **extra)
    leaves = [x.clone().requires_grad_() for x in (call.q, call.k, call.values)]
    with_leaves = replace(call, q=leaves[0], k=leaves[1], v=leaves[2])
    out, record = run(with_leaves, replace(sparse(), training=False))
    assert (record.path, record.reason) == ("dense", "training: dense unless asked for")
    torch.testing.assert_close(out.double(), attention(call, dense_pairs(call))[0], **TOLERANCE)
    out.sum().backward()
    step = 1e-3
    for leaf in leaves:
        assert leaf.grad is not None
        direction = torch.rand(leaf.shape, generator=torch.Generator().manual_seed(0))
        moved = [x.detach() + (step * direction if x is leaf else 0) for x in leaves]
        back = [x.detach() - (step * direction if x is leaf else 0) for x in leaves]
        up, down = (attention(replace(call, q=q, k=k, v=v), dense_pairs(call))[0].sum() for q, k, v in (moved, back))
        slope = float((up - down) / (2 * step))
        assert float((leaf.grad * direction).sum()) == pytest.approx(slope, rel=1e-2, abs=1e-2)


def test_a_call_that_is_made_already_runs_the_same() -> None:
    call = call_in("left padding", length=40, dim=8)
    out, lse = attend(call, sparse(), return_lse=True)
    (expected, expected_lse), _ = run(call, sparse(), return_lse=True)
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)


# What it says


def test_a_record_says_what_was_done() -> None:
    call = replace(call_in("chunk", length=40, dim=8), layer=7)
    _, record = run(call, sparse())
    assert (record.layer, record.path, record.reason) == (7, "sparse", None)
    assert (record.query_len, record.key_len) == (call.query_len, call.key_len)
    assert record.executor == backends.name_of(call)
    assert record.density == Spy().plan(call).density()
    assert min(record.plan_seconds, record.attention_seconds) > 0


def seconds_of(record: CallRecord) -> tuple[float, float]:
    return record.plan_seconds, record.attention_seconds


def test_seconds_are_those_of_planning_and_of_attending(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([10.0, 13.0, 18.0])
    monkeypatch.setattr("gossamer.attention.time.perf_counter", lambda: next(now))
    _, record = run(call_in("no padding", dim=8), sparse())
    assert seconds_of(record) == (3.0, 5.0)


@pytest.mark.parametrize(
    ("policy", "query_len", "reason"),
    [
        (Policy(Spy()), 40, "short prompt"),
        (Policy(Spy(), 40), 31, "few queries"),
        (sparse(), 1, "decode"),
        (Policy(Spy(window=99), 0), 40, TOO_DENSE),
        (Policy(methods.create("dense"), 0), 40, None),
    ],
)
def test_a_dense_call_says_why(policy: Policy, query_len: int, reason: str | None) -> None:
    q, k = torch.rand(1, 2, query_len, 8), torch.rand(1, 1, 40, 8)
    _, record = run(AttentionCall(q, k, k), policy)
    assert (record.path, record.reason, record.density) == ("dense", reason, 1.0)


@pytest.mark.parametrize(
    ("call", "policy", "more", "executor"),
    [
        ("no padding", Policy(Spy()), {}, "sdpa"),
        ("no padding", Policy(Spy()), {"return_lse": True}, "cpu/some"),
        ("no padding", Policy(Spy(window=99), 0), {}, "cpu/some"),
        ("no padding", Policy(Dense()), {}, "sdpa"),
        ("no padding", Policy(Dense("gossamer")), {}, "cpu/some"),
        ("left padding", Policy(Spy()), {}, "cpu/some"),
        ("scale, sinks and soft-cap", Policy(Spy()), {}, "cpu/some"),
    ],
)
def test_dense_attention_runs_where_it_needs_no_mask(
    monkeypatch: pytest.MonkeyPatch, call: str, policy: Policy, more: dict, executor: str
) -> None:
    monkeypatch.setattr(backends, "name_of", lambda subject: "cpu/some")
    _, record = run(call_in(call, dim=8), policy, **more)
    assert record.executor == executor


@pytest.mark.parametrize(
    ("situation", "executor"),
    [("no padding", "sdpa"), ("left padding", "sdpa"), ("scale, sinks and soft-cap", "torch")],
)
def test_without_kernels_dense_attention_is_torchs(
    monkeypatch: pytest.MonkeyPatch, situation: str, executor: str
) -> None:
    monkeypatch.setenv("GOSSAMER_BACKEND", "torch")
    _, record = run(call_in(situation, dim=8), Policy(Spy()))
    assert record.executor == executor


def test_a_reason_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    module._log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="gossamer"):
        for _ in range(2):
            run(call_in("no padding", dim=8), Policy(Spy()))
    assert [record.getMessage() for record in caplog.records] == [
        "attention runs dense: short prompt (counted in stats; logged once)"
    ]


def test_a_dense_method_logs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="gossamer"):
        run(call_in("no padding", dim=8), "dense")
    assert not caplog.records


def test_the_torch_backend_warns_of_its_cost_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOSSAMER_BACKEND", "torch")
    monkeypatch.setattr(backends, "why_slow", lambda call: "no reason")
    module._warn_slow.cache_clear()
    call = call_in("no padding", dim=8)
    with pytest.warns(RuntimeWarning, match="slower than dense attention .*: no reason"):
        run(call, sparse())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(call, sparse())
    module._warn_slow.cache_clear()


@pytest.mark.parametrize("planner", ["torch", "cpu"])
def test_autocast_changes_nothing_inside(planner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if planner == "cpu" and not backends.cpu.is_available():
        pytest.skip("no C++ kernels")
    monkeypatch.setenv("GOSSAMER_PLANNER", planner)
    monkeypatch.setenv("GOSSAMER_BACKEND", planner)
    q, k, v = torch.randn(3, 1, 2, 200, 16).unbind(0)
    for method in ("max_relative", "vertical_slash", "dense"):
        policy = Policy(methods.create(method), min_tokens=1, max_density=2.0)
        expected = sparse_attention(q, k, v, policy)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = sparse_attention(q, k, v, policy)
        assert got.dtype == torch.float32
        assert torch.equal(got, expected)
