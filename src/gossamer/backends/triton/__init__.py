"""The Triton backend, for CUDA devices; on a CPU under Triton's interpreter. Not yet measured on a GPU.

Its verbs mean what those of `gossamer.backends.torch` mean, and choose the same from equal scores. Triton is optional,
and imported by the first call. With ``TRITON_INTERPRET=1`` in the environment before Triton is imported, the same code
runs on CPU tensors, slowly: that is how it is tested.

Nothing waits for the device but `finish`, `ListWriter.build`, `count` and, of long lists, `attend_backward`, once or
twice each, for numbers that the host needs.
"""

from gossamer.backends.triton.availability import interprets, is_available, why_unavailable
from gossamer.backends.triton.backward import attend_backward
from gossamer.backends.triton.choose import ListWriter, finish
from gossamer.backends.triton.forward import attend, autotune
from gossamer.backends.triton.pairs import count
from gossamer.backends.triton.scores import (
    PART_BYTES,
    antidiagonal_scores,
    block_mass,
    last_query_probe,
    pool_keys,
    pool_queries,
    pooled_scores,
    row_block_energy,
)
from gossamer.backends.triton.steps import collisions, label_scores, page_scores

__all__ = [
    "PART_BYTES",
    "ListWriter",
    "antidiagonal_scores",
    "attend",
    "attend_backward",
    "autotune",
    "block_mass",
    "collisions",
    "count",
    "finish",
    "interprets",
    "is_available",
    "label_scores",
    "last_query_probe",
    "page_scores",
    "pool_keys",
    "pool_queries",
    "pooled_scores",
    "row_block_energy",
    "why_unavailable",
]
