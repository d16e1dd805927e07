"""From a call's gradients to grids of programs. Imports Triton."""

# Triton's launchers take what pyright does not see.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gossamer.backends.torch.backward import Gradients, Needs, shared_by_keys
from gossamer.backends.triton.config import Config, choose_backward, power_of_two
from gossamer.backends.triton.device import UNLIMITED
from gossamer.backends.triton.kernels.columns import mark_blocks
from gossamer.backends.triton.kernels.key_gradients import column_gradients, key_gradients, mean_gradients
from gossamer.backends.triton.kernels.query_gradients import query_gradients
from gossamer.backends.triton.kernels.softmax import ATTENDED, SLOPES
from gossamer.backends.triton.launch import MARK_TILE, Arguments, inverse, means_of, numbers_of, problem_of
from gossamer.backends.triton.transpose import query_blocks_of, transposed_columns
from gossamer.call import AttentionCall
from gossamer.plan import SparsePlan, ceil_div

__all__ = ["Reached", "launch_backward"]


_MOST_COLUMNS = 64  # of a tile: their bits are two words


class Reached(NamedTuple):
    """What `attend` returned, and what reaches it."""

    out: Tensor
    lse: Tensor
    grad_out: Tensor
    grad_lse: Tensor | None


def launch_backward(
    call: AttentionCall,
    plan: SparsePlan,
    given: Arguments,
    reached: Reached,
    needs: Needs,
    *,
    config: Config | None = None,
) -> Gradients:
    """Run the backward kernels; ``config`` overrides the table's."""
    given = _prepared(given)
    reached = _matching(given, reached)
    config = config or choose_backward(problem_of(given))
    q, (plan_heads, _, _, _, blocks, key_blocks, _) = given.q, given.shape
    grad_q = torch.zeros(q.shape, dtype=_stored(given), device=q.device) if needs.q else None
    level = torch.zeros(q.shape[:3], dtype=torch.float32, device=q.device)
    bits = given.block_indices
    if given.needs_bitmap:
        words = ceil_div(key_blocks, 32)
        bits = torch.zeros(q.shape[0] * plan_heads * blocks, words, dtype=torch.int32, device=q.device)
    if not (q.numel() and blocks):
        k, v = _no_gradients(given, needs, q.dtype)
        return Gradients(grad_q if grad_q is None else grad_q.to(q.dtype), k, v, _of_sinks(call, reached, level, needs))
    with torch.cuda.device_of(q):  # Triton launches on the current device
        if given.needs_bitmap:
            lists = (given.block_indptr, given.block_indices, bits, 0, bits.shape[1])
            mark_blocks[(bits.shape[0],)](*lists, TILE=MARK_TILE)
        shared, means = _shared(given, reached, config), means_of(given)
        shared |= dict(level_ptr=level, base_ptr=torch.full_like(level, torch.inf))
        _query_gradients(given, reached, config, shared, bits, means, grad_q)
        found = _key_gradients(given, config, shared, bits, needs)
        if given.pruned_mean:
            of_means = _mean_gradients(given, config, shared, bits, means, needs)
            found = [
                None if own is None or mean is None else own + shared_by_keys(mean, call, plan)
                for own, mean in zip(found, of_means, strict=True)
            ]
    q_grad, k, v = (None if x is None else x.to(q.dtype) for x in (grad_q, *found))
    return Gradients(q_grad, k, v, _of_sinks(call, reached, level, needs))


def _prepared(given: Arguments) -> Arguments:
    """With rows that are dense in memory, and bands that kernels take."""
    q, k, v = (t.detach() if t.stride(-1) == 1 else t.detach().contiguous() for t in given[:3])
    sink, window = given.sink.clamp(max=UNLIMITED), given.window.clamp(max=UNLIMITED)
    return given._replace(q=q, k=k, v=v, sink=sink, window=window)


def _matching(given: Arguments, reached: Reached) -> Reached:
    grad_out = reached.grad_out.detach().to(given.q.dtype)
    return Reached(
        reached.out.to(given.q.dtype).contiguous(),
        reached.lse.float().contiguous(),
        grad_out if grad_out.stride(-1) == 1 else grad_out.contiguous(),
        None if reached.grad_lse is None else reached.grad_lse.detach().float().contiguous(),
    )


def _stored(given: Arguments) -> torch.dtype:
    """The interpreter rounds fp32 to bf16 otherwise than devices do; torch does it like them."""
    q = given.q
    return torch.float32 if q.dtype == torch.bfloat16 and not q.is_cuda else q.dtype


