"""`Policy`: dense or sparse, by thresholds that are tested on both sides, and why."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from gossamer import AttentionCall, Extent, Method, Policy, Profile, SparsePlan, backends, methods
from gossamer.cli import main
from gossamer.evaluate.records import label_of, policy_text
from gossamer.methods import AShape, Dense
from gossamer.policy import FEW_QUERIES, STREAMED_KEYS, TOO_DENSE, Decision
from gossamer.profiles.costs import MIN_TOKENS, BreakEven, Costs, Kernel, forget
from gossamer.profiles.machine import Machine


@dataclass(frozen=True)
class Planned(Method):
    """Gives what it was given, and takes note of calls."""

    name: ClassVar[str] = "planned"
    window: int = 1
    calls: tuple[list[AttentionCall], ...] = ()

    def plan(self, call: AttentionCall) -> SparsePlan:
        for calls in self.calls:
            calls.append(call)
        return SparsePlan(call.groups, call.query_len, call.key_len, call.extent, window=self.window)


@dataclass(frozen=True)
class Needy(Planned):
    name: ClassVar[str] = "needy"
    needs: ClassVar[frozenset[str]] = frozenset({"causal", "store"})


def call_of(query_len: int, key_len: int, dtype: torch.dtype = torch.float32, **extent: Any) -> AttentionCall:
    q, k = torch.zeros(1, 2, query_len, 4, dtype=dtype), torch.zeros(1, 1, key_len, 4, dtype=dtype)
    return AttentionCall(q, k, k, Extent.full(1, query_len, key_len, **extent))


def policy(min_tokens: int = 0, max_density: float = 1.0, method: Method | None = None) -> Policy:
    return Policy(method or Planned(), min_tokens, max_density)


# Making one


def test_thresholds_are_2048_tokens_and_a_density_of_nine_tenths() -> None:
    assert Policy(Planned()) == Policy(Planned(), None, 0.9)
    assert Policy(Planned()).resolved(call_of(1, 1)).min_tokens == MIN_TOKENS == 2048
    assert Policy(Planned()).why_dense(call_of(2047, 2047)) == "short prompt"
    assert Policy(Planned()).why_dense(call_of(2048, 2048)) is None


def test_a_policy_is_taken_as_it_is() -> None:
    given = policy(5, 0.5)
    assert Policy.of(given) is given


@pytest.mark.parametrize(
    ("given", "method"),
    [
        (AShape(3, 4), AShape(3, 4)),
        ("a_shape", AShape()),
        (Profile.uniform(1, 2, AShape(3, 4)), Profile.uniform(1, 2, AShape(3, 4)).method),
    ],
)
def test_methods_names_and_profiles_get_the_default_thresholds(given: Any, method: Method) -> None:
    assert Policy.of(given) == Policy(method)


def test_an_unknown_name_is_named() -> None:
    with pytest.raises(ValueError, match="unknown method 'nonesuch'; known: "):
        Policy.of("nonesuch")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Policy("dense"), TypeError, r"must be a gossamer\.methods\.Method, got str"),  # type: ignore[arg-type]
        (lambda: Policy.of(3), TypeError, "got int"),  # type: ignore[arg-type]
        (lambda: policy(min_tokens=-1), ValueError, "min_tokens must not be negative, got -1"),
        (lambda: policy(max_density=0.0), ValueError, r"max_density must be above 0, got 0\.0"),
        (lambda: policy(max_density=float("nan")), ValueError, "max_density must be above 0, got nan"),
    ],
)
def test_bad_policies_are_named(make: Callable[[], Policy], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


# Deciding


def test_a_plan_that_pays_is_taken() -> None:
    calls: list[AttentionCall] = []
    call = call_of(40, 60)
    decision = policy(method=Planned(2, (calls,))).decide(call)
    assert calls == [call]
    assert decision.plan is not None
    assert decision.plan.to_mask().sum() == 80
    assert (decision.density, decision.reason) == (decision.plan.density(), None)


@pytest.mark.parametrize(("max_density", "reason"), [(0.36, None), (0.3599, TOO_DENSE)])
def test_a_plan_may_be_as_dense_as_the_threshold(max_density: float, reason: str | None) -> None:
    """One block of three by three tokens in five by five."""
    call = call_of(5, 5, causal=False)
    blocks = torch.tensor([[[[True, False], [False, False]]]])
    plan = SparsePlan.from_block_mask(blocks, 5, 5, extent=call.extent, block_q=3, block_k=3)
    assert plan.density() == 0.36

    @dataclass(frozen=True)
    class Nine(Method):
        name: ClassVar[str] = "nine"

        def plan(self, call: AttentionCall) -> SparsePlan:
            return plan

    decision = policy(max_density=max_density, method=Nine()).decide(call)
    assert decision.reason == reason
    assert (decision.plan is None) is (reason is not None)
    assert decision.density == (1.0 if reason else 0.36)


@pytest.mark.parametrize(("max_density", "planned"), [(0.8, True), (0.79, False)])
def test_a_method_that_is_known_to_choose_too_much_is_not_asked(max_density: float, planned: bool) -> None:
    calls: list[AttentionCall] = []

    @dataclass(frozen=True)
    class Generous(Planned):
        name: ClassVar[str] = "generous"

        def least_density(self, call: AttentionCall) -> float:
            return 0.8

    decision = policy(max_density=max_density, method=Generous(2, (calls,))).decide(call_of(40, 60))
    assert len(calls) == planned
    assert decision.reason == (None if planned else TOO_DENSE)


def test_a_dense_method_needs_no_reason() -> None:
    decision = Policy(Dense(), min_tokens=10_000).decide(call_of(1, 60))
    assert (decision.plan, decision.density, decision.reason) == (None, 1.0, None)


@pytest.mark.parametrize(
    ("call", "min_tokens", "reason"),
    [
        (call_of(50, 50), 50, None),
        (call_of(50, 50), 51, "short prompt"),
        (call_of(50, 50), 0, None),
        (call_of(50, 60, limit=50), 50, None),
        (call_of(50, 60, limit=49), 50, "short model window"),
        (call_of(50, 60, limit=60), 61, "short prompt"),
        (call_of(50, 60, limit=59), 61, "short model window"),
        (call_of(FEW_QUERIES, 100), 100, None),
        (call_of(FEW_QUERIES - 1, 100), 100, "few queries"),
        (call_of(7, 100), 7, None),
        (call_of(6, 100), 7, "few queries"),
        (call_of(2, 100), 0, None),
        (call_of(1, 100), 0, "decode"),
        (call_of(1, 100, causal=False), 0, None),
        (call_of(1, 100, causal=False), 100, "few queries"),
    ],
)
def test_calls_run_dense_below_the_thresholds(call: AttentionCall, min_tokens: int, reason: str | None) -> None:
    calls: list[AttentionCall] = []
    decision = policy(min_tokens, method=Planned(1, (calls,))).decide(call)
    assert decision.reason == reason
    assert (decision.plan is None) is (reason is not None)
    assert bool(calls) is (reason is None)


@pytest.mark.parametrize(("live", "reason"), [(59, "short prompt"), (60, None)])
def test_spare_slots_of_a_cache_make_no_prompt_long(live: int, reason: str | None) -> None:
    q, k = torch.zeros(2, 2, 60, 4), torch.zeros(2, 1, 500, 4)
    call = AttentionCall(q, k, k, Extent([0, 0], [40, live], [0, 0], [40, live]))
    assert policy(60).why_dense(call) == reason


def test_a_call_that_needs_a_gradient_runs_dense_unless_asked_for() -> None:
    call = call_of(50, 50)
    call.q.requires_grad_()
    dense = replace(policy(), training=False)
    assert dense.why_dense(call) == "training: dense unless asked for"
    assert policy().why_dense(call) is None
    with torch.no_grad():
        assert dense.why_dense(call) is None


def test_a_call_that_lacks_what_the_method_needs_runs_dense() -> None:
    assert policy(method=Needy()).why_dense(call_of(50, 50)) == "needy needs store"
    assert policy(method=Needy()).why_dense(call_of(50, 50, causal=False)) == "needy needs causal"


# Kernels for dense attention


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "name_of", lambda subject: "cpu/some")


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "name_of", lambda subject: "torch")


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("kernel", "ours"), [("torch", False), ("gossamer", True)])
@pytest.mark.parametrize("reason", [None, "decode", TOO_DENSE])
def test_a_dense_method_says_which_kernel_runs_it(kernel: str, ours: bool, reason: str | None) -> None:
    assert Policy(Dense(kernel)).attends_on_kernel(call_of(1, 9999), reason) is ours


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("reason", "ours"),
    [(TOO_DENSE, True), ("decode", True), ("few queries", True), ("short prompt", False), (None, False)],
)
def test_reasons_for_which_our_own_kernel_runs_dense(reason: str | None, ours: bool) -> None:
    assert policy().attends_on_kernel(call_of(4, 4096), reason) is ours


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("reason", [TOO_DENSE, "decode", "few queries"])
def test_without_kernels_torch_runs_dense(reason: str) -> None:
    assert not policy().attends_on_kernel(call_of(4, 4096), reason)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("reason", [TOO_DENSE, "decode"])
def test_on_other_devices_than_cpus_torch_runs_dense(reason: str) -> None:
    q = torch.zeros(1, 2, 1, 4, device="meta")
    k = torch.zeros(1, 1, 4096, 4, device="meta")
    assert not policy().attends_on_kernel(AttentionCall(q, k, k), reason)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("dtype", "key_len", "ours"),
    [
        (torch.float32, STREAMED_KEYS[4], True),
        (torch.float32, STREAMED_KEYS[4] - 1, False),
        (torch.bfloat16, STREAMED_KEYS[2], True),
        (torch.float16, STREAMED_KEYS[2] - 1, False),
        (torch.float64, 1 << 20, False),
    ],
)
def test_long_caches_are_decoded_on_our_own_kernel(dtype: torch.dtype, key_len: int, ours: bool) -> None:
    assert policy().decodes_on_kernel(torch.zeros(1, 2, 1, 4, dtype=dtype), key_len) is ours


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("kernel", "ours"), [("torch", False), ("gossamer", True)])
def test_a_dense_method_decodes_on_its_kernel(kernel: str, ours: bool) -> None:
    method = methods.create("dense", kernel=kernel)
    assert Policy(method).decodes_on_kernel(torch.zeros(1, 2, 1, 4), 1 << 20) is ours


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("reason", [None, "decode", TOO_DENSE])
def test_dense_steps_of_a_method_for_steps_run_on_our_own_kernel(reason: str | None) -> None:
    """What reads the prompt says nothing of the layers that the method reads whole."""
    both = Policy(Dense(), decode=methods.create("quest"))
    assert both.attends_on_kernel(call_of(1, 4096), reason)
    assert both.decodes_on_kernel(torch.zeros(1, 2, 1, 4), 4096)
    assert not both.attends_on_kernel(call_of(1, 4095), None)
    assert not both.attends_on_kernel(call_of(999, 4096), None)
    assert Policy(Dense("gossamer"), decode=both.decode).attends_on_kernel(call_of(1, 4095), None)


def test_decisions_are_compared_by_identity_as_their_plans_are() -> None:
    assert Decision(None) != Decision(None)


# The break-even that was measured


def point(method: Method, tokens: float | None, subject: AttentionCall, heads: int = 2) -> BreakEven:
    fields = json.loads(json.dumps(method.to_dict()))  # as a file gives them
    return BreakEven(Kernel.of(subject), fields, heads, 1, tokens, 16, 128)


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Puts break-evens at hand."""

    def write(*points: BreakEven, machine: Machine | None = None) -> None:
        Costs(machine or Machine.here(), break_even=points).save(tmp_path / "costs.json")
        forget()

    monkeypatch.setenv("GOSSAMER_COST_MODEL", str(tmp_path / "costs.json"))
    yield write
    forget()


