"""Is everything right on this device? `benchmarks/gpu.py` times nothing while it is not.

The Triton kernels and FlexAttention against the definition in fp64, gradients too, plans that were made on the device
against those that are made on the CPU, and what is timed at the lengths at which it is timed. On a device the small
checks run in processes of their own, where kernels compile side by side and a broken one harms no other.
"""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from types import ModuleType
from typing import Any, NamedTuple

import torch
from gpu_setting import planned_by
from gpu_timing import Budget
from gpu_verify_gradients import gradient_checks
from gpu_verify_sizes import NotRun, forget_inputs, size_checks, validate
from torch import Tensor

from gossamer import AttentionCall, Extent, SparsePlan, methods
from gossamer.backends import flex, triton
from gossamer.methods import AShape, BlockSparse, Dense, MaxRelative, VerticalSlash
from gossamer.testing import SITUATIONS, assert_accurate, make_call, random_plan

MIXED = (VerticalSlash(60, 300), AShape(9, 150), BlockSparse(4), MaxRelative(0.3, 1, 2, 0), Dense())
Entry = tuple[str, dict[str, Any]]
METHODS: list[Entry] = [
    ("dense", {}),
    ("a_shape", {"sink": 9, "window": 150}),
    ("tri_shape", {"sink": 9, "window": 150, "last": 100}),
    ("vertical_slash", {"vertical_size": 60, "slash_size": 300}),
    ("vertical_slash", {"vertical_size": 60, "slash_size": 300, "exact": True}),
    ("block_sparse", {"blocks": 4}),
    ("minference", {"vertical_size": 60, "slash_size": 300}),
    ("per_head", {"layers": MIXED}),
    ("max_relative", {"alpha": 0.3, "sink_blocks": 1, "window_blocks": 2, "last_rows": 256}),
]
NOT_CAUSAL = ("bidirectional", "cross-attention")
GROUPS = ("methods", "random", "options", "plans", "gradients", "sizes")
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
        if situation in NOT_CAUSAL and "causal" in _method(entry, 4).needs:
            continue
        check = functools.partial(_check_plan, device, entry, situation, length)
        yield Check("plans", f"plan of {_label(entry)}, {situation}", check)
    for name, check in gradient_checks(device, whole, small):
        yield Check("gradients", name, check)
    for name, check in size_checks(device, small):
        yield Check("sizes", name, check)


def _label(entry: Entry) -> str:
    name, given = entry
    return name + (" of mixed methods" if "layers" in given else " exact" if given.get("exact") else "")


def _method(entry: Entry, heads: int) -> methods.Method:
    name, given = entry
    if "layers" in given:
        given = given | {"layers": [list(itertools.islice(itertools.cycle(given["layers"]), heads))]}
    return methods.create(name, **given)


def _on(device: torch.device, call: AttentionCall) -> AttentionCall:
    q, k, v = (t.to(device) for t in (call.q, call.k, call.values))
    return replace(call, q=q, k=k, v=v, sinks=None if call.sinks is None else call.sinks.to(device))


def _attend(backend: ModuleType, call: AttentionCall, plan: SparsePlan, device: torch.device) -> tuple[Tensor, Tensor]:
    out, lse = backend.attend(_on(device, call), plan.to(device))
    return out.cpu(), lse.cpu()


def _check_method(
    device: torch.device, entry: Entry, dtype: torch.dtype, dim: int, share: int, lengths: Sequence[int]
) -> None:
    method = _method(entry, 2 * share)
    for length in lengths:
        for situation in SITUATIONS:
            call = make_call(situation, length=length, heads=2 * share, groups=2, dim=dim, dtype=dtype, seed=length)
            if method.lacks(call) is None:
                plan = method.plan(call)
                assert_accurate(call, plan, *_attend(triton, call, plan, device), most_rows=40)


