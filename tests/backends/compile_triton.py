"""Compiles the Triton kernels to PTX for a GPU that need not be there: ``compile_triton.py CAPABILITY``.

Each kernel once or twice, with constants that stand for all; products for Hopper, the rest for Ampere. Prints a line
for each that multiplies matrices: its name, the registers of a thread, the bytes of its stack, and which of the
instructions below it has.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gossamer.backends.triton import config, kernels, scores
from gossamer.backends.triton.config import power_of_two
from gossamer.backends.triton.kernels import choices, coded

INTEGERS = dict.fromkeys(("block_indices", "column_indices", "q_order", "k_order", "k_rank", "selected_bits"), "*i32")
FLOATS = (
    "reaching_lse", "level", "base", "k_grad", "v_grad",
    "lse", "top", "total", "columns", "partial", "diagonals", "energy", "reference", "scores", "sinks", "queries",
    "keys", "bias",
)  # fmt: skip
TYPES = INTEGERS | {f"{name}_ptr": "*fp32" for name in FLOATS}
TYPES |= dict.fromkeys(("q_steps", "q_shifts", "k_steps"), "*fp32")
TYPES |= dict.fromkeys(("block_indptr", "column_indptr", "indptr_ptr", "pairs_ptr"), "*i64")
TYPES |= dict.fromkeys(("row_indptr", "gathered_indptr", "list_indptr"), "*i64")
TYPES |= dict.fromkeys(("flags_ptr", "forced_heads_ptr", "everywhere_ptr"), "*u8")
TYPES |= dict.fromkeys(("scale_log2", "softcap_log2", "softcap_slope", "skip_log2", "slope", "alpha"), "fp32")
TYPES |= dict(scale="fp32")
FLAGS = ("HAS_BLOCKS", "HAS_COLUMNS", "Q_ORDER", "K_ORDER", "SOFTCAP", "SINKS")
ATTRIBUTES = ("MEANS", "SKIP")  # of plans of blocks alone
BACKWARD = ("query_gradients", "key_gradients", "column_gradients", "mean_gradients")
INSTRUCTIONS = {
    "asynchronous-copy": "cp.async.c",
    "tensor-copy": "cp.async.bulk.tensor",
    "warp-matrix": "mma.sync",
    "warpgroup-matrix": "wgmma.mma_async",
    "int8-matrix": ".s32.s8.s8",
}


def compile_kernel(
    kernel: Any, capability: int, constants: dict, *, warps: int = 4, stages: int = 2, **types: str
) -> Any:
    """With every pointer and stride divisible by 16, as those of ordinary tensors are."""

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        return (TYPES | types).get(name, "*i32" if name.endswith("_ptr") else "i32")

    signature = {name: kind(name) for name in kernel.arg_names}
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    aligned = [name for name, kind in signature.items() if kind[0] == "*" or (kind == "i32" and "stride" in name)]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, signature, constexprs=values, attrs=attributes)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": warps, "num_stages": stages})


def compile_attend(
    capability: int,
    dtype: str,
    dim: int,
    tile: tuple[int, int],
    flags: set[str],
    *,
    warps: int = 4,
    stages: int = 2,
    block: int = 64,
    share: int = 4,
    descriptors: bool = False,
    codings: tuple[int, int] = (0, 0),
    quantised: bool = False,
) -> Any:
    block_d = power_of_two(dim)
    halves = 2 if capability < 90 and tile[0] < block_d <= 2 * tile[0] else 1
    like_q = ("q_ptr", "k_ptr", "v_ptr", "out_ptr", "k_means", "v_means", "k_scales", "k_zeros", "v_scales", "v_zeros")
    types: dict[str, str] = dict.fromkeys(like_q, "*" + dtype)
    if quantised:
        types |= dict.fromkeys(("q_ptr", "k_ptr", "k_scales", "k_zeros"), "*i8")
    types |= {f"{x}_codes": "*u8" if coding else "*" + dtype for x, coding in zip("kv", codings, strict=True)}
    for name, width in (("k_descriptor", block_d), ("v_descriptor", block_d // halves)):
        types[name] = f"tensordesc<{dtype}[1, 1, {tile[1]}, {width}]>" if descriptors else "*" + dtype
    constants: dict[str, Any] = dict(SHARE=share, DIM=dim, VALUE_DIM=dim, BLOCK_D=block_d, BLOCK_DV=block_d // halves)
    constants |= dict(HALVES=halves, BLOCK_Q=block, BLOCK_K=block, TILE_M=tile[0], TILE_N=tile[1])
    constants |= {name: name in flags for name in (*FLAGS, *ATTRIBUTES)} | dict(DESCRIPTORS=descriptors)
    constants |= dict(BIASED="BIASED" in flags, K_CODING=codings[0], K_BITS=4, K_GROUP=32)
    constants |= dict(V_CODING=codings[1], V_BITS=4, V_GROUP=32)
    return compile_kernel(kernels.attend, capability, constants, warps=warps, stages=stages, **types)


def compile_backward(
    capability: int, dtype: str, dim: int, flags: set[str], only: tuple[str, ...] = BACKWARD
) -> dict[str, Any]:
    """The kernels of gradients, in the table's tile, for blocks of 64 and four heads that share a plan."""
    chosen = config.choose_backward(config.Problem((capability // 10, 0), dim, 4 if dtype == "fp32" else 2, 64, 64, 17))
    block_d = power_of_two(dim)
    constants: dict[str, Any] = dict(SHARE=4, DIM=dim, VALUE_DIM=dim, BLOCK_D=block_d, BLOCK_DV=block_d)
    constants |= dict(BLOCK_Q=64, BLOCK_K=64, TILE_M=chosen.tile_m, TILE_N=chosen.tile_n)
    constants |= dict(SOFTCAP="SOFTCAP" in flags, HAS_BLOCKS="HAS_BLOCKS" in flags)
    orders = {name: name in flags for name in ("Q_ORDER", "K_ORDER")}
    asked = dict(OF_KEYS=True, OF_VALUES=True)
    variants = {
        "query_gradients": orders | dict(HAS_COLUMNS="HAS_COLUMNS" in flags, MEANS="MEANS" in flags)
        | dict(REACHING_LSE=True, PASS=2),
        "key_gradients": orders | asked | dict(TOGETHER=1, BANDS=True, ADD="HAS_COLUMNS" in flags),
        "column_gradients": orders | asked,
        "mean_gradients": asked | dict(TOGETHER=1),
    }  # fmt: skip
    like_q = ("q_ptr", "k_ptr", "v_ptr", "reaching_ptr", "out_ptr", "k_means", "v_means", "grad_ptr")
    types: dict[str, str] = dict.fromkeys(like_q, "*" + dtype)
    types |= dict.fromkeys(("row_indices", "gathered", "lists", "members"), "*i32")
    return {
        name: compile_kernel(
            getattr(kernels, name), capability, constants | own, warps=chosen.warps, stages=chosen.stages, **types
        )
        for name, own in variants.items()
        if name in only
    }


def compile_products(capability: int, dtype: str, dim: int, share: int, only: str | None = None) -> dict[str, Any]:
    """The planning kernels that multiply queries with keys, in the tiles of `gossamer.backends.triton.scores`."""
    like_q = torch.empty(1, 1, 1, dim, dtype=torch.float32 if dtype == "fp32" else torch.bfloat16)
    rows, keys, mass_keys = scores._probe_tiles(like_q)
    operands = dict(SHARE=share, DIM=dim, BLOCK_D=power_of_two(dim))
    probe = operands | dict(ROW_TILES=64 // rows, ROWS=rows)
    sums, mass = probe | dict(KEYS=keys, STEPS=2048 // keys), probe | dict(KEYS=mass_keys, STEPS=8)
    tile_m, tile_n, warps = scores._energy_tiles(like_q, 64 * share)
    energy = operands | dict(BLOCK_Q=64, BLOCK_K=128, TILE_M=tile_m, PARTS=64 * share // tile_m, TILE_N=tile_n)
    blocks = scores._cells(like_q) // 16
    cells = operands | dict(STRIDE=8, ROW_CELLS=8, ROW_BLOCKS=2 * blocks, ROW_LANES=8)
    cells |= dict(KEY_CELLS=16, KEY_BLOCKS=blocks, KEY_LANES=16)
    stages = 1 if dtype == "fp32" or dim > 128 else 3
    types = dict.fromkeys(("q_ptr", "k_ptr", "keys_ptr"), "*" + dtype) | {"out_ptr": "*fp32"}
    variants = {
        "probe_sums": (sums, 4, stages),
        "probe_mass": (mass, 4, min(stages, 2)),
        "row_energies": (energy | dict(CAUSAL=True, ENDED=False, LISTS=1), warps, stages),
        "antidiagonal_mass": (cells, 4, min(stages, 2)),
    }
    return {
        name: compile_kernel(getattr(kernels, name), capability, constants, warps=warps, stages=stages, **types)
        for name, (constants, warps, stages) in variants.items()
        if only in (None, name)
    }


def compile_others(capability: int) -> None:
    """The kernels that multiply nothing, or means."""
    means = dict(DIM=128, BLOCK_D=128)
    compile_kernel(kernels.merge_sums, capability, dict(TILE=64))
    compile_kernel(kernels.merge_diagonals, capability, dict(ROW_TILES=1, ROWS=64, KEYS=64, TILE=1024))
    compile_kernel(kernels.block_means, capability, means | dict(TILE=64), x_ptr="*bf16", out_ptr="*fp32")
    tiles = means | dict(SHARE=4, TILE_M=32, TILE_N=32)
    compile_kernel(kernels.mean_products, capability, tiles, stages=1, out_ptr="*fp32")
    masses = means | dict(SHARE=4, BLOCK_Q=64, BLOCK_K=64, TILE_M=64, TILE_N=64)
    compile_kernel(kernels.block_mass, capability, masses, stages=1, q_ptr="*bf16", k_ptr="*bf16", mass_ptr="*fp32")
    compile_kernel(kernels.merge_energies, capability, dict(PARTS=2, TILE_N=64, TILE=1024), out_ptr="*fp32")
    compile_kernel(kernels.mark_blocks, capability, dict(TILE=128))
    compile_kernel(kernels.list_bits, capability, dict(TILE=32))
    for rule, one, tile in ((choices.BEST, False, 4096), (choices.BEST, True, 1024), (choices.RELATIVE, True, 32)):
        constants = dict(RULE=rule.value, DIAGONALS=not one, MIRRORED=not one, EVERYWHERE=one, ONE=one, TILE=tile)
        compile_kernel(kernels.choose_rows, capability, constants, diagonals_ptr="*u8")
    pages = dict(SHARE=4, DIM=256, BLOCK_D=256, TILE=32)
    compile_kernel(kernels.page_products, capability, pages, queries_ptr="*fp32", bounds_ptr="*bf16")
    for in_codes in (False, True):
        labels = dict(SHARE=4, HEADS=16, CODED=in_codes, PACKED=in_codes, TILE=256)
        of = "*u8" if in_codes else "*bf16"
        compile_kernel(kernels.label_products, capability, labels, codes_ptr=of, low_ptr="*bf16", step_ptr="*bf16")
    hashes = dict(SHARE=5, HEADS=16, TILE=64)
    types = {f"{name}_ptr": "*i16" for name in ("queries", "codes", "counts")}
    compile_kernel(kernels.hash_collisions, capability, hashes, warps=4, stages=2, **types)
    compile_kernel(kernels.count_columns, capability, dict(BLOCK_K=64, TILE=128))
    lists = dict(HAS_BLOCKS=True, HAS_COLUMNS=True)
    compile_kernel(
        kernels.count_pairs, capability, lists | dict(BLOCK_Q=64, BLOCK_K=128, TILE=128, EDGE_M=64, EDGE_N=64)
    )


def resources(compiled: Any) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack: what did not fit them."""
    disassembler = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(disassembler), "--dump-resource-usage", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", told)
    assert found, told
    return int(found[1]), int(found[2])


def compile_chosen(dtype: str, dim: int, rows: int, flags: set[str], *, quantised: bool = False) -> Any:
    """For Hopper, in the tile that the table chooses for ``rows`` rows of a query block and the heads that share it."""
    parts = {"blocks": "HAS_BLOCKS" in flags, "columns": "HAS_COLUMNS" in flags}
    chosen = config.choose(config.Problem((9, 0), dim, 4 if dtype == "fp32" else 2, rows, 128, 17, **parts))
    options: dict[str, Any] = dict(warps=chosen.warps, stages=chosen.stages, descriptors=chosen.descriptors)
    options |= dict(share=max(1, rows // 64), block=128)
    if quantised:  # descriptors are of what has two bytes
        options |= dict(quantised=True, descriptors=False)
    return compile_attend(90, dtype, dim, (chosen.tile_m, chosen.tile_n), flags, **options)


def main(capability: int) -> None:
    if capability < 90:
        compile_others(capability)
        compiled = {"attend": compile_attend(capability, "fp16", 80, (64, 32), set(FLAGS))}
        compiled |= {
            "attend-attributes": compile_attend(capability, "fp16", 128, (64, 64), {"HAS_BLOCKS", *ATTRIBUTES})
        }
        compiled |= {"attend-int8": compile_attend(capability, "fp16", 64, (64, 64), {"HAS_BLOCKS"}, quantised=True)}
        of_codes = (coded.BY_TOKENS.value, coded.BY_CHANNELS.value)
        compile_attend(capability, "bf16", 128, (16, 32), {"BIASED"}, codings=of_codes, stages=1)
        of_bitmaps = (coded.BITMAP.value, coded.BITMAP.value)
        compile_attend(capability, "fp32", 64, (16, 32), {"HAS_BLOCKS"}, codings=of_bitmaps, stages=1)
        every = {"HAS_BLOCKS", "SOFTCAP", "Q_ORDER", "K_ORDER"}
        compiled |= compile_backward(capability, "fp16", 80, every, ("column_gradients", "mean_gradients"))
    else:
        compiled = {"attend": compile_chosen("bf16", 128, 64, {"HAS_BLOCKS", "HAS_COLUMNS"})}
        compiled |= {"attend-attributes": compile_chosen("bf16", 128, 64, {"HAS_BLOCKS", *ATTRIBUTES})}
        listed = {"HAS_BLOCKS", "HAS_COLUMNS"}
        compiled |= {"attend-int8": compile_chosen("bf16", 128, 64, listed, quantised=True)}
        compiled |= {"attend-fp32": compile_chosen("fp32", 128, 64, set())}
        compiled |= {"sums-fp32": compile_products(90, "fp32", 128, 1, only="probe_sums")["probe_sums"]}
        compiled |= compile_products(90, "bf16", 128, 4)
        compiled |= compile_backward(90, "bf16", 128, listed, ("query_gradients", "key_gradients"))
    for name, kernel in compiled.items():
        found = [word for word, instruction in INSTRUCTIONS.items() if instruction in kernel.asm["ptx"]]
        print(name, *resources(kernel), *found)


if __name__ == "__main__":
    main(int(sys.argv[1]))
