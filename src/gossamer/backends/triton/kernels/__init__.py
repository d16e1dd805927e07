"""The kernels of the Triton backend, and the functions that they are made of. Imports Triton.

Functions take few arguments: what belongs together goes in a named tuple. One that holds constants is made in the call
that passes it on, where they stay constants; assigned to a variable, they would become values.

No kernel adds floats atomically, and how work is split depends on positions alone: results repeat bit for bit, whatever
padding and companions a batch row has.
"""

from gossamer.backends.triton.kernels.antidiagonals import antidiagonal_mass
from gossamer.backends.triton.kernels.attend import attend
from gossamer.backends.triton.kernels.choices import choose_rows, list_bits
from gossamer.backends.triton.kernels.columns import mark_blocks
from gossamer.backends.triton.kernels.key_gradients import column_gradients, key_gradients, mean_gradients
from gossamer.backends.triton.kernels.mass import block_mass
from gossamer.backends.triton.kernels.means import block_means, mean_products, merge_energies, row_energies
from gossamer.backends.triton.kernels.pairs import count_columns, count_pairs
from gossamer.backends.triton.kernels.probe import merge_diagonals, merge_sums, probe_mass, probe_sums
from gossamer.backends.triton.kernels.query_gradients import query_gradients
from gossamer.backends.triton.kernels.steps import hash_collisions, label_products, page_products

__all__ = [
    "antidiagonal_mass",
    "attend",
    "block_mass",
    "block_means",
    "choose_rows",
    "column_gradients",
    "count_columns",
    "count_pairs",
    "hash_collisions",
    "key_gradients",
    "label_products",
    "list_bits",
    "mark_blocks",
    "mean_gradients",
    "mean_products",
    "merge_diagonals",
    "merge_energies",
    "merge_sums",
    "page_products",
    "probe_mass",
    "probe_sums",
    "query_gradients",
    "row_energies",
]
