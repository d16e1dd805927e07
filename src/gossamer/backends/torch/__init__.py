"""The torch backend: the definition of every verb, obvious and slow, beside which all others are tested."""

from gossamer.backends.torch.attend import attend
from gossamer.backends.torch.choose import ListWriter, count, finish
from gossamer.backends.torch.gates import block_attention, pool_key_bounds
from gossamer.backends.torch.scores import (
    PART_BYTES,
    antidiagonal_scores,
    last_query_probe,
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
    "block_attention",
    "count",
    "exact_slashes",
    "finish",
    "last_query_probe",
    "pool_key_bounds",
    "pool_keys",
    "pool_queries",
    "pooled_scores",
    "row_block_energy",
]
