"""Planning in Triton, for CUDA tensors: scores, chosen blocks, pairs in a plan. Not yet measured on a GPU.

The interface of `gossamer.backends.cpu.planning`, with the same meaning; the torch versions are the oracles, and the sets
that are chosen are the same. ``GOSSAMER_PLANNER=torch`` keeps to the torch versions. Scores repeat bit for bit: no
kernel adds floats atomically.

Nothing here waits for the device, but for `fetch`, which hands numbers to the host: `choose`, `build` and `count_pairs`
call it once each. `BitLists` keeps a choice on the device until its size is fetched.

Notation: B batch, H query heads, G key/value heads, S queries, T key slots, D head dimension, M query blocks, N key
blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor

from gossamer.backends import triton as executor
from gossamer.backends.cpu.planning import Ranges, switched_off
from gossamer.backends.triton.config import power_of_two
from gossamer.plan import Extent, SparsePlan, ceil_div

__all__ = [
    "BitLists",
    "Ranges",
    "antidiagonal_scores",
    "build",
    "choose",
    "count_pairs",
    "enabled",
    "fetch",
    "has_antidiagonal",
    "last_query_probe",
    "pool",
    "row_block_energy",
    "serves",
]

_LOG2_E = math.log2(math.e)
_SPLIT_KEYS = 2048  # of the probe's first pass, a program
_SPAN_TILES = 8  # of its second pass
_PROBE_TILE = 64  # its rows and keys: a tile of twice the keys would not fit the registers when it is skewed
_FP32_ROWS = 32  # of a tile of a product without tensor cores, which is unrolled and has to fit the registers
_MERGE_TILE = 1024
_MOST_ROWS = 256  # of a tile of energies
_CELLS = 64  # rows and columns of a tile of antidiagonal cells, where a block has no more
_MOST_CELLS = 128
_ROW_TILE = 4096  # candidates that a program holds at once
_BITMAP_BYTES = 1 << 30


def serves(*tensors: Tensor) -> bool:
    """Whether planning with these tensors runs in Triton: on one device, head dimension 1 to 256.

    CPU tensors need Triton's interpreter.

    Raises:
        ValueError: ``GOSSAMER_PLANNER`` is neither empty nor ``torch``.
    """
    device = tensors[0].device
    runs = device.type == "cuda" or (device.type == "cpu" and executor.interprets())
    return (
        enabled()
        and runs
        and all(
            t.device == device and t.dtype in executor.DTYPES and 1 <= t.shape[-1] <= executor.MAX_HEAD_DIM
            for t in tensors
        )
    )


def enabled() -> bool:
    """Whether Triton is installed and its planner not switched off."""
    return not switched_off() and executor.is_available() and not torch.compiler.is_compiling()


def fetch(numbers: Tensor) -> list[int]:
    """The one place where planning waits for the device."""
    return numbers.tolist()


def last_query_probe(q: Tensor, k: Tensor, *, scale: float, extent: Extent, last: int = 64) -> tuple[Tensor, Tensor]:
    """See `gossamer.estimators.last_query_probe`. Logits of bf16 and fp16 inputs stay in fp32."""
    _check(q, k, k.shape[2], extent)
    if last < 1:
        raise ValueError(f"the probe needs at least one row, got last={last}")
    kernels = _kernels()
    batch, heads, query_len, dim = q.shape
    groups, key_len = k.shape[1], k.shape[2]
    rows = min(last, query_len)
    columns = torch.zeros(batch, heads, key_len, device=q.device)
    diagonals = torch.zeros_like(columns)
    if rows == 0 or key_len == 0:
        return columns, diagonals
    q, k = _dense_rows(q), _dense_rows(k)
    narrow = q.element_size() > 2 or dim > 128
    row_tile, key_tile, mass_tile = _probe_tiles(q)
    row_tile = min(row_tile, power_of_two(rows))
    row_tiles, tiles = ceil_div(rows, row_tile), ceil_div(key_len, mass_tile)
    splits, spans = ceil_div(key_len, _SPLIT_KEYS), ceil_div(tiles, _SPAN_TILES)
    positions = _extent_on(extent, q.device)
    top = torch.empty(batch, heads, splits, row_tiles * row_tile, device=q.device)
    total = torch.empty_like(top)
    inputs = (*q.stride()[:3], *k.stride()[:3], positions, batch, groups, query_len)
    tile = dict(SHARE=heads // groups, ROW_TILES=row_tiles, ROWS=row_tile) | _operands(q)
    _run(
        kernels.probe_sums, batch * heads * splits * row_tiles, q, k, top, total, *inputs, rows, splits,
        scale * _LOG2_E, KEYS=key_tile, STEPS=_SPLIT_KEYS // key_tile, **tile, num_warps=4,
        num_stages=1 if narrow else 3,
    )  # fmt: skip
    lse = _merge_sums(top, total)
    partial = torch.empty(batch, heads, row_tiles, tiles, mass_tile + row_tile, device=q.device)
    _run(
        kernels.probe_mass, batch * heads * spans, q, k, lse, columns, partial, *inputs, key_len, rows, tiles, spans,
        scale * _LOG2_E, KEYS=mass_tile, STEPS=_SPAN_TILES, **tile, num_warps=4, num_stages=1 if narrow else 2,
    )  # fmt: skip
    pieces = ceil_div(key_len, _MERGE_TILE)
    _run(
        kernels.merge_diagonals, batch * heads * pieces, partial, diagonals, positions, batch, heads, query_len,
        key_len, rows, tiles, pieces, ROW_TILES=row_tiles, ROWS=row_tile, KEYS=mass_tile, TILE=_MERGE_TILE,
    )  # fmt: skip
    return columns, diagonals


def _probe_tiles(q: Tensor) -> tuple[int, int, int]:
    """Rows, keys of the first pass, and keys of the second: no fewer than rows, since a diagonal crosses two tiles."""
    if q.element_size() > 2:
        return _FP32_ROWS, 32 if q.shape[-1] <= 64 else 16, _FP32_ROWS
    return _PROBE_TILE, _PROBE_TILE if q.shape[-1] > 128 else 2 * _PROBE_TILE, _PROBE_TILE


def _merge_sums(top: Tensor, total: Tensor) -> Tensor:
    """Base-2 log-sum-exp over splits, dimension 2; 0 for rows that see nothing."""
    highest = top.amax(dim=2, keepdim=True)
    highest = highest.masked_fill(highest == float("-inf"), 0.0)
    merged = (total * torch.exp2(top - highest)).sum(dim=2, keepdim=True)
    lse = (highest + merged.log2()).squeeze(2)
    return lse.masked_fill_(lse == float("-inf"), 0.0)


def pool(x: Tensor, live: Tensor, block: int) -> Tensor:
    """Means over the live ones of each ``block`` tokens: fp32 ``[B, heads, blocks, D]``; 0 where none is live.

    ``x`` is ``[B, heads, tokens, D]``; ``live`` int64 ``[B, 2]``, the range of live tokens.
    """
    batch, heads, tokens, dim = x.shape
    if live.shape != (batch, 2) or block < 1:
        raise ValueError(f"pool needs a range for each of {batch} rows and a block of at least 1, got {block}, {live}")
    blocks = ceil_div(tokens, block)
    out = torch.empty(batch, heads, blocks, dim, device=x.device)
    x, live = _dense_rows(x), _int32_on(live, x.device)
    tile = min(64, power_of_two(block))
    _run(
        _kernels().pool_blocks, batch * heads * blocks, x, live, out, *x.stride()[:3], heads, tokens, blocks, block,
        DIM=dim, BLOCK_D=power_of_two(dim), TILE=min(tile, 8192 // power_of_two(dim)), num_warps=4,
    )  # fmt: skip
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

    ``pooled`` ``[B, G, N, D]`` has q's dtype. Logits of bf16 and fp16 inputs stay in fp32.
    """
    _check(q, pooled, key_len, extent)
    if pooled.shape[2] != ceil_div(key_len, block_k):
        raise ValueError(f"{key_len} keys in blocks of {block_k} do not give {pooled.shape[2]} pooled keys")
    if not 0 <= at <= stop <= ceil_div(q.shape[2], block_q):
        raise ValueError(f"query blocks {at} to {stop} do not lie in {q.shape[2]} queries in blocks of {block_q}")
    kernels = _kernels()
    batch, heads, query_len, dim = q.shape
    groups, key_blocks = pooled.shape[1], pooled.shape[2]
    blocks, share = stop - at, heads // groups
    narrow = q.element_size() > 2 or dim > 128
    tile_m, tile_n, warps = _energy_tiles(q, block_q * share)
    tiles, parts = ceil_div(key_blocks, tile_n), ceil_div(block_q * share, tile_m)
    energy = torch.zeros(batch, groups, blocks, parts, key_blocks, device=q.device)
    if energy.numel() == 0:
        return energy[:, :, :, 0]
    q, pooled = _dense_rows(q), _dense_rows(pooled)
    top = torch.empty(batch, groups, blocks, parts, device=q.device)
    reference = torch.full((*top.shape, tiles), float("-inf"), device=q.device)
    _run(
        kernels.row_energies, top.numel(), q, pooled, energy, reference, top, *q.stride()[:3], *pooled.stride()[:3],
        _extent_on(extent, q.device), batch, groups, query_len, key_blocks, at, blocks, tiles, scale * _LOG2_E,
        SHARE=share, BLOCK_Q=block_q, BLOCK_K=block_k, TILE_M=tile_m, PARTS=parts, TILE_N=tile_n, **_operands(q),
        num_warps=warps, num_stages=1 if narrow else 3,
    )  # fmt: skip
    out = energy[:, :, :, 0] if parts == 1 else torch.empty(batch, groups, blocks, key_blocks, device=q.device)
    pieces = ceil_div(key_blocks, _MERGE_TILE)
    _run(
        kernels.merge_energies, batch * groups * blocks * pieces, energy, reference, top, out, key_blocks, tiles,
        pieces, PARTS=parts, TILE_N=tile_n, TILE=_MERGE_TILE,
    )  # fmt: skip
    return out


