"""Stores that encode older tokens: which ones, how far from the originals, and what bytes they take."""

import pickle

import pytest
import torch
from cache_steps import Tokens
from torch import Tensor

from gossamer.cache import Int8, Kivi, Mustafar, StoreLayer, create
from gossamer.cache.encodings import EncodedLayer
from gossamer.summaries import Held, PageBounds

DIM = 16
SMALL = {
    "kivi": Kivi(bits=4, group=4, residual=8),
    "int8": Int8(),
    "mustafar": Mustafar(key_sparsity=0.5, value_sparsity=0.75, residual=3, pack=5),
}
small = pytest.mark.parametrize("name", SMALL)


def tails(layer: EncodedLayer) -> tuple[int, int]:
    keys, values = layer.keys, layer.values
    assert keys is not None
    assert values is not None
    return keys.shape[2], values.shape[2]


def due_tails(name: str, chunks: list[int]) -> list[tuple[int, int]]:
    """Tokens that are as they came after each call, keys and values, in the words of the specification."""
    found, keys, values = [], 0, 0
    for count in chunks:
        keys, values = keys + count, values + count
        if name == "kivi":
            keys, values = keys % 8, min(values, 8)
        elif name == "int8":
            keys = values = 0
        else:
            while keys >= 3 + 5:
                keys = values = keys - 5
        found.append((keys, values))
    return found


@small
def test_tokens_are_encoded_when_they_are_due(name: str) -> None:
    chunks = [21, *[1] * 9, 6, *[1] * 9]
    tokens = Tokens.random([0], sum(chunks), heads=2, groups=1, dim=DIM)
    layer = SMALL[name].layer(0, 1)
    assert isinstance(layer, EncodedLayer)
    found = [tails(layer) for _ in tokens.run(layer, *chunks)]
    assert found == due_tails(name, chunks)
    assert layer.get_seq_length() == sum(chunks)


def bound(name: str, x: Tensor, *, keys: bool) -> Tensor:
    """How far an encoded number may lie from ``x`` ``[B, G, T, D]``."""
    if name == "mustafar":
        return x.abs()
    if name == "kivi" and keys:
        blocks = x.unflatten(2, (-1, 4))
        spread = (blocks.amax(3) - blocks.amin(3)).repeat_interleave(4, dim=2)
    else:
        group = 4 if name == "kivi" else DIM
        blocks = x.unflatten(3, (-1, group))
        spread = (blocks.amax(4) - blocks.amin(4)).repeat_interleave(group, dim=3)
    return spread / (15 if name == "kivi" else 255) / 2


@small
def test_new_tokens_are_as_they_came_and_old_ones_within_bounds(name: str) -> None:
    tokens = Tokens.random([0, 0], 45, heads=4, groups=2, dim=DIM)
    layer = SMALL[name].layer(0, 1)
    assert isinstance(layer, EncodedLayer)
    list(tokens.run(layer, 30, *[1] * 15))
    for found, x, tail, keys in zip(layer.read(), (tokens.k, tokens.v), tails(layer), (True, False), strict=True):
        old = 45 - tail
        assert torch.equal(found[:, :, old:], x[:, :, old:])
        error = (found[:, :, :old] - x[:, :, :old]).abs()
        assert bool((error <= bound(name, x[:, :, :old], keys=keys) * 1.0001 + 1e-5).all())
        assert float(error.max()) > 0
    if name == "mustafar":
        for found, stay in zip(layer.read(), (8, 4), strict=True):
            assert bool(((found[:, :, :35] != 0).sum(-1) == stay).all())


@small
def test_steps_attend_what_is_read_and_a_prompt_what_came(name: str) -> None:
    tokens = Tokens.random([2, 0], 40, heads=4, groups=2, dim=DIM)
    layer, plain = SMALL[name].layer(0, 1), StoreLayer()
    steps = tokens.run(layer, 30, *[1] * 10)
    (_, first), (_, expected) = next(steps), next(tokens.run(plain, 30))
    assert torch.equal(first, expected)
    for last in range(30, 40):
        before = [x.clone() for x in layer.read()]
        call, out = next(steps)
        new = tokens.k[:, :, last : last + 1], tokens.v[:, :, last : last + 1]
        k, v = (torch.cat(pair, dim=2) for pair in zip(before, new, strict=True))
        read = Tokens(tokens.q, k, v, [])
        for row, start in enumerate(tokens.starts):
            own = read.attend(row, 3, last, list(range(start, last + 1)))
            torch.testing.assert_close(out[row, 3, 0], own, atol=1e-5, rtol=1e-4)
        assert call.key_len == last + 1


@small
def test_padding_enters_nothing(name: str) -> None:
    tokens = Tokens.random([6, 0], 40, heads=2, groups=1, dim=DIM)
    dirty = Tokens(tokens.q, tokens.k.clone(), tokens.v.clone(), tokens.starts)
    for x in (dirty.k, dirty.v):
        x[0, :, :6] = 1000.0
    one, other = SMALL[name].layer(0, 1), SMALL[name].layer(0, 1)
    for (_, a), (_, b) in zip(tokens.run(one, 30, 1, 1), dirty.run(other, 30, 1, 1), strict=True):
        assert torch.equal(a[0, :, -1], b[0, :, -1])
        assert torch.equal(a[1], b[1])


