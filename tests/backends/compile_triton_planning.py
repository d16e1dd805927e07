"""Compiles the planning kernels to PTX for a GPU that need not be there: ``compile_triton_planning.py CAPABILITY``.

Prints one line a kernel that multiplies queries with keys: whether it has matrix instructions.
"""

import sys

import torch
from compile_triton import POINTERS, compile_kernel

from gossamer.backends.triton import planning, planning_kernels

PLANNING_POINTERS = POINTERS | {
    "top_ptr": "*fp32",
    "total_ptr": "*fp32",
    "columns_ptr": "*fp32",
    "partial_ptr": "*fp32",
    "diagonals_ptr": "*fp32",
    "energy_ptr": "*fp32",
    "reference_ptr": "*fp32",
    "scores_ptr": "*fp32",
    "seen_ptr": "*i32",
    "forced_ptr": "*i32",
    "leading_ptr": "*i32",
    "forcing_ptr": "*u8",
    "budgets_ptr": "*i32",
    "bands_ptr": "*u8",
    "origin_ptr": "*i32",
    "bits_ptr": "*i32",
    "counts_ptr": "*i32",
    "mask_ptr": "*u8",
    "indptr_ptr": "*i64",
    "indices_ptr": "*i32",
    "column_bits_ptr": "*i32",
    "column_count_ptr": "*i32",
    "pairs_ptr": "*i64",
    "live_ptr": "*i32",
    "slope": "fp32",
    "alpha": "fp32",
}


def compile_products(capability: int, dtype: str, dim: int, share: int, only: str | None = None) -> list:
    """The planning kernels that multiply queries with keys, in the tiles of `gossamer.backends.triton.planning`."""
    kernels = planning_kernels
    types = PLANNING_POINTERS | {"q_ptr": "*" + dtype, "k_ptr": "*" + dtype, "pooled_ptr": "*" + dtype}
    types |= {"scale_log2": "fp32", "out_ptr": "*fp32"}
    fp32 = dtype == "fp32"
    narrow = fp32 or dim > 128
    like_q = torch.empty(1, 1, 1, dim, dtype=torch.float32 if fp32 else torch.bfloat16)
    rows, keys, mass_keys = planning._probe_tiles(like_q)
    operands = dict(SHARE=share, DIM=dim, BLOCK_D=max(16, 1 << (dim - 1).bit_length()))
    probe = operands | dict(ROW_TILES=64 // rows, ROWS=rows)
    sums, mass = probe | dict(KEYS=keys, STEPS=2048 // keys), probe | dict(KEYS=mass_keys, STEPS=8)
    tile_m, tile_n, warps = planning._energy_tiles(like_q, 64 * share)
    energy = operands | dict(BLOCK_Q=64, BLOCK_K=128, TILE_M=tile_m, PARTS=64 * share // tile_m, TILE_N=tile_n)
    blocks = planning._cells(like_q) // 16
    cells = operands | dict(STRIDE=8, ROW_CELLS=8, ROW_BLOCKS=2 * blocks, ROW_LANES=8)
    cells |= dict(KEY_CELLS=16, KEY_BLOCKS=blocks, KEY_LANES=16)
    stages = 1 if narrow else 3
    lists = {
        "probe_sums": (kernels.probe_sums, sums, 4, stages),
        "probe_mass": (kernels.probe_mass, mass, 4, min(stages, 2)),
        "row_energies": (kernels.row_energies, energy, warps, stages),
        "antidiagonal_mass": (kernels.antidiagonal_mass, cells, 4, min(stages, 2)),
    }
    return [
        compile_kernel(kernel, types, constants, capability, warps, stages)
        for name, (kernel, constants, warps, stages) in lists.items()
        if only in (None, name)
    ]


def compile_choices(capability: int) -> None:
    """The other planning kernels."""
    kernel = planning_kernels
    lists: list[tuple] = [
        (kernel.merge_diagonals, dict(ROW_TILES=1, ROWS=64, KEYS=64, TILE=1024)),
        (kernel.pool_blocks, dict(DIM=128, BLOCK_D=128, TILE=64)),
        (kernel.merge_energies, dict(PARTS=2, TILE_N=64, TILE=1024)),
        (kernel.pack_mask, dict(TILE=1024)),
        (kernel.list_bits, dict(TILE=32)),
        (kernel.count_columns, dict(BLOCK_K=64, TILE=128)),
    ]
    for rule, one, tile in ((0, True, 32), (1, True, 4096), (2, True, 1024), (2, False, 4096), (3, False, 4096)):
        lists.append((kernel.choose_rows, dict(RULE=rule, BANDS=rule != 1, ONE=one, TILE=tile)))
    for flag in (False, True):
        flags = dict.fromkeys(("HAS_BLOCKS", "HAS_COLUMNS", "CAUSAL", "LIMITED"), flag)
        lists.append((kernel.count_tiles, flags | dict(BLOCK_Q=64, BLOCK_K=128, TILE=128, EDGE_M=64, EDGE_N=64)))
    for kernel, constants in lists:
        types = PLANNING_POINTERS | {"x_ptr": "*bf16", "out_ptr": "*fp32"}
        if kernel is planning_kernels.count_columns:
            types |= {"out_ptr": "*i32"}
        compile_kernel(kernel, types, constants, capability, 4, 2)


def compile_planner(capability: int) -> None:
    for dtype, dim, share in (("bf16", 128, 4), ("fp16", 80, 1), ("bf16", 64, 8), ("fp32", 64, 2)):
        for compiled in compile_products(capability, dtype, dim, share):
            print(dtype, dim, "matrix" if "mma" in compiled.asm["ptx"] else "scalar")
    compile_choices(capability)


if __name__ == "__main__":
    compile_planner(int(sys.argv[1]))
