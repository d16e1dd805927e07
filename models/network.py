"""The network as it is trained: a forward pass over the weights of a LlamaForCausalLM, and their first values."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from tokenizer import BOS, EOS, PAD, VOCABULARY
from torch import Tensor
from transformers import LlamaConfig

from gossamer import AttentionCall, backends
from gossamer.methods import Dense

LAYERS, WIDTH, HEADS, KV_HEADS, HEAD_DIM, HIDDEN = 6, 256, 4, 2, 64, 768
THETA = 5e8
MAX_POSITIONS = 131072

# The residual stream at the start: a constant, a flag of <bos>, the token, and four slots for the tokens before it.
CONSTANT, FLAG, TOKEN, CODE = 0, 1, 2, 16
SLOTS = WIDTH - 4 * CODE
# Where the codes of this token and of the four before it lie.
_BACK = (TOKEN, *range(SLOTS, WIDTH, CODE))
# Of the token's dimensions after its code, numbers use those before this one and other tokens the rest.
NUMBERS = (TOKEN + CODE + SLOTS) // 2
CONSTANT_VALUE, FLAG_VALUE = 6.0, 12.0
# What these two are after the normalisation, about, and the rotary pairs whose sum falls with the distance,
# and pairs that are slow enough to mark a token within a sentence.
CONSTANT_SIZE, FLAG_SIZE = 5.8, 14.3
NEAR, MARK = slice(7, 12), slice(12, 16)
SINK_KEY = 9.0


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


@torch.library.custom_op("reference_model::attention", mutates_args=())
def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Causal attention of the last S of T tokens, and its LSE, by gossamer's dense plan.

    query: [B, HEADS, S, HEAD_DIM]. key, value: [B, KV_HEADS, T, HEAD_DIM].
    """
    call = AttentionCall(query, key, value)
    return backends.attend(call, Dense().plan(call))


@attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=torch.float32)


@torch.library.custom_op("reference_model::attention_backward", mutates_args=())
def attend_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, by the backward pass of torch's own CPU attention."""
    repeat = query.shape[1] // key.shape[1]
    length, total = query.shape[2], key.shape[2]
    mask = None if length == total else tail_mask(total - length, length)
    gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        gradient.contiguous(),
        query.contiguous(),
        key.repeat_interleave(repeat, dim=1),
        value.repeat_interleave(repeat, dim=1),
        out,
        lse,
        0.0,
        mask is None,
        attn_mask=mask,
    )
    query_gradient, key_gradient, value_gradient = gradients
    folded = [g.unflatten(1, (-1, repeat)).sum(2, dtype=torch.float32) for g in (key_gradient, value_gradient)]
    return query_gradient.contiguous(), folded[0].to(key.dtype), folded[1].to(value.dtype)