@pytest.mark.parametrize("policy", [Kivi(residual=64), Mustafar(residual=64)], ids=lambda policy: policy.name)
def test_a_window_longer_than_all_is_dense(policy: Kivi) -> None:
    tokens = Tokens.random([3, 0], 40, heads=4, groups=2, dim=32)
    layer, plain = policy.layer(0, 1), StoreLayer()
    for (_, a), (_, b) in zip(tokens.run(layer, 30, 1, 5, 1), tokens.run(plain, 30, 1, 5, 1), strict=True):
        assert torch.equal(a, b)


@small
def test_rows_change_places_with_all_that_is_theirs(name: str) -> None:
    tokens = Tokens.random([2, 0], 40, heads=2, groups=1, dim=DIM)
    layer = SMALL[name].layer(0, 1)
    list(tokens.run(layer, 30, 1))
    before = [x.clone() for x in layer.read()]
    layer.batch_repeat_interleave(2)
    layer.reorder_cache(torch.tensor([3, 0, 1, 2]))
    layer.batch_select_indices(torch.tensor([0, 3]))
    for x, old in zip(layer.read(), before, strict=True):
        assert torch.equal(x, old[[1, 1]])
    copy = pickle.loads(pickle.dumps(layer))
    assert all(torch.equal(x, y) for x, y in zip(copy.read(), layer.read(), strict=True))
    layer.reset()
    assert layer.get_seq_length() == layer.nbytes == 0


@small
def test_newest_tokens_can_be_cut_off_and_encoded_ones_not(name: str) -> None:
    tokens = Tokens.random([0], 40, heads=2, groups=1, dim=DIM)
    layer, other = SMALL[name].layer(0, 1), SMALL[name].layer(0, 1)
    list(tokens.run(layer, 24, 1, 1))
    list(tokens.run(other, 24))
    newest = min(tails(layer))  # type: ignore[arg-type]
    assert isinstance(layer, EncodedLayer)
    with pytest.raises(ValueError, match="encoded all but"):
        layer.crop(-newest - 1)
    if name == "int8":
        return
    assert newest >= 2
    layer.crop(-2)
    if name == "kivi":  # values of two tokens more are encoded
        return
    for (_, a), (_, b) in zip(tokens.run(layer, 1, 4), tokens.run(other, 1, 4), strict=True):
        assert torch.equal(a, b)


@small
def test_page_bounds_are_those_of_what_is_read(name: str) -> None:
    tokens = Tokens.random([2, 0], 45, heads=2, groups=1, dim=DIM)
    layer = SMALL[name].layer(0, 1)
    for _ in tokens.run(layer, 20, *[1] * 25):
        found = layer.summary(PageBounds(4)).clone()
        keys, values = layer.read()
        assert torch.equal(found, PageBounds(4).begin().of(Held(keys, values, tokens.starts, 20)))


def test_bytes_are_what_is_held() -> None:
    tokens = Tokens.random([0, 0], 400, heads=2, groups=2, dim=64)
    dense = StoreLayer()
    list(tokens.run(dense, 400))
    assert dense.nbytes == 2 * 2 * 400 * 64 * 4 * 2
    held = {}
    for name in ("kivi", "int8", "mustafar"):
        layer = create(name).layer(0, 1)
        list(tokens.run(layer, 400))
        held[name] = layer.nbytes // (2 * 2)
    keys, values = 384 * 32 + 2 * 12 * 64 * 4 + 16 * 64 * 4, 272 * 32 + 2 * 272 * 2 * 4 + 128 * 64 * 4
    assert held["kivi"] == keys + values
    assert held["int8"] == 2 * 400 * (64 + 8)
    assert held["mustafar"] == 2 * (256 * (8 + 20 * 4) + 144 * 64 * 4)


def test_encoded_layers_drop_nothing() -> None:
    layer = Int8().layer(0, 1)
    list(Tokens.random([0], 8, heads=1, groups=1, dim=DIM).run(layer, 8))
    with pytest.raises(ValueError, match="drops none"):
        layer.keep(torch.arange(4)[None, None])


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("kivi", {"bits": 8}, "one of 2, 4"),
        ("kivi", {"group": 32, "residual": 48}, "multiple of group=32"),
        ("mustafar", {"key_sparsity": 1.0}, "below 1"),
        ("mustafar", {"value_sparsity": 1.5}, r"\[0, 1\]"),
        ("mustafar", {"pack": 0}, "at least 1"),
        ("int8", {"bits": 8}, "no field 'bits'"),
    ],
)
def test_fields_that_do_not_fit(name: str, fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create(name, **fields)


def test_a_group_that_does_not_divide_the_channels_is_refused() -> None:
    tokens = Tokens.random([0], 12, heads=1, groups=1, dim=20)
    with pytest.raises(ValueError, match="multiple of group=8"):
        list(tokens.run(Kivi(group=8, residual=8).layer(0, 1), 12))
