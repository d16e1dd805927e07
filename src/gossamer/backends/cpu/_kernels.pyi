"""Addresses are of contiguous CPU tensors of the stated dtype, 0 for none; the caller keeps them alive for the call."""

from collections.abc import Sequence
from enum import Enum

class DType(Enum):
    float32 = 0
    bfloat16 = 1
    float16 = 2

class Tensor:
    def __init__(self, data: int, shape: Sequence[int], strides: Sequence[int], dtype: DType) -> None: ...

class Extent:
    def __init__(
        self, *, batch: int, query_start: int, key_start: int, key_count: int, causal: bool, limit: int | None
    ) -> None: ...

class Plan:
    def __init__(
        self,
        *,
        extent: Extent,
        heads: int,
        query_len: int,
        key_len: int,
        block_q: int,
        block_k: int,
        block_indptr: int,
        block_indices: int,
        column_group: int,
        column_indptr: int,
        column_indices: int,
        sink: int,
        window: int,
        q_order: int,
        k_order: int,
    ) -> None: ...

class AttentionCall:
    def __init__(
        self,
        *,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: int,
        sinks: int,
        scale: float,
        softcap: float,
        threads: int,
    ) -> None: ...

class ScoreCall:
    def __init__(self, *, q: Tensor, k: Tensor, extent: Extent, scale: float, threads: int) -> None: ...

class Part:
    def __init__(self, *, block_q: int, block_k: int, first: int, stop: int) -> None: ...

class Rule(Enum):
    none = 0
    relative_to_max = 1
    top_k = 2
    top_p = 3
    top_p_forced = 4
    top_p_reaching = 5
    top_p_below = 6
    top_p_of_all_rows = 7

class Choice:
    def __init__(
        self,
        *,
        batch: int,
        heads: int,
        blocks: int,
        width: int,
        rule: Rule,
        alpha: float,
        scores: int,
        budgets: int,
        shares: int,
        diagonals: int,
        diagonal_count: int,
        main_diagonal: int,
        heads_that_force: int,
        forced: int,
        forced_everywhere: int,
        seen: int,
    ) -> None: ...

class Slashes:
    def __init__(
        self,
        *,
        extent: Extent,
        heads: int,
        key_len: int,
        first: int,
        stop: int,
        distance_indptr: int,
        distances: int,
        columns: int,
    ) -> None: ...

class ChosenBits:
    def __init__(self, *, bits: int, counts: int) -> None: ...

def attend(isa: str, plan: Plan, call: AttentionCall, /) -> None: ...
def probe(isa: str, call: ScoreCall, *, last: int, columns: int, diagonals: int) -> None: ...
def pool(isa: str, x: Tensor, *, block: int, live: int, out: int, threads: int) -> None: ...
def block_energy(isa: str, call: ScoreCall, part: Part, *, out: int) -> None: ...
def antidiagonal(isa: str, call: ScoreCall, part: Part, *, stride: int, out: int) -> None: ...
def choose(choice: Choice, chosen: ChosenBits, *, threads: int) -> None: ...
def list_bits(*, bits: int, rows: int, width: int, indptr: int, indices: int, threads: int) -> None: ...
def slashes(call: Slashes, *, blocks: ChosenBits, columns: ChosenBits, threads: int) -> None: ...
def count_pairs(plan: Plan, *, counts: int, threads: int) -> None: ...
def prefer_huge_pages(begin: int, size: int, /) -> None: ...
def supported() -> list[str]: ...
def prefers_bf16_dot() -> bool: ...
def has_openmp() -> bool: ...