def test_what_was_measured_takes_the_place_of_the_constant(measured) -> None:
    measured(point(AShape(3, 4), 49.2, call_of(1, 1)))
    assert Policy(AShape(3, 4)).why_dense(call_of(49, 49)) == "short prompt"
    assert Policy(AShape(3, 4)).why_dense(call_of(50, 50)) is None
    assert Policy(AShape(3, 4)).resolved(call_of(9, 9).q) == Policy(AShape(3, 4), 50)


def test_what_was_measured_holds_for_the_same_fields_kernel_dtype_and_head_dimension(measured) -> None:
    call = call_of(100, 100)
    measured(
        point(AShape(3, 5), 50, call),
        point(AShape(3, 4), 50, call_of(1, 1, torch.bfloat16)),
        replace(point(AShape(3, 4), 50, call), kernel=replace(Kernel.of(call), head_dim=8)),
        replace(point(AShape(3, 4), 50, call), kernel=replace(Kernel.of(call), backend="another")),
    )
    assert Policy(AShape(3, 4)).resolved(call).min_tokens == MIN_TOKENS
    assert Policy(AShape(3, 5)).resolved(call).min_tokens == 50


def test_of_several_numbers_of_heads_the_largest_is_taken(measured) -> None:
    call = call_of(1, 1)
    measured(*(point(AShape(), tokens, call, heads) for heads, tokens in ((2, 40), (4, 60), (8, 50))))
    assert Policy(AShape()).resolved(call).min_tokens == 60


