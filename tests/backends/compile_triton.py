"""Compiles the Triton kernels to PTX for a GPU that need not be there: ``compile_triton.py CAPABILITY``.

Prints one line a variant of the forward kernel: its name, and which of the instructions below it has.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gossamer.backends.triton.kernels.attend import attend
from gossamer.backends.triton.kernels.columns import mark_blocks

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
INSTRUCTIONS = {
    "asynchronous-copy": "cp.async.c",
    "tensor-copy": "cp.async.bulk.tensor",
    "warp-matrix": "mma.sync",
    "warpgroup-matrix": "wgmma.mma_async",
}


def compile_kernel(kernel, types: dict[str, str], constants: dict, capability: int, warps: int, stages: int):
    """With every pointer and stride divisible by 16, as those of ordinary tensors are."""
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    aligned = [name for name, kind in signature.items() if kind[0] == "*" or (kind == "i32" and "stride" in name)]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, signature, constexprs=values, attrs=attributes)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": warps, "num_stages": stages})


def resources(compiled) -> tuple[int, int]:
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
):
    types = POINTERS | dict.fromkeys(TENSORS, "*" + dtype) | dict.fromkeys(FLOATS, "fp32")
    block_d = max(16, 1 << (dim - 1).bit_length())
    halves = 2 if capability < 90 and tile[0] < block_d <= 2 * tile[0] else 1
    for name, width in (("k_descriptor", block_d), ("v_descriptor", block_d // halves)):
        types[name] = f"tensordesc<{dtype}[1, 1, {tile[1]}, {width}]>" if descriptors else "*" + dtype
    constants = dict(SHARE=share, BLOCK_Q=block, BLOCK_K=block)
    constants |= dict(
        DIM=dim, VALUE_DIM=dim, BLOCK_D=block_d, BLOCK_DV=block_d // halves, TILE_M=tile[0], TILE_N=tile[1]
    )
    constants |= dict(HALVES=halves, DESCRIPTORS=descriptors)
    constants |= {name: name in flags for name in FLAGS}
    return compile_kernel(attend, types, constants, capability, warps, stages)


def main(capability: int) -> None:
    everything: set[str] = set(FLAGS)
    unpermuted = everything - {"Q_ORDER", "K_ORDER"}
    usual = {"HAS_BLOCKS", "HAS_COLUMNS", "CAUSAL"}
    variants = {
        "bf16": (("bf16", 128, (64, 64), usual), {"stages": 3}),
        "everything": (("fp16", 80, (64, 32), everything), {}),
        "fp32": (("fp32", 64, (64, 32), unpermuted - {"CAUSAL"}), {}),
    }
    if capability >= 90:
        variants["descriptors"] = (("bf16", 128, (64, 64), usual), {"stages": 3, "descriptors": True})
    for name, (arguments, options) in variants.items():
        ptx = compile_attend(capability, *arguments, **options).asm["ptx"]
        print(name, *(word for word, instruction in INSTRUCTIONS.items() if instruction in ptx))
    compile_kernel(mark_blocks, POINTERS, {"TILE": 128}, capability, 4, 2)


if __name__ == "__main__":
    main(int(sys.argv[1]))
