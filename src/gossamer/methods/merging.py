"""Plans of several methods, merged head by head into one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gossamer.plan import SparsePlan, ceil_div, starts_of

__all__ = ["merge_plans"]


def merge_plans(
    plans: Sequence[SparsePlan],
    owner: Sequence[int] | Sequence[Sequence[int]],
    sources: Sequence[Sequence[int]] | None = None,
) -> SparsePlan:
    """One plan of query heads, head h as it is in ``plans[owner[h]]``, or in batch row b in ``plans[owner[b][h]]``.

    Blocks are refined to the common divisor; heads of a plan per key/value head stand for their query heads.

    Args:
        sources: of each plan, which of its heads stands for each query head; anything for heads that it does not own.

    Raises:
        ValueError: a plan orders keys alone, or orders queries that do not begin at position 0 in every row; the plans
            are for other calls; they differ in their attributes, or in blocks whose means count, which finer blocks
            would change; a head has other bands in other batch rows.
    """
    first = plans[0]
    owners = torch.tensor(owner, dtype=torch.int64, device="cpu")
    owners = owners.expand(first.batch, -1) if owners.ndim == 1 else owners
    heads = owners.shape[1]
    for plan in plans:
        keys_alone = plan.k_order is not None and plan.q_order is None
        if keys_alone or (plan.query_len, plan.key_len, plan.batch) != (first.query_len, first.key_len, first.batch):
            raise ValueError("only plans of one call, without an order of keys alone, can be merged")
        if sources is None and heads % plan.heads:
            raise ValueError(f"a plan of {plan.heads} heads cannot stand for {heads} query heads")
    if len(plans) == 1 and sources is None:
        return first
    _check_attributes(plans)
    block_q, block_k = math.gcd(*(p.block_q for p in plans)), math.gcd(*(p.block_k for p in plans))
    if sources is None:
        sources = [[head // (heads // plan.heads) for head in range(heads)] for plan in plans]
    # Of all heads of all plans one after the other, which one is a head of the merged one, [B, heads].
    start = [sum(plan.heads for plan in plans[:number]) for number in range(len(plans))]
    taken = (torch.tensor(sources, device="cpu") + torch.tensor(start, device="cpu")[:, None]).gather(0, owners)
    orders = {name: _order(plans, name, taken) for name in ("q_order", "k_order")}
    merged = SparsePlan.unchecked(
        heads=heads, query_len=first.query_len, key_len=first.key_len, extent=first.extent,
        block_q=block_q, block_k=block_k, **orders,
    )  # fmt: skip
    rows = merged.num_query_blocks
    group = _column_group(plans, block_q, rows)
    block_indptr, block_indices = _gathered([_refined_blocks(plan, block_q, block_k, rows) for plan in plans], taken)
    column_indptr, column_indices = _gathered([_column_rows(plan, block_q, rows, group) for plan in plans], taken)
    # Those that no backend counted, such as a dense plan, are cheaper to count by themselves than when merged.
    pairs = torch.cat([plan.count_pairs() for plan in plans], dim=1).gather(1, taken)
    return SparsePlan.unchecked(
        heads=heads,
        query_len=first.query_len,
        key_len=first.key_len,
        extent=first.extent,
        block_q=block_q,
        block_k=block_k,
        block_indptr=block_indptr,
        block_indices=block_indices,
        column_group=group,
        column_indptr=column_indptr,
        column_indices=column_indices,
        sink=_band(plans, "sink", taken),
        window=_band(plans, "window", taken),
        pruned_mean=first.pruned_mean,
        skip=first.skip,
        quantised=first.quantised,
        pairs=pairs,
        **orders,
    )


def _order(plans: Sequence[SparsePlan], name: str, taken: Tensor) -> Tensor | None:
    """The order of each head, its own where its plan has none; None where no plan has one.

    Positions are then counted as ranks are, from 0.
    """
    given = [getattr(plan, name) for plan in plans]
    if all(order is None for order in given):
        return None
    first = plans[0]
    if bool((first.extent.first_position != 0).any()):
        raise ValueError(
            "plans with an order of queries or keys can be merged where all rows' queries begin at position 0, "
            f"got positions {first.extent.first_position.tolist()}"
        )
    length = first.query_len if name == "q_order" else first.key_len
    own = torch.arange(length, dtype=torch.int32, device=first.device)
    orders = [
        own.expand(plan.batch, plan.heads, length) if order is None else order
        for plan, order in zip(plans, given, strict=True)
    ]
    index = taken.to(first.device)[..., None].expand(-1, -1, length)
    return torch.cat(orders, dim=1).gather(1, index)


def _band(plans: Sequence[SparsePlan], name: str, taken: Tensor) -> Tensor:
    numbers = torch.cat([torch.as_tensor(getattr(plan, name), device=plan.device) for plan in plans])
    if taken.shape[0] == 0:
        return numbers.new_zeros(taken.shape[1])
    of_rows = numbers[taken.to(numbers.device)]
    if bool((of_rows != of_rows[:1]).any()):
        raise ValueError(f"a head must have the same {name} in all batch rows, but its plans differ in it")
    return of_rows[0]


def _check_attributes(plans: Sequence[SparsePlan]) -> None:
    names = ("pruned_mean", "skip", "quantised")
    different = {tuple(getattr(plan, name) for name in names) for plan in plans}
    if len(different) > 1:
        given = (", ".join(f"{n}={v}" for n, v in zip(names, own, strict=True)) for own in sorted(different, key=str))
        raise ValueError(
            f"heads of one layer must share {' and '.join(names)}, got {' and '.join(given)}; give the methods of all "
            "its heads the same"
        )
    blocks = {(plan.block_q, plan.block_k) for plan in plans}
    if plans[0].pruned_mean and len(blocks) > 1:
        raise ValueError(
            f"heads of one layer with pruned_mean must have the same blocks, got {sorted(blocks)} (queries, keys): "
            "means of finer blocks are others"
        )


class _Lists:
    """Lists of ``[B, heads, rows]``: their lengths, where each begins, and all members."""

    def __init__(self, lengths: Tensor, begins: Tensor, members: Tensor) -> None:
        self.lengths, self.begins, self.members = lengths, begins, members


def _local_rows(plan: SparsePlan, block_q: int, rows: int) -> Tensor:
    """The plan's row that covers each row of blocks of ``block_q``, int64 ``[B, rows]``; it may lie beyond the last."""
    first = plan.extent.first_position // block_q
    ratio = plan.block_q // block_q
    return ((first[:, None] + torch.arange(rows, device="cpu")) // ratio - plan.grid.first_block[:, None]).to(
        plan.device
    )


