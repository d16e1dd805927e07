"""`Extent` and `SparsePlan`: where tokens sit, and which query-key pairs are computed.

The plan is the one data structure that methods produce and executors consume. Notation: B batch, H query heads,
G key/value heads, S query tokens of this call, T key slots, M query blocks, N key blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

__all__ = ["Extent", "SparsePlan"]


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def on_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on the device. Only a copy to the CPU waits for it: of a copy from the CPU, the driver has taken the
    values when the call returns."""
    return tensor.to(device, non_blocking=torch.device(device).type != "cpu")


_Integers = Tensor | Sequence[int] | int


def _int_vector(value: _Integers, name: str, batch: int | None = None) -> Tensor:
    tensor = torch.as_tensor(value, dtype=torch.int64, device="cpu")
    if tensor.ndim == 0 and batch is not None:
        tensor = tensor.expand(batch).contiguous()
    if tensor.ndim != 1 or (batch is not None and tensor.numel() != batch):
        raise ValueError(
            f"Extent.{name} must hold one integer per batch row"
            + (f" ({batch} of them)" if batch is not None else "")
            + f", got shape {tuple(tensor.shape)}"
        )
    return tensor


@dataclass(frozen=True, slots=True, eq=False, init=False)
class Extent:
    """Where the tokens of one attention call sit. One rule for one-shot and chunked prefill, caches and padding.

    Positions count from a row's first live key: key slot ``j`` of batch row ``b`` has position
    ``j - key_start[b]`` and is live when that lies in ``[0, key_count[b])``; query ``i`` has position
    ``query_start[b] + i``. Under left padding the padding queries have negative positions and attend nothing.

    Fields (int64 CPU tensors of shape ``[B]``; integers and lists are converted):
        query_start: position of the first query of this call; the number of tokens already cached, minus
            the left padding.
        key_start: slot of the first live key; the left padding.
        key_count: number of live keys, contiguous from ``key_start``.

    Raises:
        ValueError: shapes differ, or a count or start is negative.
    """

    query_start: Tensor
    key_start: Tensor
    key_count: Tensor

    def __init__(self, query_start: _Integers, key_start: _Integers, key_count: _Integers) -> None:
        starts = _int_vector(query_start, "query_start")
        object.__setattr__(self, "query_start", starts)
        for name, value in (("key_start", key_start), ("key_count", key_count)):
            vector = _int_vector(value, name, starts.numel())
            if vector.numel() and int(vector.min()) < 0:
                raise ValueError(f"Extent.{name} must not be negative, got {vector.tolist()}")
            object.__setattr__(self, name, vector)

    @property
    def batch(self) -> int:
        return self.query_start.numel()

    @classmethod
    def full(cls, batch: int, query_len: int, key_len: int) -> Extent:
        """All ``key_len`` slots are live and the queries are the last ``query_len`` of them."""
        if query_len > key_len:
            raise ValueError(
                f"Extent.full: {query_len} queries cannot be the last tokens of {key_len} keys; "
                "give query_start, key_start and key_count explicitly"
            )
        row = torch.ones(batch, dtype=torch.int64)
        return cls(row * (key_len - query_len), row * 0, row * key_len)

    @classmethod
    def from_key_mask(cls, mask: Tensor, query_len: int) -> Extent:
        """From a bool mask ``[B, T]`` of live keys, whose last True is the last query's own position.

        Raises:
            TypeError: the mask is not bool.
            ValueError: the mask is not ``[B, T]``, or a row's live keys are not contiguous.
        """
        if mask.dtype != torch.bool:
            raise TypeError(f"a key mask must be bool, got {mask.dtype}; use mask.bool()")
        if mask.ndim != 2:
            raise ValueError(f"a key mask must be [batch, keys], got shape {tuple(mask.shape)}")
        mask = mask.cpu()
        count = mask.sum(dim=1)
        start = mask.int().argmax(dim=1) if mask.shape[1] else count
        last = start + count
        slots = torch.arange(mask.shape[1])
        contiguous = (mask == ((slots >= start[:, None]) & (slots < last[:, None]))).all(dim=1)
        if not bool(contiguous.all()):
            row = int((~contiguous).nonzero()[0])
            raise ValueError(
                f"the live keys of batch row {row} have a hole; only left and right padding can be described. "
                "Use dense attention for this mask"
            )
        return cls(count - query_len, start, count)

    def key_positions(self, key_len: int, device: torch.device | str = "cpu") -> Tensor:
        """Position of each key slot, int64 ``[B, T]``. Does not wait for the device."""
        return torch.arange(key_len, device=device) - self.key_start.to(device, non_blocking=True)[:, None]

    def query_positions(self, query_len: int) -> Tensor:
        """Position of each query row, int64 ``[B, S]``."""
        return torch.arange(query_len) + self.query_start[:, None]

    def is_trivial(self, query_len: int, key_len: int) -> bool:
        """Whether every slot is live and the queries are the last tokens: no padding, no empty slots."""
        return bool(
            (self.key_start == 0).all()
            and (self.key_count == key_len).all()
            and (self.query_start == key_len - query_len).all()
        )


