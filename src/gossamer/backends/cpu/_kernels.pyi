"""Addresses are of contiguous CPU tensors of the stated dtype, 0 for none; the caller keeps them alive for the call.

An `Array` is an address with the number of elements there. What is made of them is checked as it is made: ValueError.
"""

from collections.abc import Sequence
from enum import Enum
from typing import overload

Array = tuple[int, int]

class DType(Enum):
    float32 = 0
    bfloat16 = 1
    float16 = 2

class Tensor:
    def __init__(self, data: int, shape: Sequence[int], strides: Sequence[int], dtype: DType) -> None: ...

class PageForm(Enum):
    rows = 0
    columns = 1
    key_tiles = 2
    value_tiles = 3

class Numbers:
    """Of a tensor ``[B, heads, rows, n]`` of any dtype."""

    def __init__(self, data: int, shape: Sequence[int], strides: Sequence[int]) -> None: ...

class Tokens:
    """Keys or values: of a tensor; of sequences in pages, with strides of pages and heads, and tables int32; or
    encoded ones before a tail. Scales, zeros and packed elements have the tail's dtype; codes and bitmaps are bytes."""

    @overload
    def __init__(self, rows: Tensor, /) -> None: ...
    @overload
    def __init__(
        self,
        *,
        data: int,
        shape: Sequence[int],
        strides: Sequence[int],
        form: PageForm,
        page: int,
        dim: int,
        dtype: DType,
        tokens: int,
        table: Array,
        batch: int = 1,
    ) -> None: ...
    @overload
    def __init__(
        self,
        *,
        tail: Tensor,
        codes: Numbers,
        scale: Numbers,
        zero: Numbers,
        bits: int,
        group: int,
        over_tokens: bool,
    ) -> None: ...
    @overload
    def __init__(self, *, tail: Tensor, bitmap: Numbers, packed: Numbers) -> None: ...

class Extent:
    """Of int64 ``[B]``."""

    def __init__(
        self,
        *,
        query_start: Array,
        query_count: Array,
        key_start: Array,
        key_count: Array,
        causal: bool,
        limit: int | None,
    ) -> None: ...

class Grid:
    def __init__(self, extent: Extent, *, block_q: int, block_k: int) -> None: ...

class Part:
    def __init__(self, first: int, stop: int) -> None: ...

class Plan:
    """Of the plan's tensors; row pointers are int64, all others int32. Orders that are absent have no elements."""

    def __init__(
        self,
        grid: Grid,
        *,
        heads: int,
        query_len: int,
        key_len: int,
        query_blocks: int,
        column_group: int,
        block_indptr: Array,
        block_indices: Array,
        column_indptr: Array,
        column_indices: Array,
        sink: Array,
        window: Array,
        q_order: Array,
        k_order: Array,
    ) -> None: ...

class AttentionCall:
    """Of fp32: lse ``[B, H, S]``, sinks ``[H]`` or none. Rows int64 ``[B, R]``, or none for all."""

    def __init__(
        self,
        *,
        q: Tensor,
        k: Tensor | Tokens,
        v: Tensor | Tokens,
        out: Tensor,
        lse: Array,
        sinks: Array,
        scale: float,
        softcap: float,
        threads: int,
        rows: Array,
    ) -> None: ...

class GradientCall:
    """Of an attended call, its output and LSE among it; what reaches them, fp32 ``[B, H, S]`` or none for the LSE.

    Gradients are zeros, to be written; None or no elements where none is asked for. Sinks fp32 ``[H]``.
    """

    def __init__(
        self,
        *,
        attended: AttentionCall,
        reaching: Tensor,
        reaching_lse: Array,
        queries: Tensor | None,
        keys: Tensor | None,
        values: Tensor | None,
        sinks: Array,
    ) -> None: ...

class ScoreCall:
    def __init__(self, *, q: Tensor, k: Tensor | Tokens, extent: Extent, scale: float, threads: int) -> None: ...