def _energy_tiles(q: Tensor, rows: int) -> tuple[int, int, int]:
    """Rows, pooled keys and warps for query blocks of ``rows`` rows."""
    wide = q.shape[-1] > 128
    if q.element_size() > 2:
        return min(64, power_of_two(rows)), 16 if wide else 32, 8 if wide else 4
    tile_m = min(64 if wide else _MOST_ROWS, power_of_two(rows))
    return tile_m, 32 if wide else 64, 8 if tile_m >= 128 else 4


def has_antidiagonal(block_q: int, block_k: int, stride: int) -> bool:
    """Whether `antidiagonal_scores` runs here: blocks of at most 128 cells."""
    return max(block_q, block_k) <= _MOST_CELLS * stride


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

    For blocks that `has_antidiagonal` names.
    """
    _check(q, k, k.shape[2], extent)
    batch, heads, query_len, _ = q.shape
    key_blocks = ceil_div(k.shape[2], block_k)
    q, k = _dense_rows(q), _dense_rows(k)
    positions = _extent_on(extent, q.device)
    row_cells, key_cells = block_q // stride, block_k // stride
    row_lanes, key_lanes = _lanes(row_cells), _lanes(key_cells)
    cells = _cells(q)
    row_blocks, tile_blocks = max(1, cells // row_lanes), max(1, cells // key_lanes)
    mass = torch.zeros(batch, heads, stop - at, key_blocks, device=q.device)
    row_groups = ceil_div(stop - at, row_blocks)
    _run(
        _kernels().antidiagonal_mass, batch * heads * row_groups, q, k, mass, *q.stride()[:3], *k.stride()[:3],
        positions, batch, heads, query_len, key_blocks, at, stop, row_groups, scale * _LOG2_E / stride,
        SHARE=heads // k.shape[1], STRIDE=stride, ROW_CELLS=row_cells, ROW_BLOCKS=row_blocks, ROW_LANES=row_lanes,
        KEY_CELLS=key_cells, KEY_BLOCKS=tile_blocks, KEY_LANES=key_lanes, **_operands(q),
        num_warps=4, num_stages=2 if q.element_size() == 2 else 1,
    )  # fmt: skip
    return mass


def _cells(q: Tensor) -> int:
    return _FP32_ROWS if q.element_size() > 2 else _CELLS


def _lanes(cells: int) -> int:
    return 1 << (cells - 1).bit_length()


class BitLists:
    """Chosen candidates of the rows of all heads, as bits on the device until their number is known.

    Fields:
        bits: int32 ``[B, heads, rows, ceil(width / 32)]``; counts: int32 ``[B, heads, rows]``.
    """

    RULES: ClassVar = {"alpha", "budgets"}  # of `gossamer.backends.cpu.planning.RULES`; the others come as masks

    def __init__(self, batch: int, heads: int, rows: int, width: int, device: torch.device) -> None:
        self.width = width
        self.bits = torch.empty(batch, heads, rows, ceil_div(width, 32), dtype=torch.int32, device=device)
        self.counts = torch.zeros(batch, heads, rows, dtype=torch.int32, device=device)

    def choose(
        self,
        at: int,
        ranges: Ranges,
        *,
        scores: Tensor | None = None,
        alpha: float | None = None,
        budgets: Tensor | None = None,
        bands: Tensor | None = None,
        band_origin: Tensor | None = None,
        forcing: Tensor | None = None,
    ) -> None:
        """Rows ``at ..`` by the rules of `choose`."""
        batch, heads, all_rows, words = self.bits.shape
        rows = ranges.seen.shape[1]
        device = self.bits.device
        if scores is not None and (
            scores.shape != (batch, heads, rows, self.width) or (alpha is None) == (budgets is None)
        ):
            raise ValueError(
                f"choose needs scores [{batch}, {heads}, {rows}, {self.width}] and one rule, got "
                f"{tuple(scores.shape)}, alpha {alpha} and {'no ' if budgets is None else ''}budgets"
            )
        if bands is not None and (bands.shape[:2] != (batch, heads) or band_origin is None):
            raise ValueError(f"bands must be [{batch}, {heads}, bands], with an origin, got {tuple(bands.shape)}")
        rule = 0 if scores is None else 2 if budgets is not None else 3 if alpha == 0 else 1
        nothing = self.counts
        if forcing is None:
            forcing = torch.ones(batch, heads, dtype=torch.bool, device=device)
        tile = min(_ROW_TILE, max(32, power_of_two(self.width)))
        _run(
            _kernels().choose_rows, batch * heads * rows,
            nothing if scores is None else scores.float().contiguous(),
            _int32_on(ranges.seen, device), _int32_on(ranges.forced, device), _int32_on(ranges.leading, device),
            _flags_on(forcing.expand(batch, heads), device),
            nothing if budgets is None else _int32_on(budgets.expand(heads), device),
            nothing if bands is None else _flags_on(bands, device),
            nothing if band_origin is None else _int32_on(band_origin, device),
            self.bits, self.counts, heads, rows, self.width, at, all_rows,
            0 if bands is None else bands.shape[2], words, 0.0 if alpha is None else float(alpha),
            RULE=rule, BANDS=bands is not None, ONE=self.width <= tile, TILE=tile,
            num_warps=4 if tile > 512 else 1,
        )  # fmt: skip

    def take(self, mask: Tensor, at: int = 0) -> None:
        """Rows ``at ..`` from a mask, bool ``[B, heads, rows, width]``."""
        batch, heads, rows, _ = mask.shape
        if rows != self.counts.shape[2]:
            part = BitLists(batch, heads, rows, self.width, self.bits.device)
            part.take(mask)
            self.bits[:, :, at : at + rows] = part.bits
            self.counts[:, :, at : at + rows] = part.counts
            return
        pieces = ceil_div(self.width, _MERGE_TILE)
        _run(
            _kernels().pack_mask, self.counts.numel() * pieces, _flags_on(mask, mask.device), self.bits, self.width,
            self.bits.shape[3], pieces, TILE=_MERGE_TILE,
        )  # fmt: skip
        torch.sum(mask, dim=-1, dtype=torch.int32, out=self.counts)

    def build(self) -> tuple[Tensor, Tensor]:
        """As CSR: row pointers int64 and ascending indices int32. Waits for the device."""
        return build(self)[0][0]


def build(*lists: BitLists, numbers: Sequence[Tensor] = ()) -> tuple[list[tuple[Tensor, Tensor]], list[int]]:
    """Each of the lists as CSR, and the values of scalar tensors, with one wait for the device in all."""
    pointers = []
    for part in lists:
        indptr = torch.zeros(part.counts.numel() + 1, dtype=torch.int64, device=part.counts.device)
        torch.cumsum(part.counts.flatten(), 0, out=indptr[1:])
        pointers.append(indptr)
    found = fetch(torch.stack([indptr[-1] for indptr in pointers] + list(numbers)))
    built = []
    for part, indptr, size in zip(lists, pointers, found, strict=False):
        indices = torch.empty(size, dtype=torch.int32, device=indptr.device)
        if size:
            _run(
                _kernels().list_bits, part.counts.numel(), part.bits, indptr, indices, part.bits.shape[3],
                TILE=min(32, power_of_two(part.bits.shape[3])), num_warps=4,
            )  # fmt: skip
        built.append((indptr, indices))
    return built, found[len(lists) :]


def choose(
    ranges: Ranges,
    heads: int,
    width: int,
    *,
    scores: Tensor | None = None,
    alpha: float | None = None,
    budgets: Tensor | None = None,
    bands: Tensor | None = None,
    band_origin: Tensor | None = None,
    forcing: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `gossamer.backends.cpu.planning.choose`. On the device of ``ranges.seen``. Waits for the device."""
    batch, rows = ranges.seen.shape[:2]
    lists = BitLists(batch, heads, rows, width, ranges.seen.device)
    lists.choose(
        0,
        ranges,
        scores=scores,
        alpha=alpha,
        budgets=budgets,
        bands=bands,
        band_origin=band_origin,
        forcing=forcing,
    )
    _, indices = lists.build()
    return lists.counts.long(), indices


