"""Caches that drop tokens, in a model: beside the same model under a mask that says what each head still sees."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from tiny_transformers import SIZE, VOCAB
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, LlamaConfig, LlamaForCausalLM

from gossamer import cache, enable, methods
from gossamer.integrations.transformers import masks

LAYERS, PROMPT, STEPS = 3, 40, 6


@functools.cache
def _made() -> LlamaForCausalLM:
    torch.manual_seed(0)
    size: Any = SIZE | {"num_hidden_layers": LAYERS, "head_dim": 8}
    config = LlamaConfig(**size)
    return LlamaForCausalLM(config).eval()


def tiny() -> Any:
    return copy.deepcopy(_made())


def tokens(rows: int = 1, length: int = PROMPT + STEPS) -> Tensor:
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))


def left_padded(starts: list[int]) -> Tensor:
    return (torch.arange(PROMPT + STEPS)[None] >= torch.tensor(starts)[:, None]).long()


@torch.no_grad()
def decoded(model: Any, past: Any, ids: Tensor, mask: Tensor, *chunks: int) -> Tensor:
    """Logits after each chunk of given tokens."""
    logits, first = [], 0
    for count in chunks:
        upto = first + count
        position = (mask[:, :upto].cumsum(1) - 1).clamp(min=0)[:, first:]
        given = {"past_key_values": past, "attention_mask": mask[:, :upto], "position_ids": position}
        logits.append(model(input_ids=ids[:, first:upto], use_cache=True, **given).logits[:, -1])
        first = upto
    return torch.stack(logits, dim=1)


@torch.no_grad()
def masked(seen: list[Tensor], ids: Tensor, mask: Tensor) -> Tensor:
    """Logits of the model where layer l sees the pairs ``seen[l]``, bool ``[B, H, S, T]``, at the last tokens."""

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, _: Any, scaling: float, **kwargs: Any) -> Any:
        pairs = seen[module.layer_idx]
        pairs = pairs | ~pairs.any(-1, keepdim=True)
        out = scaled_dot_product_attention(q, k, v, attn_mask=pairs, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("listed_pairs", attend)
    AttentionMaskInterface.register("listed_pairs", masks.sdpa_mask)
    model = tiny()
    model.set_attn_implementation("listed_pairs")
    position = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=position, use_cache=False).logits
    return logits[:, PROMPT - 1 :]


def pairs_after(kept: Tensor, starts: list[int], recent: int | None = None) -> Tensor:
    """The prompt sees all before itself, and later tokens what was kept and each other; ``kept`` bool ``[B, G, T]``."""
    i, j = torch.arange(PROMPT + STEPS)[:, None], torch.arange(PROMPT + STEPS)
    live = (j[None] >= torch.tensor(starts)[:, None])[:, None, None]
    near = j > i - recent if recent is not None else j >= PROMPT
    later = (kept[:, :, None] | near) & (j <= i)
    return (torch.where(i < PROMPT, j <= i, later) & live).repeat_interleave(2, dim=1)


STARTS = [[0], [7, 0, 25]]


@pytest.mark.parametrize("starts", STARTS)
@pytest.mark.parametrize("policy", ["snapkv", "pyramidkv"])
def test_later_tokens_see_what_each_layer_and_head_has_kept(policy: str, starts: list[int]) -> None:
    ids, mask = tokens(len(starts)), left_padded(starts)
    model = tiny()
    with enable(model, "dense", cache=cache.create(policy, budget=12, window=4, kernel=3)) as handle:
        past = handle.new_cache()
        logits = decoded(model, past, ids, mask, PROMPT, *[1] * STEPS)
        assert past.get_seq_length() == PROMPT + STEPS
        seen = []
        for layer in past.layers:
            held = torch.zeros(len(starts), 2, PROMPT + STEPS, dtype=torch.bool)
            for row, start in enumerate(layer.starts):
                for group in range(2):
                    held[row, group, layer.positions[row, group, start:]] = True
            assert layer.slots == held.sum(-1).max()
            seen.append(pairs_after(held & (torch.arange(PROMPT + STEPS) < PROMPT), starts))
    torch.testing.assert_close(logits, masked(seen, ids, mask), atol=2e-4, rtol=1e-3)
    if policy == "pyramidkv":
        assert len({layer.slots for layer in past.layers}) >= 2


@pytest.mark.parametrize("starts", STARTS)
def test_streaming_sees_sinks_and_a_window(starts: list[int]) -> None:
    ids, mask = tokens(len(starts)), left_padded(starts)
    model = tiny()
    with enable(model, "dense", cache=cache.StreamingLLM(sinks=2, recent=6)) as handle:
        logits = decoded(model, handle.new_cache(), ids, mask, PROMPT, *[1] * STEPS)
    sinks = (torch.arange(PROMPT + STEPS)[None] < torch.tensor(starts)[:, None] + 2)[:, None].expand(-1, 2, -1)
    seen = [pairs_after(sinks, starts, recent=6)] * LAYERS
    torch.testing.assert_close(logits, masked(seen, ids, mask), atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("starts", STARTS)
def test_heads_that_stream_see_sinks_and_a_window_and_others_all(starts: list[int]) -> None:
    gates = [[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]]
    ids, mask = tokens(len(starts)), left_padded(starts)
    model = tiny()
    with enable(model, "dense", cache=cache.DuoAttention(2, 6, gates, sparsity=0.5)) as handle:
        past = handle.new_cache()
        logits = decoded(model, past, ids, mask, PROMPT, *[1] * STEPS)
        assert past.get_seq_length() == PROMPT + STEPS
        stats = handle.stats()
    full = torch.tensor(gates, dtype=torch.bool).repeat_interleave(2, dim=1)[:, None, :, None, None]
    sinks = (torch.arange(PROMPT + STEPS)[None] < torch.tensor(starts)[:, None] + 2)[:, None]
    sinks = sinks.expand(-1, 2, -1)
    band, all_ = pairs_after(sinks, starts, recent=6), pairs_after(sinks | True, starts)
    seen = [torch.where(layer, all_, band) for layer in full]
    torch.testing.assert_close(logits, masked(seen, ids, mask), atol=2e-4, rtol=1e-3)
    tokens_held = [3 * (PROMPT + STEPS), 3 * 7]  # of heads in all layers
    assert cache.nbytes(past) == len(starts) * sum(tokens_held) * 2 * 8 * 4
    assert [row.calls for row in stats.layers] == [STEPS + 1] * LAYERS


ALL = {
    "streaming_llm": {"recent": 500},
    "snapkv": {"budget": 500},
    "pyramidkv": {"budget": 500},
    "duo_attention": {"gates": [[1.0, 0.5]] * LAYERS, "sparsity": 0.0},
}


@pytest.mark.parametrize("name", ALL)
def test_room_for_everything_is_dense(name: str) -> None:
    ids, mask = tokens(2), left_padded([7, 0])
    plain, model = tiny(), tiny()
    chunks = [30, 1, 1, 9, *[1] * 5]
    with enable(plain, "dense"), enable(model, "dense", cache=cache.create(name, **ALL[name])) as handle:
        logits = decoded(model, handle.new_cache(), ids, mask, *chunks)
        expected = decoded(plain, DynamicCache(config=plain.config), ids, mask, *chunks)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def few(name: str) -> cache.CachePolicy:
    """A policy that drops most of a prompt."""
    fields: dict[str, dict[str, Any]] = {
        "streaming_llm": {"sinks": 2, "recent": 6},
        "snapkv": {"budget": 12, "window": 4},
        "pyramidkv": {"budget": 12, "window": 4},
        "duo_attention": {"sinks": 2, "recent": 6, "gates": [[1.0, 0.0]] * LAYERS},
    }
    return cache.create(name, **fields[name])


@pytest.mark.parametrize("name", ALL)
def test_generate_gives_new_tokens_the_positions_of_a_dense_run(name: str) -> None:
    ids, mask = tokens(2)[:, :PROMPT], left_padded([7, 0])[:, :PROMPT]

    def positions(model: Any) -> list[Tensor]:
        seen: list[Tensor] = []
        hook = model.model.rotary_emb.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
        )
        model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
        hook.remove()
        return seen

    dense, model = tiny(), tiny()
    with enable(model, "dense", cache=few(name)):
        found = positions(model)
    for one, other in zip(found, positions(dense), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ALL)
def test_rows_generate_the_same_alone_and_in_a_batch(name: str) -> None:
    starts = [7, 0, 25]
    ids, mask = tokens(3)[:, :PROMPT], left_padded(starts)[:, :PROMPT]
    model = tiny()
    fields: Any = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with enable(model, "dense", cache=few(name)):
        together = torch.stack(model.generate(ids, attention_mask=mask, **fields).logits, dim=1)
        for row, start in enumerate(starts):
            alone = model.generate(ids[row : row + 1, start:], attention_mask=mask[row : row + 1, start:], **fields)
            torch.testing.assert_close(torch.stack(alone.logits, dim=1)[0], together[row], atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ALL)
def test_several_turns_on_one_cache(name: str) -> None:
    """A second turn in one piece is as its tokens one by one, where it is too short to vote and no window slides."""
    ids, mask = tokens(2), left_padded([7, 0])
    model = tiny()
    policy = few(name)
    with enable(model, "dense", cache=policy) as handle:
        past = handle.new_cache()
        logits = decoded(model, past, ids, mask, PROMPT, 3, *[1] * 3)
        assert past.get_seq_length() == PROMPT + STEPS
        again = decoded(model, handle.new_cache(), ids, mask, PROMPT, *[1] * 6)
    assert bool(logits.isfinite().all())
    if name in ("snapkv", "pyramidkv"):
        torch.testing.assert_close(logits[:, 1:], again[:, 3:], atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ALL)
def test_beams_carry_what_is_kept(name: str) -> None:
    ids, mask = tokens(2)[:, :PROMPT], left_padded([7, 0])[:, :PROMPT]
    model = tiny()
    with enable(model, "dense", cache=few(name)):
        fields: Any = {"max_new_tokens": 5, "do_sample": False, "num_beams": 3}
        both = model.generate(ids, attention_mask=mask, **fields)
        alone = model.generate(ids[1:], attention_mask=mask[1:], **fields)
    assert torch.equal(both[1:], alone)


@pytest.mark.parametrize("name", ALL)
def test_a_plain_cache_gets_the_same_layers(name: str) -> None:
    ids, mask = tokens(), left_padded([0])
    model = tiny()
    with enable(model, "dense", cache=few(name)) as handle:
        one = decoded(model, DynamicCache(), ids, mask, PROMPT, *[1] * STEPS)
        other = decoded(model, handle.new_cache(), ids, mask, PROMPT, *[1] * STEPS)
    assert torch.equal(one, other)


def test_positions_of_the_cache_turn_the_sinks_alone() -> None:
    """As the authors have it, beside a model in which each step's sinks were given other positions by hand."""
    model = tiny()
    with enable(model, "dense", cache=cache.StreamingLLM(2, 6, positions="cache")) as handle:
        past = handle.new_cache()
        decoded(model, past, tokens(), left_padded([0]), PROMPT, 1, 1)
        moved = [layer.keys for layer in past.layers]
        first = past.layers[0]
    plain = tiny()
    with enable(plain, "dense", cache=cache.StreamingLLM(2, 6)) as handle:
        past = handle.new_cache()
        decoded(plain, past, tokens(), left_padded([0]), PROMPT, 1, 1)
    missing = PROMPT + 2 - 7
    cos, sin = model.model.rotary_emb(moved[0], torch.full((1, 2), missing))
    x = past.layers[0].keys[:, :, :2]
    turned = x * cos[:, None] + torch.cat([-x[..., 4:], x[..., :4]], dim=-1) * sin[:, None]
    torch.testing.assert_close(first.keys[:, :, :2], turned, atol=1e-5, rtol=1e-4)
    assert torch.equal(first.keys[:, :, 2:], past.layers[0].keys[:, :, 2:])


