"""A step of training in one attention layer, forward and backward, for benchmarks/gpu.py."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from gpu_report import Row
from gpu_setting import Cell, Contender, Setting, flex, full_plan, on_triton, torch_contenders
from gpu_timing import Series, alternate
from torch import Tensor
from workloads import random_blocks_of

from gossamer import AttentionCall, SparsePlan, backends

DENSITIES = (0.1,)


def training(setting: Setting) -> Iterator[Cell]:
    """Forward and backward of one layer: our kernels dense and on random blocks, torch's attention, FlexAttention."""
    for length in setting.lengths(32768):
        block = 64 if setting.interpreted else 128
        yield Cell(f"{length} in {block}x{block}", functools.partial(_training, setting, length, block))


def _training(setting: Setting, length: int, block: int) -> Iterator[Row]:
    plans, densities = _plans(setting, length, block)
    contenders = {name: _step(_ours(plan)) for name, plan in plans.items()}
    contenders |= {name: _step(contender) for name, contender in torch_contenders(setting).items()}
    if not setting.interpreted:  # uncompiled it holds every pair
        contenders["flex 10%"] = _step(flex(setting, plans["10%"], setting.shape[0]))
    with on_triton(setting):
        series = alternate(
            setting.timer,
            contenders,
            _drawn(setting, length),
            **setting.rounds(),
            budget=setting.budget,
            length=length,
            scope=f"training {block}",
        )
    yield from _rows(series, densities, length)


@torch.inference_mode(False)
def _plans(setting: Setting, length: int, block: int) -> tuple[dict[str, SparsePlan], dict[str, float]]:
    """By name, on the device, and their densities. Autograd keeps no tensors that were made in inference mode."""
    plans = {"dense": full_plan(setting, length)} | {
        f"{share:.0%}": random_blocks_of(setting.shape[1], length, share, block_q=block, block_k=block)
        for share in DENSITIES
    }
    densities = {name: plan.to("cpu").density() for name, plan in plans.items()}
    return {name: plan.to(setting.device) for name, plan in plans.items()}, densities


def _rows(series: dict[str, Series], densities: dict[str, float], length: int) -> Iterator[Row]:
    rivals = {name: one.median for name, one in series.items() if name.startswith("sdpa") and one.median}
    best, base = min(rivals.values(), default=None), series["dense"].median
    for name, density in densities.items():
        own, peer = series[name].median, series.get(f"flex {name}")
        theirs = None if peer is None else peer.median
        yield {
            "what": f"step, {name}",
            "length": length,
            "density": round(density, 5),
            "efficiency": round(base / own * density, 3) if own and base else None,
            "speedup_over_sdpa": round(best / own, 3) if own and best else None,
            "speedup_over_flex": round(theirs / own, 3) if own and theirs else None,
            **series[name].to_dict(),
            **({"flex": peer.to_dict()} if peer is not None else {}),
            **({"rivals": {n: s.to_dict() for n, s in series.items() if n in rivals}} if name == "dense" else {}),
        }


def _drawn(setting: Setting, length: int) -> Callable[[int], AttentionCall]:
    """Inputs that need a gradient, whatever mode the caller is in."""
    draw = setting.draw(length)

    def inputs(seed: int) -> AttentionCall:
        with torch.inference_mode(False):
            call = draw(seed)
            return replace(call, **{name: getattr(call, name).requires_grad_() for name in "qkv"})

    return inputs


def _step(attend: Contender) -> Contender:
    """Forward and backward; what reaches the output is the queries, which have its shape."""

    def step(call: AttentionCall) -> object:
        with torch.inference_mode(False), torch.enable_grad():
            out = attend(call)
            assert isinstance(out, Tensor)
            return torch.autograd.grad(out, (call.q, call.k, call.values), call.q.detach())

    return step


def _ours(plan: SparsePlan) -> Contender:
    return lambda call: backends.attend(call, plan)[0]
