"""Evictions in a layer's store: what stays, what later tokens attend, and how long the cache says it is."""

import pytest
import torch
from cache_steps import Tokens
from torch import Tensor

from gossamer import AttentionCall, Extent
from gossamer.cache import CachePolicy, create
from gossamer.cache.evictions import PyramidKV, SnapKV, StreamingLLM
from gossamer.rotary import Rotary

STARTS = [[0], [3, 0, 11]]


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def held(layer, row: int, group: int = 0) -> list[int]:
    """The tokens that a layer holds, dead slots aside."""
    tokens = layer.positions[row, group].tolist() if layer.positions is not None else list(range(layer.slots))
    return tokens[layer.starts[row] :]


@pytest.mark.parametrize("starts", STARTS)
def test_streaming_attends_sinks_and_the_window(starts: list[int]) -> None:
    tokens = Tokens.random(starts, 40, heads=4, groups=2, dim=8)
    layer = StreamingLLM(sinks=2, recent=5).layer(0, 1)
    for (call, out), last in zip(tokens.run(layer, 20, *[1] * 20), range(19, 40), strict=True):
        for row, start in enumerate(starts):
            expected = [t for t in range(start, last + 1) if t < start + 2 or t > last - 5]
            if last > 19:
                for head in range(4):
                    close(out[row, head, 0], tokens.attend(row, head, last, expected))
        assert layer.get_seq_length() == last + 1
        assert call.key_len <= 20
    assert layer.slots == 2 + 5 - 1
    assert held(layer, 0) == [starts[0], starts[0] + 1, 36, 37, 38, 39]


def test_streaming_in_chunks_attends_the_window_before_each_query() -> None:
    tokens = Tokens.random([0], 21, heads=2, groups=1, dim=8)
    layer = StreamingLLM(sinks=1, recent=4).layer(0, 1)
    first = 0
    for (_, out), count in zip(tokens.run(layer, 7, 6, 8), (7, 6, 8), strict=True):
        for i in range(count):
            # What was kept, and the chunk's own tokens up to the query.
            seen = sorted({*range(min(1, first)), *range(max(0, first - 3), first + i + 1)})
            close(out[0, 1, i], tokens.attend(0, 1, first + i, seen))
        first += count


def test_streaming_with_positions_of_the_cache_is_the_papers() -> None:
    """Keys stored before their rotation, turned at each step by their place in the cache (paper, figure 4)."""
    starts, dim = [2, 0], 8
    tokens = Tokens.random(starts, 30, heads=2, groups=1, dim=dim)
    rotary = Rotary.of_base(dim, 100.0)
    at = torch.arange(30)[None] - torch.tensor(starts)[:, None]
    turned = Tokens(rotary.turn(tokens.q, at), rotary.turn(tokens.k, at), tokens.v, starts)
    layer = StreamingLLM(sinks=2, recent=5, positions="cache").layer(0, 1)
    for (_, out), last in zip(turned.run(layer, 12, *[1] * 18, rotary=rotary), range(11, 30), strict=True):
        if last == 11:
            continue
        for row, start in enumerate(starts):
            kept = [t for t in range(start, last + 1) if t < start + 2 or t > last - 5]
            place = torch.arange(len(kept))[None]
            k = rotary.turn(tokens.k[row : row + 1, :, kept], place)[0, 0]
            for head in range(2):
                q = rotary.turn(tokens.q[row : row + 1, head : head + 1, last : last + 1], place[:, -1:])[0, 0, 0]
                expected = (k @ q * dim**-0.5).softmax(0) @ tokens.v[row, 0, kept]
                close(out[row, head, 0], expected)


def test_streaming_with_positions_of_the_cache_says_what_it_lacks() -> None:
    tokens = Tokens.random([0], 30, heads=2, groups=1, dim=8)
    with pytest.raises(ValueError, match="rotary embedding"):
        list(tokens.run(StreamingLLM(sinks=2, recent=5, positions="cache").layer(0, 1), 12))