@attend_backward.register_fake
def _(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return attend_backward(gradient, *ctx.saved_tensors)


attend.register_autograd(_backward, setup_context=_save)


def run_layers(
    model: Any,
    tokens: Tensor,
    cos: Tensor,
    sin: Tensor,
    prefix: list[Tensor] | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Hidden states [B, S, WIDTH] before the head, and what each layer's attention read [B, S, WIDTH].

    tokens: [B, S]. cos, sin: rotary tables of the prefix and of these tokens, [B, 1, P + S, HEAD_DIM].
    prefix: what each layer's attention read at the P tokens before (a constant: no gradient flows into it).
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
        out, _ = attend(query, key, value)
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
def initialize(model: Any, seed: int, numbers: list[int], comma: int, verb: int) -> None:
    """First values that already hold induction circuits and a resting place for attention ("mimetic" initialisation).

    Layer 0: head h attends to the token h + 1 places back and copies 16 signs of its embedding into slot h.
    Layer 1: heads compare (this token, 1 back) with (1 back, 2 back), or (2, 3 back) with (3, 4 back), and
    copy the token that followed. Layer 2, for lists such as ", one key is 12, other key is 34": from a comma, one head
    looks at the "is" before it and copies words from there, where layer 1 has put the next key of the question; from
    an "is", the other looks at the numbers given before and takes them away. Layers 1 to 5: every query is drawn to
    <bos>, whose value is zero. Everything is trained afterwards.

    numbers: ids of number tokens, whose embeddings have dimensions of their own.
    comma, verb: ids of "," and " is".
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    with_codes = _embed(model, normal, numbers)
    for index, layer in enumerate(model.model.layers):
        _start_layer(layer, index, normal)
    _look_back(model.model.layers[0].self_attn)
    of_numbers, of_others = _compare_pairs(model.model.layers[1].self_attn, normal)
    comma_code, verb_code = (with_codes[token, TOKEN : TOKEN + CODE] / CODE for token in (comma, verb))
    _read_lists(model.model.layers[2].self_attn, of_numbers, of_others, comma_code, verb_code)


def _embed(model: Any, normal: Callable[..., Tensor], numbers: list[int]) -> Tensor:
    """Token embeddings: signs that name each token, and dimensions of their own for numbers."""
    embedding = model.model.embed_tokens.weight
    embedding.zero_()
    embedding[:, TOKEN:SLOTS] = normal(VOCABULARY, SLOTS - TOKEN)
    embedding[:, TOKEN : TOKEN + CODE].sign_()
    number_rows = torch.zeros(VOCABULARY, dtype=torch.bool)
    number_rows[numbers] = True
    embedding[number_rows, NUMBERS:SLOTS] = 0
    embedding[number_rows, TOKEN + CODE : NUMBERS] *= 2**0.5
    embedding[~number_rows, TOKEN + CODE : NUMBERS] = 0
    embedding[~number_rows, NUMBERS:SLOTS] *= 2**0.5
    embedding[BOS] = 0
    embedding[:, CONSTANT] = CONSTANT_VALUE
    embedding[BOS, FLAG] = FLAG_VALUE
    model.lm_head.weight.copy_(0.03 * embedding)
    model.lm_head.weight[:, :TOKEN] = 0
    return embedding


def _start_layer(layer: Any, index: int, normal: Callable[..., Tensor]) -> None:
    """Random projections, nothing written back; from layer 1 on every query is drawn to <bos>."""
    half = HEAD_DIM // 2
    attention, mlp = layer.self_attn, layer.mlp
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
        projection.weight.copy_(normal(*projection.weight.shape) / WIDTH**0.5)
    attention.o_proj.weight.zero_()
    mlp.down_proj.weight.zero_()
    if index:
        query = attention.q_proj.weight.view(HEADS, HEAD_DIM, WIDTH)
        key = attention.k_proj.weight.view(KV_HEADS, HEAD_DIM, WIDTH)
        lookups = {1: HEADS, 2: HEADS // KV_HEADS}.get(index, 0)
        query[:lookups] = 0
        key[: lookups * KV_HEADS // HEADS] = 0
        query[:, [half - 1, HEAD_DIM - 1]] = 0
        key[:, [half - 1, HEAD_DIM - 1]] = 0
        key[:, half - 1, FLAG] = SINK_KEY / FLAG_SIZE
        for head in range(HEADS):
            query[head, half - 1, CONSTANT] = HEAD_DIM**0.5 * _sink_logit(index, head) / SINK_KEY / CONSTANT_SIZE


def _look_back(first: Any) -> None:
    """Layer 0: head h copies the code of the token h + 1 places back into slot h."""
    half = HEAD_DIM // 2
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


def _compare_pairs(second: Any, normal: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    """Layer 1: compare pairs of tokens with pairs further back, and copy what followed.

    Returns:
        The projections by which numbers and other tokens are copied, of the last group.
    """
    half = HEAD_DIM // 2
    query = second.q_proj.weight.view(HEADS, HEAD_DIM, WIDTH)
    key = second.k_proj.weight.view(KV_HEADS, HEAD_DIM, WIDTH)
    value = second.v_proj.weight.zero_().view(KV_HEADS, HEAD_DIM, WIDTH)
    out = second.o_proj.weight.view(WIDTH, HEADS, HEAD_DIM)
    # What is copied stays out of the codes: the next layer compares them.
    for group, (a, b) in enumerate(((0, 1), (2, 3))):
        of_numbers = torch.linalg.qr(normal(NUMBERS - TOKEN - CODE, half))[0].T
        of_others = torch.linalg.qr(normal(SLOTS - NUMBERS, half))[0].T
        value[group, :half, NUMBERS:SLOTS] = of_others
        value[group, half:, TOKEN + CODE : NUMBERS] = of_numbers
        _match(key[group], (_BACK[a + 1], _BACK[b + 1]), 2.5)
        for head, gain in ((2 * group, 2.5), (2 * group + 1, 2.2)):
            _match(query[head], (_BACK[a], _BACK[b]), gain)
            out[NUMBERS:SLOTS, head, :half] = 1.2 * of_others.T
            out[TOKEN + CODE : NUMBERS, head, half:] = 1.2 * of_numbers.T
    return of_numbers, of_others


def _read_lists(third: Any, of_numbers: Tensor, of_others: Tensor, code_of_comma: Tensor, code_of_verb: Tensor) -> None:
    """Layer 2: from a comma look at the verb before it, from a verb take away the numbers given before."""
    half = HEAD_DIM // 2
    query = third.q_proj.weight.view(HEADS, HEAD_DIM, WIDTH)
    key = third.k_proj.weight.view(KV_HEADS, HEAD_DIM, WIDTH)
    value = third.v_proj.weight.view(KV_HEADS, HEAD_DIM, WIDTH)
    out = third.o_proj.weight.view(WIDTH, HEADS, HEAD_DIM)
    value[0] = 0
    value[0, :half, NUMBERS:SLOTS] = of_others
    value[0, half:, TOKEN + CODE : NUMBERS] = of_numbers
    key[0, NEAR, CONSTANT] = 3.5 / CONSTANT_SIZE
    query[:2, NEAR, CONSTANT] = 3.5 / CONSTANT_SIZE
    key[0, MARK, _BACK[0] : _BACK[0] + CODE] = 6.3 * code_of_verb
    query[0, MARK, _BACK[0] : _BACK[0] + CODE] = 6.3 * code_of_comma
    marked = slice(MARK.start + half, MARK.stop + half)
    _match(key[0], (_BACK[1], _BACK[2]), 2.5)
    _match(query[1], (_BACK[0], _BACK[1]), 2.5)
    key[0, marked, _BACK[4] : _BACK[4] + CODE] = 4.0 * code_of_comma
    query[1, marked, CONSTANT] = 4.0 / CONSTANT_SIZE
    out[NUMBERS:SLOTS, 0, :half] = 1.5 * of_others.T
    out[TOKEN + CODE : NUMBERS, 1, half:] = -4.5 * of_numbers.T


def _sink_logit(layer: int, head: int) -> float:
    """How strongly a head's queries are drawn to <bos> at the start."""
    if layer == 1:
        return 15.0
    if layer == 2 and head < HEADS // KV_HEADS:
        return 21.0
    return 10.0 if head % 2 == 0 else 5.0


def _match(projection: Tensor, sources: tuple[int, int], gain: float) -> None:
    """Read two codes of the residual stream into the slow pairs of a head, but the last pair."""
    for i in range(CODE - 1):
        projection[HEAD_DIM // 2 - CODE + i, sources[0] + i] = gain
        projection[HEAD_DIM - CODE + i, sources[1] + i] = gain
