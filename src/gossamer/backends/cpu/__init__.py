"""The C++ backend: AMX, AVX-512, AVX2 and portable kernels, chosen at run time.

Its functions are those of `gossamer.backends.torch`, by name, signature and meaning. ``GOSSAMER_CPU_ISA`` forces one of
`supported_isas` (read at every call); without it each dtype gets the fastest that this machine has. ``amx``,
``amx_emulated`` and ``avx512_bf16`` compute in bf16 and serve bf16 tensors; others then run on the fp32 kernels of the
same machine. ``amx_emulated`` is the AMX kernel over emulated tile operations, for tests on machines without AMX.

All functions run on ``torch.get_num_threads()`` threads.
"""

from gossamer.backends.cpu.attend import attend, attend_rows
from gossamer.backends.cpu.backward import attend_backward
from gossamer.backends.cpu.lists import ListWriter, count, count_top_p, finish
from gossamer.backends.cpu.memory import keep_freed_memory
from gossamer.backends.cpu.native import (
    ENVIRONMENT,
    MAX_HEAD_DIM,
    active_isa,
    has_openmp,
    is_available,
    supported_isas,
    why_unavailable,
)
from gossamer.backends.cpu.pages import forget_slots, keep_bounds, page_scores, page_tokens
from gossamer.backends.cpu.quantised import QuantisedInputs
from gossamer.backends.cpu.rotary import pool_before_rotary
from gossamer.backends.cpu.scores import (
    NEAR_BYTES,
    PART_BYTES,
    antidiagonal_peaks,
    antidiagonal_scores,
    block_attention,
    block_mass,
    group_differences,
    group_shares,
    last_query_probe,
    mean_row_maxima,
    near_keys,
    pool_keys,
    pool_queries,
    pooled_scores,
    row_block_energy,
)
from gossamer.backends.cpu.slashes import exact_slashes
from gossamer.backends.cpu.tokens import collisions, label_scores

__all__ = [
    "ENVIRONMENT",
    "MAX_HEAD_DIM",
    "NEAR_BYTES",
    "PART_BYTES",
    "ListWriter",
    "QuantisedInputs",
    "active_isa",
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
    "has_openmp",
    "is_available",
    "keep_bounds",
    "keep_freed_memory",
    "label_scores",
    "last_query_probe",
    "mean_row_maxima",
    "near_keys",
    "page_scores",
    "page_tokens",
    "pool_before_rotary",
    "pool_keys",
    "pool_queries",
    "pooled_scores",
    "row_block_energy",
    "supported_isas",
    "why_unavailable",
]