def test_turned_sinks_follow_their_batch_rows() -> None:
    rotary = Rotary.of_base(8, 100.0)
    tokens = Tokens.random([0, 4], 20, heads=2, groups=1, dim=8)
    policy = StreamingLLM(sinks=2, recent=5, positions="cache")
    layer, other = policy.layer(0, 1), policy.layer(0, 1)
    swapped = Tokens(tokens.q[[1, 0]], tokens.k[[1, 0]], tokens.v[[1, 0]], [4, 0])
    for _ in tokens.run(layer, 16, 1, rotary=rotary):
        pass
    for _ in swapped.run(other, 16, 1, rotary=rotary):
        pass
    layer.reorder_cache(torch.tensor([1, 0]))
    for (_, one), (_, two) in zip(swapped.run(layer, 1, 1), swapped.run(other, 1, 1), strict=True):
        assert torch.equal(one, two)


VOTING = [SnapKV(budget=10, window=4, kernel=3), PyramidKV(budget=10, window=4, kernel=3, beta=2)]


@pytest.mark.parametrize("starts", STARTS)
@pytest.mark.parametrize("policy", VOTING, ids=lambda policy: policy.name)
def test_voted_tokens_and_all_new_ones_are_attended(policy: SnapKV, starts: list[int]) -> None:
    tokens = Tokens.random(starts, 40, heads=4, groups=2, dim=8)
    dense, layer = create("keep").layer(0, 3), policy.layer(0, 3)
    ((whole, plain),) = tokens.run(dense, 32)
    chosen = policy.kept(whole, 0, 3)
    assert chosen is not None
    steps = tokens.run(layer, 32, 1, 1, 1)
    _, out = next(steps)
    assert torch.equal(out, plain), "a prompt is attended before anything is dropped"
    kept = []
    for row, start in enumerate(starts):
        for group in range(2):
            own = [int(p) + start for p in chosen[row, group] if p >= 0]
            assert held(layer, row, group) == own
            assert own[-4:] == [28, 29, 30, 31]
            kept.append(own)
    for (_, out), last in zip(steps, (32, 33, 34), strict=True):
        for row in range(len(starts)):
            for head in range(4):
                seen = kept[2 * row + head // 2] + list(range(32, last + 1))
                close(out[row, head, 0], tokens.attend(row, head, last, seen))


@pytest.mark.parametrize("policy", VOTING, ids=lambda policy: policy.name)
def test_a_row_keeps_the_same_alone_and_in_a_batch(policy: SnapKV) -> None:
    tokens = Tokens.random([3, 0, 17], 40, heads=4, groups=2, dim=8)
    for index in range(3):
        layer = policy.layer(index, 3)
        outs = [out for _, out in tokens.run(layer, 32, 1, 1)]
        for row, start in enumerate(tokens.starts):
            own = policy.layer(index, 3)
            alone = [out for _, out in tokens.alone(row).run(own, 32 - start, 1, 1)]
            assert [t - start for t in held(layer, row)] == held(own, 0)
            for one, other in zip(outs[1:], alone[1:], strict=True):
                close(one[row], other[0])


@pytest.mark.parametrize("name", ["snapkv", "pyramidkv"])
def test_a_budget_of_everything_is_dense(name: str) -> None:
    tokens = Tokens.random([3, 0], 30, heads=4, groups=2, dim=8)
    layer, plain = create(name, budget=1000, window=4).layer(0, 2), create("keep").layer(0, 2)
    for (_, out), (_, expected) in zip(tokens.run(layer, 20, 1, 5, 1), tokens.run(plain, 20, 1, 5, 1), strict=True):
        assert torch.equal(out, expected)
    assert layer.positions is None


def test_a_window_longer_than_all_is_dense() -> None:
    tokens = Tokens.random([3, 0], 30, heads=4, groups=2, dim=8)
    layer, plain = StreamingLLM(sinks=2, recent=50).layer(0, 1), create("keep").layer(0, 1)
    for (_, out), (_, expected) in zip(tokens.run(layer, 20, 1, 5, 1), tokens.run(plain, 20, 1, 5, 1), strict=True):
        assert torch.equal(out, expected)


def test_lengths_and_masks_of_layers_that_differ() -> None:
    """Rules 1 and 2 of masks: the length is that of all tokens; a mask has the slots, from the first dropped on."""
    tokens = Tokens.random([0], 40, heads=2, groups=1, dim=8)
    slots = []
    for index in range(3):
        layer = PyramidKV(budget=10, window=4, beta=3).layer(index, 3)
        list(tokens.run(layer, 32, 1))
        assert layer.get_seq_length() == 33
        assert layer.get_mask_sizes(2) == (layer.slots + 2, 33 - layer.slots)
        slots.append(layer.slots)
    assert slots == sorted(slots, reverse=True)
    assert len(set(slots)) == 3


def test_a_long_turn_votes_anew_and_a_short_one_drops_nothing() -> None:
    tokens = Tokens.random([0], 60, heads=2, groups=1, dim=8)
    layer = SnapKV(budget=10, window=4).layer(0, 1)
    list(tokens.run(layer, 32))
    assert layer.slots == 10
    list(tokens.run(layer, 1, 3))
    assert layer.slots == 14
    list(tokens.run(layer, 8))
    assert layer.slots == 10
    assert held(layer, 0)[-4:] == [40, 41, 42, 43]
    assert layer.get_seq_length() == 44


def test_tokens_after_a_prompt_can_be_cut_off_and_others_not() -> None:
    tokens = Tokens.random([2, 0], 40, heads=2, groups=1, dim=8)
    layer, other = (SnapKV(budget=10, window=4).layer(0, 1) for _ in range(2))
    list(tokens.run(layer, 32, 3))
    layer.crop(-3)
    list(tokens.run(other, 32))
    for (_, one), (_, two) in zip(tokens.run(layer, 1, 1), tokens.run(other, 1, 1), strict=True):
        assert torch.equal(one, two)
    with pytest.raises(ValueError, match="for good"):
        layer.crop(-3)


def test_kept_tokens_follow_their_batch_rows() -> None:
    tokens = Tokens.random([2, 0], 40, heads=2, groups=1, dim=8)
    layer = SnapKV(budget=10, window=4).layer(0, 1)
    list(tokens.run(layer, 32))
    before = [held(layer, row) for row in range(2)]
    layer.batch_repeat_interleave(2)
    layer.reorder_cache(torch.tensor([3, 0, 1, 2]))
    assert [held(layer, row) for row in range(4)] == [before[1], before[0], before[0], before[1]]


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("snapkv", {"budget": 8, "window": 8}, "must be above it"),
        ("snapkv", {"pool": "median"}, "one of max, mean"),
        ("snapkv", {"reduce": "min"}, "one of mean, max, sum"),
        ("pyramidkv", {"beta": 0}, "at least 1"),
        ("streaming_llm", {"recent": 0}, "at least 1"),
        ("streaming_llm", {"positions": "mine"}, "one of original, cache"),
    ],
)
def test_fields_that_do_not_fit(name: str, fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create(name, **fields)


@pytest.mark.parametrize("policy", [*VOTING, StreamingLLM(sinks=2, recent=6)], ids=lambda policy: policy.name)
def test_right_padding_is_dropped_with_the_rest(policy: CachePolicy) -> None:
    """The shorter row's tokens stand before its padding; then its next token comes right after them."""
    tokens = Tokens.random([0, 0], 31, heads=4, groups=2, dim=8)
    lengths = [30, 24]
    layer = policy.layer(0, 1)
    k, v = layer.update(tokens.k[:, :, :30], tokens.v[:, :, :30])
    extent = Extent([0, 0], lengths, [0, 0], lengths)
    layer.place(extent)
    layer.attended(AttentionCall(tokens.q[:, :, :30], k, v, extent))
    kept = [[held(layer, row, group) for group in range(2)] for row in range(2)]
    assert all(max(own) == length - 1 for row, length in zip(kept, lengths, strict=True) for own in row)
    _, out = next(tokens.run(layer, 1))
    for row in range(2):
        for head in range(4):
            close(out[row, head, 0], tokens.attend(row, head, 30, [*kept[row][head // 2], 30]))


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_heads_that_share_keys_keep_one_copy(groups: int, dim: int) -> None:
    tokens = Tokens.random([2, 0], 22, heads=8, groups=groups, dim=dim)
    layer = SnapKV(budget=10, window=4).layer(0, 1)
    steps = tokens.run(layer, 20, 1, 1)
    next(steps)
    assert layer.nbytes == 2 * 2 * groups * 10 * dim * 4
    for (_, out), last in zip(steps, (20, 21), strict=True):
        for head in range(8):
            seen = held(layer, 0, head // (8 // groups))
            assert len(seen) == 10 + last - 19
            close(out[0, head, 0], tokens.attend(0, head, last, seen))