class Rule(Enum):
    none = 0
    relative_to_max = 1
    top_k = 2
    top_p = 3
    top_p_forced_first = 4
    top_p_reaching = 5
    top_p_below = 6
    top_p_of_all_rows = 7
    at_least = 8
    above = 9
    top_p_in_tiers = 10

class Choice:
    """Addresses of fp32 scores, int64 counts, fp64 shares, int64 ranges and origins, bool masks as bytes."""

    def __init__(
        self,
        *,
        batch: int,
        heads: int,
        rows: int,
        width: int,
        rule: Rule,
        alpha: float,
        scores: int,
        counts: int,
        shares: int,
        seen: int,
        forced: int,
        first: int,
        forced_heads: int,
        diagonals: int,
        diagonal_count: int,
        origin: int,
        mirrored: bool,
        everywhere: int,
        ruled_heads: int,
        early: int,
        taken: int,
        unite: bool,
    ) -> None: ...

class ChosenBits:
    """Addresses of int64: bits, ``ceil(width / 64)`` a row, and how many are set."""

    def __init__(self, *, bits: int, counts: int) -> None: ...

class Slashes:
    """Addresses of bool ``[B, heads, width]``, as bytes."""

    def __init__(self, *, extent: Extent, heads: int, width: int, part: Part, columns: int, distances: int) -> None: ...

class PageChoice:
    """Of pages of ``size`` keys; keys int64 ``[B]``."""

    def __init__(
        self, *, heads: int, pages: int, size: int, keys: Array, sinks: int, recent: int, count: int
    ) -> None: ...

class LabelType(Enum):
    float32 = 0
    bfloat16 = 1
    float16 = 2
    uint8 = 3
    uint4 = 4

class Labels:
    """Address of ``[B, lists, channels, tokens]``, of two codes a byte where they are uint4; three strides."""

    def __init__(self, *, codes: int, shape: Sequence[int], strides: Sequence[int], type: LabelType) -> None: ...

class QuantisedInputs:
    """Of ``[rows, features]`` at an address, with the stride of rows in elements; writes uint8 to ``out``."""

    def __init__(
        self,
        isa: str,
        x: int,
        *,
        shape: Sequence[int],
        stride: int,
        dtype: DType,
        scale: float,
        out: Array,
        threads: int,
    ) -> None: ...
    @property
    def beyond(self) -> int: ...
    @property
    def lost(self) -> list[int]: ...
    def add(
        self, *, weight: Array, by_row: Array, out: int, shape: Sequence[int], stride: int, dtype: DType, threads: int
    ) -> None: ...

