"""The network as it is trained: a forward pass over the weights of a LlamaForCausalLM, and their first values."""

from typing import Any

import torch
import torch.nn.functional as F
from tokenizer import BOS, EOS, PAD, VOCABULARY
from torch import Tensor
from transformers import LlamaConfig

LAYERS, WIDTH, HEADS, KV_HEADS, HEAD_DIM, HIDDEN = 6, 256, 4, 2, 64, 768
THETA = 5e8
MAX_POSITIONS = 131072

# The residual stream at the start: a constant, a flag of <bos>, the token, and four slots for the tokens before it.
CONSTANT, FLAG, TOKEN, CODE = 0, 1, 2, 16
SLOTS = WIDTH - 4 * CODE
CONSTANT_VALUE, FLAG_VALUE = 6.0, 12.0


def make_config() -> LlamaConfig:
    """The architecture of the reference model."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )


def rotary(positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos, sin [B, 1, S, HEAD_DIM] in float32 for integer positions [B, S]."""
    frequencies = THETA ** (-torch.arange(HEAD_DIM // 2, dtype=torch.float64) / (HEAD_DIM // 2))
    angles = (positions.double()[:, None, :, None] * frequencies).float()
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    return (x.float() * cos + torch.cat([-second, first], dim=-1) * sin).to(torch.bfloat16)


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight.to(torch.bfloat16))


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (WIDTH,), weight, 1e-5).to(torch.bfloat16)


def _split(x: Tensor, heads: int) -> Tensor:
    return x.view(x.shape[0], x.shape[1], heads, HEAD_DIM).transpose(1, 2)


