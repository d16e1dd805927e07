"""MInference's index construction for token-exact slashes, in C++."""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.backends.cpu.lists import listed
from gossamer.backends.cpu.native import kernels
from gossamer.backends.cpu.views import extent_view, part_view
from gossamer.plan import Grid, ceil_div

__all__ = ["exact_slashes"]

BLOCK = 64


def exact_slashes(
    columns: Tensor, slashes: Tensor, grid: Grid, part: range
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """See `gossamer.backends.torch.exact_slashes`."""
    batch, heads, width = columns.shape
    if slashes.shape != columns.shape or grid.extent.batch != batch or columns.dtype != torch.bool:
        raise ValueError(
            f"columns and slashes must be bool [B, H, positions] for the extent's {grid.extent.batch} batch rows, "
            f"got {columns.dtype} {tuple(columns.shape)} and {slashes.dtype} {tuple(slashes.shape)}"
        )
    if (grid.block_q, grid.block_k) != (BLOCK, BLOCK):
        raise ValueError(f"exact slashes take blocks of {BLOCK}, got {grid.block_q} and {grid.block_k}")
    # Held by name until the kernel is done: only their addresses are handed over.
    columns, slashes = columns.contiguous(), slashes.to(torch.bool).contiguous()
    words = ceil_div(width, 64)
    rows = (batch, heads, len(part))
    block_bits = torch.empty(*rows, ceil_div(words, 64), dtype=torch.int64, device="cpu")
    column_bits = torch.empty(*rows, words, dtype=torch.int64, device="cpu")
    block_counts, column_counts = (
        torch.empty(rows, dtype=torch.int64, device="cpu"),
        torch.empty(rows, dtype=torch.int64, device="cpu"),
    )
    native = kernels()
    call = native.Slashes(
        extent=extent_view(grid.extent),
        heads=heads,
        width=width,
        part=part_view(part),
        columns=columns.data_ptr(),
        distances=slashes.data_ptr(),
    )
    native.slashes(
        call,
        blocks=native.ChosenBits(bits=block_bits.data_ptr(), counts=block_counts.data_ptr()),
        columns=native.ChosenBits(bits=column_bits.data_ptr(), counts=column_counts.data_ptr()),
        threads=torch.get_num_threads(),
    )
    return listed(block_bits, block_counts, words), listed(column_bits, column_counts, width)
