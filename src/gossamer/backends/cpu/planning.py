"""Planning in C++, for CPU tensors: scores, chosen blocks, pairs in a plan. The torch versions are the oracles.

`gossamer.estimators`, `gossamer.methods` and `gossamer.plan` call these functions where `serves` says so. From equal
scores the same sets are chosen, and pairs are counted exactly; scores agree with torch's up to the order of fp32 sums
and the rounding of exponentials, so plans can differ only where two scores are that close. ``GOSSAMER_PLANNER=torch``
(read at every call) keeps to the torch versions. All functions run on ``torch.get_num_threads()`` threads, on the
instruction set of `gossamer.backends.cpu.active_isa`, without the GIL; results do not depend on the number of threads.

Notation: B batch, H query heads, G key/value heads, S queries, T key slots, D head dimension.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gossamer.backends.cpu.native import DTYPES, MAX_HEAD_DIM, active_isa, is_available, kernels
from gossamer.backends.cpu.views import address, dense_rows, extent_view, tensor_view
from gossamer.plan import Extent, SparsePlan, ceil_div

__all__ = [
    "RULES",
    "Ranges",
    "antidiagonal_scores",
    "choose",
    "count_pairs",
    "enabled",
    "exact_slashes",
    "has_antidiagonal",
    "last_query_probe",
    "one_rule",
    "pool",
    "row_block_energy",
    "serves",
]

ENVIRONMENT = "GOSSAMER_PLANNER"


def serves(*tensors: Tensor) -> bool:
    """Whether planning with these tensors runs in C++: on the CPU, kernels built, head dimension 1 to 256.

    Raises:
        ValueError: ``GOSSAMER_PLANNER`` is neither empty nor ``torch``.
    """
    return enabled() and all(
        t.device.type == "cpu" and t.dtype in DTYPES and 1 <= t.shape[-1] <= MAX_HEAD_DIM for t in tensors
    )


def enabled() -> bool:
    """Whether the kernels are built and not switched off."""
    return not switched_off() and is_available() and not torch.compiler.is_compiling()


def switched_off() -> bool:
    """Whether ``GOSSAMER_PLANNER`` keeps to the torch versions, here and in `gossamer.backends.triton.planning`."""
    wanted = os.environ.get(ENVIRONMENT, "")
    if wanted not in ("", "torch"):
        raise ValueError(f"{ENVIRONMENT}={wanted!r} is not known; leave it empty, or say 'torch' for the torch planner")
    return bool(wanted)


def last_query_probe(q: Tensor, k: Tensor, *, scale: float, extent: Extent, last: int = 64) -> tuple[Tensor, Tensor]:
    """See `gossamer.estimators.last_query_probe`."""
    _check(q, k, k.shape[2], extent)
    if last < 1:
        raise ValueError(f"the probe needs at least one row, got last={last}")
    columns = torch.zeros(q.shape[0], q.shape[1], k.shape[2])
    diagonals = torch.zeros_like(columns)
    q, k, extent = dense_rows(q), dense_rows(k), _dense(extent)
    kernels().probe(
        active_isa(q.dtype),
        _score_call(q, k, extent, scale),
        last=last,
        columns=columns.data_ptr(),
        diagonals=diagonals.data_ptr(),
    )
    return columns, diagonals


def pool(x: Tensor, live: Tensor, block: int) -> Tensor:
    """Means over the live ones of each ``block`` tokens: fp32 ``[B, heads, blocks, D]``; 0 where none is live.

    ``x`` is ``[B, heads, tokens, D]``; ``live`` int64 ``[B, 2]``, the range of live tokens.
    """
    batch, heads, tokens, dim = x.shape
    if live.shape != (batch, 2) or block < 1:
        raise ValueError(f"pool needs a range for each of {batch} rows and a block of at least 1, got {block}, {live}")
    out = torch.zeros(batch, heads, ceil_div(tokens, block), dim)
    x, live = dense_rows(x), live.to(torch.int64).contiguous()
    kernels().pool(
        active_isa(x.dtype),
        tensor_view(x),
        block=block,
        live=live.data_ptr(),
        out=out.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return out


def row_block_energy(
    q: Tensor,
    pooled: Tensor,
    key_len: int,
    *,
    scale: float,
    extent: Extent,
    block_q: int,
    block_k: int,
    at: int,
    stop: int,
) -> Tensor:
    """`gossamer.estimators.row_block_energy` for query blocks ``at .. stop - 1``: fp32 ``[B, G, stop - at, N]``.

    ``pooled`` ``[B, G, N, D]`` has q's dtype.
    """
    _check(q, pooled, key_len, extent)
    if pooled.shape[2] != ceil_div(key_len, block_k):
        raise ValueError(f"{key_len} keys in blocks of {block_k} do not give {pooled.shape[2]} pooled keys")
    _check_blocks(q, block_q, at, stop)
    out = torch.empty(q.shape[0], pooled.shape[1], stop - at, pooled.shape[2])
    q, pooled, extent = dense_rows(q), dense_rows(pooled), _dense(extent)
    native = kernels()
    native.block_energy(
        active_isa(q.dtype),
        _score_call(q, pooled, extent, scale),
        native.Part(block_q=block_q, block_k=block_k, first=at, stop=stop),
        out=out.data_ptr(),
    )
    return out


def has_antidiagonal(block_q: int, block_k: int, stride: int) -> bool:
    """Whether `antidiagonal_scores` runs here: for any blocks that the stride divides."""
    return block_q % stride == 0 and block_k % stride == 0


def antidiagonal_scores(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    extent: Extent,
    block_q: int,
    block_k: int,
    stride: int,
    at: int,
    stop: int,
) -> Tensor:
    """`gossamer.estimators.antidiagonal_scores` for query blocks ``at .. stop - 1``: fp32 ``[B, H, stop - at, N]``.

    Working memory of a thread: some MiB, and some KiB a key block.
    """
    _check(q, k, k.shape[2], extent)
    if stride < 1 or block_q < 1 or block_k < 1 or block_q % stride or block_k % stride:
        raise ValueError(f"stride must divide block_q and block_k, got {stride} for blocks {block_q} and {block_k}")
    _check_blocks(q, block_q, at, stop)
    out = torch.empty(q.shape[0], q.shape[1], stop - at, ceil_div(k.shape[2], block_k))
    q, k, extent = dense_rows(q), dense_rows(k), _dense(extent)
    native = kernels()
    native.antidiagonal(
        active_isa(q.dtype),
        _score_call(q, k, extent, scale),
        native.Part(block_q=block_q, block_k=block_k, first=at, stop=stop),
        stride=stride,
        out=out.data_ptr(),
    )
    return out


# What `choose` knows to do with scores; scores outside what a row sees count as 0.
#   alpha: `gossamer.selectors.relative_to_max`, a number
#   budgets: `gossamer.selectors.top_k` among the seen ones, int64 [heads] (their scores elsewhere are -inf)
#   top_p: `gossamer.selectors.top_p` of the scores alone, a number or [heads], as all below
#   top_p_forced: the same with the forced ones first, which take their share of p (XAttention)
#   top_p_reaching, top_p_below, top_p_of_all_rows: the selectors of these names; all rows are those of the call
RULES = ("alpha", "budgets", "top_p", "top_p_forced", "top_p_reaching", "top_p_below", "top_p_of_all_rows")


def one_rule(scores: Tensor | None, rule: dict[str, Tensor | float]) -> tuple[str, Tensor | float] | None:
    """Name and value of the rule on scores; None without scores.

    Raises:
        TypeError: not exactly one of `RULES` with scores, or one without them.
    """
    if set(rule) - set(RULES) or len(rule) != (0 if scores is None else 1):
        raise TypeError(
            f"scores need exactly one rule of {', '.join(RULES)}, and no scores none; "
            f"got {'no ' if scores is None else ''}scores with {', '.join(rule) or 'no rule'}"
        )
    return next(iter(rule.items()), None)


@dataclass(frozen=True)
class Ranges:
    """Which candidates each row may take and must take: half-open ranges, int64.

    Fields:
        seen: ``[B, rows, 2]``; nothing else is chosen.
        forced: ``[B, rows, 2]``, of the heads that force any.
        leading: ``[B, 2]``, forced in every row of these heads.
    """

    seen: Tensor
    forced: Tensor
    leading: Tensor


def choose(
    ranges: Ranges,
    heads: int,
    width: int,
    *,
    scores: Tensor | None = None,
    bands: Tensor | None = None,
    band_origin: Tensor | None = None,
    forcing: Tensor | None = None,
    **rule: Tensor | float,
) -> tuple[Tensor, Tensor]:
    """Candidates of each row as a CSR: by a rule on scores, on block diagonals, in forced ranges; the union.

    Args:
        ranges: for B batch rows and the rows of each head.
        heads, width: heads, and candidates a row.
        scores: fp32 ``[B, heads, rows, width]``, with exactly one rule of `RULES`.
        bands: bool ``[B, heads, bands]``: candidates ``band_origin - band`` of the chosen bands.
        band_origin: int64 ``[B, rows]``.
        forcing: bool ``[B, heads]``, heads whose forced ranges count; default all.
        rule: see `RULES`.

    Returns:
        counts int64 ``[B, heads, rows]``; indices int32, ascending in each row.

    Raises:
        TypeError: not exactly one rule with scores, or one without them.
        ValueError: shapes disagree, or a share lies outside [0, 1].
    """
    batch, rows = ranges.seen.shape[:2]
    chosen = one_rule(scores, rule)
    if scores is not None and scores.shape != (batch, heads, rows, width):
        raise ValueError(f"choose needs scores [{batch}, {heads}, {rows}, {width}], got {tuple(scores.shape)}")
    if bands is not None and (bands.shape[:2] != (batch, heads) or band_origin is None):
        raise ValueError(f"bands must be [{batch}, {heads}, bands], with an origin, got {tuple(bands.shape)}")
    if forcing is None:
        forcing = torch.ones(batch, heads, dtype=torch.bool)
    name, value = chosen or ("", 0.0)
    if name == "top_p_of_all_rows" and rows * width >= 1 << 32:
        raise ValueError(
            f"one list of all rows takes less than 2^32 scores a head, got {rows} x {width}; widen the blocks"
        )
    # Held by name until the kernel is done: only their addresses are handed over.
    scores = None if scores is None else scores.float().contiguous()
    budgets = _int64(torch.as_tensor(value), (heads,)) if name == "budgets" else None
    shares = _shares(value, heads) if name.startswith("top_p") else None
    bands = None if bands is None else bands.contiguous().view(torch.uint8)
    band_origin = None if band_origin is None else _int64(band_origin, (batch, rows))
    forcing = forcing.expand(batch, heads).contiguous().view(torch.uint8)
    forced, leading = _int64(ranges.forced, (batch, rows, 2)), _int64(ranges.leading, (batch, 2))
    seen = _int64(ranges.seen, (batch, rows, 2))
    bits = torch.empty(batch * heads * rows, ceil_div(width, 64), dtype=torch.int64)
    counts = torch.empty(batch, heads, rows, dtype=torch.int64)
    native = kernels()
    rules = {"": "none", "alpha": "relative_to_max", "budgets": "top_k"}
    choice = native.Choice(
        batch=batch,
        heads=heads,
        blocks=rows,
        width=width,
        rule=getattr(native.Rule, rules.get(name, name)),
        alpha=float(value) if name == "alpha" else 0.0,
        scores=address(scores),
        budgets=address(budgets),
        shares=address(shares),
        diagonals=address(bands),
        diagonal_count=0 if bands is None else bands.shape[2],
        main_diagonal=address(band_origin),
        heads_that_force=address(forcing),
        forced=address(forced),
        forced_everywhere=address(leading),
        seen=address(seen),
    )
    chosen = native.ChosenBits(bits=bits.data_ptr(), counts=counts.data_ptr())
    native.choose(choice, chosen, threads=torch.get_num_threads())
    return counts, _listed(bits, counts, width)


def _listed(bits: Tensor, counts: Tensor, width: int) -> Tensor:
    """The set bits of each row, int32, ascending."""
    indptr = torch.zeros(counts.numel() + 1, dtype=torch.int64)
    torch.cumsum(counts.flatten(), 0, out=indptr[1:])
    indices = torch.empty(int(indptr[-1]), dtype=torch.int32)
    kernels().list_bits(
        bits=bits.data_ptr(),
        rows=counts.numel(),
        width=width,
        indptr=indptr.data_ptr(),
        indices=indices.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return indices


def exact_slashes(
    columns: Tensor, slashes: Tensor, extent: Extent, *, at: int, stop: int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """`gossamer.methods._exact_slash.exact_slash_blocks` for query blocks ``at .. stop - 1`` of 64.

    Args:
        columns, slashes: bool ``[B, H, T]``, chosen key slots and distances.

    Returns:
        counts int64 ``[B, H, stop - at]`` and ascending int32 indices of key blocks of 64; the same of key slots.
    """
    batch, heads, key_len = columns.shape
    if slashes.shape != columns.shape or extent.batch != batch:
        raise ValueError(
            f"columns and slashes must be [B, H, T] for the extent's {extent.batch} batch rows, "
            f"got {tuple(columns.shape)} and {tuple(slashes.shape)}"
        )
    if not 0 <= at <= stop:
        raise ValueError(f"query blocks must rise from 0, got {at} to {stop}")
    words = ceil_div(key_len, 64)
    padded = torch.nn.functional.pad(columns, (0, words * 64 - key_len)).unflatten(-1, (words, 64))
    indptr = torch.zeros(batch * heads + 1, dtype=torch.int64)
    torch.cumsum(slashes.sum(-1).flatten(), 0, out=indptr[1:])
    farthest_first = key_len - 1 - slashes.flip(-1).flatten(0, 1).nonzero()[:, 1]
    # Held by name until the kernel is done: only their addresses are handed over.
    distances = farthest_first.to(torch.int32).contiguous()
    column_words = (padded.long() << torch.arange(64)).sum(-1).contiguous()
    extent = _dense(extent)
    rows = (batch, heads, stop - at)
    block_bits = torch.empty(*rows, ceil_div(words, 64), dtype=torch.int64)
    column_bits = torch.empty(*rows, words, dtype=torch.int64)
    block_counts, column_counts = torch.empty(rows, dtype=torch.int64), torch.empty(rows, dtype=torch.int64)
    native = kernels()
    call = native.Slashes(
        extent=_extent_view(extent),
        heads=heads,
        key_len=key_len,
        first=at,
        stop=stop,
        distance_indptr=indptr.data_ptr(),
        distances=distances.data_ptr(),
        columns=column_words.data_ptr(),
    )
    native.slashes(
        call,
        blocks=native.ChosenBits(bits=block_bits.data_ptr(), counts=block_counts.data_ptr()),
        columns=native.ChosenBits(bits=column_bits.data_ptr(), counts=column_counts.data_ptr()),
        threads=torch.get_num_threads(),
    )
    return (
        (block_counts, _listed(block_bits, block_counts, words)),
        (column_counts, _listed(column_bits, column_counts, key_len)),
    )


def count_pairs(plan: SparsePlan) -> Tensor:
    """See `gossamer.plan.SparsePlan.count_pairs`; the plan must not be permuted."""
    if plan.q_order is not None or plan.k_order is not None:
        raise ValueError("pairs of a permuted plan are not counted in C++; use SparsePlan.count_pairs")
    counts = torch.zeros(plan.batch, plan.heads, dtype=torch.int64)
    # Held by name until the kernel is done: only their addresses are handed over.
    block_indptr, block_indices = plan.block_indptr.contiguous(), plan.block_indices.contiguous()
    column_indptr, column_indices = plan.column_indptr.contiguous(), plan.column_indices.contiguous()
    sink, window = torch.as_tensor(plan.sink).contiguous(), torch.as_tensor(plan.window).contiguous()
    extent = _dense(plan.extent)
    native = kernels()
    view = native.Plan(
        extent=_extent_view(extent, causal=plan.causal, limit=plan.limit),
        heads=plan.heads,
        query_len=plan.query_len,
        key_len=plan.key_len,
        block_q=plan.block_q,
        block_k=plan.block_k,
        block_indptr=block_indptr.data_ptr(),
        block_indices=block_indices.data_ptr(),
        column_group=plan.column_group,
        column_indptr=column_indptr.data_ptr(),
        column_indices=column_indices.data_ptr(),
        sink=sink.data_ptr(),
        window=window.data_ptr(),
        q_order=0,
        k_order=0,
    )
    native.count_pairs(view, counts=counts.data_ptr(), threads=torch.get_num_threads())
    return counts


def _check(q: Tensor, k: Tensor, key_len: int, extent: Extent) -> None:
    if q.ndim != 4 or k.ndim != 4 or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[1] % k.shape[1]:
        raise ValueError(
            "planning takes q [B, H, S, D] and keys [B, G, T, D] where G divides H, "
            f"got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    if q.dtype != k.dtype or q.dtype not in DTYPES or not serves(q, k):
        raise TypeError(
            "planning in C++ takes float32, bfloat16 or float16 on the CPU, head dimensions up to "
            f"{MAX_HEAD_DIM}, got {q.dtype} on {q.device} and {k.dtype} on {k.device}; convert them"
        )
    if extent.batch != q.shape[0]:
        raise ValueError(f"the extent has {extent.batch} batch rows, q has {q.shape[0]}")
    ends = extent.key_start + extent.key_count
    if extent.batch and int(ends.max()) > key_len:
        raise ValueError(f"the extent names live keys up to slot {int(ends.max())}, but there are {key_len}")


def _check_blocks(q: Tensor, block_q: int, at: int, stop: int) -> None:
    if not 0 <= at <= stop <= ceil_div(q.shape[2], block_q):
        raise ValueError(f"query blocks {at} to {stop} do not lie in {q.shape[2]} queries in blocks of {block_q}")


def _dense(extent: Extent) -> Extent:
    """With contiguous tensors."""
    return Extent(extent.query_start.contiguous(), extent.key_start.contiguous(), extent.key_count.contiguous())


def _extent_view(extent: Extent, *, causal: bool = True, limit: int | None = None) -> Any:
    return extent_view(extent.query_start, extent.key_start, extent.key_count, causal=causal, limit=limit)


def _score_call(q: Tensor, k: Tensor, extent: Extent, scale: float) -> Any:
    """Of dense rows and extents, which the caller holds."""
    return kernels().ScoreCall(
        q=tensor_view(q), k=tensor_view(k), extent=_extent_view(extent), scale=scale, threads=torch.get_num_threads()
    )


def _int64(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    return values.to(torch.int64).expand(shape).contiguous()


def _shares(value: Tensor | float, heads: int) -> Tensor:
    shares = torch.as_tensor(value, dtype=torch.float64).expand(heads).contiguous()
    outside = ~((shares >= 0) & (shares <= 1))
    if bool(outside.any()):
        raise ValueError(f"p must lie in [0, 1], got {shares[outside].tolist()[0]}")
    return shares
