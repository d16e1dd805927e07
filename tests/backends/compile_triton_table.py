"""Compiles what the table of tile shapes chooses for Hopper, without one: ``compile_triton_table.py few|all``.

Prints one line a kernel: its name, dtype and head dimension, the registers of a thread, and the bytes of its stack.
"""

import sys

from compile_triton import FLAGS, compile_attend, resources
from compile_triton_planning import compile_products

from gossamer.backends.triton import config

BLOCKS, COLUMNS = {"HAS_BLOCKS", "CAUSAL"}, {"HAS_BLOCKS", "HAS_COLUMNS", "CAUSAL"}
UNPERMUTED = {flag for flag in FLAGS if "ORDER" not in flag}
SIZES = {"fp32": 4, "bf16": 2}


def show(name: str, dtype: str, dim: int, compiled) -> None:
    print(name, dtype, dim, *resources(compiled), flush=True)


def attend(dtype: str, dim: int, rows: int, flags: set[str]) -> None:
    """``rows`` of a query block of 64 tokens and the heads that share it."""
    blocks, columns = "HAS_BLOCKS" in flags, "HAS_COLUMNS" in flags
    chosen = config.choose(config.Problem((9, 0), dim, SIZES[dtype], rows, 128, 17, blocks, columns))
    tile = (chosen.tile_m, chosen.tile_n)
    options: dict = dict(warps=chosen.warps, stages=chosen.stages, share=max(1, rows // 64), block=128)
    show(
        f"attend-{rows}",
        dtype,
        dim,
        compile_attend(90, dtype, dim, tile, flags, descriptors=chosen.descriptors, **options),
    )


def main(which: str) -> None:
    attend("fp32", 128, 64, {"CAUSAL"})
    attend("bf16", 128, 64, COLUMNS)
    if which == "few":
        for compiled in compile_products(90, "fp32", 128, 1, only="probe_sums"):
            show("probe_sums", "fp32", 128, compiled)
        return
    for dim in (64, 128, 256):
        for dtype in SIZES:
            for compiled in compile_products(90, dtype, dim, 4):
                show(compiled.name, dtype, dim, compiled)
            for rows in (16, 64) if dtype == "fp32" else (64, 256):
                for flags in (BLOCKS, COLUMNS, UNPERMUTED):
                    attend(dtype, dim, rows, flags)


if __name__ == "__main__":
    main(sys.argv[1])
