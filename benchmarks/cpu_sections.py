"""What benchmarks/cpu.py measures, a function a section. Each yields rows of plain numbers."""

from __future__ import annotations

import functools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from timing import alternate
from torch import Tensor
from vllm_attention import PagedAttention
from workloads import DTYPES, Shape, bands, blocks_a_row, columns, random_blocks

from gossamer import SparsePlan
from gossamer.ops import cpu

Rows = Iterator[dict[str, object]]
DENSITIES = (None, 0.5, 0.2, 0.1, 0.05, 0.02)


def about(shape: Shape, plan: SparsePlan, name: str) -> dict[str, object]:
    return {
        "what": name,
        "length": shape.length,
        "dtype": shape.dtype,
        "dim": shape.dim,
        "heads": shape.heads,
        "groups": shape.groups,
        "block_k": plan.block_k,
        "density": round(plan.density(), 5),
        "isa": cpu.active_isa(DTYPES[shape.dtype]),
    }


def compare(
    shape: Shape,
    plans: dict[str, SparsePlan],
    peak: float | None,
    prepare: Callable[[Tensor, Tensor, Tensor], None] | None = None,
    **others: Callable[..., object],
) -> Rows:
    """SDPA, the plans and other contenders in turn; a row a plan, with what the others took.

    Args:
        prepare: is given each round's inputs before they are timed.
    """

    def inputs(seed: int) -> tuple[Tensor, Tensor, Tensor]:
        drawn = shape.draw(seed)
        if prepare is not None:
            prepare(*drawn)
        return drawn

    contenders = {"sdpa": shape.sdpa, **others, **{name: shape.run(plan) for name, plan in plans.items()}}
    series = alternate(contenders, inputs, warm_up=shape.length <= 32768)
    base = series["sdpa"].median
    dense = series["dense"].median if "dense" in series else None
    for name, plan in plans.items():
        seconds, density = series[name].median, plan.density()
        rate = density * shape.flops() / seconds
        yield {
            **about(shape, plan, name),
            "speedup": round(base / seconds, 3),
            "gflops": round(rate / 1e9, 1),
            "share_of_gemm": None if peak is None else round(rate / peak, 3),
            "efficiency": None if dense is None else round(dense / seconds * density, 3),
            **series[name].to_dict(),
            "sdpa": series["sdpa"].to_dict(),
            **{other: series[other].to_dict() for other in others},
        }


def gemm_peak(dtype: str, quick: bool) -> float:
    """FLOP/s of torch's matrix product, the best of several."""
    size = 1024 if quick else 4096
    a, b = (torch.randn(size, size).to(DTYPES[dtype]) for _ in range(2))
    best = math.inf
    for _ in range(4 if quick else 8):
        started = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def gemm(quick: bool) -> Rows:
    """The machine's matrix product and memory, for scale."""
    for dtype in DTYPES:
        yield {"what": "gemm", "dtype": dtype, "gflops": round(gemm_peak(dtype, quick) / 1e9, 1)}
    data = torch.ones((1 << 22) if quick else (1 << 28))
    data.sum()
    best = math.inf
    for _ in range(5):
        started = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - started)
    yield {"what": "read", "gb_per_s": round(data.numel() * 4 / best / 1e9, 1)}


def prefill(quick: bool) -> Rows:
    """Dense and random block plans by length, dtype and head dimension, against SDPA."""
    grid = [
        ("bf16", 128, (4096, 16384, 32768, 65536, 131072)),
        ("bf16", 64, (16384, 32768)),
        ("fp32", 128, (4096, 16384)),
    ]
    grid += [("fp32", 64, (16384,))]
    for dtype, dim, lengths in grid:
        peak = gemm_peak(dtype, quick)
        for length in (1024,) if quick else lengths:
            shape = Shape(length, 4, 1, dim, dtype)
            plans = {"dense": random_blocks(shape, None)}
            for density in DENSITIES[1:]:
                if length == 131072 and density > 0.1:
                    continue
                for block_k in (64, 128) if length < 131072 else (128,):
                    plans[f"{density:.0%} in 64x{block_k}"] = random_blocks(shape, density, block_k)
            yield from compare(shape, plans, peak)


def flex_block_mask(plan: SparsePlan) -> Any:
    """The plan's blocks for FlexAttention, in the form that it is fastest with: whole ones apart, a causal mask for the
    others."""
    from torch.nn.attention.flex_attention import BlockMask

    blocks = plan.block_mask()[0]
    first_query = torch.arange(plan.num_query_blocks)[:, None] * plan.block_q
    whole = (torch.arange(plan.num_key_blocks)[None] + 1) * plan.block_k <= first_query + 1

    def ordered(mask: Tensor) -> tuple[Tensor, Tensor]:
        indices = mask.int().argsort(dim=-1, descending=True, stable=True)
        return mask.sum(-1).to(torch.int32)[None], indices.to(torch.int32)[None]

    return BlockMask.from_kv_blocks(
        *ordered(blocks & ~whole),
        *ordered(blocks & whole),
        BLOCK_SIZE=(plan.block_q, plan.block_k),
        mask_mod=lambda b, h, q, k: k <= q,
        seq_lengths=(plan.query_len, plan.key_len),
    )