def _taken(plan: SparsePlan, indptr: Tensor, indices: Tensor, many: int, rows: Tensor) -> _Lists:
    """Lists ``rows`` ``[B, n]`` out of ``many`` a head, empty beyond them."""
    shape = (plan.batch, plan.heads, rows.shape[1])
    if many == 0:
        nothing = torch.zeros(shape, dtype=torch.int64, device=plan.device)
        return _Lists(nothing, nothing, indices)
    lengths = indptr.diff().view(plan.batch, plan.heads, many)
    begins = indptr[:-1].view(plan.batch, plan.heads, many)
    inside = (rows < many)[:, None].expand(shape)
    index = rows.clamp(max=many - 1)[:, None].expand(shape)
    return _Lists(torch.where(inside, lengths.gather(2, index), 0), begins.gather(2, index), indices)


def _refined_blocks(plan: SparsePlan, block_q: int, block_k: int, rows: int) -> _Lists:
    indptr, indices, ratio = plan.block_indptr, plan.block_indices, plan.block_k // block_k
    if ratio > 1:
        indices = (indices[:, None] * ratio + torch.arange(ratio, dtype=torch.int32, device=plan.device)).flatten()
        indptr = indptr * ratio
        # A row's last block may reach beyond the last one of the finer blocks.
        most = ceil_div(plan.extent.longest if plan.k_order is None else plan.key_len, block_k)
        keep = indices < most
        kept = starts_of(keep)
        indptr, indices = kept[indptr], indices[keep]
    return _taken(plan, indptr, indices, plan.num_query_blocks, _local_rows(plan, block_q, rows))


def _column_group(plans: Sequence[SparsePlan], block_q: int, rows: int) -> int:
    """The merged plan's: as many rows as have the same list in every plan with columns."""
    with_columns = [plan for plan in plans if plan.column_indices.numel()]
    if all(plan.num_column_groups <= 1 for plan in with_columns):
        return max(1, rows)
    group = math.gcd(*(plan.column_group * (plan.block_q // block_q) for plan in with_columns))
    for plan in with_columns:
        lists = _column_lists(plan, block_q, rows)
        if bool((lists != lists[:, torch.arange(rows, device=lists.device) // group * group]).any()):
            return 1
    return group


def _column_lists(plan: SparsePlan, block_q: int, rows: int) -> Tensor:
    """Which of a plan's column lists each row of blocks of ``block_q`` has, int64 ``[B, rows]``."""
    return _local_rows(plan, block_q, rows) // plan.column_group


def _column_rows(plan: SparsePlan, block_q: int, rows: int, group: int) -> _Lists:
    lists = ceil_div(rows, group)
    if lists == 1:  # which is all that a plan with columns has
        chosen = torch.zeros(plan.batch, 1, dtype=torch.int64, device=plan.device)
    else:
        chosen = _column_lists(plan, block_q, rows)[:, ::group]
    return _taken(plan, plan.column_indptr, plan.column_indices, plan.num_column_groups, chosen)


def _gathered(lists: Sequence[_Lists], taken: Tensor) -> tuple[Tensor, Tensor]:
    """Row pointers and members of the lists of some heads ``[B, heads]``, of all lists' heads one after the other."""
    # Members of all plans one after the other, too.
    offsets = [0]
    for part in lists:
        offsets.append(offsets[-1] + part.members.numel())
    index = taken.to(lists[0].lengths.device)[..., None].expand(-1, -1, lists[0].lengths.shape[-1])
    lengths = torch.cat([part.lengths for part in lists], dim=1).gather(1, index)
    begins = torch.cat([part.begins + offset for part, offset in zip(lists, offsets, strict=False)], dim=1)
    begins = begins.gather(1, index)
    indptr = starts_of(lengths)
    flat = lengths.flatten()
    place = torch.repeat_interleave(begins.flatten() - indptr[:-1], flat)
    members = torch.cat([part.members for part in lists])
    return indptr, members[torch.arange(place.numel(), device=members.device) + place]
