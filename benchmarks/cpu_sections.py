"""What benchmarks/cpu.py measures, a function a section. Each yields rows of plain numbers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from children import in_child, memory
from comparison import Request, Rows, about, compare, gemm_rate, register_rate
from timing import alternate, environment
from torch import Tensor
from vllm_attention import PagedAttention
from workloads import (
    DTYPES,
    Shape,
    bands,
    blocks_a_row,
    columns,
    permuted_blocks,
    random_blocks,
    united,
    vertical_slash,
)

from gossamer import AttentionCall, SparsePlan
from gossamer.backends import cpu

DENSITIES = (0.5, 0.2, 0.1, 0.05, 0.02)
LENGTHS = (4096, 16384, 32768, 65536, 131072)
HELD = ", all held to AVX2"
KINDS = [(dtype, dim) for dtype in DTYPES for dim in (128, 64)]


def gemm(request: Request) -> Rows:
    """The machine's arithmetic on registers, matrix product and memory, for scale."""
    if register_rate("portable", torch.get_num_threads()) is None:
        print("no C++ compiler measures arithmetic on registers: torch's product is the scale")
    for isa in cpu.supported_isas():
        rate = register_rate(isa, torch.get_num_threads())
        if rate is not None and request.lacks(what="peak", isa=isa):
            yield {"what": "peak", "isa": isa, "gflops": round(rate / 1e9, 1)}
    for dtype in DTYPES:
        if request.lacks(what="gemm", dtype=dtype):
            yield {"what": "gemm", "dtype": dtype, "gflops": round(gemm_rate(dtype, request.quick) / 1e9, 1)}
    if not request.lacks(what="read"):
        return
    data = torch.ones((1 << 22) if request.quick else (1 << 28))
    data.sum()
    best = math.inf
    for _ in range(5):
        started = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - started)
    yield {"what": "read", "gb_per_s": round(data.numel() * 4 / best / 1e9, 1)}


def dense(shape: Shape) -> dict[str, Callable[[], SparsePlan]]:
    return {"dense": partial(random_blocks, shape, None)}


def structured(shape: Shape) -> dict[str, Callable[[], SparsePlan]]:
    """What methods choose besides blocks."""
    return {
        "1000 columns, 32 slashes of 64": partial(vertical_slash, shape, 1000, 32),
        "sink 128, window 4096": partial(bands, shape, 128, 4096),
        "0.1, keys permuted inside 256": partial(permuted_blocks, shape, 0.1),
        "0.1, means of the rest": lambda: random_blocks(shape, 0.1).with_attributes(pruned_mean=True),
    }


def prefill(request: Request) -> Rows:
    """Dense, random blocks, columns with slashes, and bands, by length, dtype and head dimension, against SDPA."""
    for dtype, dim in KINDS:
        for length in (1024,) if request.quick else LENGTHS:
            shape = Shape(length, 4, 1, dim, dtype)
            plans = dense(shape)
            for density in DENSITIES:
                if length == 131072 and density > 0.1:
                    continue
                for block_k in (64, 128) if length <= 32768 else (128,):
                    plans[f"{density:.0%} in 64x{block_k}"] = partial(random_blocks, shape, density, block_k)
            yield from compare(request, shape, plans | structured(shape))


def flex_block_mask(plan: SparsePlan) -> Any:
    """The plan's blocks for FlexAttention, in the form that it is fastest with: whole ones apart, a causal mask for the
    others."""
    from torch.nn.attention.flex_attention import BlockMask

    blocks = plan.block_mask()[0]
    first_query = plan.grid.queries[0, :, :1]
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


def flex(request: Request) -> Rows:
    """FlexAttention, compiled, with the same blocks."""
    for dtype, dim in KINDS:
        for length in (1024,) if request.quick else (4096, 16384, 32768):
            # Beyond 16K each dense call takes ten seconds and more.
            densities = (None, *DENSITIES) if length <= 16384 else (0.1, 0.02)
            yield from against_flex(request, Shape(length, 4, 1, dim, dtype), densities, 128)
            if (dtype, dim) == ("bf16", 128):
                yield from against_flex(request, Shape(length, 4, 1, dim, dtype), (0.1,), 64)
    if not request.quick:
        yield from against_flex(request, Shape(65536, 4, 1, 128, "bf16"), (0.1, 0.02), 128)