def _per_head(value: _Integers, heads: int, name: str) -> Tensor:
    tensor = torch.as_tensor(value)
    if tensor.ndim == 0:
        tensor = tensor.expand(heads)
    if tensor.shape != (heads,) or tensor.is_floating_point():
        raise ValueError(
            f"SparsePlan.{name} must hold one integer for each of the plan's {heads} heads, "
            f"got {tensor.dtype} of shape {tuple(tensor.shape)}"
        )
    if tensor.numel() and int(tensor.min()) < 0:
        raise ValueError(f"SparsePlan.{name} must not be negative, got {int(tensor.min())}")
    return tensor.to(torch.int32).contiguous()


def _check_csr(indptr: Tensor, indices: Tensor, rows: int, limit: int, name: str, unit: str) -> None:
    """Validate ascending CSR rows; the messages name the first offending value."""
    if indptr.dtype != torch.int64 or indices.dtype != torch.int32:
        raise TypeError(
            f"SparsePlan.{name}_indptr must be int64 and {name}_indices int32, got {indptr.dtype}, {indices.dtype}"
        )
    if indptr.shape != (rows + 1,) or indices.ndim != 1:
        raise ValueError(
            f"SparsePlan.{name}_indptr must have shape ({rows + 1},) for this plan's batch, heads and blocks, "
            f"got {tuple(indptr.shape)}; {name}_indices must be one-dimensional, got {tuple(indices.shape)}"
        )
    lengths = indptr.diff()
    if int(indptr[0]) != 0 or int(indptr[-1]) != indices.numel() or (rows and int(lengths.min()) < 0):
        raise ValueError(
            f"SparsePlan.{name}_indptr must rise from 0 to the number of indices ({indices.numel()}), "
            f"got first {int(indptr[0])}, last {int(indptr[-1])}, "
            f"smallest step {int(lengths.min()) if rows else 0}"
        )
    if not indices.numel():
        return
    low, high = int(indices.min()), int(indices.max())
    if low < 0 or high >= limit:
        raise ValueError(f"SparsePlan.{name}_indices must lie in [0, {limit}) ({unit}), got {low if low < 0 else high}")
    rising = indices.diff() > 0
    starts = indptr[1:-1]
    rising[starts[(starts > 0) & (starts < indices.numel())] - 1] = True
    if not bool(rising.all()):
        at = int((~rising).nonzero()[0])
        raise ValueError(
            f"SparsePlan.{name}_indices must rise strictly within each row, "
            f"got {int(indices[at])} followed by {int(indices[at + 1])} at entry {at}"
        )


def _check_order(order: Tensor, shape: tuple[int, int, int], name: str) -> None:
    if order.dtype != torch.int32 or tuple(order.shape) != shape:
        raise ValueError(
            f"SparsePlan.{name} must be int32 of shape {shape}, got {order.dtype} of shape {tuple(order.shape)}"
        )
    expected = torch.arange(shape[-1], dtype=torch.int32, device=order.device)
    if not torch.equal(order.sort(dim=-1).values, expected.expand(shape)):
        raise ValueError(f"SparsePlan.{name} must be a permutation of 0..{shape[-1] - 1} in every row")


