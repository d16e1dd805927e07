"""Speed of the C++ executor against torch's SDPA: one process, contenders alternating, fresh inputs each round.

    python benchmarks/cpu.py [--quick] [--threads N] [--out FILE]

First both contenders are verified, SDPA and our kernel, against fp64; nothing is timed while one of them is wrong.
Every sample is taken twice at once: wall-clock seconds, and seconds of CPU time of the whole process divided by the
number of threads. On an idle machine they agree. Beside other programs (the report says how much of the machine they
took) the wall clock says little, and CPU time with ``--threads 1`` still tells what the kernels cost; with more
threads CPU time counts their waiting, and short samples of it are only exact to a tick of the scheduler.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer import Extent, SparsePlan
from gossamer.ops import cpu
from gossamer.testing import Case, assert_accurate

RESULTS = Path(__file__).parent / "results" / "cpu.json"
ROUNDS = 5
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
DENSITIES = (None, 0.5, 0.25, 0.1, 0.05)  # None: the dense plan


@dataclass(frozen=True)
class Shape:
    length: int
    heads: int
    groups: int
    dim: int
    dtype: str


def inputs(shape: Shape, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = (shape.heads, shape.groups, shape.groups)
    q, k, v = (torch.randn(1, n, shape.length, shape.dim, generator=generator) for n in sizes)
    dtype = DTYPES[shape.dtype]
    return q.to(dtype), k.to(dtype), v.to(dtype)


def make_plan(shape: Shape, density: float | None, block_k: int, seed: int) -> SparsePlan:
    """Random blocks with the diagonal, one plan per key/value head, at a share of the causal block pairs."""
    length, extent = shape.length, Extent.full(1, shape.length, shape.length)
    if density is None:
        return SparsePlan.dense(shape.groups, length, length, extent)
    rows, columns = -(-length // 64), -(-length // block_k)
    generator = torch.Generator().manual_seed(seed)
    first, last = torch.arange(rows)[:, None] * 64, (torch.arange(columns)[None] + 1) * block_k - 1
    diagonal = (last - block_k + 1 <= first + 63) & (last >= first)
    below = last < first
    wanted = density * float(below.sum() + diagonal.sum()) - float(diagonal.sum())
    share = max(0.0, wanted / max(1, int(below.sum())))
    chosen = torch.rand(1, shape.groups, rows, columns, generator=generator) < share
    return SparsePlan.from_block_mask(chosen & below | diagonal, length, length, block_k=block_k)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def verify() -> None:
    """Raises AssertionError if a contender is wrong."""
    for dtype in DTYPES:
        for dim in (64, 128):
            shape = Shape(1024, 4, 1, dim, dtype)
            q, k, v = inputs(shape, seed=0)
            for density, block_k in ((None, 64), (0.25, 64), (0.25, 128)):
                plan = make_plan(shape, density, block_k, seed=1)
                case = Case(q, k, v, plan.extent, dim**-0.5)
                out, lse = cpu.execute(q, k, v, plan, scale=case.scale)
                assert_accurate(case, plan, out, lse)
                if density is None:
                    torch.testing.assert_close(sdpa(q, k, v), out, atol=3e-2, rtol=3e-2)


def sample(call: Callable[[], object], threads: int) -> tuple[float, float]:
    wall, used = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, (time.process_time() - used) / threads


def measure(shape: Shape, block_ks: tuple[int, ...], threads: int, rounds: int) -> list[dict]:
    """SDPA, then every plan, in turn; as often as there are rounds."""
    plans = [
        (density, block_k, make_plan(shape, density, block_k, seed=round(1000 * (density or 0)) + block_k))
        for density in DENSITIES
        for block_k in (block_ks if density is not None else block_ks[:1])
    ]
    scale = shape.dim**-0.5
    samples: list[list[tuple[float, float]]] = [[] for _ in range(len(plans) + 1)]
    warm_up = shape.length <= 4096  # longer calls need none
    for n in range(rounds + warm_up):
        q, k, v = inputs(shape, seed=n)
        calls: list[Callable[[], object]] = [lambda q=q, k=k, v=v: sdpa(q, k, v)]
        calls += [lambda q=q, k=k, v=v, p=plan: cpu.execute(q, k, v, p, scale=scale) for _, _, plan in plans]
        for series, call in zip(samples, calls, strict=True):
            taken = sample(call, threads)
            if n or not warm_up:
                series.append(taken)
    rows = []
    for (density, block_k, plan), series in zip(plans, samples[1:], strict=True):
        row = {
            **shape.__dict__,
            "block_q": plan.block_q,
            "block_k": block_k,
            "nominal_density": density,
            "density": round(plan.density(), 4),
            "isa": cpu.active_isa(DTYPES[shape.dtype]),
        }
        for index, clock in enumerate(("wall", "cpu")):
            base = statistics.median(s[index] for s in samples[0])
            ours = statistics.median(s[index] for s in series)
            row[f"speedup_{clock}"] = round(base / ours, 3)
            row[f"gflops_{clock}"] = round(2 * plan.density() * pair_flops(shape) / ours / 1e9, 1)
            row[f"sdpa_{clock}_s"] = [round(s[index], 6) for s in samples[0]]
            row[f"gossamer_{clock}_s"] = [round(s[index], 6) for s in series]
        rows.append(row)
    dense = next(r for r in rows if r["nominal_density"] is None)
    for row in rows:  # its speed-up over the same kernel run dense, times density: 1 is ideal
        row["efficiency_cpu"] = round(row["speedup_cpu"] / dense["speedup_cpu"] * row["density"], 3)
    return rows


def pair_flops(shape: Shape) -> float:
    """Flops of one of the two products over all causal pairs."""
    return 2.0 * shape.heads * shape.dim * shape.length * (shape.length + 1) / 2


def busy_seconds() -> float | None:
    """CPU seconds that all programs of this machine have used, where that is known."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    user, nice, system = (int(x) for x in stat.read_text().split()[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


