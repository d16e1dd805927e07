"""Planning kernels: scores of columns, diagonals and blocks; choices as bitmaps; bitmaps as lists; pairs in a plan.

Coordinates are key slots, as in `gossamer.backends.triton.kernels`. No kernel adds floats atomically, and how the work is
split depends on shapes alone: results repeat bit for bit. Bitmaps are int32 words, candidate ``32 w + i`` in bit ``i``
of word ``w``.
"""

from gossamer.backends.triton.planning_kernels.choices import (
    choose_rows,
    count_columns,
    count_tiles,
    list_bits,
    pack_mask,
)
from gossamer.backends.triton.planning_kernels.probe import merge_diagonals, probe_mass, probe_sums
from gossamer.backends.triton.planning_kernels.scores import (
    antidiagonal_mass,
    merge_energies,
    pool_blocks,
    row_energies,
)

__all__ = [
    "antidiagonal_mass",
    "choose_rows",
    "count_columns",
    "count_tiles",
    "list_bits",
    "merge_diagonals",
    "merge_energies",
    "pack_mask",
    "pool_blocks",
    "probe_mass",
    "probe_sums",
    "row_energies",
]
