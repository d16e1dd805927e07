"""Compiles the Triton kernels to PTX for a GPU that need not be there: ``compile_triton.py CAPABILITY``."""

import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gossamer.ops.triton import kernels

POINTERS = {
    "block_indptr": "*i64",
    "block_indices": "*i32",
    "column_indptr": "*i64",
    "column_indices": "*i32",
    "sink_ptr": "*i32",
    "window_ptr": "*i32",
    "q_order": "*i32",
    "k_order": "*i32",
    "k_rank": "*i32",
    "selected_bits": "*i32",
    "extent_ptr": "*i32",
    "sinks_ptr": "*fp32",
    "lse_ptr": "*fp32",
}
TENSORS = ("q_ptr", "k_ptr", "v_ptr", "out_ptr")
FLOATS = ("scale_log2", "softcap_log2", "softcap_slope")
FLAGS = ("HAS_BLOCKS", "HAS_COLUMNS", "Q_ORDER", "K_ORDER", "CAUSAL", "LIMITED", "SOFTCAP", "SINKS")


def compile_kernel(kernel, types: dict[str, str], constants: dict, capability: int, warps: int, stages: int) -> str:
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, constexprs=values)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": warps, "num_stages": stages}).asm["ptx"]


def compile_attend(capability: int, dtype: str, dim: int, tile: tuple[int, int], flags: set[str]) -> str:
    types = POINTERS | dict.fromkeys(TENSORS, "*" + dtype) | dict.fromkeys(FLOATS, "fp32")
    block = max(16, 1 << (dim - 1).bit_length())
    constants = dict(SHARE=4, TILES=2, DIM=dim, VALUE_DIM=dim, BLOCK_D=block, BLOCK_DV=block, BLOCK_Q=64, BLOCK_K=64)
    constants |= dict(TILE_M=tile[0], TILE_N=tile[1], WIDEN=False, PRECISION="ieee" if dtype == "fp32" else "tf32")
    constants |= {name: name in flags for name in FLAGS}
    return compile_kernel(kernels.attend, types, constants, capability, 4, 2)


if __name__ == "__main__":
    capability = int(sys.argv[1])
    everything: set[str] = set(FLAGS)
    unpermuted = everything - {"Q_ORDER", "K_ORDER"}
    for dtype, dim, tile, flags in (
        ("bf16", 128, (128, 64), {"HAS_BLOCKS", "HAS_COLUMNS", "CAUSAL"}),
        ("fp16", 80, (64, 32), everything),
        ("fp32", 64, (64, 32), unpermuted - {"CAUSAL"}),
    ):
        ptx = compile_attend(capability, dtype, dim, tile, flags)
        print(torch.__version__, dtype, dim, "matrix" if "mma" in ptx else "scalar")
    compile_kernel(kernels.mark_blocks, POINTERS, {"TILE": 128}, capability, 4, 2)
    print("compiled")
