"""What methods for denoising models share: where text and patches lie, orders of axes, and plans kept over steps."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from gossamer import scores
from gossamer.call import AttentionCall
from gossamer.layout import DenoisingStep, TokenLayout
from gossamer.methods.base import Method
from gossamer.plan import Extent, Grid, SparsePlan, ceil_div, on_device

__all__ = [
    "ORDERS",
    "Denoising",
    "Kept",
    "axis_order",
    "keep",
    "kept",
    "kept_through",
    "layout_of",
    "mass_of_blocks",
    "plan_of_mask",
    "plan_of_rows",
    "reordered",
    "step_of",
    "text_blocks",
]

ORDERS = ("FHW", "FWH", "HWF", "HFW", "WHF", "WFH")
"""Orders of the axes of a video, the slowest first."""


@dataclass(frozen=True)
class Denoising(Method):
    """A method for calls of a whole image, video or text at once, that attend in both directions."""

    needs: ClassVar[frozenset[str]] = frozenset({"layout"})

    def lacks(self, call: AttentionCall) -> str | None:
        missing = call.lacks(self.needs)
        if missing is not None:
            return missing
        extent = call.extent
        if extent.causal or extent.limit is not None:
            return "attention of every token to every other"
        whole = bool((extent.query_start == -extent.key_start).all())
        return None if whole and call.query_len == call.key_len else "all tokens in one call"


def layout_of(call: AttentionCall) -> TokenLayout:
    """The call's layout.

    Raises:
        ValueError: it has none.
    """
    if not isinstance(call.layout, TokenLayout):
        raise ValueError("this call does not say which of its tokens are text: make it with layout=")
    return call.layout


def step_of(call: AttentionCall) -> DenoisingStep:
    """The call's step.

    Raises:
        ValueError: it has none.
    """
    if call.step is None:
        raise ValueError("this call does not say which step of a sampling it belongs to: make it with step=")
    return call.step


def text_blocks(call: AttentionCall, grid: Grid) -> tuple[Tensor, Tensor]:
    """Query blocks and key blocks that hold a token of text, bool ``[B, M]`` and ``[B, N]`` on the CPU.

    Queries beyond a row's keys are of padding: a block of nothing else counts as text, any other by its live queries.
    """
    layout, count = layout_of(call), call.extent.key_count[:, None]
    first = torch.tensor(layout.before, dtype=torch.int64, device="cpu")[:, None]
    low, high = grid.queries.unbind(-1)
    rows = ((low < first) | (low >= count) | (high.minimum(count) > first + layout.patches)) & (high > low)
    low, high = grid.key_block_ends()
    return rows, ((low < first) | (high > first + layout.patches)) & (high > low)


def axis_order(call: AttentionCall, axes: str) -> Tensor:
    """Positions by rank when patches run in another order of their axes: int64 ``[B, S]`` on the CPU.

    Text stays where it is.

    Args:
        axes: one of `ORDERS`.
    """
    layout = layout_of(call)
    patches = torch.arange(layout.patches, device="cpu").view(layout.frames, layout.height, layout.width)
    patches = patches.permute(*("FHW".index(axis) for axis in axes)).flatten()
    order = torch.arange(call.query_len, device="cpu").repeat(call.batch, 1)
    for row, before in enumerate(layout.before):
        order[row, before : before + layout.patches] = patches + before
    return order


def mass_of_blocks(call: AttentionCall, grid: Grid, lse: Tensor | None = None) -> Tensor:
    """Attention mass of each block of patches and text, fp32 ``[B, H, M, N]``, without that of queries beyond a row's
    keys: so padding in a query block does not count in what the block chooses.

    Args:
        lse: ``[B, H, S]``, of the call or of one like it; None: found.
    """
    from gossamer.oracle import log_sum_exp

    lse, extent = log_sum_exp(call) if lse is None else lse, call.extent
    beyond = torch.arange(call.query_len, device="cpu") >= (extent.key_start + extent.key_count)[:, None]
    lse = lse.masked_fill(on_device(beyond, lse.device)[:, None], float("inf"))
    parts = [mass for _, mass in scores.block_mass(call, lse, grid)]
    return (
        torch.cat(parts, dim=2) if parts else torch.zeros(call.batch, call.heads, 0, grid.key_blocks, device=lse.device)
    )


def plan_of_mask(call: AttentionCall, mask: Tensor, block: int, order: Tensor | None = None) -> SparsePlan:
    """The plan of blocks ``[B, heads, M, N]`` for a call that attends in both directions, its pairs counted.

    Args:
        order: queries and keys by rank, int64 ``[B, S]`` for all heads, live ones first.
    """
    heads = mask.shape[1]
    plan = SparsePlan.from_block_mask(
        mask,
        call.query_len,
        call.key_len,
        extent=call.extent,
        block_q=block,
        block_k=block,
        **({} if order is None else _orders(call, order, heads)),
    )
    of_one = mask[:, :1] if mask.stride(1) == 0 else mask  # heads that are one mask expanded are counted once
    pairs = _pairs(of_one, call.extent, block).expand(-1, heads).contiguous()
    given = {name: getattr(plan, name) for name in ("heads", "query_len", "key_len", "extent", "block_q", "block_k")}
    lists = {name: getattr(plan, name) for name in ("block_indptr", "block_indices", "q_order", "k_order")}
    return SparsePlan.unchecked(**given, **lists, pairs=pairs)


def _pairs(mask: Tensor, extent: Extent, block: int) -> Tensor:
    """Pairs of live tokens in blocks ``[B, heads, M, N]``, int64 ``[B, heads]`` on the CPU."""
    of_heads = []
    for row, (queries, keys) in enumerate(zip(extent.query_count.tolist(), extent.key_count.tolist(), strict=True)):
        counts = _tokens_of(mask[row], keys, block)
        of_heads.append(_tokens_of(counts, queries, block))
    return torch.stack(of_heads).cpu() if of_heads else torch.zeros(0, mask.shape[1], dtype=torch.int64, device="cpu")


def _tokens_of(x: Tensor, count: int, block: int) -> Tensor:
    """``x`` summed over blocks, its last dimension, each as often as it has tokens of ``count``; int64."""
    whole, rest = divmod(count, block)
    return x[..., :whole].sum(dim=-1) * block + x[..., whole : whole + 1].sum(dim=-1) * rest


def _orders(call: AttentionCall, order: Tensor, heads: int) -> dict[str, Tensor]:
    by_head = on_device(order.int(), call.device)[:, None].expand(-1, heads, -1)
    return {"q_order": by_head, "k_order": by_head}


def reordered(call: AttentionCall, order: Tensor) -> AttentionCall:
    """The call with queries and keys by rank in an order ``[B, S]``, without values and without padding before them."""
    extent, none = call.extent, call.extent.key_start * 0
    slots = (order + extent.key_start[:, None]).clamp(max=max(0, call.query_len - 1))
    index = on_device(slots, call.device)[:, None, :, None]
    q, k = (x.take_along_dim(index, dim=2) for x in (call.q, call.k))
    own = Extent(none, extent.query_count, none, extent.key_count, causal=False)
    return AttentionCall(q, k, None, own, scale=call.scale, softcap=call.softcap, layer=call.layer)


@dataclass(frozen=True, eq=False)
class Kept:
    """What a method found for a batch row, to be used again at later steps.

    Fields:
        plan: of the call in which it was found; row: the batch row's place in it.
        step: when.
        extra: whatever else the method needs.
    """

    plan: SparsePlan
    row: int
    step: int
    extra: Any = None


def keep(call: AttentionCall, key: Hashable, plan: SparsePlan, step: int, extra: list[Any] | None = None) -> None:
    """Keep a plan in each row's state.

    Args:
        extra: one thing for each batch row.
    """
    states: Sequence[dict[Any, Any]] = call.state or ()
    for row, state in enumerate(states):
        state[key] = Kept(plan, row, step, None if extra is None else extra[row])


def kept(call: AttentionCall, key: Hashable) -> list[Kept] | None:
    """What is kept of all rows, if all have something that was found for calls of this size at one step."""
    states: Sequence[dict[Any, Any]] = call.state or ()
    found = [state[key] for state in states if key in state]
    if not found or len(found) < len(states):
        return None
    same = all(
        (one.plan.query_len, one.plan.key_len, one.step) == (call.query_len, call.key_len, found[0].step)
        and _tokens(one.plan.extent, one.row) == _tokens(call.extent, row)
        for row, one in enumerate(found)
    )
    return found if same else None


def kept_through(call: AttentionCall, method: Method, make: Callable[[], SparsePlan]) -> SparsePlan:
    """A plan that depends on the call's layout and lengths alone: made once and kept, where there is a state."""
    layout = layout_of(call)
    lies = [(before, layout.frames, layout.height, layout.width) for before in layout.before]
    found = kept(call, method)
    if found is not None and [one.extra for one in found] == lies:
        return plan_of_rows(call, found)
    plan = make()
    keep(call, method, plan, 0, lies)
    return plan