def flex(quick: bool) -> Rows:
    """FlexAttention, compiled, with the same blocks."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    for length in (1024,) if quick else (16384, 32768):
        for block_k in (64, 128):
            shape = Shape(length, 4, 1, 128, "bf16")
            plan = random_blocks(shape, 0.1, block_k)
            run = functools.partial(compiled, block_mask=flex_block_mask(plan), scale=shape.dim**-0.5, enable_gqa=True)
            q, k, v = shape.draw(0)
            expected, _ = cpu.execute(q, k, v, plan, scale=shape.dim**-0.5)
            torch.testing.assert_close(run(q, k, v), expected, atol=3e-2, rtol=3e-2)
            for row in compare(shape, {f"10% in 64x{block_k}": plan}, None, flex=run):
                theirs: Any = row["flex"]
                row["speedup_over_flex"] = round(theirs["median_s"] / cast(float, row["median_s"]), 3)
                yield row


def parts(quick: bool) -> Rows:
    """Columns, bands and their union, and what a pair costs in them next to a pair in blocks."""
    for dtype in DTYPES:
        shape = Shape(2048 if quick else 32768, 4, 1, 128, dtype)
        plans = {
            "16 blocks a row": blocks_a_row(shape, 16),
            "1000 columns": columns(shape, 1000),
            "sink 128, window 4096": bands(shape, 128, 4096),
            "64 blocks a row": blocks_a_row(shape, 64),
            "1000 columns, window 4096": columns(shape, 1000, sink=128, window=4096),
        }
        rows = list(compare(shape, plans, None))
        cost = {row["what"]: cast(float, row["median_s"]) / cast(float, row["density"]) for row in rows}
        for row in rows:
            row["pair_cost_over_blocks"] = round(cost[row["what"]] / cost["16 blocks a row"], 3)
            yield row


@contextmanager
def forced(isa: str) -> Iterator[None]:
    before = os.environ.get(cpu.ENVIRONMENT)
    os.environ[cpu.ENVIRONMENT] = isa
    try:
        yield
    finally:
        del os.environ[cpu.ENVIRONMENT]
        if before is not None:
            os.environ[cpu.ENVIRONMENT] = before


def instruction_sets(quick: bool) -> Rows:
    """Each instruction set forced, against SDPA as it is; AVX2 also against an SDPA that is held to AVX2."""
    length = 1024 if quick else 8192
    for isa in cpu.supported_isas():
        if isa == "amx_emulated":
            continue
        for dtype in ("bf16", "fp32"):
            with forced(isa):
                if dtype == "fp32" and cpu.active_isa(torch.float32) != isa:
                    continue
                shape = Shape(length, 4, 1, 128, dtype)
                yield from compare(shape, {"dense": random_blocks(shape, None), "10%": random_blocks(shape, 0.1)}, None)
    if "avx2" in cpu.supported_isas() and torch.backends.cpu.get_cpu_capability() != "AVX2":
        limits = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
        yield from in_child("held_to_avx2", quick, {**limits, cpu.ENVIRONMENT: "avx2"})


def held_to_avx2(quick: bool) -> Rows:
    """Both contenders on AVX2. Runs in a process of its own."""
    assert torch.backends.cpu.get_cpu_capability() == "AVX2"
    for dtype in ("bf16", "fp32"):
        shape = Shape(1024 if quick else 8192, 4, 1, 128, dtype)
        for row in compare(shape, {"dense": random_blocks(shape, None)}, None):
            yield {**row, "what": "dense, all held to AVX2"}


def decode(quick: bool) -> Rows:
    """One query token against a cache, dense and with a tenth of the blocks; gigabytes of cache read a second."""
    for dtype in DTYPES:
        for length in (2048,) if quick else (4096, 16384, 32768, 131072):
            shape = Shape(length, 32, 8, 128, dtype, queries=1)
            plans = {"dense": random_blocks(shape, None), "10%": random_blocks(shape, 0.1)}
            for row in compare(shape, plans, None):
                size = 2 * shape.groups * length * shape.dim * DTYPES[dtype].itemsize
                row["gb_per_s"] = round(cast(float, row["density"]) * size / cast(float, row["median_s"]) / 1e9, 1)
                yield {**row, "what": f"decode, {row['what']}"}


def growth(quick: bool) -> Rows:
    """Cost against length at fixed budgets: 64 blocks a row and 1000 columns."""
    lengths = (1024, 2048, 4096) if quick else (16384, 32768, 65536, 131072)
    seconds = []
    for length in lengths:
        shape = Shape(length, 4, 1, 128, "bf16")
        blocks = blocks_a_row(shape, 64)
        extra = columns(shape, 1000)
        plan = SparsePlan(
            1,
            length,
            length,
            shape.extent(),
            block_indptr=blocks.block_indptr,
            block_indices=blocks.block_indices,
            column_group=extra.column_group,
            column_indptr=extra.column_indptr,
            column_indices=extra.column_indices,
        )
        series = alternate({"plan": shape.run(plan)}, shape.draw)["plan"]
        seconds.append(series.median)
        yield {**about(shape, plan, "64 blocks a row, 1000 columns"), **series.to_dict()}
    slopes = [math.log(b / a) / math.log(2) for a, b in pairwise(seconds)]
    overall = math.log(seconds[-1] / seconds[0]) / math.log(lengths[-1] / lengths[0])
    yield {"what": "exponent", "exponent": round(overall, 3), "by_doubling": [round(s, 3) for s in slopes]}


def memory(quick: bool) -> Rows:
    """Peak memory of one call beyond its inputs and output, in a process of its own."""
    yield from in_child("peak_memory", quick, {})


def peak_memory(quick: bool) -> Rows:
    import resource

    shape = Shape(4096 if quick else 131072, 32, 8, 128, "bf16")
    # Rows of zeros, written: what is measured is memory, not numbers.
    q, k, v = (
        torch.zeros(1, n, shape.length, shape.dim, dtype=torch.bfloat16)
        for n in (shape.heads, shape.groups, shape.groups)
    )
    plan = random_blocks(shape, 0.02, 128)
    small = Shape(256, 32, 8, 128, "bf16")
    small.run(random_blocks(small, None))(*small.draw(0))
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    out, lse = cpu.execute(q, k, v, plan, scale=1.0)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    returned = out.numel() * 2 + lse.numel() * 4
    packed = (k.numel() + v.numel()) * 2
    yield {
        **about(shape, plan, "peak memory"),
        "extra_bytes": after - before - returned,
        "packed_bytes": packed,
        "beyond_packed_mib": round((after - before - returned - packed) / 2**20, 1),
    }


def vllm(quick: bool) -> Rows:
    """vLLM's CPU attention, dense: prompts in one call, and decoding; alone, and with its writing to the cache."""
    prompts = [
        Shape(length, 4, 1, dim, dtype)
        for dtype in DTYPES
        for dim in (128, 64)
        for length in ((1024,) if quick else (4096, 16384, 32768))
    ]
    decoding = [
        Shape(length, 32, 8, 128, dtype, queries=1)
        for dtype in DTYPES
        for length in ((2048,) if quick else (4096, 16384, 32768))
    ]
    for shape in (*prompts, *decoding):
        yield from against_vllm(shape)


