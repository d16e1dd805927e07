"""Compiles every tile that the table chooses for Hopper, without one: minutes, for whoever changes the table.

Prints one line a kernel: its name, dtype and head dimension, the registers of a thread, and the bytes of its stack.
"""

from compile_triton import compile_backward, compile_chosen, compile_products, resources

PARTS = ({"HAS_BLOCKS"}, {"HAS_BLOCKS", "HAS_COLUMNS"}, {"HAS_BLOCKS", "HAS_COLUMNS", "SOFTCAP", "SINKS"})


def main() -> None:
    for dim in (64, 128, 256):
        for dtype in ("fp32", "bf16"):
            for name, kernel in compile_products(90, dtype, dim, 4).items():
                print(name, dtype, dim, *resources(kernel), flush=True)
            for flags in PARTS:
                for name, kernel in compile_backward(90, dtype, dim, flags).items():
                    print(f"{name}-{len(flags)}", dtype, dim, *resources(kernel), flush=True)
            for rows in (16, 64) if dtype == "fp32" else (64, 256):
                for flags in PARTS:
                    name = f"attend-{rows}-{len(flags)}"
                    print(name, dtype, dim, *resources(compile_chosen(dtype, dim, rows, flags)), flush=True)


if __name__ == "__main__":
    main()
