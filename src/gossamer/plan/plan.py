"""`SparsePlan`: which query-key pairs are computed. What methods produce and backends consume.

Notation: B batch, H query heads, G key/value heads, S query tokens of this call, T key slots, M query blocks, N key
blocks.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gossamer.plan.checks import LISTS, SKIP_TILE, check_attributes, check_blocks_alone, check_numbers, check_sizes
from gossamer.plan.extent import Extent
from gossamer.plan.grid import Grid
from gossamer.plan.integers import MOST, Integers, band, ceil_div, integer, integers_per_head, ranks_of, starts_of

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

__all__ = ["SKIP_TILE", "WHOLE", "SparsePlan", "on_device"]

# A window that holds every pair: positions lie below it.
WHOLE = MOST


def on_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on the device. Only a copy to the CPU waits for it: of a copy from the CPU, the driver has taken the
    values when the call returns."""
    return tensor.to(device, non_blocking=torch.device(device).type != "cpu")


def _empty_indices() -> Tensor:
    return torch.empty(0, dtype=torch.int32, device="cpu")


@dataclass(frozen=True, slots=True, eq=False)
class SparsePlan:
    """Which pairs of query and key an attention call computes: a union of blocks, columns and bands.

    Query ``i`` attends key ``j`` exactly when::

        the extent allows (i, j)
        and (   the key block of j is selected for the query block of i
             or pos(j) is in the column list of the group of query blocks that i belongs to
             or pos(j) < sink[h]  or  |pos(i) - pos(j)| < window[h] )

    A pair that several parts select counts once. Blocks are counted in positions, as `Grid` says: key block
    ``pos(j) // block_k``; row m of a batch row's lists is its query block ``first_block + m``. Rows that a batch row
    does not need are empty.

    Two attributes change how a plan of blocks alone (no columns, bands or orders) is computed. Neither changes its
    pairs, as `to_mask`, `count_pairs` and `density` have them.

    - ``pruned_mean`` (FlashPrefill V2's zero-order correction, 2608.19758): a key block that is not selected, though
      every live query of the query block may attend every live key of it (`Grid.wholly_seen`), counts as if each of its
      keys were their mean, with the mean of their values. To row i it is one more key with the logit
      ``ln(n) + logit(q_i, mean of k)`` and the value ``mean of v``, n being its live keys. Blocks of which the model
      allows a part alone, as on the diagonal, count as selected or not at all.
    - ``skip`` (BLASST, 2512.12087), in nats: a row leaves the tiles of its selected blocks out, `SKIP_TILE` keys each
      and in ascending order, whose largest logit lies more than this below the largest of the tiles before. A tile that
      all rows of a kernel's tile leave out is not multiplied with values. Each row decides by itself, so that nothing
      depends on which rows a kernel takes together. Sinks' logits and means take no part, and are never left out.

    And one that goes with every plan but one with ``pruned_mean``: ``quantised`` (SageAttention, 2410.02367) lets the
    executor multiply queries and keys in int8, as `gossamer.backends.torch.integers` defines. Torch's and Triton's do;
    the others compute the ordinary product, which is closer to exact. There is no gradient.

    Fields:
        heads: H for a plan per query head, or G for one per key/value head that its query heads share.
        query_len, key_len: S and T.
        extent: what the model allows; B rows.
        block_q, block_k: tokens in a query block and in a key block.
        block_indptr: int64 ``[B * heads * M + 1]``; block_indices: int32 ``[nnz]``, ascending in each row.
        column_group: consecutive query blocks that share one column list (M or more for vertical lines of a head).
        column_indptr: int64 ``[B * heads * ceil(M / column_group) + 1]``; column_indices: int32 key positions,
            ascending in each row. None means no columns.
        sink, window: int32 ``[heads]``; an integer serves all heads. A window of `WHOLE` makes a head dense.
        q_order: int32 ``[B, heads, S]``, live queries by permuted rank: 0 is the batch row's first live query. Numbers
            of S that it has no live query for stand anywhere. The query blocks then count ranks from 0.
        k_order: int32 ``[B, heads, T]``, key positions by permuted rank, likewise. Causality, columns and bands go by
            the original positions.
        pruned_mean: whether blocks that are not selected count by their mean.
        skip: of tiles far below a row's maximum, in nats; None: none. ``block_k`` is then a multiple of `SKIP_TILE`.
        quantised: whether queries and keys may be multiplied in int8.

    Tensors are copied, and must not be written afterwards. Where one is nevertheless, kernels on the CPU refuse the
    plan or compute something else, but read nothing outside its lists and the call's tensors; ``GOSSAMER_CHECK=1`` has
    every call `check` its plan.

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
    sink: Integers = 0
    window: Integers = 0
    q_order: Tensor | None = None
    k_order: Tensor | None = None
    pruned_mean: bool = False
    skip: float | None = None
    quantised: bool = False
    grid: Grid = field(init=False, repr=False)
    _pairs: Tensor | None = field(default=None, init=False, repr=False)  # count_pairs, where a backend counted

    def __post_init__(self) -> None:
        self._check_integers()
        device = self.device
        for name in LISTS:
            given = getattr(self, name)
            if given is not None:
                object.__setattr__(self, name, given.to(device, copy=True).contiguous())
        for name in ("sink", "window"):
            value = integers_per_head(getattr(self, name), f"SparsePlan.{name}", self.heads)
            object.__setattr__(self, name, value.to(device))
        self._complete()
        self.check()

    def _check_integers(self) -> None:
        for name in ("heads", "block_q", "block_k", "column_group"):
            integer(getattr(self, name), f"SparsePlan.{name}", least=1)
        for name in ("query_len", "key_len"):
            integer(getattr(self, name), f"SparsePlan.{name}")
        self.extent.check(self.query_len, self.key_len)
        check_attributes(self.pruned_mean, self.skip, self.block_k, quantised=self.quantised)

    def _complete(self) -> None:
        """Sets the grid, row pointers of lists that are absent, and bands as tensors."""
        object.__setattr__(self, "grid", Grid(self.extent, self.block_q, self.block_k))
        for name, rows in (("block_indptr", self.num_query_blocks), ("column_indptr", self.num_column_groups)):
            if getattr(self, name) is None:
                indptr = torch.zeros(self.batch * self.heads * rows + 1, dtype=torch.int64, device=self.device)
                object.__setattr__(self, name, indptr)
        for name in ("sink", "window"):
            given = getattr(self, name)
            object.__setattr__(self, name, band(given, f"SparsePlan.{name}", self.heads, self.device))
        check_blocks_alone(self)

    def check_sizes(self) -> None:
        """Validate the shapes, dtypes and devices of all tensors. Waits for no device.

        Raises:
            ValueError, TypeError: one does not fit the plan's other fields.
        """
        check_sizes(self)

    def check(self) -> None:
        """Validate everything, every number in the plan's tensors too; waits for their device.

        A plan was checked when it was made, but whoever holds its tensors can write to them. With ``GOSSAMER_CHECK=1``
        in the environment every call that attends checks its plan.

        Raises:
            ValueError, TypeError: naming the value that does not fit.
        """
        self.extent.check(self.query_len, self.key_len)
        self.check_sizes()
        grid = Grid(self.extent, self.block_q, self.block_k)
        if (grid.query_blocks, grid.key_blocks) != (self.grid.query_blocks, self.grid.key_blocks):
            raise ValueError(
                f"the plan was made for {self.grid.query_blocks} x {self.grid.key_blocks} blocks, but its extent now "
                f"has {grid.query_blocks} x {grid.key_blocks}; make a new plan instead of writing to the tensors of one"
            )
        check_numbers(self)

    @classmethod
    def unchecked(cls, *, pairs: Tensor | None = None, **given: Any) -> SparsePlan:
        """A plan from fields whose numbers a backend knows to be right: sizes and dtypes alone are checked.

        Reads no values that lie on a device, so it does not wait for one; copies no tensors.

        Args:
            pairs: what `count_pairs` would give, int64 ``[B, heads]`` on the CPU, where it is known.
            given: the constructor's arguments; absent ones take their defaults.

        Raises:
            ValueError, TypeError: a number out of range, or a tensor of another shape or dtype.
        """
        plan, given_values = object.__new__(cls), list(given.values())
        for part in cls.__dataclass_fields__.values():  # not by fields(), which takes longer than all of this
            value = part.default_factory() if part.default_factory is not MISSING else part.default
            value = given.pop(part.name, value) if part.init else None
            object.__setattr__(plan, part.name, None if value is MISSING else value)
        if given:
            raise TypeError(f"SparsePlan has no field {', '.join(sorted(given))}")
        plan._check_integers()
        plan._complete()
        if any(isinstance(value, Tensor) for value in given_values):  # those that it made fit
            plan.check_sizes()
        object.__setattr__(plan, "_pairs", pairs)
        return plan

    @property
    def batch(self) -> int:
        return self.extent.batch

    @property
    def num_query_blocks(self) -> int:
        """M."""
        return self.grid.query_blocks if self.q_order is None else ceil_div(self.query_len, self.block_q)

    @property
    def num_key_blocks(self) -> int:
        """N."""
        return self.grid.key_blocks if self.k_order is None else ceil_div(self.key_len, self.block_k)

    @property
    def num_column_groups(self) -> int:
        return ceil_div(self.num_query_blocks, self.column_group)

    @property
    def device(self) -> torch.device:
        return self.block_indices.device

    @property
    def permuted(self) -> bool:
        return self.q_order is not None or self.k_order is not None

    @classmethod
    def dense(cls, heads: int, query_len: int, key_len: int, extent: Extent) -> SparsePlan:
        """The plan that computes every pair that the extent allows."""
        return cls.unchecked(heads=heads, query_len=query_len, key_len=key_len, extent=extent, window=WHOLE)

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

        Without an extent all keys are live and the queries are the last ones. M and N are those of `Grid`, or cover S
        and T where there is an order.

        Raises:
            ValueError: the mask's shape does not fit the lengths and block sizes.
        """
        if mask.ndim != 4 or mask.dtype != torch.bool:
            raise ValueError(f"a block mask must be bool [batch, heads, M, N], got {mask.dtype} {tuple(mask.shape)}")
        extent = extent if extent is not None else Extent.full(mask.shape[0], query_len, key_len)
        grid = Grid(extent, block_q, block_k)
        expected = (
            grid.query_blocks if fields.get("q_order") is None else ceil_div(query_len, block_q),
            grid.key_blocks if fields.get("k_order") is None else ceil_div(key_len, block_k),
        )
        if tuple(mask.shape[2:]) != expected:
            raise ValueError(
                f"a block mask must be bool [batch, heads, {expected[0]}, {expected[1]}] for lengths "
                f"{query_len}, {key_len} and blocks {block_q}, {block_k}; got {mask.dtype} {tuple(mask.shape)}"
            )
        counts = mask.sum(dim=-1).flatten()
        indptr = starts_of(counts)
        indices = mask.flatten(0, 2).nonzero()[:, 1].to(torch.int32)
        return cls(
            heads=mask.shape[1],
            query_len=query_len,
            key_len=key_len,
            extent=extent,
            block_q=block_q,
            block_k=block_k,
            block_indptr=indptr,
            block_indices=indices,
            **fields,
        )

    def with_attributes(
        self, *, pruned_mean: bool = False, skip: float | None = None, quantised: bool = False
    ) -> SparsePlan:
        """The same pairs, computed with these attributes in place of the plan's own. Nothing is copied.

        Raises:
            ValueError, TypeError: the plan is not one of blocks alone, or a value does not fit.
        """
        given = {part.name: getattr(self, part.name) for part in fields(self) if part.init}
        attributes = {"pruned_mean": pruned_mean, "skip": skip, "quantised": quantised}
        return SparsePlan.unchecked(**(given | attributes), pairs=self._pairs)

    def to(self, device: torch.device | str) -> SparsePlan:
        """The same plan with its tensors on ``device``; the extent stays on the CPU."""
        if torch.device(device) == self.device:
            return self
        given = {part.name: getattr(self, part.name) for part in fields(self) if part.init}
        moved = {name: on_device(value, device) for name, value in given.items() if isinstance(value, Tensor)}
        return SparsePlan.unchecked(**(given | moved), pairs=self._pairs)

    def block_mask(self) -> Tensor:
        """The selected blocks as bool ``[B, heads, M, N]``; columns and bands are not in it."""
        return self._listed(self.block_indptr, self.block_indices, self.num_query_blocks, self.num_key_blocks)

    def pruned_blocks(self) -> Tensor:
        """Blocks that `pruned_mean` has count by their mean, bool ``[B, heads, M, N]``."""
        if not self.pruned_mean:
            return torch.zeros_like(self.block_mask())
        low, high = self.grid.wholly_seen.to(self.device)[:, None, :, None].unbind(-1)
        block = torch.arange(self.num_key_blocks, device=self.device)
        return ~self.block_mask() & (block >= low) & (block < high)

    def column_mask(self) -> Tensor:
        """The column lists as bool ``[B, heads, groups, positions]``."""
        return self._listed(self.column_indptr, self.column_indices, self.num_column_groups, self.extent.longest)

    def _listed(self, indptr: Tensor, indices: Tensor, lists: int, width: int, which: Tensor | None = None) -> Tensor:
        """Lists ``which`` ``[B, heads, R]`` (all if None) of so many a head as bool ``[B, heads, R, width]``."""
        first = torch.arange(self.batch * self.heads, device=self.device).view(self.batch, self.heads, 1) * lists
        number = first + (torch.arange(lists, device=self.device) if which is None else which)
        begin, length = indptr[:-1][number].flatten(), indptr.diff()[number].flatten()
        mask = torch.zeros(number.numel(), width, dtype=torch.bool, device=self.device)
        row = torch.repeat_interleave(torch.arange(number.numel(), device=self.device), length)
        place = torch.arange(row.numel(), device=self.device) + (begin - length.cumsum(0) + length)[row]
        mask[row, indices[place].long()] = True
        return mask.view(*number.shape, width)

    def rows_mask(self, rows: Tensor) -> Tensor:
        """The definition, for query rows ``int64 [R]`` or ``[B, R]``: bool ``[B, heads, R, T]``, what is computed."""
        rows = rows.to(self.device)
        key = self.extent.key_positions(self.key_len, self.device)[:, None, None]  # [B, 1, 1, T]
        query = (rows + on_device(self.extent.query_start, self.device)[:, None])[:, None, :, None]
        selected = key < torch.as_tensor(self.sink, device=self.device).view(1, -1, 1, 1)
        selected = selected | ((query - key).abs() < torch.as_tensor(self.window, device=self.device).view(1, -1, 1, 1))
        q_block = self.row_blocks(rows)
        if self.block_indices.numel():
            given = (self.block_indptr, self.block_indices, self.num_query_blocks, self.num_key_blocks)
            self._unite(selected, self._listed(*given, q_block).repeat_interleave(self.block_k, dim=3), self.k_order)
        if self.column_indices.numel():
            given = (self.column_indptr, self.column_indices, self.num_column_groups, self.extent.longest)
            self._unite(selected, self._listed(*given, q_block // self.column_group))
        return selected & self.extent.allowed(rows, self.key_len, self.device)[:, None]

    def _unite(self, selected: Tensor, positions: Tensor, order: Tensor | None = None) -> None:
        """Add keys by position, or by rank in an order, ``[B, heads, R, positions]`` to those by slot."""
        if order is not None:
            positions = positions.gather(3, ranks_of(order)[:, :, None].expand(*positions.shape[:3], -1))
        for b, (start, count) in enumerate(zip(self.extent.key_start, self.extent.key_count, strict=True)):
            selected[b, :, :, int(start) : int(start + count)] |= positions[b, :, :, : int(count)]

    def row_blocks(self, rows: Tensor) -> Tensor:
        """Row of the plan's lists of each query row, int64 ``[B, heads, R]``; anything for dead queries."""
        extent, most = self.extent, max(0, self.num_query_blocks - 1)
        if self.q_order is None:
            position = rows + on_device(extent.query_start, rows.device)[:, None]
            block = position // self.block_q - on_device(self.grid.first_block, rows.device)[:, None]
            return block.clamp(0, most)[:, None].expand(-1, self.heads, -1)
        ordinal = (rows - on_device(extent.first_query, rows.device)[:, None]).clamp(0, max(0, self.query_len - 1))
        return ranks_of(self.q_order).gather(2, ordinal[:, None].expand(-1, self.heads, -1)) // self.block_q

    def to_mask(self) -> Tensor:
        """Dense bool mask ``[B, heads, S, T]``. For tests and pictures: it has S * T entries a head."""
        return self.rows_mask(torch.arange(self.query_len, device="cpu"))

    def count_pairs(self) -> Tensor:
        """Number of pairs that the plan computes, int64 ``[B, heads]`` on the CPU. Exact.

        Known where a backend made the plan; else counted in torch, which never builds the S x T mask (unless the plan
        is permuted).
        """
        if self._pairs is not None:
            return self._pairs.clone()
        from gossamer.plan.count import count_pairs

        return count_pairs(self)

    def density(self) -> float:
        """Computed pairs over the pairs that the extent allows; 1.0 if there are none."""
        total = int(self.extent.count_allowed().sum()) * self.heads
        return int(self.count_pairs().sum()) / total if total else 1.0

    def memory_bytes(self) -> int:
        """Bytes held by the plan's tensors."""
        tensors = [getattr(self, name) for name in self.__slots__] + [
            getattr(self.extent, name) for name in self.extent.__slots__
        ]
        return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))

    def to_block_mask(self, num_heads: int | None = None) -> BlockMask:
        """FlexAttention's ``BlockMask`` for the same pairs, for ``num_heads`` query heads (default: ``heads``).

        Raises:
            ValueError: the plan is permuted or has an attribute, or ``num_heads`` is no multiple of ``heads``.
        """
        from gossamer.plan.flex_mask import to_block_mask

        return to_block_mask(self, num_heads if num_heads is not None else self.heads)
