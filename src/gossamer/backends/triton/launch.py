"""From the operator's arguments to a grid of programs. Imports Triton."""

# Triton's launchers take what pyright does not see.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gossamer.backends.triton.config import Config, Problem, choose, power_of_two
from gossamer.backends.triton.device import UNLIMITED
from gossamer.backends.triton.encoded import coded_arguments, plain
from gossamer.backends.triton.kernels.attend import attend
from gossamer.backends.triton.kernels.columns import mark_blocks
from gossamer.backends.triton.scores import block_means
from gossamer.encoded import EncodedTokens
from gossamer.plan import ceil_div
from gossamer.plan.checks import SKIP_TILE

__all__ = [
    "MARK_TILE",
    "Arguments",
    "describable",
    "inverse",
    "launch",
    "means_of",
    "numbers_of",
    "offers_descriptors",
    "problem_of",
]

MARK_TILE = 128
_MOST_BITMAP_BYTES = 64 << 20
_LOG2_E = math.log2(math.e)
# Of a bias: larger numbers are infinite in units of log2.
_MOST = 2e38


class Arguments(NamedTuple):
    """Of the operator ``gossamer::triton_attend``: inputs, the plan's parts, and numbers.

    Absent tensors are empty. ``extent`` is that of `gossamer.backends.triton.device.extent_on`; ``shape`` the plan's
    heads, block_q, block_k, column_group, numbers of query and key blocks and pruned_mean; ``all_live`` says that there
    is no dead query row; a ``softcap`` of 0 is none, as is no ``skip``. ``k`` and ``v`` may be
    `gossamer.encoded.EncodedTokens`; ``bias`` is ``[B, G, T]``. ``codes`` are none, or
    `gossamer.backends.torch.integers.Codes`, which the kernel reads in place of ``q`` and ``k``.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    block_indptr: Tensor
    block_indices: Tensor
    column_indptr: Tensor
    column_indices: Tensor
    sink: Tensor
    window: Tensor
    q_order: Tensor
    k_order: Tensor
    extent: Tensor
    sinks: Tensor
    bias: Tensor
    shape: list[int]
    all_live: bool
    scale: float
    softcap: float
    skip: float | None = None
    codes: Sequence[Tensor] = ()

    @property
    def pruned_mean(self) -> bool:
        return bool(self.shape[6])

    @property
    def needs_bitmap(self) -> bool:
        """Whether columns, or means of blocks, have to be told from those that selected blocks hold."""
        return self.block_indices.numel() > 0 and (self.column_indices.numel() > 0 or self.pruned_mean)


def launch(given: Arguments, *, config: Config | None = None) -> tuple[Tensor, Tensor]:
    """Run the forward kernel; ``config`` overrides the table's."""
    q, (plan_heads, block_q, _, _, blocks, key_blocks, _) = given.q, given.shape
    batch, heads = q.shape[:2]
    # The interpreter rounds fp32 to bf16 otherwise than devices do; torch does it like them.
    out_dtype = torch.float32 if q.dtype == torch.bfloat16 and not q.is_cuda else q.dtype
    out = torch.empty(*q.shape[:3], given.v.shape[-1], dtype=out_dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if not given.all_live:  # the kernel writes live rows alone
        out.zero_()
        lse.copy_(given.sinks[:, None]) if given.sinks.numel() else lse.fill_(-math.inf)
    if out.numel() == 0 or blocks == 0:
        return out.to(q.dtype), lse
    given = _prepared(given)
    config = config or choose(problem_of(given))
    if given.skip is not None:
        config = _with_skip_tiles(config, given)
    if given.codes:
        given = given._replace(q=given.codes[0], k=given.codes[1])
    share, words = heads // plan_heads, ceil_div(key_blocks, 32)
    rows, together = batch * plan_heads, plan_heads // given.k.shape[1]
    bits = given.block_indices
    if given.needs_bitmap:
        rows, together = _rows_at_once(rows, together, blocks * words * 4)
        bits = torch.empty(rows * blocks, words, dtype=torch.int32, device=q.device)
    arguments = _tensors(given, config) | numbers_of(given) | _constants(given, config)
    arguments |= coded_arguments("k", given.k) | coded_arguments("v", given.v)
    arguments |= dict(out_ptr=out, lse_ptr=lse, selected_bits=bits, together=together, blocks=blocks, words=words)
    with torch.cuda.device_of(q):  # Triton launches on the current device
        for first_row in range(0, batch * plan_heads, rows):
            plan_rows = min(rows, batch * plan_heads - first_row) * blocks
            if given.needs_bitmap:
                bits.zero_()
                lists = (given.block_indptr, given.block_indices, bits, first_row * blocks, words)
                mark_blocks[(plan_rows,)](*lists, TILE=MARK_TILE)
            programs = plan_rows * ceil_div(block_q * share, config.tile_m)
            attend[(programs,)](**arguments, first_row=first_row, num_warps=config.warps, num_stages=config.stages)
    return out.to(q.dtype), lse


def _prepared(given: Arguments) -> Arguments:
    """With rows that are dense in memory, and a scale above 0, by which the kernel multiplies a row's maximum."""
    encoded = EncodedTokens
    q, k, v = (t if isinstance(t, encoded) or t.stride(-1) == 1 else t.contiguous() for t in given[:3])
    scale, codes = given.scale, [x.contiguous() for x in given.codes]
    if scale <= 0:
        if codes:
            sign = -1.0 if scale < 0 else 0.0
            codes = [*codes[:2], codes[2] * sign, codes[3], codes[4] * sign]
        q, scale = (-q, -scale) if scale < 0 else (torch.zeros_like(q), 1.0)
    sink, window = given.sink.clamp(max=UNLIMITED), given.window.clamp(max=UNLIMITED)
    return given._replace(q=q, k=k, v=v, scale=scale, sink=sink, window=window, codes=codes)


def _with_skip_tiles(config: Config, given: Arguments) -> Config:
    """Tiles of the keys that rows leave out together; with wide heads, fewer of them at once in shared memory."""
    wide = max(given.q.shape[3], given.v.shape[3]) > 128
    return replace(config, tile_n=SKIP_TILE, stages=min(config.stages, 1 if wide else 2))


def means_of(given: Arguments) -> tuple[Tensor, Tensor]:
    """Of the keys and values of each key block, ``[B, G, N, dim]`` in q's dtype; anything where they are not needed."""
    if not given.pruned_mean:
        return given.q, given.q
    block_k, key_blocks = given.shape[2], given.shape[5]
    tokens = torch.nn.functional.pad(given.extent[:, 2:4], (0, 1))
    k, v = (block_means(x, tokens, block_k, key_blocks).to(given.q.dtype) for x in (given.k, given.v))
    return k, v


def problem_of(given: Arguments) -> Problem:
    """What the choice of tiles goes by."""
    heads, block_q, block_k = given.shape[:3]
    parts = {"blocks": given.block_indices.numel() > 0, "columns": given.column_indices.numel() > 0}
    return Problem.of(given.q, given.v, heads, block_q, block_k, given.k.shape[2], **parts)


def _tensors(given: Arguments, config: Config) -> dict[str, Any]:
    """Tensors of the kernel, descriptors and strides."""
    k_descriptor, v_descriptor = plain(given.k), plain(given.v)
    if _described(given, config):
        block_d, block_dv, _ = _dims(given, config)
        k_descriptor = _descriptor(given.k, config.tile_n, block_d)
        v_descriptor = _descriptor(given.v, config.tile_n, block_dv)
    tensors: dict[str, Any] = dict(k_descriptor=k_descriptor, v_descriptor=v_descriptor, bias_ptr=_log2_bias(given))
    for name in ("q", "k", "v"):
        rows = plain(getattr(given, name))
        places = (f"{name}_batch_stride", f"{name}_head_stride", f"{name}_stride")
        tensors |= {f"{name}_ptr": rows} | dict(zip(places, rows.stride()[:3], strict=True))
    lists = ("block_indptr", "block_indices", "column_indptr", "column_indices", "q_order", "k_order")
    tensors |= {name: getattr(given, name) for name in lists}
    tensors |= dict(zip(("k_means", "v_means"), means_of(given), strict=True))
    steps = given.codes[2:] or (given.q, given.q, given.q)
    tensors |= dict(zip(("q_steps", "k_steps", "q_shifts"), steps, strict=True))
    tensors |= dict(sink_ptr=given.sink, window_ptr=given.window, extent_ptr=given.extent, sinks_ptr=given.sinks)
    return tensors | dict(k_rank=inverse(given.k_order) if given.needs_bitmap else given.k_order)


def _log2_bias(given: Arguments) -> Tensor:
    """In units of log2, fp32; what is finite stays so."""
    bias = given.bias.float()
    return torch.where(bias.isinf(), bias, bias.clamp(-_MOST, _MOST) * _LOG2_E).contiguous()


def numbers_of(given: Arguments) -> dict[str, Any]:
    """Of the kernel, that are no constants."""
    heads, _, _, column_group, blocks, key_blocks, _ = given.shape
    return dict(
        plan_heads=heads,
        groups=given.k.shape[1],
        query_len=given.q.shape[2],
        key_len=given.k.shape[2],
        key_blocks=key_blocks,
        column_lists=ceil_div(blocks, column_group),
        column_group=column_group,
        scale_log2=given.scale * _LOG2_E,
        softcap_log2=given.softcap * _LOG2_E,
        softcap_slope=2.0 * _LOG2_E * given.scale / given.softcap if given.softcap else 0.0,
        skip_log2=(given.skip or 0.0) * _LOG2_E,
    )


def _constants(given: Arguments, config: Config) -> dict[str, Any]:
    heads, block_q, block_k = given.shape[:3]
    block_d, block_dv, halves = _dims(given, config)
    return dict(
        SHARE=given.q.shape[1] // heads,
        DIM=given.q.shape[3],
        VALUE_DIM=given.v.shape[3],
        BLOCK_D=block_d,
        BLOCK_DV=block_dv,
        HALVES=halves,
        BLOCK_Q=block_q,
        BLOCK_K=block_k,
        TILE_M=config.tile_m,
        TILE_N=config.tile_n,
        HAS_BLOCKS=given.block_indices.numel() > 0,
        HAS_COLUMNS=given.column_indices.numel() > 0,
        Q_ORDER=given.q_order.numel() > 0,
        K_ORDER=given.k_order.numel() > 0,
        SOFTCAP=given.softcap > 0,
        SINKS=given.sinks.numel() > 0,
        DESCRIPTORS=_described(given, config),
        MEANS=given.pruned_mean,
        SKIP=given.skip is not None,
        BIASED=given.bias.numel() > 0,
    )


def _dims(given: Arguments, config: Config) -> tuple[int, int, int]:
    """Dimensions of tiles of K and V, and in how many parts the output is accumulated: 2 where its halves are no wider
    than high, but it is.

    For Ampere-style products Triton gives the warps rows when the accumulator is at least as high as wide, and else
    columns, and then every softmax step passes shared memory. Those of Hopper and big Blackwells do not care.
    """
    block_d, block_dv = power_of_two(given.q.shape[3]), power_of_two(given.v.shape[3])
    if given.codes:  # products of int8 take 32 dimensions at least
        block_d = max(32, block_d)
    major = torch.cuda.get_device_capability(given.q.device)[0] if given.q.is_cuda else 0
    halves = 2 if config.tile_m < block_dv <= 2 * config.tile_m and major not in (9, 10) else 1
    return block_d, block_dv // halves, halves


def _described(given: Arguments, config: Config) -> bool:
    able = config.descriptors and describable(given.k) and describable(given.v)
    return able and offers_descriptors(given.q.device)


def offers_descriptors(device: torch.device) -> bool:
    """Whether this Triton makes tensor descriptors on the host for a device: Triton 3.6, compute capability 9.0."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        return False
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    has_them = hasattr(tl, "tensor_descriptor") and importlib.util.find_spec("triton.tools.tensor_descriptor")
    return version >= (3, 6) and bool(has_them)


def describable(t: Tensor) -> bool:
    """Whether ``[B, G, T, D]`` has two-byte elements and the alignment that a tensor descriptor needs: 16 bytes."""
    if isinstance(t, EncodedTokens) or t.element_size() != 2 or t.stride(-1) != 1 or t.data_ptr() % 16 or not t.numel():
        return False
    strides = [stride for size, stride in zip(t.shape[:-1], t.stride()[:-1], strict=True) if size > 1]
    return all(stride > 0 and stride % 8 == 0 for stride in strides)


def _descriptor(t: Tensor, tile_n: int, block_dim: int) -> object:
    from triton.tools.tensor_descriptor import TensorDescriptor

    # A dimension of one element may have any stride; a descriptor wants an aligned one.
    strides = [stride if size > 1 else 8 for size, stride in zip(t.shape[:-1], t.stride()[:-1], strict=True)]
    return TensorDescriptor(t, list(t.shape), [*strides, 1], [1, 1, tile_n, block_dim])


def _rows_at_once(rows: int, together: int, bytes_a_row: int) -> tuple[int, int]:
    """Rows of the plan (batch times head) that one launch serves so that their bitmap stays small, and how many of
    them run side by side: the heads of a key/value head, or as many of them as fit.
    """
    most = max(1, _MOST_BITMAP_BYTES // max(1, bytes_a_row))
    if most >= rows:
        return rows, together
    together = max(n for n in range(1, together + 1) if together % n == 0 and n <= most)
    return most - most % together, together


def inverse(order: Tensor) -> Tensor:
    """Rank by original index, of the last dimension."""
    if not order.numel():
        return order
    ranks = torch.arange(order.shape[-1], dtype=torch.int32, device=order.device).expand_as(order).contiguous()
    return torch.empty_like(ranks).scatter_(-1, order.long(), ranks)