def against_flex(request: Request, shape: Shape, densities: tuple[float | None, ...], block_k: int) -> Rows:
    """A row a density. FlexAttention is verified first; its masks are made beforehand, as our plans are."""
    from torch.nn.attention.flex_attention import flex_attention

    names = {f"{1 if density is None else density:.0%} in 64x{block_k}": density for density in densities}
    wanted = request.lacks_of(shape, *names)
    if not wanted:
        return
    compiled = torch.compile(flex_attention, dynamic=False)
    plans, others = {}, {}
    for name in wanted:
        density = names[name]
        # One of all blocks, so that both sides have blocks of one size.
        plan = random_blocks(shape, 1.0 if density is None else density, block_k)
        plans[name] = lambda plan=plan: plan
        run = partial(compiled, block_mask=flex_block_mask(plan), scale=shape.dim**-0.5, enable_gqa=True)
        others[f"flex {name}"] = attend = lambda call, run=run: run(call.q, call.k, call.v)
        call: AttentionCall = shape.draw(0)
        expected, _ = cpu.attend(call, plan)
        torch.testing.assert_close(attend(call), expected, atol=3e-2, rtol=3e-2)
    for row in compare(request, shape, plans, **others):
        theirs = {name: row.pop(name) for name in others}[f"flex {row['what']}"]
        yield row | {"flex": theirs, "speedup_over_flex": round(theirs["median_s"] / row["median_s"], 3)}


def parts(request: Request) -> Rows:
    """Columns, bands and their union, and what a pair costs in them next to a pair in blocks."""
    for dtype, dim in KINDS:
        shape = Shape(2048 if request.quick else 32768, 4, 1, dim, dtype)
        plans = {
            "16 blocks a row": partial(blocks_a_row, shape, 16),
            "1000 columns": partial(columns, shape, 1000),
            "sink 128, window 4096": partial(bands, shape, 128, 4096),
            "64 blocks a row": partial(blocks_a_row, shape, 64),
            "1000 columns, window 4096": partial(columns, shape, 1000, sink=128, window=4096),
        }
        if not request.lacks_of(shape, *plans):
            continue
        rows = list(compare(Request(request.quick), shape, plans))
        cost = {row["what"]: row["median_s"] / row["density"] for row in rows}
        for row in rows:
            row["pair_cost_over_blocks"] = round(cost[row["what"]] / cost["16 blocks a row"], 3)
            yield row


def instruction_sets(request: Request) -> Rows:
    """Each instruction set forced, against SDPA as it is."""
    for isa in cpu.supported_isas():
        if isa == "amx_emulated":
            continue
        for dtype in DTYPES:
            with environment(cpu.ENVIRONMENT, isa):
                if dtype == "fp32" and cpu.active_isa(torch.float32) != isa:
                    continue
                longer = [] if isa == "portable" else [(16384, 128)]
                for length, dim in [(1024, 128)] if request.quick else [(8192, 128), (8192, 64), *longer]:
                    shape = Shape(length, 4, 1, dim, dtype)
                    tenth = {"10%": partial(random_blocks, shape, 0.1)}
                    yield from compare(request, shape, dense(shape) | tenth | structured(shape))


def avx2(request: Request) -> Rows:
    """All contenders on AVX2, as on processors that have no more: in a process of its own where this one has."""
    if "avx2" not in cpu.supported_isas():
        return
    limits = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
    for dtype, dim in [(dtype, dim) for dtype in ("fp32", "bf16") for dim in (64, 128)]:
        for length in (1024,) if request.quick else (8192, 16384, 32768) if dtype == "fp32" else (8192, 16384):
            if request.lacks(what="dense" + HELD, length=length, dtype=dtype, dim=dim):
                environment_there = {**limits, cpu.ENVIRONMENT: "avx2"}
                yield from in_child("cpu_sections", "held_to_avx2", request, environment_there, length, dtype, dim)