def against_vllm(shape: Shape) -> Rows:
    """A dense plan and one of a tenth against vLLM's dense attention, which is verified first."""
    theirs = PagedAttention(shape)
    theirs.verify()
    plans = {"dense": random_blocks(shape, None), "10%": random_blocks(shape, 0.1, 128)}
    others = {"vllm": theirs.attend, "vllm_with_cache_write": theirs.write_and_attend}
    for row in compare(shape, plans, None, theirs.prepare, **others):
        seconds, taken = cast(float, row["median_s"]), cast(dict[str, Any], row)
        for name in others:
            row[f"speedup_over_{name}"] = round(taken[name]["median_s"] / seconds, 3)
        what = row["what"] if shape.queries is None else f"decode, {row['what']}"
        yield {**row, "what": what, "vllm_isa": theirs.isa}


def in_child(section: str, quick: bool, environment: dict[str, str]) -> Rows:
    """A section of this module in a new process."""
    code = (
        "import json, sys, torch; sys.path.insert(0, sys.argv[1]); torch.set_num_threads(int(sys.argv[2])); "
        "import cpu_sections; rows = getattr(cpu_sections, sys.argv[3])(sys.argv[4] == '1'); "
        "[print(json.dumps(row)) for row in rows]"
    )
    arguments = [str(Path(__file__).parent), str(torch.get_num_threads()), section, "1" if quick else "0"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    for line in done.stdout.splitlines():
        yield json.loads(line)


SECTIONS: dict[str, Callable[[bool], Rows]] = {
    "gemm": gemm,
    "prefill": prefill,
    "flex": flex,
    "parts": parts,
    "instruction_sets": instruction_sets,
    "decode": decode,
    "growth": growth,
    "memory": memory,
    "vllm": vllm,
}