def counts_pairs_of(plan: SparsePlan) -> bool:
    """Whether `count_pairs` serves a plan: on the device, not permuted, its bitmaps of moderate size."""
    if plan.q_order is not None or plan.k_order is not None:
        return False
    rows = plan.batch * plan.heads
    words = plan.num_query_blocks * ceil_div(plan.num_key_blocks, 32)
    if plan.column_indices.numel():
        words += plan.num_column_groups * ceil_div(plan.key_len, 32)
    return 4 * rows * words <= _BITMAP_BYTES


def count_pairs(plan: SparsePlan) -> Tensor:
    """See `gossamer.plan.SparsePlan.count_pairs`; the plan must not be permuted. Waits for the device."""
    if plan.q_order is not None or plan.k_order is not None:
        raise ValueError("pairs of a permuted plan are not counted in Triton; use SparsePlan.count_pairs")
    blocks = columns = None
    if plan.block_indices.numel():
        blocks = _marked(plan.block_indptr, plan.block_indices, plan.num_key_blocks)
    if plan.column_indices.numel():
        columns = _marked(plan.column_indptr, plan.column_indices, plan.key_len)
    pairs = pairs_of_bits(
        blocks,
        columns,
        heads=plan.heads,
        query_len=plan.query_len,
        key_len=plan.key_len,
        extent=plan.extent,
        block_q=plan.block_q,
        block_k=plan.block_k,
        column_group=plan.column_group,
        sink=torch.as_tensor(plan.sink),
        window=torch.as_tensor(plan.window),
        causal=plan.causal,
        limit=plan.limit,
        device=plan.device,
    )
    found = fetch(pairs.flatten())
    return torch.tensor(found, dtype=torch.int64).view(plan.batch, plan.heads)


