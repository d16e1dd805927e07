"""Is everything right on this device? `benchmarks/gpu.py` times nothing while it is not.

The Triton executor and FlexAttention against the definition in fp64, plans that were made on the device against those
that are made on the CPU, and what is timed at the lengths at which it is timed. On a device the small checks run in
processes of their own, where kernels compile side by side and a broken one harms no other.
"""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from typing import NamedTuple

import torch
from gossamer.backends.planners import triton_on_cpu
from gpu_timing import Budget
from gpu_verify_sizes import NotRun, forget_inputs, size_checks, validate
from torch import Tensor

from gossamer import SparsePlan, methods
from gossamer.backends import flex, triton
from gossamer.backends import torch as reference
from gossamer.profiles import HeadPattern, Profile
from gossamer.testing import SITUATIONS, Case, assert_accurate, make_case, random_plan

MIXED = (
    HeadPattern("vertical_slash", (60, 300)),
    HeadPattern("a_shape", (9, 150)),
    HeadPattern("block_sparse", (4,)),
    HeadPattern("dense"),
)
METHODS: list[tuple[str, dict]] = [
    ("dense", {}),
    ("a_shape", {"sink": 9, "window": 150}),
    ("tri_shape", {"sink": 9, "window": 150, "last": 100}),
    ("vertical_slash", {"vertical_size": 60, "slash_size": 300}),
    ("vertical_slash", {"vertical_size": 60, "slash_size": 300, "exact": True}),
    ("block_sparse", {"blocks": 4}),
    ("minference", {"vertical_size": 60, "slash_size": 300}),
    ("minference", {"profile": MIXED}),
    ("max_relative", {"alpha": 0.3, "sink_blocks": 1, "window_blocks": 2, "last_rows": 256}),
]
GROUPS = ("methods", "random", "options", "plans", "sizes")
# Dtypes, head dimensions and shares of a group take turns: some methods meet each, and few kernels compile.
_TURNS = [
    (torch.bfloat16, 128, 4),
    (torch.float16, 64, 8),
    (torch.float32, 96, 1),
    (torch.bfloat16, 64, 1),
    (torch.float16, 128, 4),
    (torch.float32, 64, 4),
    (torch.bfloat16, 256, 4),
    (torch.float16, 80, 1),
    (torch.float32, 128, 8),
    (torch.bfloat16, 96, 8),
    (torch.float32, 256, 1),
]
_TURNS_A_METHOD = 3
_MOST_WORKERS = 12
# Of the pairs, where scores near a threshold are rounded differently on two devices.
_MOST_CHANGED = 0.005
Failure = tuple[str, str]


class Check(NamedTuple):
    group: str
    name: str
    call: Callable[[], None]


def verify(
    device: torch.device,
    *,
    whole: bool,
    small: bool,
    groups: tuple[str, ...] = GROUPS,
    budget: Budget | None = None,
    workers: int | None = None,
) -> tuple[int, list[Failure], list[str]]:
    """Run the checks.

    Args:
        whole: all dtypes, head dimensions and lengths; else those that are timed.
        small: sizes for Triton's interpreter.
        groups: which of `GROUPS`.
        budget: checks that have not ended with it are left out.
        workers: processes for the small checks; 0 for none, which is what the interpreter gets.

    Returns:
        the number of checks that ran, the failed ones with their messages, and the names of those left out.
    """
    budget = budget or Budget(3600.0)
    if workers is None:
        workers = min(_MOST_WORKERS, max(1, (os.cpu_count() or 2) - 2)) if device.type == "cuda" else 0
    chosen = [check for check in _checks(device, whole, small) if check.group in groups]
    here = [check for check in chosen if not workers or check.group == "sizes"]
    elsewhere = [check for check in chosen if check not in here]
    found: dict[str, str | None] = {}  # None: right; absent: left out
    pool = None
    if elsewhere:
        together = multiprocessing.get_context("spawn")
        one_thread = (torch.set_num_threads, (1,))
        pool = ProcessPoolExecutor(min(workers, len(elsewhere)), together, *one_thread)
    futures = {} if pool is None else {check.name: pool.submit(message_of, check.call) for check in elsewhere}
    for check in here:
        if budget.left() > 0:
            _keep(found, check.name, lambda check=check: message_of(check.call))
    for name, future in futures.items():
        _keep(found, name, functools.partial(_result, future, budget))
    if pool is not None:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()
    forget_inputs()
    failures = [(name, message) for name, message in found.items() if message is not None]
    return len(found), failures, [check.name for check in chosen if check.name not in found]


