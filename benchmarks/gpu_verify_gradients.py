"""Are the gradients right on this device? Against the definition in fp64, at small sizes and at a timed one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from gpu_setting import Setting
from gpu_timing import Budget, Timer
from gpu_verify_sizes import plan_of_head
from torch import Tensor
from workloads import random_blocks_of

from gossamer import AttentionCall, Extent, SparsePlan
from gossamer.backends import torch as definition
from gossamer.backends import triton
from gossamer.backends.torch.backward import Gradients
from gossamer.testing import random_plan

DTYPES = (torch.bfloat16, torch.float32, torch.float16)
# Of a gradient's norm: fp32 sums; weights, slopes, outputs and results that are rounded to 16 bits.
MOST_ERROR = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}


def gradient_checks(device: torch.device, whole: bool, small: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """By name: plans by chance in turns of dtypes and head dimensions, repeated runs, and one at a timed length."""
    length = 100 if small else 1000
    for seed in range(6 if small or not whole else 18):
        yield f"gradients of random plan {seed}", functools.partial(check_random, device, seed, length)
    yield "gradients of two runs are the same", functools.partial(check_repeatable, device, length)
    for timed in Setting(device, small, Timer(torch.device("cpu")), Budget(0)).lengths(32768):
        for name in ("dense", "10%"):
            check = functools.partial(check_timed, device, small, name, timed)
            yield f"gradients of {name} at {timed} tokens", check


def random_call(seed: int, length: int) -> tuple[AttentionCall, SparsePlan]:
    """Parts, orders, padding, means, sinks and soft-cap by chance."""
    means = seed % 6 == 4
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
        limit=length // 5 if seed % 5 == 4 else None,
        causal=seed % 7 != 6,
        pruned_mean=means,
    )
    dim, generator = 16 if length < 200 else [64, 128, 80][seed % 3], torch.Generator().manual_seed(seed)
    q = torch.randn(2, 4, length - 3, dim, generator=generator)
    k, v = (torch.randn(2, 2, length, dim, generator=generator) for _ in range(2))
    more: dict[str, Any] = {"softcap": 5.0 if seed % 3 == 1 else None}
    more["sinks"] = torch.randn(4, generator=generator) if seed % 4 == 1 else None
    dtype = DTYPES[seed % 3]
    return AttentionCall(q.to(dtype), k.to(dtype), v.to(dtype), plan.extent, **more), plan


def reached(call: AttentionCall, plan: SparsePlan, device: torch.device) -> tuple[Gradients, Tensor, Tensor]:
    """Gradients on the device, and what reaches output and LSE."""
    generator = torch.Generator().manual_seed(1)
    shape = (*call.q.shape[:3], call.values.shape[-1])
    grad_out = torch.randn(shape, generator=generator).to(call.q.dtype)
    grad_lse = torch.randn(shape[:3], generator=generator)
    fields = {name: getattr(call, name) for name in ("q", "k", "v", "sinks")}
    there = replace(call, **{name: None if x is None else x.to(device) for name, x in fields.items()})
    plan = plan.to(device)
    out, lse = triton.attend(there, plan)
    return triton.attend_backward(there, plan, out, lse, grad_out.to(device), grad_lse.to(device)), grad_out, grad_lse


def compare(call: AttentionCall, plan: SparsePlan, found: Gradients, grad_out: Tensor, grad_lse: Tensor | None) -> None:
    """Against the definition in fp64, where the call's tensors lie."""
    fields = {name: getattr(call, name) for name in ("q", "k", "v", "sinks")}
    exact = replace(call, **{name: None if x is None else x.double() for name, x in fields.items()})
    out, lse = definition.attend(exact, plan)
    wide = None if grad_lse is None else grad_lse.double()
    expected = definition.attend_backward(exact, plan, out, lse, grad_out.double(), wide)
    most = MOST_ERROR[call.q.dtype]
    for name, own, right in zip(("q", "k", "v", "sinks"), found, expected, strict=False):
        if right is None:
            continue
        assert own is not None, f"no gradient of {name}"
        assert bool(own.isfinite().all()), f"the gradient of {name} has NaN or infinity"
        error = float((own.to(right.device).double() - right).norm()) / max(float(right.norm()), 1e-30)
        assert error <= most, f"the gradient of {name} has an error of {error:.1e} of its norm, over {most:.0e}"


def check_random(device: torch.device, seed: int, length: int) -> None:
    call, plan = random_call(seed, length)
    compare(call, plan, *reached(call, plan, device))


def check_repeatable(device: torch.device, length: int) -> None:
    call, plan = random_call(3, length)
    first, again = (reached(call, plan, device)[0] for _ in range(2))
    for name, one, other in zip("qkv", first, again, strict=False):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other)), f"gradients of {name} differ"


def check_timed(device: torch.device, small: bool, name: str, length: int) -> None:
    """The last key/value head and its query heads, of all that are timed."""
    setting = Setting(device, small, Timer(torch.device("cpu")), Budget(0))
    call, groups = setting.draw(length)(0), setting.shape[1]
    plan = SparsePlan.dense(groups, length, length, Extent.full(1, length, length))
    if name != "dense":
        block = 64 if setting.interpreted else 128
        plan = random_blocks_of(groups, length, 0.1, block_q=block, block_k=block)
    out, lse = triton.attend(call, plan.to(device))
    grad_out = call.q.roll(1, 2)
    found = triton.attend_backward(call, plan.to(device), out, lse, grad_out)
    heads = slice(call.heads - call.share, call.heads)
    own = AttentionCall(call.q[:, heads], call.k[:, -1:], call.values[:, -1:])
    some = found._replace(
        q=None if found.q is None else found.q[:, heads],
        k=None if found.k is None else found.k[:, -1:],
        v=None if found.v is None else found.v[:, -1:],
    )
    compare(own, plan_of_head(plan, groups - 1).to(device), some, grad_out[:, heads], None)