def _marked(indptr: Tensor, indices: Tensor, width: int) -> Tensor:
    from gossamer.backends.triton.kernels.columns import mark_blocks

    rows, words = indptr.numel() - 1, ceil_div(width, 32)
    bits = torch.zeros(rows, words, dtype=torch.int32, device=indices.device)
    _run(mark_blocks, rows, indptr, indices, bits, 0, words, TILE=128)
    return bits


def pairs_of_bits(
    blocks: Tensor | None,
    columns: Tensor | None,
    *,
    heads: int,
    query_len: int,
    key_len: int,
    extent: Extent,
    block_q: int,
    block_k: int,
    column_group: int,
    sink: Tensor | int,
    window: Tensor | int,
    causal: bool,
    limit: int | None,
    device: torch.device,
) -> Tensor:
    """Pairs that a plan computes, int64 ``[B, heads]`` on the device, from the bits of its blocks and columns.

    ``blocks`` int32 ``[.., M, ceil(N / 32)]``, ``columns`` int32 ``[.., ceil(M / column_group), ceil(T / 32)]``; the
    rest are the plan's fields.
    """
    kernels = _kernels()
    query_blocks, key_blocks = ceil_div(query_len, block_q), ceil_div(key_len, block_k)
    words, column_words = ceil_div(key_blocks, 32), ceil_div(key_len, 32)
    lists = ceil_div(query_blocks, column_group)
    pairs = torch.zeros(extent.batch, heads, query_blocks, dtype=torch.int64, device=device)
    if pairs.numel() == 0 or key_len == 0:
        return pairs.sum(dim=2)
    unlimited = 1 << 29
    nothing = torch.zeros(1, dtype=torch.int32, device=device)
    listed = nothing
    if columns is not None:
        listed = torch.empty(extent.batch * heads * lists, key_blocks, dtype=torch.int32, device=device)
        pieces = ceil_div(key_blocks, 128)
        _run(
            kernels.count_columns, listed.shape[0] * pieces, columns, listed, column_words, key_blocks, pieces,
            BLOCK_K=block_k, TILE=128,
        )  # fmt: skip
    _run(
        kernels.count_tiles, pairs.numel(), nothing if blocks is None else blocks,
        nothing if columns is None else columns, listed, _per_head(sink, heads, device).clamp(max=unlimited),
        _per_head(window, heads, device).clamp(max=unlimited), _extent_on(extent, device), pairs, extent.batch, heads,
        query_len, query_blocks, key_blocks, words, column_words, lists, column_group,
        unlimited if limit is None else min(limit, unlimited), BLOCK_Q=block_q, BLOCK_K=block_k,
        HAS_BLOCKS=blocks is not None, HAS_COLUMNS=columns is not None, CAUSAL=causal, LIMITED=limit is not None,
        TILE=128, EDGE_M=min(64, power_of_two(block_q)), EDGE_N=min(64, power_of_two(block_k)), num_warps=4,
    )  # fmt: skip
    return pairs.sum(dim=2)