def _random_call(seed: int, length: int, dtype: torch.dtype) -> tuple[AttentionCall, SparsePlan]:
    # Of blocks alone, in order.
    attributes: dict[str, Any] = {"pruned_mean": True, "skip": 0.5} if seed % 12 == 5 else {}
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
        causal=seed % 7 != 6,
        **attributes,
    )
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, 4, length - 3, 64, generator=generator).to(dtype)
    k, v = (torch.randn(2, 2, length, 64, generator=generator).to(dtype) for _ in range(2))
    return AttentionCall(q, k, v, plan.extent), plan


def _check_random(device: torch.device, seed: int, length: int) -> None:
    call, plan = _random_call(seed, length, [torch.bfloat16, torch.float32][seed % 2])
    assert_accurate(call, plan, *_attend(triton, call, plan, device))


def _check_flex(device: torch.device, length: int) -> None:
    call, plan = _random_call(1, length, torch.float32)
    out, lse = _attend(flex, call, plan, device)
    precise = torch.get_float32_matmul_precision() == "highest" or device.type == "cpu"
    other, other_lse = _attend(triton, call, plan, device)
    tolerance = 1e-4 if precise else 5e-3
    torch.testing.assert_close(out, other, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse, other_lse, atol=tolerance, rtol=tolerance)


def _check_repeatable(device: torch.device, length: int) -> None:
    call, plan = _random_call(2, length, torch.bfloat16)
    first, again = (_attend(triton, call, plan, device) for _ in range(2))
    assert torch.equal(first[0], again[0]), "outputs differ"
    assert torch.equal(first[1], again[1]), "lse differs"


OPTIONS = ("sinks", "soft-cap", "the model's own window", "all three")


def _check_option(device: torch.device, entry: Entry, dtype: torch.dtype, option: str, length: int) -> None:
    call = make_call("no padding", length=length, heads=4, groups=2, dim=64, dtype=dtype)
    if option in ("sinks", "all three"):
        call = replace(call, sinks=torch.tensor([0.5, -1.0, 2.0, 0.0]))
    if option in ("soft-cap", "all three"):
        call = replace(call, softcap=15.0)
    if option in ("the model's own window", "all three"):
        call = replace(call, extent=Extent.full(1, length, length, limit=length // 3))
    plan = _method(entry, 4).plan(call)
    assert_accurate(call, plan, *_attend(triton, call, plan, device))


def _check_future(device: torch.device, entry: Entry, dtype: torch.dtype, length: int) -> None:
    """Keys and values after a token, however large, change nothing before it. The plan stays: it may look ahead."""
    call = make_call("no padding", length=length, heads=4, groups=2, dim=64, dtype=dtype)
    plan = _method(entry, 4).plan(call)
    now = length * 5 // 8 + 7
    k, v = call.k.clone(), call.values.clone()
    k[:, :, now:] *= -30
    v[:, :, now:] *= 100
    before, after = (_attend(triton, one, plan, device) for one in (call, replace(call, k=k, v=v)))
    for what, one, other in zip(("output", "lse"), before, after, strict=True):
        assert torch.equal(one[:, :, :now], other[:, :, :now]), f"the {what} of earlier rows changed"
    assert not torch.equal(before[0][:, :, now:], after[0][:, :, now:]), "the later rows did not change"


def _check_plan(device: torch.device, entry: Entry, situation: str, length: int) -> None:
    """The sets that the device chooses are the CPU's. In fp32, where both compute the same scores up to rounding."""
    method = _method(entry, 4)
    call = make_call(situation, length=length, heads=4, groups=2, dim=64)
    expected = method.plan(call)
    with planned_by("triton"):
        found = method.plan(_on(device, call)).to("cpu")
    names = ("block_indptr", "block_indices", "column_indptr", "column_indices")
    unequal = [name for name in names if not torch.equal(getattr(expected, name), getattr(found, name))]
    if unequal and device.type == "cuda":
        validate(found)
        one, other = expected.to_mask(), found.to_mask()
        if int((one ^ other).sum()) <= _MOST_CHANGED * int(one.sum()):
            return  # a score at the edge of the choice
    assert not unequal, f"{', '.join(unequal)} differ"
