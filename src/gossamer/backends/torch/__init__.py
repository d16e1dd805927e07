"""The torch backend: the definition of every verb, obvious and slow, beside which all others are tested."""

from gossamer.backends.torch.attend import attend, attend_rows
from gossamer.backends.torch.backward import attend_backward
from gossamer.backends.torch.cells import antidiagonal_means, antidiagonal_peaks, antidiagonal_scores, value_norms
from gossamer.backends.torch.choose import ListWriter, count, finish
from gossamer.backends.torch.gates import block_attention, pool_before_rotary, pool_key_bounds
from gossamer.backends.torch.groups import group_differences, group_shares, mean_row_maxima, near_keys
from gossamer.backends.torch.mass import block_mass
from gossamer.backends.torch.pages import forget_slots, keep_bounds, page_scores, page_tokens
from gossamer.backends.torch.scores import (
    NEAR_BYTES,
    PART_BYTES,
    key_similarity,
    last_query_probe,
    last_query_products,
    pool_keys,
    pool_queries,
    pooled_scores,
    query_similarity,
    row_block_energy,
)
from gossamer.backends.torch.slashes import exact_slashes
from gossamer.backends.torch.tokens import collisions, label_scores
from gossamer.rules import count_top_p

__all__ = [
    "NEAR_BYTES",
    "PART_BYTES",
    "ListWriter",
    "antidiagonal_means",
    "antidiagonal_peaks",
    "antidiagonal_scores",
    "attend",
    "attend_backward",
    "attend_rows",
    "block_attention",
    "block_mass",
    "collisions",
    "count",
    "count_top_p",
    "exact_slashes",
    "finish",
    "forget_slots",
    "group_differences",
    "group_shares",
    "keep_bounds",
    "key_similarity",
    "label_scores",
    "last_query_probe",
    "last_query_products",
    "mean_row_maxima",
    "near_keys",
    "page_scores",
    "page_tokens",
    "pool_before_rotary",
    "pool_key_bounds",
    "pool_keys",
    "pool_queries",
    "pooled_scores",
    "query_similarity",
    "row_block_energy",
    "value_norms",
]
