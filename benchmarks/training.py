"""A step of training in one attention layer, forward and backward, beside torch's attention and our own dense kernel.

    python benchmarks/training.py [--sections dense,sparse,memory] [--rounds N] [--quick] [--out FILE]

``dense`` runs every causal pair by torch's scaled_dot_product_attention and by our kernel; ``sparse`` runs blocks by
chance at 10% density and the same kernel dense. Contenders run in turns on the same fresh inputs, medians of the
rounds after one that does not count; forward and backward are timed as one. ``memory`` is what a step adds to the
process at its peak, less the output, the gradients and the LSE, at 32K with 32 heads, in a process of its own. Rows are
JSON; ``--out`` also writes them with the machine into a file.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from machines import machine
from timing import ROUNDS, Series, alternate, write
from torch import Tensor

from gossamer import AttentionCall, Extent, SparsePlan, backends

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Heads, key/value heads, head dimension. Beside torch without grouped heads, which its fast kernel lacks on CPUs.
SHAPES = {"dense": ((4, 4, 128), (4, 4, 64)), "sparse": ((4, 4, 128), (4, 1, 128))}
DENSITY, BLOCK = 0.1, 64
MEMORY = (32768, 32, 8, 128)  # tokens, and the same
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def inputs(dtype: torch.dtype, length: int, shape: tuple[int, int, int], seed: int) -> Inputs:
    """q, k, v, which need gradients, and what reaches the output."""
    heads, groups, dim = shape
    generator = torch.Generator().manual_seed(seed)
    q, k, v, reaching = (
        torch.randn(1, n, length, dim, generator=generator).to(dtype) for n in (heads, groups, groups, heads)
    )
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), reaching


def step(attend: Callable[[Tensor, Tensor, Tensor], Tensor], given: Inputs) -> None:
    q, k, v, reaching = given
    torch.autograd.grad(attend(q, k, v), (q, k, v), reaching)


def by_torch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def by_plan(plan: SparsePlan, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return backends.attend(AttentionCall(q, k, v), plan)[0]


def dense_plan(shape: tuple[int, int, int], length: int) -> SparsePlan:
    return SparsePlan.dense(shape[1], length, length, Extent.full(1, length, length))


def sparse_plan(shape: tuple[int, int, int], length: int) -> SparsePlan:
    blocks = length // BLOCK
    chosen = torch.rand(1, shape[1], blocks, blocks, generator=torch.Generator().manual_seed(0)) < DENSITY
    chosen = (chosen | torch.eye(blocks, dtype=torch.bool)).tril()
    return SparsePlan.from_block_mask(chosen, length, length, block_q=BLOCK, block_k=BLOCK)


def measured(
    contenders: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]],
    dtype: str,
    length: int,
    shape: tuple[int, int, int],
    rounds: int,
) -> tuple[dict[str, Any], dict[str, Series]]:
    steps = {name: partial(step, attend) for name, attend in contenders.items()}
    series = alternate(steps, partial(inputs, DTYPES[dtype], length, shape), rounds=rounds)
    row: dict[str, Any] = {"dtype": dtype, "length": length, "heads": shape[0], "groups": shape[1], "dim": shape[2]}
    row["executor"] = backends.name_of(torch.empty(1, 1, 1, shape[2], dtype=DTYPES[dtype]))
    return row | {name: one.to_dict() for name, one in series.items()}, series


def dense(length: int, rounds: int) -> Iterator[dict[str, Any]]:
    for dtype in DTYPES:
        for shape in SHAPES["dense"]:
            contenders = {"torch": by_torch, "dense": partial(by_plan, dense_plan(shape, length))}
            row, series = measured(contenders, dtype, length, shape, rounds)
            yield row | {"section": "dense", "ratio": round(series["torch"].median / series["dense"].median, 3)}


def sparse(length: int, rounds: int) -> Iterator[dict[str, Any]]:
    for dtype in DTYPES:
        for shape in SHAPES["sparse"]:
            plan = sparse_plan(shape, length)
            contenders = {"dense": partial(by_plan, dense_plan(shape, length)), "sparse": partial(by_plan, plan)}
            row, series = measured(contenders, dtype, length, shape, rounds)
            ratio = series["dense"].median / series["sparse"].median
            efficiency = {"ratio": round(ratio, 3), "efficiency": round(ratio * plan.density(), 3)}
            yield row | {"section": "sparse", "density": round(plan.density(), 4)} | efficiency


def memory(length: int, _rounds: int) -> Iterator[dict[str, Any]]:
    for dtype in DTYPES:
        command = [sys.executable, __file__, "--peak-of", dtype, "--length", str(length)]
        yield json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def peak(dtype: str, length: int) -> dict[str, Any]:
    """Of a step under a window, which costs little time and takes the same memory."""
    _, *shape = MEMORY
    sizes = (shape[0], shape[1], shape[2])
    given = inputs(DTYPES[dtype], length, sizes, 0)
    plan = SparsePlan(sizes[1], length, length, AttentionCall(*given[:3]).extent, sink=64, window=512)
    small = inputs(DTYPES[dtype], 256, sizes, 0)
    step(partial(by_plan, dense_plan(sizes, 256)), small)
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    q, k, v, reaching = given
    out = by_plan(plan, q, k, v)
    gradients = torch.autograd.grad(out, (q, k, v), reaching)
    own = sum(x.nbytes for x in (out, *gradients)) + 4 * out.shape[1] * length
    beside = _resident("VmHWM") - before - own
    row = {"section": "memory", "dtype": dtype, "length": length, "heads": sizes[0], "groups": sizes[1]}
    return row | {"dim": sizes[2], "own_mib": round(own / 2**20), "beside_mib": round(beside / 2**20)}


def _resident(name: str) -> int:
    """Bytes, by Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


SECTIONS = {"dense": (dense, 8192), "sparse": (sparse, 16384), "memory": (memory, MEMORY[0])}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--quick", action="store_true", help="1K, one round")
    parser.add_argument("--out", type=Path, help="a JSON file; without it rows are printed alone")
    parser.add_argument("--peak-of", choices=list(DTYPES), help=argparse.SUPPRESS)
    parser.add_argument("--length", type=int, default=MEMORY[0], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak_of is not None:
        print(json.dumps(peak(arguments.peak_of, arguments.length)))
        return 0
    report: list[dict[str, Any]] = []
    for name in arguments.sections.split(","):
        section, length = SECTIONS[name]
        for row in section(1024 if arguments.quick else length, 1 if arguments.quick else arguments.rounds):
            print(json.dumps(row), flush=True)
            report.append(row)
    if arguments.out is not None:
        header = {"machine": machine(), "date": date.today().isoformat(), "threads": torch.get_num_threads()}
        write(arguments.out, {**header, "rows": report})
    return 0


if __name__ == "__main__":
    sys.exit(main())
