"""The FlexAttention executor: the same plan through PyTorch's own block-sparse kernels, on CPUs and GPUs.

An independent oracle, and the fallback on CUDA devices for which the Triton executor has no kernel. On CUDA it is
compiled; a plan of another structure (block sizes, parts, window) compiles anew. On CPUs FlexAttention returns the
LSE only uncompiled, and then holds all S x T logits: there it serves as an oracle. Not yet measured on a GPU.
On CUDA a plan's blocks must be multiples of 16 tokens.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gossamer.backends.torch.attend import cleared, cleared_queries
from gossamer.call import AttentionCall
from gossamer.plan import SparsePlan

__all__ = ["attend", "kernel_options"]

_MOST_TOKENS = 64  # of a tile
_SMALLEST = 16  # of a matrix product
_TILE_BYTES = 64 << 10  # of a tile of queries, in shared memory


def attend(call: AttentionCall, plan: SparsePlan) -> tuple[Tensor, Tensor]:
    """Attention over exactly the pairs that the plan names. See `gossamer.backends.torch.attend`, the definition.

    Returns:
        out ``[B, H, S, Dv]`` in q's dtype and lse fp32 ``[B, H, S]``.

    Raises:
        ValueError, TypeError: a plan for another call; one that is permuted, or has ``pruned_mean`` or ``skip``; fp64;
            on CUDA, blocks that `kernel_options` refuses.
    """
    from torch.nn.attention.flex_attention import AuxRequest

    call.check_plan(plan)
    call.refuse_bias("FlexAttention here")
    plan.check()  # making a mask waits for the device anyway
    q, sinks, softcap = call.q, call.sinks, call.softcap
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"FlexAttention takes float32, bfloat16 or float16, got {q.dtype}; convert q, k and v")
    if q.numel() == 0 or call.k.numel() == 0:
        lse = torch.full(q.shape[:3], float("-inf"), dtype=torch.float32, device=q.device)
        return q.new_zeros(*q.shape[:3], call.values.shape[-1]), _add_sinks(lse, sinks)
    attend_tiles, options = _uncompiled, {}
    if _on_cuda(q):
        widest = max(q.shape[-1], call.values.shape[-1])
        attend_tiles = _compiled()
        options = {"kernel_options": kernel_options(plan.block_q, plan.block_k, widest, q.dtype)}
    out, aux = attend_tiles(
        cleared_queries(call),
        cleared(call.k, call),
        cleared(call.values, call),
        score_mod=None if softcap is None else _cap(softcap),
        block_mask=plan.to(q.device).to_block_mask(call.heads),
        scale=call.scale,
        enable_gqa=call.share != 1,
        return_aux=AuxRequest(lse=True),
        **options,
    )
    lse = aux.lse.float()
    # The two paths of FlexAttention say differently that a row attends nothing.
    empty = ~(lse > torch.finfo(lse.dtype).min)
    out = out.masked_fill(empty[..., None], 0.0)
    lse = lse.masked_fill(empty, float("-inf"))
    if sinks is None:
        return out, lse
    with_sinks = _add_sinks(lse, sinks)
    share = torch.exp(lse - with_sinks.masked_fill(with_sinks == float("-inf"), 0.0))
    return (out * share[..., None]).to(q.dtype), with_sinks


def kernel_options(block_q: int, block_k: int, dim: int, dtype: torch.dtype) -> dict[str, Any]:
    """Tiles for FlexAttention's kernel on CUDA that divide a plan's blocks, which its own defaults often do not.

    Args:
        block_q, block_k: tokens in a block of the plan; dim: the larger head dimension.

    Raises:
        ValueError: a block is no multiple of 16 tokens, the least that a matrix product takes.
    """
    if block_q % _SMALLEST or block_k % _SMALLEST:
        raise ValueError(
            f"FlexAttention on CUDA takes plans whose blocks are multiples of {_SMALLEST} tokens, got "
            f"block_q={block_q} and block_k={block_k}; make the plan with such blocks, or set GOSSAMER_BACKEND=torch"
        )
    width = 1 << max(0, dim - 1).bit_length()
    rows = keys = _MOST_TOKENS
    if dtype == torch.float32:  # products without tensor cores are unrolled, and their operands have to fit registers
        rows, keys = (64, 32) if width <= 64 else (32, 16) if width <= 256 else (16, 16)
    elif width > 128:
        rows = min(rows, max(_SMALLEST, _TILE_BYTES // (2 * width)))
        keys = max(_SMALLEST, rows // 2)
    options: dict[str, Any] = {
        "BLOCK_M": min(rows, block_q & -block_q),
        "BLOCK_N": min(keys, block_k & -block_k),
        "FORCE_USE_FLEX_ATTENTION": True,  # the kernel for short queries has tiles of its own
    }
    if dtype == torch.float32 or width > 256:
        options["num_warps"] = 8
    if width > 256:
        options["num_stages"] = 1
    return options


def _add_sinks(lse: Tensor, sinks: Tensor | None) -> Tensor:
    return lse if sinks is None else torch.logaddexp(lse, sinks.to(lse).view(1, -1, 1))


def _cap(softcap: float) -> Callable[..., Tensor]:
    def score_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return score_mod


def _uncompiled(*arguments: Any, **options: Any) -> Any:
    """All S x T logits are held, as this module says and FlexAttention warns."""
    from torch.nn.attention.flex_attention import flex_attention

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile", category=UserWarning)
        return flex_attention(*arguments, **options)


def _on_cuda(q: Tensor) -> bool:
    return q.is_cuda


@functools.cache
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)
