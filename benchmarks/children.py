"""Sections that need a process of their own: other settings of libraries, and memory."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from comparison import Request, Rows, about
from vllm_attention import Unavailable
from workloads import Shape, columns, random_blocks, strips, vertical_slash

from gossamer import AttentionCall, SparsePlan
from gossamer.backends import cpu

MEMORY_PLANS: dict[str, Callable[[Shape], SparsePlan]] = {
    "2% in 64x128": lambda shape: random_blocks(shape, 0.02, 128),
    "1000 columns": lambda shape: columns(shape, 1000),
    "1000 columns of each 1024 queries": lambda shape: strips(shape, 1000),
    "1000 columns, 32 slashes of 64": lambda shape: vertical_slash(shape, 1000, 32),
}


def in_child(module: str, section: str, request: Request, environment: dict[str, str], *more: Any) -> Rows:
    """A section of a module in a new process."""
    code = (
        "import importlib, json, sys, torch; sys.path.insert(0, sys.argv[1]); torch.set_num_threads(int(sys.argv[2])); "
        "from comparison import Request; section = getattr(importlib.import_module(sys.argv[3]), sys.argv[4]); "
        "rows = section(Request(sys.argv[5] == '1'), *sys.argv[6:]); "
        "[print(json.dumps(row)) for row in rows]"
    )
    quick = "1" if request.quick else "0"
    arguments = [str(Path(__file__).parent), str(torch.get_num_threads()), module, section, quick, *map(str, more)]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    for line in done.stdout.splitlines():
        yield json.loads(line)


def memory(request: Request) -> Rows:
    """Peak memory of one call beyond its inputs and output, in a process of its own for each kind of plan."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        raise Unavailable("this system does not tell a process the peak of its memory since a moment")
    for kind in MEMORY_PLANS:
        if request.lacks(what=f"peak memory, {kind}"):
            yield from in_child("children", "peak_memory", request, {}, kind)


def peak_memory(request: Request, kind: str) -> Rows:
    """From a process that has freed what it had for making the plan, and has threads and libraries ready."""
    shape = Shape(4096 if request.quick else 131072, 32, 8, 128, "bf16")
    # Written, not drawn: what is measured is memory, not numbers.
    q, k, v = (
        torch.empty(1, n, shape.length, shape.dim, dtype=torch.bfloat16).fill_(0.5)
        for n in (shape.heads, shape.groups, shape.groups)
    )
    plan = MEMORY_PLANS[kind](shape)
    described = about(shape, plan, f"peak memory, {kind}")
    small = Shape(64, 2, 1, 128, "bf16")
    small.run(random_blocks(small, None))(small.draw(0))
    call = AttentionCall(q, k, v)
    give_back_freed_memory()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    out, lse = cpu.attend(call, plan)
    peak = resident("VmHWM")
    returned = out.numel() * 2 + lse.numel() * 4
    packed = (k.numel() + v.numel()) * 2
    yield {
        **described,
        "extra_bytes": peak - before - returned,
        "packed_bytes": packed,
        "plan_bytes": plan.memory_bytes(),
        "beyond_packed_mib": round((peak - before - returned - packed) / 2**20, 1),
    }


def give_back_freed_memory() -> None:
    """Without this a call would use pages that are resident already, and seem to need less than it does."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim is not None:
        trim(0)


def resident(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