def _check_limit(limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise ValueError(f"SparsePlan.limit must be at least 1 token or None, got {limit}")


def _empty_indices() -> Tensor:
    return torch.empty(0, dtype=torch.int32)


@dataclass(frozen=True, slots=True, eq=False)
class SparsePlan:
    """Which pairs of query and key an attention call computes: a union of blocks, columns and bands.

    Query ``i`` attends key ``j`` (slots), with positions from `Extent`, exactly when::

        live(j)  and  (pos(j) <= pos(i) if causal)  and  (|pos(i) - pos(j)| < limit if limit is given)
        and (   key block of j is selected for the query block of i
             or j is in the column list of the group of query blocks that i belongs to
             or pos(j) < sink[h]  or  |pos(i) - pos(j)| < window[h] )

    A pair that several parts select counts once. Blocks are counted in slots: key block ``j // block_k``, query
    block ``i // block_q`` (of the permuted order, where there is one).

    Fields:
        heads: H for a plan per query head, or G for one per key/value head that its query heads share.
        query_len, key_len: S and T.
        extent: where the tokens sit; B rows.
        block_q, block_k: tokens in a query block and in a key block.
        block_indptr: int64 ``[B * heads * M + 1]``; block_indices: int32 ``[nnz]``, ascending in each row.
        column_group: consecutive query blocks that share one column list (M for vertical lines of a head).
        column_indptr: int64 ``[B * heads * ceil(M / column_group) + 1]``; column_indices: int32 key slots,
            ascending in each row. None means no columns.
        sink, window: int32 ``[heads]``; an integer serves all heads. A window of T + S makes a head dense.
        q_order, k_order: int32 ``[B, heads, S]`` and ``[B, heads, T]``, original index by permuted rank.
        causal: keys after the query are never attended.
        limit: the model's own sliding window in tokens, or None.

    Raises:
        ValueError, TypeError: at construction, naming the value that does not fit.
    """

    heads: int
    query_len: int
    key_len: int
    extent: Extent
    block_q: int = 64
    block_k: int = 64
    block_indptr: Tensor = None  # type: ignore[assignment]  # set in __post_init__
    block_indices: Tensor = field(default_factory=_empty_indices)
    column_group: int = 1
    column_indptr: Tensor = None  # type: ignore[assignment]
    column_indices: Tensor = field(default_factory=_empty_indices)
    sink: _Integers = 0
    window: _Integers = 0
    q_order: Tensor | None = None
    k_order: Tensor | None = None
    causal: bool = True
    limit: int | None = None
    _pairs: int | None = field(default=None, init=False, repr=False)  # sum of count_pairs, where a planner counted

    def __post_init__(self) -> None:
        for name in ("heads", "block_q", "block_k", "column_group"):
            if getattr(self, name) < 1:
                raise ValueError(f"SparsePlan.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("query_len", "key_len"):
            if getattr(self, name) < 0:
                raise ValueError(f"SparsePlan.{name} must not be negative, got {getattr(self, name)}")
        _check_limit(self.limit)
        ends = self.extent.key_start + self.extent.key_count
        if self.batch and int(ends.max()) > self.key_len:
            raise ValueError(
                f"SparsePlan.extent names live keys up to slot {int(ends.max())}, but key_len is {self.key_len}"
            )
        block_rows, column_rows = self._complete_lists()
        device = self.device
        _check_csr(self.block_indptr, self.block_indices, block_rows, self.num_key_blocks, "block", "key blocks")
        _check_csr(self.column_indptr, self.column_indices, column_rows, self.key_len, "column", "key slots")
        object.__setattr__(self, "sink", _per_head(self.sink, self.heads, "sink").to(device))
        object.__setattr__(self, "window", _per_head(self.window, self.heads, "window").to(device))
        for name, length in (("q_order", self.query_len), ("k_order", self.key_len)):
            order = getattr(self, name)
            if order is not None:
                _check_order(order, (self.batch, self.heads, length), name)

    def _complete_lists(self) -> tuple[int, int]:
        """Gives absent lists row pointers; returns how many rows blocks and columns have."""
        rows = (
            self.batch * self.heads * self.num_query_blocks,
            self.batch * self.heads * self.num_column_groups,
        )
        for name, count in zip(("block_indptr", "column_indptr"), rows, strict=True):
            if getattr(self, name) is None:
                indptr = torch.zeros(count + 1, dtype=torch.int64, device=self.device)
                object.__setattr__(self, name, indptr)
        return rows

    @classmethod
    def unchecked(cls, *, pairs: int | None = None, **given: Any) -> SparsePlan:
        """A plan from fields that a planner knows to be right. Reads no values, so it does not wait for a device.

        Args:
            pairs: the sum of `count_pairs`, where it is known.
            given: the constructor's arguments, each of the right shape and dtype; absent ones take their defaults.
        """
        plan = object.__new__(cls)
        for part in fields(cls):
            value = part.default_factory() if part.default_factory is not MISSING else part.default
            value = given.pop(part.name, value)
            if value is MISSING or not part.init:
                value = None
            object.__setattr__(plan, part.name, value)
        plan._complete_lists()
        for name in ("sink", "window"):
            value = getattr(plan, name)
            if isinstance(value, Tensor):
                value = value.to(plan.device, torch.int32, non_blocking=True).contiguous()
            else:
                value = torch.full((plan.heads,), int(value), dtype=torch.int32, device=plan.device)
            object.__setattr__(plan, name, value)
        object.__setattr__(plan, "_pairs", pairs)
        return plan

    @property
    def batch(self) -> int:
        return self.extent.batch

    @property
    def num_query_blocks(self) -> int:
        return ceil_div(self.query_len, self.block_q)

    @property
    def num_key_blocks(self) -> int:
        return ceil_div(self.key_len, self.block_k)

    @property
    def num_column_groups(self) -> int:
        return ceil_div(self.num_query_blocks, self.column_group)

    @property
    def device(self) -> torch.device:
        return self.block_indices.device

    @classmethod
    def dense(
        cls, heads: int, query_len: int, key_len: int, extent: Extent, *, causal: bool = True, limit: int | None = None
    ) -> SparsePlan:
        """The plan that computes every pair that the extent, causality and the model's own window allow."""
        return cls(heads, query_len, key_len, extent, window=query_len + key_len, causal=causal, limit=limit)

    @classmethod
    def from_block_mask(
        cls,
        mask: Tensor,
        query_len: int,
        key_len: int,
        *,
        extent: Extent | None = None,
        block_q: int = 64,
        block_k: int = 64,
        **fields: Any,
    ) -> SparsePlan:
        """From a bool mask of selected blocks ``[B, heads, M, N]``; other fields pass through.

        Without an extent all keys are live and the queries are the last ones.

        Raises:
            ValueError: the mask's shape does not fit the lengths and block sizes.
        """
        expected = (ceil_div(query_len, block_q), ceil_div(key_len, block_k))
        if mask.ndim != 4 or tuple(mask.shape[2:]) != expected or mask.dtype != torch.bool:
            raise ValueError(
                f"a block mask must be bool [batch, heads, {expected[0]}, {expected[1]}] for lengths "
                f"{query_len}, {key_len} and blocks {block_q}, {block_k}; got {mask.dtype} {tuple(mask.shape)}"
            )
        counts = mask.sum(dim=-1).flatten()
        indptr = torch.zeros(counts.numel() + 1, dtype=torch.int64, device=mask.device)
        torch.cumsum(counts, 0, out=indptr[1:])
        indices = mask.flatten(0, 2).nonzero()[:, 1].to(torch.int32)
        return cls(
            heads=mask.shape[1],
            query_len=query_len,
            key_len=key_len,
            extent=extent if extent is not None else Extent.full(mask.shape[0], query_len, key_len),
            block_q=block_q,
            block_k=block_k,
            block_indptr=indptr,
            block_indices=indices,
            **fields,
        )

    def with_limit(self, limit: int | None) -> SparsePlan:
        """The same plan under a model's own sliding window of ``limit`` tokens."""
        if limit == self.limit:
            return self
        _check_limit(limit)
        given = {part.name: getattr(self, part.name) for part in fields(self) if part.init}
        return SparsePlan.unchecked(**(given | {"limit": limit}))

    def to(self, device: torch.device | str) -> SparsePlan:
        """The same plan with its tensors on ``device``; the extent stays on the CPU."""
        if torch.device(device) == self.device:
            return self
        given = {part.name: getattr(self, part.name) for part in fields(self) if part.init}
        moved = {name: on_device(value, device) for name, value in given.items() if isinstance(value, Tensor)}
        return SparsePlan.unchecked(**(given | moved), pairs=self._pairs)

    def block_mask(self) -> Tensor:
        """The selected blocks as bool ``[B, heads, M, N]``; columns and bands are not in it."""
        rows = self.batch * self.heads * self.num_query_blocks
        mask = torch.zeros(rows, self.num_key_blocks, dtype=torch.bool, device=self.device)
        row = torch.repeat_interleave(torch.arange(rows, device=self.device), self.block_indptr.diff())
        mask[row, self.block_indices.long()] = True
        return mask.view(self.batch, self.heads, self.num_query_blocks, self.num_key_blocks)

    def column_mask(self) -> Tensor:
        """The column lists as bool ``[B, heads, groups, T]``."""
        rows = self.batch * self.heads * self.num_column_groups
        mask = torch.zeros(rows, self.key_len, dtype=torch.bool, device=self.device)
        row = torch.repeat_interleave(torch.arange(rows, device=self.device), self.column_indptr.diff())
        mask[row, self.column_indices.long()] = True
        return mask.view(self.batch, self.heads, self.num_column_groups, self.key_len)

    def rows_mask(self, rows: Tensor) -> Tensor:
        """The definition, for the query rows ``int64 [R]``: bool ``[B, heads, R, T]``, True where computed."""
        device = self.device
        kpos = self.extent.key_positions(self.key_len).to(device)[:, None, None, :]
        qpos = self.extent.query_positions(self.query_len)[:, rows.cpu()].to(device)[:, None, :, None]
        live = (kpos >= 0) & (kpos < self.extent.key_count.to(device)[:, None, None, None])
        allowed = live & (kpos <= qpos) if self.causal else live.expand(-1, -1, len(rows), -1)
        if self.limit is not None:
            allowed = allowed & ((qpos - kpos).abs() < self.limit)

        shape = (self.batch, self.heads, len(rows), self.key_len)
        q_block = self._ranks(self.q_order, self.query_len)[..., rows.to(device)] // self.block_q
        k_block = self._ranks(self.k_order, self.key_len) // self.block_k
        selected = torch.zeros(shape, dtype=torch.bool, device=device)
        if self.block_indices.numel():
            blocks = self.block_mask().gather(2, q_block[..., None].expand(-1, -1, -1, self.num_key_blocks))
            selected |= blocks.gather(3, k_block[:, :, None, :].expand(shape))
        if self.column_indices.numel():
            group = (q_block // self.column_group)[..., None].expand(shape)
            selected |= self.column_mask().gather(2, group)
        selected |= kpos < torch.as_tensor(self.sink).view(1, -1, 1, 1)
        selected |= (qpos - kpos).abs() < torch.as_tensor(self.window).view(1, -1, 1, 1)
        return selected & allowed

    def _ranks(self, order: Tensor | None, length: int) -> Tensor:
        """Rank of each original index in the (permuted) order, int64 ``[B, heads, length]``."""
        ranks = torch.arange(length, device=self.device).expand(self.batch, self.heads, length)
        if order is None:
            return ranks
        return torch.empty_like(ranks, memory_format=torch.contiguous_format).scatter_(2, order.long(), ranks)

    def to_mask(self) -> Tensor:
        """Dense bool mask ``[B, heads, S, T]``. For tests and pictures: it has S * T entries a head."""
        return self.rows_mask(torch.arange(self.query_len))

    def count_pairs(self) -> Tensor:
        """Number of pairs that the plan computes, int64 ``[B, heads]``. Exact; never builds the S x T mask
        (unless the plan is permuted)."""
        from gossamer.plan.count import count_pairs

        return count_pairs(self)

    def density(self) -> float:
        """Computed pairs over live allowed pairs (causal, inside the model's own window); 1.0 if there are none.

        For a plan on a device this waits for `count_pairs`, unless the planner has counted already.
        """
        from gossamer.plan.count import dense_pairs

        total = dense_pairs(self.extent, self.query_len, causal=self.causal, limit=self.limit) * self.heads
        computed = int(self.count_pairs().sum()) if self._pairs is None else self._pairs
        return computed / total if total else 1.0

    def memory_bytes(self) -> int:
        """Bytes held by the plan's tensors."""
        tensors = [getattr(self, name) for name in self.__slots__] + [
            getattr(self.extent, name) for name in self.extent.__slots__
        ]
        return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))

    def to_block_mask(self, num_heads: int | None = None) -> BlockMask:
        """FlexAttention's ``BlockMask`` for the same pairs, for ``num_heads`` query heads (default: ``heads``).

        Raises:
            ValueError: the plan is permuted, or ``num_heads`` is no multiple of ``heads``.
        """
        from gossamer.plan.flex_mask import to_block_mask

        return to_block_mask(self, num_heads if num_heads is not None else self.heads)
