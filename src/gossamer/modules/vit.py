"""Sparsifiner's attention in a Vision Transformer of timm (``timm.models.vision_transformer``), weights kept.

timm is not imported: what counts is how its blocks are made, ``blocks[n].attn`` with ``qkv``, ``proj`` and
``num_heads``, read from its source at 0041cb7. DeiT and ViT with one class token and plain attention are so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.modules.sparsifiner import Connections, SparsifinerAttention, Stage

__all__ = ["HostedAttention", "sparsify_vit"]

_PARTS = {"qkv", "q_norm", "k_norm", "attn_drop", "norm", "proj", "proj_drop"}


class HostedAttention(nn.Module):
    """A `SparsifinerAttention` in place of a block's ``attn``.

    Fields:
        record: called with the `Connections` of each forward pass, unless None.
    """

    def __init__(self, attention: SparsifinerAttention, record: Callable[[Connections], object] | None) -> None:
        super().__init__()
        self.attention, self.record = attention, record

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """``[B, N, E]`` to the same.

        Raises:
            ValueError: a mask, or causality.
        """
        if attn_mask is not None or is_causal:
            raise ValueError("Sparsifiner chooses what is attended by itself; call the model without attn_mask")
        return self.attention(x, record=self.record)


def sparsify_vit(
    vit: nn.Module,
    *,
    stage: Stage = "masked",
    record: Callable[[Connections], object] | None = None,
    **options: Any,
) -> nn.Module:
    """Put `SparsifinerAttention` in place of the attention of every block, with its weights; the same model returned.

    Args:
        vit: a ``VisionTransformer`` of timm, or what has its parts: ``blocks``, ``patch_embed.num_patches``, and a
            class token as its one token of another kind.
        stage: see `SparsifinerAttention`; with ``"dense"`` the model is the function that it was.
        record: see `HostedAttention`; ``seen.append`` of a list is what `reconstruction_loss` needs.
        options: of `SparsifinerAttention`: ``keep``, ``rank``, ``coefficients`` and so on.

    Raises:
        ValueError: the model has not one class token, or attention that this cannot stand in for: with norms of
            queries and keys, with dropout, with parameters or buffers of its own (a position bias), or of another make.
    """
    blocks = getattr(vit, "blocks", None)
    prefix = getattr(vit, "num_prefix_tokens", 1)
    if blocks is None or not len(blocks) or prefix != 1 or getattr(vit, "cls_token", None) is None:
        raise ValueError(
            f"expected a VisionTransformer of timm with blocks and one class token, got {type(vit).__name__} with "
            f"{0 if blocks is None else len(blocks)} blocks and {prefix} tokens before the patches"
        )
    tokens = int(vit.patch_embed.num_patches) + 1  # pyright: ignore
    if without := [n for n, block in enumerate(blocks) if not isinstance(getattr(block, "attn", None), nn.Module)]:
        raise ValueError(f"expected an attn in every block, as timm's have it; block {without[0]} has none")
    made = [_of(block.attn, tokens, stage, options) for block in blocks]  # all, before the first takes its place
    for block, attention in zip(blocks, made, strict=True):
        block.attn = HostedAttention(attention, record).train(block.attn.training)
    return vit


def _of(own: Any, tokens: int, stage: Stage, options: dict[str, Any]) -> SparsifinerAttention:
    parts = dict(own.named_children())
    other = sorted(parts.keys() - _PARTS) + [n for n in ("q_norm", "k_norm", "norm") if not _nothing(parts.get(n))]
    other += [n for n in ("attn_drop", "proj_drop") if getattr(parts.get(n), "p", 0.0)]
    # Such as BEiT's position bias, which the function reads beside qkv and proj.
    other += [n for n, _ in (*own.named_parameters(recurse=False), *own.named_buffers(recurse=False))]
    if other or not {"qkv", "proj"} <= parts.keys() or not hasattr(own, "num_heads"):
        raise ValueError(
            f"expected plain attention of timm, with qkv, proj and num_heads, no norms, no dropout and no parameters "
            f"or buffers beside them; {type(own).__name__} has {', '.join(other) or ', '.join(parts) or 'no parts'}"
        )
    weight, bias = own.qkv.weight, own.qkv.bias
    biased = bias is not None or own.proj.bias is not None
    given = {"device": weight.device, "dtype": weight.dtype, "bias": biased, "stage": stage, **options}
    made = SparsifinerAttention(own.proj.out_features, own.num_heads, tokens, **given)
    to = made.projections
    with torch.no_grad():
        for n, proj in enumerate((to.q_proj, to.k_proj, to.v_proj)):
            _take(proj.weight, weight, n, 3)
            if biased:
                _take(proj.bias, bias, n, 3)
        _take(to.o_proj.weight, own.proj.weight)
        if biased:
            _take(to.o_proj.bias, own.proj.bias)
    return made


def _take(to: Tensor, given: Tensor | None, part: int = 0, parts: int = 1) -> None:
    """A part of a parameter, and whether it is trained; where there was none zeros, which stay."""
    to.copy_(torch.zeros_like(to) if given is None else given.chunk(parts)[part])
    to.requires_grad_(given is not None and given.requires_grad)


def _nothing(part: nn.Module | None) -> bool:
    return part is None or isinstance(part, nn.Identity)