def attend(isa: str, plan: Plan, call: AttentionCall, /) -> None: ...
def attend_backward(isa: str, plan: Plan, call: GradientCall, /) -> None: ...
def probe(isa: str, call: ScoreCall, *, last: int, width: int, columns: int, diagonals: int) -> None: ...
def pool_keys(isa: str, k: Tensor | Tokens, grid: Grid, *, blocks: int, out: int, threads: int) -> None: ...
def pool_queries(isa: str, q: Tensor, grid: Grid, *, blocks: int, out: int, threads: int) -> None: ...
def pool_turned(
    isa: str,
    x: Tensor | Tokens,
    *,
    cos: Array,
    sin: Array,
    grid: Grid,
    keys: bool,
    blocks: int,
    mean: int,
    low: int,
    high: int,
    threads: int,
) -> None: ...
def pooled_products(
    isa: str, queries: Tensor, keys: Tensor, grid: Grid, part: Part, *, out: int, threads: int
) -> None: ...
def pooled_shares(
    isa: str, queries: Tensor, keys: Tensor, grid: Grid, part: Part, *, scale: float, out: int, threads: int
) -> None: ...
def block_mass(
    isa: str, call: ScoreCall, grid: Grid, part: Part, *, key_blocks: int, lse: tuple[int, int], out: int
) -> None: ...
def block_energy(
    isa: str, call: ScoreCall, grid: Grid, part: Part, *, per_head: bool, ended: bool, out: int
) -> None: ...
def group_shares(
    isa: str, call: ScoreCall, means: Tensor, grid: Grid, group: int, part: Part, *, width: int, out: int
) -> None: ...
def near_keys(
    isa: str,
    call: ScoreCall,
    means: Tensor,
    grid: Grid,
    *,
    anchors: int,
    group: int,
    part: Part,
    width: int,
    bars: int,
    left_out: int,
    ranges: int,
    chosen: ChosenBits,
) -> None: ...
def group_differences(
    isa: str,
    call: ScoreCall,
    means: Tensor,
    grid: Grid,
    *,
    anchors: int,
    group: int,
    part: Part,
    width: int,
    out: int,
) -> None: ...
def antidiagonal(
    isa: str, call: ScoreCall, grid: Grid, stride: int, part: Part, *, key_blocks: int, out: int
) -> None: ...
def antidiagonal_peaks(
    isa: str,
    call: ScoreCall,
    grid: Grid,
    stride: int,
    part: Part,
    *,
    key_blocks: int,
    near: float,
    sums: int,
    attained: int,
) -> None: ...
def row_maxima(
    isa: str, call: ScoreCall, grid: Grid, part: Part, *, regions: int, region_count: int, out: int
) -> None: ...
def choose(choice: Choice, chosen: ChosenBits, threads: int) -> None: ...
def count_top_p(*, scores: int, rows: int, width: int, shares: int, counts: int, threads: int) -> None: ...
def list_bits(*, bits: int, rows: int, width: int, starts: int, indices: int, threads: int) -> None: ...
def place_lists(*, lists: int, counts: int, rows: int, starts: int, indices: int, threads: int) -> None: ...
def slashes(call: Slashes, *, blocks: ChosenBits, columns: ChosenBits, threads: int) -> None: ...
def count_pairs(plan: Plan, *, counts: int, threads: int) -> None: ...
def page_scores(isa: str, queries: Tensor, pages: Tokens, choice: PageChoice, *, out: int, threads: int) -> None: ...
def page_tokens(
    isa: str,
    scores: Array,
    *,
    query_heads: int,
    choice: PageChoice,
    room: int,
    tokens: Array,
    counts: Array,
    threads: int,
) -> None: ...
def keep_bounds(
    isa: str, keys: Tokens, *, counts: Array, bounds: Array, dtype: DType, size: int, held: Array, threads: int
) -> None: ...
def forget_slots(slots: Array, *, page: int, held: Array) -> None: ...
def label_scores(
    isa: str,
    queries: Tensor,
    labels: Labels,
    *,
    low: Tensor | None,
    step: Tensor | None,
    keys: Array,
    out: int,
    threads: int,
) -> None: ...
def collisions(
    isa: str,
    *,
    queries: Array,
    heads: Sequence[int],
    codes: int,
    shape: Sequence[int],
    strides: Sequence[int],
    out: Array,
    threads: int,
) -> None: ...

class ValueType(Enum):
    float32 = 0
    bfloat16 = 1
    float16 = 2
    int8 = 3

class SparseWeight:
    """``[rows, columns]``: a bitmap uint8, numbers of one type row by row, where each row's begin int64, and of int8
    each row's scale fp32."""

    def __init__(
        self, *, shape: Sequence[int], bitmap: Array, values: Array, type: ValueType, starts: Array, scale: Array
    ) -> None: ...

class LevelWeight:
    """``[rows, columns]``: codes uint8, levels fp16, and bits of salient columns."""

    def __init__(
        self, *, shape: Sequence[int], block: int, codes: Array, levels: Array, salient: Array, rounded: bool
    ) -> None: ...

def multiply(
    isa: str,
    weight: SparseWeight | LevelWeight,
    *,
    inputs: Array,
    stride: int,
    bias: Array,
    out: Array,
    dtype: DType,
    threads: int,
) -> None: ...
def make_whole(
    isa: str, weight: SparseWeight | LevelWeight, *, first: int, out: Array, dtype: DType, threads: int
) -> None: ...
def prefer_huge_pages(begin: int, size: int, /) -> None: ...
def supported() -> list[str]: ...
def prefers_bf16_dot() -> bool: ...
def has_openmp() -> bool: ...