def _kernels() -> Any:
    failure = executor.why_unavailable()
    if failure is not None:
        raise RuntimeError(failure)
    from gossamer.backends.triton import planning_kernels

    return planning_kernels


def _run(kernel: Any, programs: int, *arguments: Any, **meta: Any) -> None:
    if programs == 0:
        return
    device = arguments[0].device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[(programs,)](*arguments, **meta)


def _check(q: Tensor, k: Tensor, key_len: int, extent: Extent) -> None:
    if q.ndim != 4 or k.ndim != 4 or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[1] % k.shape[1]:
        raise ValueError(
            "planning takes q [B, H, S, D] and keys [B, G, T, D] where G divides H, "
            f"got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    if q.dtype != k.dtype or not serves(q, k):
        raise TypeError(
            "planning in Triton takes float32, bfloat16 or float16 on one CUDA device, head dimensions up to "
            f"{executor.MAX_HEAD_DIM}, got {q.dtype} on {q.device} and {k.dtype} on {k.device}; convert them"
        )
    if extent.batch != q.shape[0]:
        raise ValueError(f"the extent has {extent.batch} batch rows, q has {q.shape[0]}")
    ends = extent.key_start + extent.key_count
    if extent.batch and int(ends.max()) > key_len:
        raise ValueError(f"the extent names live keys up to slot {int(ends.max())}, but there are {key_len}")


def _operands(q: Tensor) -> dict[str, Any]:
    """Constants of kernels that multiply q with keys."""
    dim = q.shape[-1]
    return {
        "DIM": dim,
        "BLOCK_D": power_of_two(dim),
    }


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _extent_on(extent: Extent, device: torch.device) -> Tensor:
    return _int32_on(torch.stack([extent.query_start, extent.key_start, extent.key_count]), device)


def _int32_on(values: Tensor, device: torch.device) -> Tensor:
    return values.to(torch.int32).to(device, non_blocking=True).contiguous()


def _flags_on(values: Tensor, device: torch.device) -> Tensor:
    return values.to(device, non_blocking=True).contiguous().view(torch.uint8)


def _per_head(values: Tensor | int, heads: int, device: torch.device) -> Tensor:
    if isinstance(values, int):
        return torch.full((heads,), values, dtype=torch.int32, device=device)
    return _int32_on(values.expand(heads), device)