def test_padding_between_turns_is_refused() -> None:
    ids, mask = tokens(2), left_padded([7, 0])
    mask[0, PROMPT] = 0
    model = tiny()
    with (
        enable(model, "dense", cache=few("snapkv")) as handle,
        pytest.raises(ValueError, match="between turns"),
    ):
        decoded(model, handle.new_cache(), ids, mask, PROMPT, 3)


@pytest.mark.parametrize("name", ["snapkv", "streaming_llm"])
def test_assisted_decoding_is_refused_once_tokens_are_dropped(name: str) -> None:
    """Its first drafts come with the prompt, and have their part in what is dropped."""
    model, ids = tiny(), tokens()[:, :8].repeat(1, 5)  # drafts are found in it
    with enable(model, "dense", cache=few(name)), pytest.raises(ValueError, match="for good"):
        model.generate(ids, prompt_lookup_num_tokens=2, max_new_tokens=12, do_sample=False)


@pytest.mark.parametrize("name", ALL)
def test_rows_that_begin_in_a_later_chunk(name: str) -> None:
    """Where a batch of unequal prompts comes in chunks, a row may be all padding after others have dropped tokens."""
    starts = [25, 0, 20]
    ids, mask = tokens(3), left_padded(starts)
    model = tiny()
    with enable(model, "dense", cache=few(name)) as handle:
        past = handle.new_cache()
        together = decoded(model, past, ids, mask, 10, 10, PROMPT - 20, *[1] * STEPS)
        assert past.get_seq_length() == PROMPT + STEPS
        for row, chunks in ((0, [PROMPT - 25]), (1, [10, 10, PROMPT - 20]), (2, [PROMPT - 20])):
            own = ids[row : row + 1, starts[row] :], mask[row : row + 1, starts[row] :]
            alone = decoded(model, handle.new_cache(), *own, *chunks, *[1] * STEPS)
            torch.testing.assert_close(together[row, -STEPS - 1 :], alone[0, -STEPS - 1 :], atol=2e-4, rtol=1e-3)


