"""Sparsifiner's attention in a ViT as timm makes it: the same function in its dense stage, and refused where not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.modules import Connections, SparsifinerAttention, set_stage, sparsify_vit
from gossamer.modules.vit import HostedAttention

WIDTH, HEADS, SIDE = 16, 2, 8


class Attention(nn.Module):
    """With the parts and the arguments of timm's."""

    def __init__(self, bias: bool = True, drop: float = 0.0, norm: bool = False) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=bias)
        self.q_norm = nn.LayerNorm(WIDTH // HEADS) if norm else nn.Identity()
        self.k_norm, self.attn_drop, self.norm = nn.Identity(), nn.Dropout(drop), nn.Identity()
        self.proj, self.proj_drop = nn.Linear(WIDTH, WIDTH), nn.Dropout(0.0)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(WIDTH), Attention(**options)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(self.norm1(x), attn_mask=None, is_causal=False)


class Vit(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.num_prefix_tokens = 1
        self.patch_embed = nn.Conv2d(3, WIDTH, 2, stride=2)
        self.patch_embed.num_patches = (SIDE // 2) ** 2  # pyright: ignore
        self.cls_token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.blocks = nn.Sequential(Block(**options), Block(**options))

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        return self.blocks(torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1))


@pytest.mark.parametrize("bias", [True, False])
def test_the_dense_stage_is_the_function_that_it_was(bias: bool) -> None:
    torch.manual_seed(0)
    vit, images = Vit(bias=bias), torch.randn(3, 3, SIDE, SIDE)
    before = vit(images)
    assert sparsify_vit(vit, stage="dense") is vit
    torch.testing.assert_close(vit(images), before)


def test_blocks_are_masked_and_recorded_and_learn() -> None:
    torch.manual_seed(0)
    seen: list[Connections] = []
    vit = sparsify_vit(Vit(), keep=0.25, rank=4, record=seen.append)
    out = vit(torch.randn(3, 3, SIDE, SIDE))
    chosen = [one.chosen for one in seen]
    assert len(chosen) == 2
    assert all(mask is not None and bool((mask[:, :, 1:].sum(-1) == 5).all()) for mask in chosen)  # of 17, rounded up
    out.square().sum().backward()
    layers = [layer for layer in vit.modules() if isinstance(layer, SparsifinerAttention)]
    assert all(layer.projections.q_proj.weight.grad is not None for layer in layers)
    set_stage(vit, "dense")
    vit(torch.randn(1, 3, SIDE, SIDE))
    assert seen[-1].chosen is None


def test_a_mask_is_refused() -> None:
    vit = sparsify_vit(Vit())
    hosted = next(m for m in vit.modules() if isinstance(m, HostedAttention))
    x = torch.randn(1, 17, WIDTH)
    with pytest.raises(ValueError, match="without attn_mask"):
        hosted(x, attn_mask=torch.ones(17, 17, dtype=torch.bool))
    with pytest.raises(ValueError, match="without attn_mask"):
        hosted(x, is_causal=True)


@pytest.mark.parametrize(("options", "named"), [({"norm": True}, "q_norm"), ({"drop": 0.1}, "attn_drop")])
def test_attention_that_is_another_function_is_refused_and_nothing_is_replaced(
    options: dict[str, Any], named: str
) -> None:
    vit = Vit(**options)
    with pytest.raises(ValueError, match=named):
        sparsify_vit(vit)
    assert all(isinstance(block.attn, Attention) for block in vit.blocks)


def test_attention_with_parameters_or_buffers_of_its_own_is_refused() -> None:
    biased: Any
    indexed: Any
    bare: Any
    biased, indexed, bare = Vit(), Vit(), Vit()
    biased.blocks[1].attn.relative_position_bias_table = nn.Parameter(torch.zeros(3))
    indexed.blocks[0].attn.register_buffer("relative_position_index", torch.zeros(3))
    del bare.blocks[1].attn
    for vit, named in (
        (biased, "relative_position_bias_table"),
        (indexed, "relative_position_index"),
        (bare, "block 1 has none"),
    ):
        with pytest.raises(ValueError, match=named):
            sparsify_vit(vit)


def test_what_was_frozen_stays_frozen() -> None:
    vit: Any = Vit(bias=False)
    vit.requires_grad_(False)
    vit.blocks[0].attn.proj.weight.requires_grad_(True)
    sparsify_vit(vit)
    layers = [layer for layer in vit.modules() if isinstance(layer, SparsifinerAttention)]
    trained = [{n for n, p in layer.projections.named_parameters() if p.requires_grad} for layer in layers]
    assert trained == [{"o_proj.weight"}, set()]
    assert all(p.requires_grad for layer in layers for p in layer.predictor.parameters())


def test_models_without_one_class_token_are_refused() -> None:
    vit = Vit()
    vit.num_prefix_tokens = 5
    for other in (vit, nn.Linear(2, 2)):
        with pytest.raises(ValueError, match="one class token"):
            sparsify_vit(other)


def test_a_vit_of_timm_is_hosted() -> None:
    models = pytest.importorskip("timm.models.vision_transformer", reason="timm is an option")
    torch.manual_seed(0)
    vit = models.VisionTransformer(img_size=32, patch_size=8, embed_dim=WIDTH, depth=2, num_heads=HEADS, num_classes=3)
    images = torch.randn(2, 3, 32, 32)
    before = vit.eval()(images)
    sparsify_vit(vit, stage="dense", rank=4)
    torch.testing.assert_close(vit(images), before)
    set_stage(vit, "masked")
    assert not torch.allclose(vit(images), before)
