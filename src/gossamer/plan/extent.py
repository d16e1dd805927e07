"""`Extent`: which pairs of query and key the model allows, whatever a method then leaves out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.plan.integers import MOST, Integers, integer, integers_per_row

__all__ = ["Extent"]


@dataclass(frozen=True, slots=True, eq=False, init=False)
class Extent:
    """Where the tokens of one attention call sit, and which pairs the model allows.

    One rule for one-shot and chunked prefill, caches, left and right padding, encoders and cross-attention. Positions
    count from a row's first live key: key slot ``j`` of batch row ``b`` has position ``j - key_start[b]`` and is live
    when that lies in ``[0, key_count[b])``. Query row ``i`` has position ``query_start[b] + i``. Under left padding the
    first queries have negative positions and are dead; the ``query_count[b]`` rows after them are live, and those
    after these are right padding, dead again. A live query may attend a live key if::

        (pos(j) <= pos(i) if causal)  and  (|pos(i) - pos(j)| < limit if there is a limit)

    A dead query attends nothing.

    Fields (the first four int64 CPU tensors ``[B]``; integers and lists are converted, tensors copied):
        query_start: position of the first query row of this call: the number of tokens already cached, minus the left
            padding of this call. Cross-attention counts from 0.
        query_count: number of live queries.
        key_start: slot of the first live key; the left padding.
        key_count: number of live keys, contiguous from ``key_start``.
        causal: keys after the query are never attended.
        limit: the model's own sliding window in tokens, or None.

    Raises:
        ValueError: shapes differ, a count or ``key_start`` is negative, a limit is below 1, a number or the position of
            a query is 2^31 or more.
        TypeError: something is no integer.
    """

    query_start: Tensor
    query_count: Tensor
    key_start: Tensor
    key_count: Tensor
    causal: bool
    limit: int | None

    def __init__(
        self,
        query_start: Integers,
        query_count: Integers,
        key_start: Integers,
        key_count: Integers,
        *,
        causal: bool = True,
        limit: int | None = None,
    ) -> None:
        starts = integers_per_row(query_start, "Extent.query_start", None, least=-MOST)
        given = {"query_count": query_count, "key_start": key_start, "key_count": key_count}
        object.__setattr__(self, "query_start", starts)
        for name, value in given.items():
            object.__setattr__(self, name, integers_per_row(value, f"Extent.{name}", starts.numel()))
        if starts.numel() and int(starts.max()) + int(self.query_count.max()) > MOST:
            self._check_positions()
        object.__setattr__(self, "causal", bool(causal))
        object.__setattr__(self, "limit", None if limit is None else integer(limit, "Extent.limit", least=1))

    @classmethod
    def full(cls, batch: int, query_len: int, key_len: int, *, causal: bool = True, limit: int | None = None) -> Extent:
        """All query rows and key slots are live. Causal queries are the last tokens; others begin at position 0.

        Raises:
            ValueError: more queries than keys in causal attention.
        """
        if causal and query_len > key_len:
            raise ValueError(
                f"Extent.full: {query_len} queries cannot be the last tokens of {key_len} keys; "
                "give query_start, query_count, key_start and key_count explicitly, or causal=False for cross-attention"
            )
        row = torch.ones(batch, dtype=torch.int64, device="cpu")
        start = key_len - query_len if causal else 0
        return cls(row * start, row * query_len, row * 0, row * key_len, causal=causal, limit=limit)

    @classmethod
    def from_key_mask(
        cls,
        mask: Tensor,
        query_len: int,
        *,
        first_slot: int | None = None,
        causal: bool = True,
        limit: int | None = None,
    ) -> Extent:
        """From a bool mask ``[B, T]`` of live keys, for queries that are S consecutive tokens among them.

        A row may have left padding, right padding or both: queries whose own key slot is dead are dead.

        Args:
            first_slot: key slot of the first query row; ``T - S`` unless given, as where no slots are spare.

        Raises:
            TypeError: the mask is not bool.
            ValueError: the mask is not ``[B, T]``, the queries' own slots lie outside it, or a row's live keys have a
                hole.
        """
        if mask.dtype != torch.bool:
            raise TypeError(f"a key mask must be bool, got {mask.dtype}; use mask.bool()")
        own = mask.shape[-1] - query_len if first_slot is None else first_slot
        if mask.ndim != 2 or not 0 <= own <= mask.shape[1] - query_len:
            raise ValueError(
                f"a key mask must be [batch, keys] with slots {own} to {own + query_len - 1} for the {query_len} "
                f"queries' own keys, got shape {tuple(mask.shape)}"
            )
        mask = mask.cpu()
        count = mask.sum(dim=1)
        start = mask.int().argmax(dim=1) if mask.shape[1] else count
        slots = torch.arange(mask.shape[1], device="cpu")
        contiguous = (mask == ((slots >= start[:, None]) & (slots < (start + count)[:, None]))).all(dim=1)
        if not bool(contiguous.all()):
            row = int((~contiguous).nonzero()[0])
            raise ValueError(
                f"the live keys of batch row {row} have a hole; only left and right padding can be described. "
                "Use dense attention for this mask"
            )
        first = own - start  # position of the first query row
        live = torch.minimum(count, first + query_len) - first.clamp(min=0)
        return cls(first, live.clamp(min=0), start, count, causal=causal, limit=limit)

    def _check_positions(self) -> None:
        past = self.query_start.clamp(min=0) + self.query_count
        if int(past.max()) > MOST:
            row = int(past.argmax())
            raise ValueError(
                f"Extent: positions of queries must lie below {MOST}, got {int(self.query_count[row])} queries from "
                f"query_start {int(self.query_start[row])} on in batch row {row}"
            )

    @property
    def batch(self) -> int:
        return self.query_start.numel()

    @property
    def first_query(self) -> Tensor:
        """Query row of the first live query, int64 ``[B]``."""
        return (-self.query_start).clamp(min=0)

    @property
    def first_position(self) -> Tensor:
        """Position of the first live query, int64 ``[B]``."""
        return self.query_start.clamp(min=0)

    @property
    def longest(self) -> int:
        """The largest number of live keys of any batch row; positions lie below it."""
        return int(self.key_count.max()) if self.batch else 0

    def check(self, query_len: int, key_len: int) -> None:
        """Validate against the lengths of a call.

        Raises:
            ValueError: live queries or keys lie outside them, or a number is out of range (which only writing to the
                tensors of an extent can bring about).
        """
        # In Python's integers: of few rows, as in decoding, tensors' operations would take longer.
        fields = (self.query_start, self.query_count, self.key_start, self.key_count)
        for row, (start, queries, first, keys) in enumerate(zip(*(field.tolist() for field in fields), strict=True)):
            if start < -MOST or max(start, 0) + queries > MOST or min(queries, first, keys) < 0:
                raise ValueError(
                    f"batch row {row} of the extent has query_start {start}, query_count {queries}, key_start {first} "
                    f"and key_count {keys}: counts and key_start must not be negative, and positions must lie within "
                    f"{MOST} of 0; make a new extent instead of writing to the tensors of one"
                )
            for name, last, length in (
                ("queries", max(-start, 0) + queries if queries else 0, query_len),
                ("keys", first + keys if keys else 0, key_len),
            ):
                if last > length:
                    raise ValueError(
                        f"the extent names {last} {name} in batch row {row}, dead ones before them included, "
                        f"but there are {length}"
                    )

    def key_positions(self, key_len: int, device: torch.device | str = "cpu") -> Tensor:
        """Position of each key slot, int64 ``[B, T]``. Does not wait for the device."""
        return torch.arange(key_len, device=device) - _on(self.key_start, device)[:, None]

    def query_positions(self, query_len: int, device: torch.device | str = "cpu") -> Tensor:
        """Position of each query row, int64 ``[B, S]``; negative ones are left padding."""
        return torch.arange(query_len, device=device) + _on(self.query_start, device)[:, None]

    def live_keys(self, key_len: int, device: torch.device | str = "cpu") -> Tensor:
        """Which key slots are live, bool ``[B, T]``."""
        position = self.key_positions(key_len, device)
        return (position >= 0) & (position < _on(self.key_count, device)[:, None])

    def live_queries(self, query_len: int, device: torch.device | str = "cpu") -> Tensor:
        """Which query rows are live, bool ``[B, S]``."""
        ordinal = torch.arange(query_len, device=device) - _on(self.first_query, device)[:, None]
        return (ordinal >= 0) & (ordinal < _on(self.query_count, device)[:, None])

    def allowed(self, rows: Tensor, key_len: int, device: torch.device | str = "cpu") -> Tensor:
        """The definition, for the query rows ``int64 [R]``: bool ``[B, R, T]``, True where a pair is allowed."""
        rows = rows.to(device)
        query = rows + _on(self.query_start, device)[:, None]
        ordinal = rows - _on(self.first_query, device)[:, None]
        live = (ordinal >= 0) & (ordinal < _on(self.query_count, device)[:, None])
        key = self.key_positions(key_len, device)[:, None]
        pairs = live[:, :, None] & self.live_keys(key_len, device)[:, None]
        if self.causal:
            pairs = pairs & (key <= query[:, :, None])
        if self.limit is not None:
            pairs = pairs & ((query[:, :, None] - key).abs() < self.limit)
        return pairs

    def count_allowed(self) -> Tensor:
        """Number of allowed pairs of one head, int64 ``[B]``: what dense attention computes."""
        first, rows, keys = self.first_position, self.query_count, self.key_count
        if not self.causal and self.limit is None:
            return rows * keys
        if self.causal and self.limit is None and bool((rows == 1).all()):
            return (first + 1).minimum(keys)  # a step of decoding
        # A query at p attends the live keys below min(p + ahead, keys) that are not below p - limit + 1.
        ahead = 1 if self.causal else self.limit or 1
        pairs = _sum_clamped(first + ahead, rows, keys)
        return pairs if self.limit is None else pairs - _sum_clamped(first + 1 - self.limit, rows, keys)

    def is_trivial(self, query_len: int, key_len: int) -> bool:
        """Whether all rows and slots are live and, if causal, the queries are the last tokens."""
        return bool(
            (self.key_start == 0).all()
            and (self.key_count == key_len).all()
            and (self.query_count == query_len).all()
            and (not self.causal or (self.query_start == key_len - query_len).all())
        )

    def of_queries(self, first: int, stop: int) -> Extent:
        """For the query rows ``first .. stop - 1`` of the call alone."""
        live_from = self.first_query.clamp(min=first)
        live_to = (self.first_query + self.query_count).clamp(max=stop)
        return Extent(
            self.query_start + first,
            (live_to - live_from).clamp(min=0),
            self.key_start,
            self.key_count,
            causal=self.causal,
            limit=self.limit,
        )

    def of_rows(self, batch_rows: slice) -> Extent:
        """For some batch rows alone."""
        fields = (self.query_start, self.query_count, self.key_start, self.key_count)
        return Extent(*(field[batch_rows] for field in fields), causal=self.causal, limit=self.limit)


def _on(tensor: Tensor, device: torch.device | str) -> Tensor:
    return tensor.to(device, non_blocking=torch.device(device).type != "cpu")


def _sum_clamped(first: Tensor, terms: Tensor, most: Tensor) -> Tensor:
    """The sum of ``first, first + 1, ..`` (that many terms), each clamped to 0 .. most."""

    def up_to(last: Tensor) -> Tensor:
        rising = last.minimum(most).clamp(min=0)
        return rising * (rising + 1) // 2 + (last - most).clamp(min=0) * most

    return up_to(first + terms - 1) - up_to(first - 1)