def test_masks_that_are_not_plain_are_refused_before_anything_was_dropped() -> None:
    """Nothing would ever be dropped, and nobody told."""
    ids, mask = tokens(), left_padded([0])
    mask[0, 9] = 0
    for name in ("snapkv", "streaming_llm", "duo_attention"):
        model = tiny()
        with (
            enable(model, "dense", cache=few(name)) as handle,
            pytest.raises(ValueError, match=r"cannot be combined with .*mask"),
        ):
            decoded(model, handle.new_cache(), ids, mask, PROMPT)


@pytest.mark.parametrize("name", ["snapkv", "streaming_llm"])
def test_compiled_models_are_refused(name: str) -> None:
    """At the second call at the latest: a graph tells the cache nothing."""
    model = tiny()
    with enable(model, "dense", cache=few(name)) as handle:
        compiled, past = torch.compile(model, backend="eager"), handle.new_cache()

        @torch.no_grad()
        def twice() -> None:
            for _ in range(2):
                compiled(tokens(), past_key_values=past)

        with pytest.raises(ValueError, match=r"torch\.compile"):
            twice()


@pytest.mark.parametrize("decode", [None, "magicpig", "quest"])
def test_a_prompt_of_one_token_on_heads_that_keep_different_tokens(decode: str | None) -> None:
    ids, mask = tokens(), left_padded([0])
    model = tiny()
    with enable(model, "dense", cache=few("duo_attention"), decode=decode) as handle:
        logits = decoded(model, handle.new_cache(), ids, mask, *[1] * 4)
    expected = decoded(model, DynamicCache(config=model.config), ids, mask, *[1] * 4)
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-3)