def run_layers(
    model: Any,
    tokens: Tensor,
    cos: Tensor,
    sin: Tensor,
    prefix: list[Tensor] | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Hidden states [B, S, WIDTH] before the head, and what each layer's attention read [B, S, WIDTH].

    tokens: [B, S]. cos, sin: rotary tables of the prefix and of these tokens, [B, 1, P + S, HEAD_DIM].
    prefix: what each layer's attention read at the P tokens before (a constant: no gradient flows into it).
    mask: additive [S, P + S]; causal attention where not given (then P must be 0).
    """
    x = model.model.embed_tokens.weight[tokens]
    seen = []
    length = tokens.shape[1]
    for index, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        h = _norm(x, layer.input_layernorm.weight)
        seen.append(h)
        source = h if prefix is None else torch.cat([prefix[index], h], dim=1)
        query = _rotate(_split(_linear(h, attention.q_proj.weight), HEADS), cos[:, :, -length:], sin[:, :, -length:])
        key = _rotate(_split(_linear(source, attention.k_proj.weight), KV_HEADS), cos, sin)
        value = _split(_linear(source, attention.v_proj.weight), KV_HEADS)
        key = key.repeat_interleave(HEADS // KV_HEADS, dim=1)
        value = value.repeat_interleave(HEADS // KV_HEADS, dim=1)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None)
        out = out.transpose(1, 2).reshape(x.shape)
        x = x + _linear(out, attention.o_proj.weight).float()
        h = _norm(x, layer.post_attention_layernorm.weight)
        gate = _linear(h, mlp.gate_proj.weight)
        up = _linear(h, mlp.up_proj.weight)
        x = x + _linear(F.silu(gate) * up, mlp.down_proj.weight).float()
    return _norm(x, model.model.norm.weight), seen


def token_losses(model: Any, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy and argmax-correctness [B, S] of predicting `targets` [B, S]."""
    logits = _linear(hidden, model.lm_head.weight).float()
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
    return losses, (logits.argmax(-1) == targets)


def tail_mask(prefix: int, length: int) -> Tensor:
    """Additive causal mask [length, prefix + length] for queries that follow a prefix."""
    keys = torch.arange(prefix + length)
    allowed = keys[None, :] <= (prefix + torch.arange(length))[:, None]
    return torch.zeros(length, prefix + length, dtype=torch.bfloat16).masked_fill(~allowed, float("-inf"))


@torch.no_grad()
def initialize(model: Any, seed: int) -> None:
    """First values that already hold an induction circuit and a resting place for attention ("mimetic" initialisation).

    Layer 0: head h attends to the token h + 1 places back and copies 16 signs of its embedding into slot h.
    Layer 1: heads compare (this token, 1 back) with (1 back, 2 back), or (2, 3 back) with (3, 4 back), and
    copy the token that followed. Layers 1 to 5: every query is drawn to <bos>, whose value is zero.
    Everything is trained afterwards.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    embedding = model.model.embed_tokens.weight
    embedding.zero_()
    embedding[:, TOKEN:SLOTS] = normal(VOCABULARY, SLOTS - TOKEN)
    embedding[:, TOKEN : TOKEN + CODE].sign_()
    embedding[BOS] = 0
    embedding[:, CONSTANT] = CONSTANT_VALUE
    embedding[BOS, FLAG] = FLAG_VALUE
    model.lm_head.weight.copy_(0.03 * embedding)
    model.lm_head.weight[:, :TOKEN] = 0

    half = HEAD_DIM // 2
    for index, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
            projection.weight.copy_(normal(*projection.weight.shape) / WIDTH**0.5)
        attention.o_proj.weight.zero_()
        mlp.down_proj.weight.zero_()
        if index:
            strength = (8 * (15.0 if index == 1 else 5.0)) ** 0.5
            for projection, heads in ((attention.q_proj, HEADS), (attention.k_proj, KV_HEADS)):
                if index == 1:
                    projection.weight.zero_()
                rows = projection.weight.view(heads, HEAD_DIM, WIDTH)
                rows[:, [half - 1, HEAD_DIM - 1]] = 0
                source, size = (CONSTANT, 5.8) if projection is attention.q_proj else (FLAG, 14.3)
                rows[:, half - 1, source] = strength / size

    first = model.model.layers[0].self_attn
    frequencies = THETA ** (-torch.arange(6) / half)
    query = first.q_proj.weight.zero_().view(HEADS, HEAD_DIM, WIDTH)
    key = first.k_proj.weight.zero_().view(KV_HEADS, HEAD_DIM, WIDTH)
    value = first.v_proj.weight.view(KV_HEADS, HEAD_DIM, WIDTH)
    out = first.o_proj.weight.view(WIDTH, HEADS, HEAD_DIM)
    key[:, :6, CONSTANT] = 5.5 / 6.9
    value[:, :CODE] = 0
    for i in range(CODE):
        value[:, i, TOKEN + i] = 1
    for head in range(HEADS):
        query[head, :6, CONSTANT] = 5.5 / 6.9 * torch.cos(frequencies * (head + 1))
        query[head, half : half + 6, CONSTANT] = -5.5 / 6.9 * torch.sin(frequencies * (head + 1))
        for i in range(CODE):
            out[SLOTS + head * CODE + i, head, i] = 1

    second = model.model.layers[1].self_attn
    query = second.q_proj.weight.view(HEADS, HEAD_DIM, WIDTH)
    key = second.k_proj.weight.view(KV_HEADS, HEAD_DIM, WIDTH)
    value = second.v_proj.weight.zero_().view(KV_HEADS, HEAD_DIM, WIDTH)
    out = second.o_proj.weight.view(WIDTH, HEADS, HEAD_DIM)
    back = [TOKEN, *(SLOTS + slot * CODE for slot in range(4))]
    for group, (a, b) in enumerate(((0, 1), (2, 3))):
        basis = torch.linalg.qr(normal(SLOTS - TOKEN, HEAD_DIM))[0].T
        value[group, :, TOKEN:SLOTS] = basis
        for i in range(CODE - 1):
            low, high = half - CODE + i, HEAD_DIM - CODE + i
            key[group, low, back[a + 1] + i] = 2.5
            key[group, high, back[b + 1] + i] = 2.5
            for head, gain in ((2 * group, 2.5), (2 * group + 1, 2.2)):
                query[head, low, back[a] + i] = gain
                query[head, high, back[b] + i] = gain
        for head in (2 * group, 2 * group + 1):
            out[TOKEN:SLOTS, head] = 1.2 * basis.T