def _keep(found: dict[str, str | None], name: str, message: Callable[[], str | None]) -> None:
    try:
        found[name] = message()
    except (NotRun, TimeoutError, torch.OutOfMemoryError):
        torch.cuda.empty_cache()


def _result(future: Future[str | None], budget: Budget) -> str | None:
    try:
        return future.result(timeout=max(0.0, budget.left()))
    except (NotRun, TimeoutError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # its process ended
        return f"{type(error).__name__}: {error}"[:200]


def message_of(call: Callable[[], None]) -> str | None:
    """What is wrong, or None."""
    try:
        with torch.inference_mode():
            call()
    except (NotRun, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a kernel does wrong is a finding
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return None


def _checks(device: torch.device, whole: bool, small: bool) -> Iterator[Check]:
    lengths = (1, 130) if small else (1, 64, 65, 1000, 4097) if whole else (65, 4097)
    for at, entry in enumerate(METHODS):
        turns = [_TURNS[(at * _TURNS_A_METHOD + n) % len(_TURNS)] for n in range(_TURNS_A_METHOD)]
        for dtype, dim, share in turns if whole else [(torch.bfloat16, 64 if small else 128, 4)]:
            dim = 64 if small else dim
            name = f"{_label(entry)}, {dtype}, D {dim}, {share} query heads a group"
            yield Check("methods", name, functools.partial(_check_method, device, entry, dtype, dim, share, lengths))
    length = 150 if small else 2000
    for seed in range(4 if small or not whole else 16):
        yield Check("random", f"random plan {seed}", functools.partial(_check_random, device, seed, length))
    repeatable = functools.partial(_check_repeatable, device, length)
    yield Check("random", "results of two runs are the same", repeatable)
    if whole:
        yield Check("random", "flex", functools.partial(_check_flex, device, length))
    for dtype, entry in itertools.product((torch.bfloat16, torch.float32), (METHODS[3], METHODS[8])):
        name = f"{_label(entry)}, {dtype}"
        for option in OPTIONS:
            check = functools.partial(_check_option, device, entry, dtype, option, length)
            yield Check("options", f"{option}: {name}", check)
        yield Check(
            "options",
            f"the future does not leak: {name}",
            functools.partial(_check_future, device, entry, dtype, length),
        )
    for entry, situation in itertools.product(METHODS[3:], SITUATIONS):
        check = functools.partial(_check_plan, device, entry, situation, length)
        yield Check("plans", f"plan of {_label(entry)}, {situation}", check)
    for name, check in size_checks(device, small):
        yield Check("sizes", name, check)


def _label(entry: tuple[str, dict]) -> str:
    name, given = entry
    return name + (" with a mixed profile" if "profile" in given else " exact" if given.get("exact") else "")


def _method(entry: tuple[str, dict], heads: int) -> methods.Method:
    name, given = entry
    if "profile" in given:
        patterns = tuple(itertools.islice(itertools.cycle(given["profile"]), heads))
        given = given | {"profile": Profile((patterns,))}
    return methods.create(name, **given)


def _execute(executor, case: Case, plan: SparsePlan, device: torch.device, **options) -> tuple[Tensor, Tensor]:
    q, k, v = (t.to(device) for t in (case.q, case.k, case.v))
    out, lse = executor.execute(q, k, v, plan.to(device), scale=case.scale, **options)
    return out.cpu(), lse.cpu()


def _check_method(device: torch.device, entry, dtype: torch.dtype, dim: int, share: int, lengths) -> None:
    method = _method(entry, 2 * share)
    for length in lengths:
        for situation in SITUATIONS:
            case = make_case(situation, length=length, heads=2 * share, groups=2, dim=dim, dtype=dtype, seed=length)
            plan = method.plan(case.q, case.k, scale=case.scale, extent=case.extent, layer=0)
            assert_accurate(case, plan, *_execute(triton, case, plan, device), most_rows=40)


def _random_case(seed: int, length: int, dtype: torch.dtype) -> tuple[Case, SparsePlan]:
    plan = random_plan(
        seed,
        batch=2,
        heads=[2, 4][seed % 2],
        query_len=length - 3,
        key_len=length,
        block_q=[64, 128, 32][seed % 3],
        block_k=[64, 128, 32, 100][seed % 4],
        permuted=seed % 4 == 3,
        padded=seed % 2 == 0,
        limit=200 if seed % 5 == 4 else None,
    )
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, 4, length - 3, 64, generator=generator).to(dtype)
    k, v = (torch.randn(2, 2, length, 64, generator=generator).to(dtype) for _ in range(2))
    return Case(q, k, v, plan.extent, 0.125), plan


def _check_random(device: torch.device, seed: int, length: int) -> None:
    case, plan = _random_case(seed, length, [torch.bfloat16, torch.float32][seed % 2])
    assert_accurate(case, plan, *_execute(triton, case, plan, device))


def _check_flex(device: torch.device, length: int) -> None:
    case, plan = _random_case(1, length, torch.float32)
    plan = replace(plan, q_order=None, k_order=None)
    out, lse = _execute(flex, case, plan, device)
    precise = torch.get_float32_matmul_precision() == "highest" or device.type == "cpu"
    other, other_lse = _execute(triton, case, plan, device)
    tolerance = 1e-4 if precise else 5e-3
    torch.testing.assert_close(out, other, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse, other_lse, atol=tolerance, rtol=tolerance)


def _check_repeatable(device: torch.device, length: int) -> None:
    case, plan = _random_case(2, length, torch.bfloat16)
    first, again = (_execute(triton, case, plan, device) for _ in range(2))
    assert torch.equal(first[0], again[0]), "outputs differ"
    assert torch.equal(first[1], again[1]), "lse differs"


OPTIONS = ("sinks", "soft-cap", "the model's own window", "all three")


def _planned(entry, dtype: torch.dtype, length: int) -> tuple[Case, SparsePlan]:
    case = make_case("no padding", length=length, heads=4, groups=2, dim=64, dtype=dtype)
    plan = _method(entry, 4).plan(case.q, case.k, scale=case.scale, extent=case.extent, layer=0)
    return case, plan


def _check_option(device: torch.device, entry, dtype: torch.dtype, option: str, length: int) -> None:
    """What `assert_accurate` has no argument for, against the reference executor in fp64."""
    case, plan = _planned(entry, dtype, length)
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0]) if option in ("sinks", "all three") else None
    softcap = 15.0 if option in ("soft-cap", "all three") else None
    if option in ("the model's own window", "all three"):
        plan = plan.with_limit(length // 3)
    q, k, v = (t.double() for t in (case.q, case.k, case.v))
    expected, expected_lse = reference.execute(q, k, v, plan, scale=case.scale, sinks=sinks, softcap=softcap)
    given = None if sinks is None else sinks.to(device)
    out, lse = _execute(triton, case, plan, device, sinks=given, softcap=softcap)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-3, rtol=1e-3)


