"""What benchmarks/gpu.py verifies before it times: the list of checks, and that each kind finds what is wrong."""

from dataclasses import replace

import pytest
import torch

from gossamer.backends import torch as definition
from gossamer.backends import triton
from gossamer.testing import random_plan

pytestmark = [
    pytest.mark.skipif(not triton.is_available(), reason=f"{triton.why_unavailable()}"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="sizes and clocks here are those of the interpreter"),
]


@pytest.fixture
def checks(script):
    """The small checks of benchmarks/gpu.py --verify, by name."""
    found = list(script("gpu_verify")._checks(torch.device("cpu"), True, True))
    assert len({check.name for check in found}) == len(found)
    return {check.name: check for check in found}


def test_exact_slashes_mixed_methods_and_every_option_are_verified(checks, script):
    names = "\n".join(checks)
    for part in ("vertical_slash exact", "per_head of mixed methods", "the future does not leak"):
        assert part in names
    for option in script("gpu_verify").OPTIONS:
        assert f"{option}: max_relative" in names
    assert "gradients of random plan 4" in names
    assert {check.group for check in checks.values()} == set(script("gpu_verify").GROUPS)


@pytest.mark.parametrize("whole", [True, False])
def test_the_timed_methods_are_verified_at_the_longest_lengths(script, whole):
    every = script("gpu_verify")._checks(torch.device("cuda"), whole, False)
    names = [check.name for check in every if check.group == "sizes"]
    for length in (131072, 1048576):
        for method in ("dense", *script("gpu_setting").SPARSE):
            assert f"{method} at {length} tokens" in names


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["output", "lse", "later keys"])
def test_a_wrong_kernel_is_found_at_the_timed_sizes(script, monkeypatch, broken):
    sizes, attend = script("gpu_verify_sizes"), definition.attend

    def wrong(call, plan):
        if broken == "later keys":  # as if an offset had overflowed
            v = torch.cat([call.v[:, :, :256], call.v[:, :, : call.key_len - 256]], dim=2)
            call = replace(call, v=v)
        out, lse = attend(call, plan)
        return out * (1.05 if broken == "output" else 1), lse + (0.05 if broken == "lse" else 0)

    named = dict(sizes.size_checks(torch.device("cpu"), True))
    name = "10% in 128x128 at 512 tokens"
    monkeypatch.setattr(triton, "attend", attend)
    named[name]()
    monkeypatch.setattr(triton, "attend", wrong)
    with pytest.raises(AssertionError, match="exceeds"):
        named[name]()


@pytest.mark.parametrize("broken", ["q", "k", "v", "sinks"])
def test_a_wrong_gradient_is_found(script, monkeypatch, broken):
    gradients = script("gpu_verify_gradients")
    right = definition.attend_backward

    def wrong(*given):
        found = right(*given)
        return found._replace(**{broken: getattr(found, broken) * 1.05})

    monkeypatch.setattr(triton, "attend", definition.attend)
    monkeypatch.setattr(triton, "attend_backward", right)
    gradients.check_random(torch.device("cpu"), 1, 100)
    monkeypatch.setattr(triton, "attend_backward", wrong)
    with pytest.raises(AssertionError, match=f"the gradient of {broken} has an error"):
        gradients.check_random(torch.device("cpu"), 1, 100)


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["minference", "max_relative"])
def test_a_plan_of_other_choices_is_found_at_the_timed_sizes(script, monkeypatch, spec):
    sizes, setting = script("gpu_verify_sizes"), script("gpu_setting")
    name = next(method for method in setting.SPARSE_SHORT if method.startswith(spec))
    check = dict(sizes.size_checks(torch.device("cpu"), True))[f"{name} at 512 tokens"]
    monkeypatch.setattr(triton, "attend", definition.attend)
    check()
    real = setting.Attempt.plan

    def of_other_inputs(attempt, call):
        return real(attempt, replace(call, q=call.q.flip(2), k=call.k.flip(2)))

    monkeypatch.setattr(setting.Attempt, "plan", of_other_inputs)
    with pytest.raises(AssertionError, match="not those that torch chooses"):
        check()


def test_the_sampled_rows_hold_the_first_the_last_and_the_edges_of_blocks(script):
    rows = script("gpu_verify_sizes").sampled_rows(1048576, 64)
    assert {0, 63, 64, 524287, 524288, 1048511, 1048512, 1048575} <= set(rows.tolist())
    assert 50 < len(rows) <= script("gpu_verify_sizes").SAMPLED_ROWS


def test_one_head_of_a_plan_names_the_pairs_of_that_head(script):
    plan = random_plan(7, batch=1, heads=3, query_len=300, key_len=300)
    rows = torch.arange(300)
    for head in range(3):
        own = script("gpu_verify_sizes").plan_of_head(plan, head)
        assert torch.equal(own.rows_mask(rows)[:, 0], plan.rows_mask(rows)[:, head])


@pytest.mark.slow
def test_checks_run_in_processes_of_their_own_where_kernels_compile(script, monkeypatch):
    verification = script("gpu_verify")
    every = verification._checks
    wanted = ("plan of block_sparse, no padding", "sinks: vertical_slash, torch.float32")

    def some(*arguments):
        return [check for check in every(*arguments) if check.name in wanted]

    monkeypatch.setattr(verification, "_checks", some)
    found = verification.verify(torch.device("cpu"), whole=True, small=True, workers=2)
    assert found == (2, [], [])


def test_checks_without_time_are_named_and_do_not_count(script):
    verification, timing = script("gpu_verify"), script("gpu_timing")
    budget = timing.Budget(-1)
    count, failures, left_out = verification.verify(
        torch.device("cpu"), whole=False, small=True, groups=("plans",), budget=budget
    )
    assert (count, failures) == (0, [])
    assert "plan of block_sparse, padded chunk" in left_out


@pytest.mark.slow
def test_a_leak_from_the_future_is_found(script, monkeypatch):
    verification, attend = script("gpu_verify"), definition.attend

    def leaking(call, plan):
        return attend(replace(call, v=call.v + 1e-3 * call.v[:, :, -1:]), plan)

    arguments = (torch.device("cpu"), verification.METHODS[3], torch.float32, 150)
    monkeypatch.setattr(triton, "attend", attend)
    verification._check_future(*arguments)
    monkeypatch.setattr(triton, "attend", leaking)
    with pytest.raises(AssertionError, match="earlier rows changed"):
        verification._check_future(*arguments)