def held_to_avx2(request: Request, length: str, dtype: str, dim: str) -> Rows:
    """A dense plan, and sparse ones of 32K tokens."""
    assert torch.backends.cpu.get_cpu_capability() == "AVX2"
    shape = Shape(int(length), 4, 1, int(dim), dtype)
    plans = dense(shape)
    if shape.length == 32768:
        plans |= {f"{share:.0%} in 64x128": partial(random_blocks, shape, share, 128) for share in (0.1, 0.05)}
    for row in compare(request, shape, plans):
        yield {**row, "what": row["what"] + HELD}


def decode(request: Request) -> Rows:
    """One query token against a cache, dense and with a tenth of the blocks; gigabytes of cache read a second."""
    for dtype, dim in KINDS:
        for length in (2048,) if request.quick else (4096, 16384, 32768, 131072):
            shape = Shape(length, 32, 8, dim, dtype, queries=1)
            plans = dense(shape) | {"10%": partial(random_blocks, shape, 0.1)}
            for row in compare(request, shape, plans, label="decode, "):
                size = 2 * shape.groups * length * shape.dim * DTYPES[dtype].itemsize
                yield row | {"gb_per_s": round(row["density"] * size / row["median_s"] / 1e9, 1)}


def growth(request: Request) -> Rows:
    """Cost against length at fixed budgets: 64 blocks a row and 1000 columns."""
    if not request.lacks(what="exponent"):
        return
    lengths = (1024, 2048, 4096) if request.quick else (16384, 32768, 65536, 131072)
    seconds = []
    for length in lengths:
        shape = Shape(length, 4, 1, 128, "bf16")
        plan = united(blocks_a_row(shape, 64), columns(shape, 1000))
        series = alternate({"plan": shape.run(plan)}, shape.draw)["plan"]
        seconds.append(series.median)
        yield {**about(shape, plan, "64 blocks a row, 1000 columns"), **series.to_dict()}
    slopes = [math.log(b / a) / math.log(2) for a, b in pairwise(seconds)]
    overall = math.log(seconds[-1] / seconds[0]) / math.log(lengths[-1] / lengths[0])
    yield {"what": "exponent", "exponent": round(overall, 3), "by_doubling": [round(s, 3) for s in slopes]}


def vllm(request: Request) -> Rows:
    """vLLM's CPU attention, dense: prompts in one call, and decoding; alone, and with its writing to the cache."""
    lengths = (4096, 16384, 32768)
    for dtype, dim in KINDS:
        for length in (1024,) if request.quick else lengths:
            yield from against_vllm(request, Shape(length, 4, 1, dim, dtype))
    for dtype in DTYPES:
        for length in (2048,) if request.quick else lengths:
            yield from against_vllm(request, Shape(length, 32, 8, 128, dtype, queries=1))


def against_vllm(request: Request, shape: Shape) -> Rows:
    """A dense plan and one of a tenth against vLLM's dense attention, which is verified first."""
    label = "" if shape.queries is None else "decode, "
    plans = dense(shape) | {"10%": partial(random_blocks, shape, 0.1, 128)}
    if not request.lacks_of(shape, *(label + name for name in plans)):
        return
    theirs = PagedAttention(shape)
    theirs.verify()
    others = {"vllm": theirs.attend, "vllm_with_cache_write": theirs.write_and_attend}
    for row in compare(request, shape, plans, theirs.prepare, label, **others):
        for name in others:
            row[f"speedup_over_{name}"] = round(row[name]["median_s"] / row["median_s"], 3)
        yield {**row, "vllm_isa": theirs.isa}


SECTIONS: dict[str, Callable[[Request], Rows]] = {
    "gemm": gemm,
    "prefill": prefill,
    "flex": flex,
    "parts": parts,
    "instruction_sets": instruction_sets,
    "avx2": avx2,
    "decode": decode,
    "growth": growth,
    "memory": memory,
    "vllm": vllm,
}