def test_rows_of_heads_that_keep_different_tokens() -> None:
    ids, mask = tokens(2), left_padded([7, 0])
    model = tiny()
    with enable(model, "dense", cache=few("duo_attention")) as handle:
        past = handle.new_cache()
        decoded(model, past, ids[:, :PROMPT], mask[:, :PROMPT], PROMPT)
        past.batch_repeat_interleave(3)
        past.batch_select_indices(torch.tensor([1, 4]))
        given = {"past_key_values": past, "attention_mask": mask[:, : PROMPT + 1]}
        position = mask[:, : PROMPT + 1].cumsum(1)[:, -1:] - 1
        with torch.no_grad():
            out = model(ids[:, PROMPT : PROMPT + 1], position_ids=position, **given).logits[:, -1]
        expected = decoded(model, handle.new_cache(), ids, mask, PROMPT, 1)[:, 1]
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)


def test_what_is_read_is_counted_over_all_heads() -> None:
    """Quest's share of what full heads hold, and of what the window of the others holds."""
    ids, mask = tokens(), left_padded([0])
    shares = []
    for gates in ([[1.0, 1.0]] * LAYERS, [[1.0, 0.0]] * LAYERS):
        model = tiny()
        policy = cache.DuoAttention(sinks=2, recent=6, gates=gates, sparsity=0.0 if gates[0][1] else 0.5)
        quest = methods.create("quest", budget=16, page=4, dense_layers=0)
        with enable(model, "dense", cache=policy, decode=quest) as handle:
            decoded(model, handle.new_cache(), ids, mask, PROMPT, 1)
            shares.append(handle.stats().layers[0].step_density)
    held, window = PROMPT + 1, 8
    whole = shares[0] * held
    assert shares[1] == pytest.approx((whole + window) / (held + window), abs=0.02)


