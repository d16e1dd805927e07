"""The torch backend: the definition of every verb, obvious and slow, beside which all others are tested."""

from gossamer.backends.torch.attend import attend
from gossamer.backends.torch.choose import ListWriter, count, finish
from gossamer.backends.torch.scores import (
    PART_BYTES,
    antidiagonal_scores,
    group_differences,
    last_query_probe,
    mean_row_maxima,
    pool_keys,
    pool_queries,
    pooled_scores,
    row_block_energy,
)
from gossamer.backends.torch.slashes import exact_slashes

__all__ = [
    "PART_BYTES",
    "ListWriter",
    "antidiagonal_scores",
    "attend",
    "count",
    "exact_slashes",
    "finish",
    "group_differences",
    "last_query_probe",
    "mean_row_maxima",
    "pool_keys",
    "pool_queries",
    "pooled_scores",
    "row_block_energy",
]