def machine() -> dict:
    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "isas": cpu.supported_isas(),
        "torch": torch.__version__,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
    }


def write(path: Path, report: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(report, indent=1) + "\n")
    temporary.replace(path)


def print_rows(rows: list[dict]) -> None:
    for r in rows:
        name = "dense" if r["nominal_density"] is None else f"{r['density']:.1%}"
        print(
            f"{r['dtype']:>5} {r['length']:>6} {r['dim']:>4} {r['isa']:>12}  64x{r['block_k']:<4} {name:>6}"
            f" {r['speedup_wall']:>8.2f}x {r['speedup_cpu']:>8.2f}x {r['gflops_cpu']:>8.0f}"
            f" {r['efficiency_cpu']:>7.2f}",
            flush=True,
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="4K tokens only; writes nothing unless --out is given")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help=f"default: {RESULTS.name} beside this script")
    arguments = parser.parse_args()
    if not cpu.is_available():
        print(cpu.why_unavailable(), file=sys.stderr)
        return 1
    torch.set_num_threads(arguments.threads)
    try:
        verify()
    except AssertionError as error:
        print(f"nothing timed: {error}", file=sys.stderr)
        return 1
    lengths = {"bf16": (4096, 16384, 32768), "fp32": (4096, 16384)}
    if arguments.quick:
        lengths = {"bf16": (4096,), "fp32": (4096,)}
    started, used, busy = time.perf_counter(), time.process_time(), busy_seconds()
    report = {"machine": machine(), "threads": arguments.threads, "rounds": ROUNDS, "rows": []}
    print(
        f"speed-up over torch SDPA (causal, same dtype) on {arguments.threads} thread(s) by wall clock and by CPU time;"
    )
    print("GFLOP/s of all threads on the plan's pairs, by CPU time; 4 query heads, 1 key/value head")
    print("dtype length  dim          isa  blocks  density     wall       cpu   GFLOP/s  effic.")
    for dtype, of_dtype in lengths.items():
        for length in of_dtype:
            for dim in (128, 64):
                rows = measure(Shape(length, 4, 1, dim, dtype), (64, 128), arguments.threads, ROUNDS)
                print_rows(rows)
                report["rows"] += rows
    seconds, busy_now = time.perf_counter() - started, busy_seconds()
    report["seconds"] = round(seconds, 1)
    if busy is not None and busy_now is not None:
        others = (busy_now - busy - (time.process_time() - used)) / seconds / (os.cpu_count() or 1)
        report["machine"]["used_by_others"] = round(others, 3)
        print(f"other programs used {others:.0%} of the machine")
    out = arguments.out or (None if arguments.quick else RESULTS)
    if out is not None:
        write(out, report)
        print(f"wrote {out.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