def test_a_method_that_was_slower_at_all_lengths_starts_beyond_them(measured) -> None:
    call = call_of(1, 1)
    measured(replace(point(AShape(), None, call), longest=9000))
    assert Policy(AShape()).resolved(call).min_tokens == 9001
    measured(point(AShape(), None, call))  # short ones alone say nothing of long ones
    assert Policy(AShape()).resolved(call).min_tokens == MIN_TOKENS


def test_a_given_number_methods_per_head_and_other_machines_are_not_touched(measured) -> None:
    call, per_head = call_of(1, 1), Profile.uniform(1, 2, AShape()).method
    points = point(AShape(), 50, call), point(per_head, 50, call)
    measured(*points)
    assert Policy(AShape(), 7).resolved(call).min_tokens == 7
    assert Policy(per_head).resolved(call).min_tokens == MIN_TOKENS
    measured(*points, machine=replace(Machine.here(), threads=Machine.here().threads + 1))
    assert Policy(AShape()).resolved(call).min_tokens == MIN_TOKENS


def test_what_is_recorded_is_the_number(measured) -> None:
    measured(point(AShape(), 50, call_of(1, 1)))
    policy = Policy(AShape()).resolved(call_of(1, 1))
    assert (policy_text(policy), label_of(policy)) == ("min_tokens=50,max_density=0.9", "a_shape(min_tokens=50)")
    assert (policy_text(Policy(AShape())), label_of(Policy(AShape()))) == ("min_tokens=2048,max_density=0.9", "a_shape")


def test_doctor_says_which_number_is_used_and_where_it_is_from(measured, capsys) -> None:
    measured(point(AShape(3, 4), 49.2, call_of(1, 1)))
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert f"50 for a_shape(sink=3,window=4) on {Kernel.of(call_of(1, 1))}, from the cost model" in said
    assert "2048 for all else, a constant" in said
    measured()
    assert main(["doctor"]) == 0
    assert "2048 for every method, a constant" in capsys.readouterr().out