def _check_future(device: torch.device, entry, dtype: torch.dtype, length: int) -> None:
    """Keys and values after a token, however large, change nothing before it. The plan stays: it may look ahead."""
    case, plan = _planned(entry, dtype, length)
    now = length * 5 // 8 + 7
    k, v = case.k.clone(), case.v.clone()
    k[:, :, now:] *= -30
    v[:, :, now:] *= 100
    before, after = (_execute(triton, one, plan, device) for one in (case, replace(case, k=k, v=v)))
    for what, one, other in zip(("output", "lse"), before, after, strict=True):
        assert torch.equal(one[:, :, :now], other[:, :, :now]), f"the {what} of earlier rows changed"
    assert not torch.equal(before[0][:, :, now:], after[0][:, :, now:]), "the later rows did not change"


def _check_plan(device: torch.device, entry: tuple[str, dict], situation: str, length: int) -> None:
    """The sets that the device chooses are the CPU's. In fp32, where both compute the same scores up to rounding."""
    method = _method(entry, 4)
    case = make_case(situation, length=length, heads=4, groups=2, dim=64)
    expected = method.plan(case.q, case.k, scale=case.scale, extent=case.extent, layer=0)
    with nullcontext() if device.type == "cuda" else triton_on_cpu():
        found = method.plan(case.q.to(device), case.k.to(device), scale=case.scale, extent=case.extent, layer=0)
    found = found.to("cpu")
    names = ("block_indptr", "block_indices", "column_indptr", "column_indices")
    unequal = [name for name in names if not torch.equal(getattr(expected, name), getattr(found, name))]
    if unequal and device.type == "cuda":
        validate(found)
        one, other = expected.to_mask(), found.to_mask()
        if int((one ^ other).sum()) <= _MOST_CHANGED * int(one.sum()):
            return  # a score at the edge of the choice
    assert not unequal, f"{', '.join(unequal)} differ"