def _tokens(extent: Extent, row: int) -> list[int]:
    return [int(x[row]) for x in (extent.query_start, extent.query_count, extent.key_start, extent.key_count)]


def plan_of_rows(call: AttentionCall, rows: list[Kept]) -> SparsePlan:
    """The plan that is kept of a call's rows: as it is, or put together where they come in another batch."""
    first = rows[0].plan
    if first.batch == call.batch and all(one.plan is first and one.row == row for row, one in enumerate(rows)):
        return first
    masks, orders = [], []
    for one in rows:
        masks.append(one.plan.block_mask()[one.row])
        orders.append(None if one.plan.q_order is None else one.plan.q_order[one.row, 0].long().cpu())
    most = (max(mask.shape[1] for mask in masks), max(mask.shape[2] for mask in masks))
    mask = torch.zeros(call.batch, first.heads, *most, dtype=torch.bool, device=first.device)
    for row, part in enumerate(masks):
        mask[row, :, : part.shape[1], : part.shape[2]] = part
    if orders[0] is None:
        grid = Grid(call.extent, first.block_q, first.block_k)
        plan = plan_of_mask(call, mask[:, :, : grid.query_blocks, : grid.key_blocks], first.block_q)
    else:
        assert mask.shape[2] == ceil_div(call.query_len, first.block_q)
        plan = plan_of_mask(call, mask, first.block_q, torch.stack([order for order in orders if order is not None]))
    return plan.with_attributes(quantised=True) if first.quantised else plan