def _shared(given: Arguments, reached: Reached, config: Config) -> dict[str, Any]:
    """What all kernels take."""
    tensors: dict[str, Any] = dict(q_ptr=given.q, reaching_ptr=reached.grad_out, extent_ptr=given.extent)
    for name, tensor in (("q", given.q), ("reaching", reached.grad_out)):
        places = (f"{name}_batch_stride", f"{name}_head_stride", f"{name}_stride")
        tensors |= dict(zip(places, tensor.stride()[:3], strict=True))
    plan_heads, block_q, block_k, _, blocks, _, _ = given.shape
    numbers = numbers_of(given)
    names = ("scale_log2", "softcap_log2", "softcap_slope", "plan_heads", "groups", "query_len")
    tensors |= {name: numbers[name] for name in names} | dict(scale=given.scale, blocks=blocks)
    dims = dict(DIM=given.q.shape[3], VALUE_DIM=given.v.shape[3])
    dims |= dict(BLOCK_D=power_of_two(given.q.shape[3]), BLOCK_DV=power_of_two(given.v.shape[3]))
    tiles = dict(BLOCK_Q=block_q, BLOCK_K=block_k, TILE_M=config.tile_m, TILE_N=config.tile_n)
    constants = dict(SHARE=given.q.shape[1] // plan_heads, SOFTCAP=given.softcap > 0)
    return tensors | dims | tiles | constants | dict(num_warps=config.warps, num_stages=config.stages)


def _keys(given: Arguments) -> dict[str, Any]:
    tensors: dict[str, Any] = dict(k_ptr=given.k, v_ptr=given.v, key_len=given.k.shape[2])
    tensors |= dict(sink_ptr=given.sink, window_ptr=given.window)
    for name in ("k", "v"):
        strides = getattr(given, name).stride()[:3]
        places = (f"{name}_batch_stride", f"{name}_head_stride", f"{name}_stride")
        tensors |= dict(zip(places, strides, strict=True))
    return tensors


def _query_gradients(
    given: Arguments,
    reached: Reached,
    config: Config,
    shared: dict[str, Any],
    bits: Tensor,
    means: tuple[Tensor, Tensor],
    grad_q: Tensor | None,
) -> None:
    plan_heads, block_q, _, column_group, blocks, key_blocks, _ = given.shape
    lists = ("block_indptr", "block_indices", "column_indptr", "column_indices", "q_order", "k_order")
    own: dict[str, Any] = {name: getattr(given, name) for name in lists}
    own |= dict(zip(("k_means", "v_means"), means, strict=True))
    own |= dict(selected_bits=bits, words=ceil_div(key_blocks, 32), key_blocks=key_blocks)
    own |= dict(k_rank=inverse(given.k_order) if given.needs_bitmap else given.k_order)
    own |= dict(column_lists=ceil_div(blocks, column_group), column_group=column_group)
    own |= dict(out_ptr=reached.out, lse_ptr=reached.lse, grad_ptr=reached.lse if grad_q is None else grad_q)
    own |= dict(reaching_lse_ptr=reached.lse if reached.grad_lse is None else reached.grad_lse)
    own |= dict(REACHING_LSE=reached.grad_lse is not None, MEANS=given.pruned_mean)
    own |= dict(HAS_BLOCKS=given.block_indices.numel() > 0, HAS_COLUMNS=given.column_indices.numel() > 0)
    own |= dict(Q_ORDER=given.q_order.numel() > 0, K_ORDER=given.k_order.numel() > 0)
    own |= dict(PASS=(ATTENDED if grad_q is None else SLOPES).value)
    programs = given.q.shape[0] * plan_heads * blocks * ceil_div(block_q * shared["SHARE"], config.tile_m)
    query_gradients[(programs,)](**shared | _keys(given) | own)


def _no_gradients(given: Arguments, needs: Needs, dtype: torch.dtype) -> list[Tensor | None]:
    """Of keys and values: zeros."""
    asked = ((given.k, needs.k), (given.v, needs.v))
    return [torch.zeros(x.shape, dtype=dtype, device=x.device) if needed else None for x, needed in asked]


def _key_gradients(
    given: Arguments, config: Config, shared: dict[str, Any], bits: Tensor, needs: Needs
) -> list[Tensor | None]:
    """Of keys and values, in floats where several launches add to them."""
    (plan_heads, _, block_k, column_group, blocks, key_blocks, _), groups = given.shape, given.k.shape[1]
    has_blocks, has_columns = given.block_indices.numel() > 0, given.column_indices.numel() > 0
    gathered = has_blocks and given.k_order.numel() > 0
    several = gathered or has_columns or given.pruned_mean
    found = _no_gradients(given, needs, torch.float32 if several else _stored(given))
    if not (needs.k or needs.v) or not given.k.numel():
        return found
    own = _keys(given) | dict(zip(("k_grad_ptr", "v_grad_ptr"), _pointers(found), strict=True))
    own |= dict(OF_KEYS=needs.k, OF_VALUES=needs.v, q_order=given.q_order, Q_ORDER=given.q_order.numel() > 0)
    indptr, indices = given.block_indptr, given.block_indices
    if has_blocks:
        indptr, indices = query_blocks_of(given.block_indptr, given.block_indices, blocks, key_blocks)
    lists = dict(row_indptr=indptr, row_indices=indices, key_blocks=key_blocks, k_order=given.k_order)
    together = plan_heads // groups

    def launch(first: int, count: int, block: int, number: int, **constants: bool) -> None:
        tiles = number * ceil_div(block, config.tile_n)
        whole = shared | own | lists | constants | dict(first=first, TOGETHER=count, BLOCK_K=block, tiles=tiles)
        if tiles:
            key_gradients[(given.q.shape[0] * groups * tiles,)](**whole)

    if has_blocks and not gathered:
        launch(0, together, block_k, key_blocks, BANDS=True, HAS_BLOCKS=True, K_ORDER=False, ADD=False)
    else:
        number = ceil_div(given.k.shape[2], config.tile_n)
        launch(0, together, config.tile_n, number, BANDS=True, HAS_BLOCKS=False, K_ORDER=False, ADD=False)
    for head in range(together if gathered else 0):  # their orders differ
        launch(head, 1, block_k, key_blocks, BANDS=False, HAS_BLOCKS=True, K_ORDER=True, ADD=True)
    if has_columns:
        own |= dict(selected_bits=bits, words=ceil_div(key_blocks, 32), HAS_BLOCKS=has_blocks, K_ORDER=gathered)
        own |= dict(k_rank=inverse(given.k_order) if gathered else given.k_order, column_group=column_group)
        own |= dict(column_lists=ceil_div(blocks, column_group), TILE_N=min(_MOST_COLUMNS, config.tile_n))
        lists_of_columns = (given.column_indptr, given.column_indices, given.q.shape[0] * groups, given.k.shape[2])
        for part in transposed_columns(*lists_of_columns, own["TILE_N"]):
            some = part._asdict()
            programs = some.pop("groups") * part.tiles
            column_gradients[(programs,)](**shared | own | some)
    return found


def _mean_gradients(
    given: Arguments,
    config: Config,
    shared: dict[str, Any],
    bits: Tensor,
    means: tuple[Tensor, Tensor],
    needs: Needs,
) -> list[Tensor | None]:
    """Of the means of key blocks, fp32 ``[B, G, N, dim]``."""
    (plan_heads, _, _, _, _, key_blocks, _), groups = given.shape, given.k.shape[1]
    asked = zip(means, (needs.k, needs.v), strict=True)
    found = [torch.zeros(x.shape, dtype=torch.float32, device=x.device) if needed else None for x, needed in asked]
    tiles = ceil_div(key_blocks, config.tile_n)
    if (needs.k or needs.v) and tiles:
        own = dict(zip(("k_ptr", "v_ptr"), means, strict=True))
        own |= dict(zip(("k_grad_ptr", "v_grad_ptr"), _pointers(found), strict=True))
        own |= dict(selected_bits=bits, words=ceil_div(key_blocks, 32), key_blocks=key_blocks, tiles=tiles)
        own |= dict(HAS_BLOCKS=given.block_indices.numel() > 0, OF_KEYS=needs.k, OF_VALUES=needs.v)
        mean_gradients[(given.q.shape[0] * groups * tiles,)](**shared | own | dict(TOGETHER=plan_heads // groups))
    return found


def _pointers(found: list[Tensor | None]) -> list[Tensor]:
    """In place of one that is not asked for, the other."""
    there = next(x for x in found if x is not None)
    return [there if x is None else x for x in found]


def _of_sinks(call: AttentionCall, reached: Reached, level: Tensor, needs: Needs) -> Tensor | None:
    """Rows that are not live have level 0."""
    if call.sinks is None or not needs.sinks:
        return None
    lse = reached.lse
    sinks = call.sinks.detach().float().view(1, -1, 1)
    share = torch.where(sinks == lse, 1.0, torch.exp(sinks - lse))
    return -torch.where(level == 0, 0.0, share * level).sum(dim=(0, 2))