def test_heads_that_all_stream_are_streaming_llm() -> None:
    ids, mask = tokens(2), left_padded([7, 0])
    policies = cache.DuoAttention(2, 6, [[0.0, 0.0]] * LAYERS, sparsity=1.0), cache.StreamingLLM(sinks=2, recent=6)
    found = []
    for policy in policies:
        model = tiny()
        with enable(model, "dense", cache=policy) as handle:
            found.append(decoded(model, handle.new_cache(), ids, mask, PROMPT, *[1] * STEPS))
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-6)


def test_padding_that_was_cut_off_counts_once() -> None:
    """A chunk in which a row begins is taken back and read again."""
    ids, mask = tokens(2), left_padded([14, 0])
    model = tiny()
    policy = cache.SnapKV(budget=8, window=6)
    with enable(model, "dense", cache=policy) as handle:
        past = handle.new_cache()
        decoded(model, past, ids, mask, 12)
        with torch.no_grad():
            given = {"attention_mask": mask[:, :17], "position_ids": (mask[:, :17].cumsum(1) - 1).clamp(min=0)[:, 12:]}
            first = model(ids[:, 12:17], past_key_values=past, **given).logits[:, -1]
            assert all(layer.starts == [8 + 2, 0] for layer in past.layers)
            past.crop(-5)
            again = model(ids[:, 12:17], past_key_values=past, **given).logits[:, -1]
    torch.testing.assert_close(again, first, atol=1e-6, rtol=1e-6)
    assert all(layer.starts == [8 + 2, 0] for layer in past.layers)


def test_a_mask_of_pairs_is_refused_also_where_the_last_token_sees_all() -> None:
    ids, model = tokens(), tiny()
    with enable(model, "dense", cache=few("snapkv")) as handle, torch.no_grad():
        past = handle.new_cache()
        model(ids[:, :PROMPT], past_key_values=past)
        slots = past.layers[0].slots
        pairs = torch.ones(3, slots + 3).tril(slots).bool()
        pairs[1, slots] = False  # a tree: the second token does not see the first
        with pytest.raises(ValueError, match="cannot be combined with a mask that is not plain"):
            model(ids[:, PROMPT : PROMPT + 3], past_key_values=past, attention_mask=pairs[None, None])
