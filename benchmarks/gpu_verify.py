"""Is everything right on this device? `benchmarks/gpu.py` times nothing while it is not.

The Triton executor and FlexAttention against the definition in fp64, and plans that were made on the device against
those that are made on the CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from gossamer import SparsePlan, methods
from gossamer.ops import flex, triton
from gossamer.ops.planners import triton_on_cpu
from gossamer.testing import SITUATIONS, Case, assert_accurate, make_case, random_plan

METHODS: list[tuple[str, dict]] = [
    ("dense", {}),
    ("a_shape", {"sink": 9, "window": 150}),
    ("tri_shape", {"sink": 9, "window": 150, "last": 100}),
    ("vertical_slash", {"vertical_size": 60, "slash_size": 300}),
    ("block_sparse", {"blocks": 4}),
    ("minference", {"vertical_size": 60, "slash_size": 300}),
    ("max_relative", {"alpha": 0.3, "sink_blocks": 1, "window_blocks": 2, "last_rows": 256}),
]
Failure = tuple[str, str]


def verify(device: torch.device, *, whole: bool, small: bool) -> tuple[int, list[Failure]]:
    """Run the checks.

    Args:
        whole: all dtypes, head dimensions and lengths; else those that are timed.
        small: sizes for Triton's interpreter.

    Returns:
        the number of checks, and the failed ones with their messages.
    """
    count, failures = 0, []
    for name, check in _checks(device, whole, small):
        count += 1
        try:
            check()
        except Exception as error:  # whatever a kernel does wrong is a finding
            failures.append((name, f"{type(error).__name__}: {error}".splitlines()[0][:200]))
    return count, failures


def _checks(device: torch.device, whole: bool, small: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    lengths = (1, 130) if small else (1, 63, 64, 65, 1000, 4097) if whole else (65, 4097)
    dims = (64,) if small else (64, 80, 96, 128, 256) if whole else (64, 128)
    dtypes = (torch.bfloat16, torch.float16, torch.float32) if whole else (torch.bfloat16,)
    shares = (4,) if small or not whole else (1, 4, 8)
    for entry in METHODS:
        for dtype in dtypes:
            for dim in dims:
                for share in shares:
                    name = f"{entry[0]}, {dtype}, D {dim}, {share} query heads a group"
                    yield name, functools.partial(_check_method, device, entry, dtype, dim, share, lengths)
    length = 150 if small else 2000
    for seed in range(4 if small or not whole else 16):
        yield f"random plan {seed}", functools.partial(_check_random, device, seed, length)
    yield "flex", lambda: _check_flex(device, length)
    yield "results of two runs are the same", lambda: _check_repeatable(device, length)
    for name, fields in METHODS[3:]:
        for situation in SITUATIONS:
            check = functools.partial(_check_plan, device, name, fields, situation, length)
            yield f"plan of {name}, {situation}", check


def _execute(executor, case: Case, plan: SparsePlan, device: torch.device) -> tuple[Tensor, Tensor]:
    q, k, v = (t.to(device) for t in (case.q, case.k, case.v))
    out, lse = executor.execute(q, k, v, plan.to(device), scale=case.scale)
    return out.cpu(), lse.cpu()


def _check_method(device: torch.device, entry, dtype: torch.dtype, dim: int, share: int, lengths) -> None:
    method = methods.create(entry[0], **entry[1])
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


def _check_plan(device: torch.device, name: str, fields: dict, situation: str, length: int) -> None:
    """The sets that the device chooses are the CPU's. In fp32, where both compute the same scores up to rounding."""
    method = methods.create(name, **fields)
    case = make_case(situation, length=length, heads=4, groups=2, dim=64)
    expected = method.plan(case.q, case.k, scale=case.scale, extent=case.extent, layer=0)
    with nullcontext() if device.type == "cuda" else triton_on_cpu():
        found = method.plan(case.q.to(device), case.k.to(device), scale=case.scale, extent=case.extent, layer=0)
    for field in ("block_indptr", "block_indices", "column_indptr", "column_indices"):
        one, other = getattr(expected, field), getattr(found, field).cpu()
        assert torch.equal(one, other), f"{field} differ"
