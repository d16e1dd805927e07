"""A store against transformers' own layer, and what only a store has: dropped tokens, pages, room made ahead."""

from __future__ import annotations

import copy
import pickle
import random
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from definitions import raised
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, MistralConfig, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from gossamer.cache import CachePolicy, Keep, StoreLayer, adopt, create, new_cache, store_of
from gossamer.plan import Extent
from gossamer.summaries import PageBounds

SIZE: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


@pytest.fixture(autouse=True)
def as_in_generation() -> Iterator[None]:
    with torch.no_grad():
        yield


def tokens(count: int, seed: int, batch: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, 2, count, 4, generator=generator), torch.randn(batch, 2, count, 6, generator=generator))


def filled(slots: int = 40, **fields: int) -> StoreLayer:
    layer = StoreLayer(**fields)
    layer.update(*tokens(slots, 0))
    return layer


def assert_same(layer: StoreLayer, stock: DynamicLayer) -> None:
    assert layer.get_seq_length() == stock.get_seq_length()
    assert layer.get_mask_sizes(3) == stock.get_mask_sizes(3)
    if stock.get_seq_length():
        assert layer.keys is not None
        assert layer.values is not None
        assert torch.equal(layer.keys, stock.keys)  # type: ignore[arg-type]
        assert torch.equal(layer.values, stock.values)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(4))
def test_it_holds_what_a_stock_layer_holds(seed: int) -> None:
    """After any sequence of what transformers asks of a layer; and its pages are those of its keys."""
    stock: Any = DynamicLayer()
    draw, layer, batch = random.Random(seed), StoreLayer(), 3
    for step in range(60):
        what = draw.choice(["add"] * 6 + ["chunk", "crop", "reorder", "repeat", "select", "reset"])
        if what in ("add", "chunk") or stock.get_seq_length() == 0:
            new = tokens(1 if what == "add" else draw.randrange(2, 90), 100 * seed + step, batch)
            got, wanted = layer.update(*new), stock.update(*new)
            assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
        elif what == "crop":
            count = draw.randrange(0, stock.get_seq_length())
            layer.crop(-count)
            stock.crop(-count)
        elif what == "reorder":
            rows = torch.tensor([draw.randrange(batch) for _ in range(batch)])
            layer.reorder_cache(rows)
            stock.reorder_cache(rows)
        elif what == "repeat" and batch < 10:
            layer.batch_repeat_interleave(2)
            stock.batch_repeat_interleave(2)
            batch *= 2
        elif what == "select":
            rows = torch.tensor(sorted(draw.sample(range(batch), draw.randrange(1, batch + 1))))
            layer.batch_select_indices(rows)
            stock.batch_select_indices(rows)
            batch = len(rows)
        elif what == "reset":
            layer.reset()
            stock.reset()
        assert_same(layer, stock)
        if stock.get_seq_length() and step % 3 == 0:
            scratch = StoreLayer()
            assert stock.keys is not None
            assert stock.values is not None
            scratch.update(stock.keys, stock.values)
            assert torch.equal(layer.summary(PageBounds(16)), scratch.summary(PageBounds(16)))


def test_the_keys_know_their_layer_and_the_layer_does_not_know_them() -> None:
    layer = StoreLayer()
    keys, values = layer.update(*tokens(5, 0))
    assert store_of(keys) is layer
    assert store_of(values) is None
    assert store_of(keys.clone()) is None
    gone = weakref.ref(layer)
    del layer, keys, values
    assert gone() is None  # without a garbage collector's help: caches are large


def test_room_is_made_ahead_and_stays_in_proportion() -> None:
    layer, moved, before = StoreLayer(), 0, 0
    for step in range(10_000):
        layer.update(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2))
        assert layer._room is not None
        room = layer._room[0]
        moved += room.data_ptr() != before
        before = room.data_ptr()
        assert room.shape[2] <= (step + 1) * 1.07 + 65
    assert moved < 120


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_goes_its_own_way(copied: Any) -> None:
    layer = filled()
    bounds = layer.summary(PageBounds(16)).clone()
    other = copied(layer)
    assert other.keys.data_ptr() == other._room[0].data_ptr()
    other.crop(-39)
    other.update(*tokens(60, 1))
    assert torch.equal(layer.summary(PageBounds(16)), bounds)
    assert torch.equal(layer.keys, tokens(40, 0)[0])  # type: ignore[arg-type]
    assert torch.equal(other.keys[:, :, 1:], tokens(60, 1)[0])


def test_inference_mode_may_be_left_between_steps() -> None:
    layer = StoreLayer()
    with torch.inference_mode():
        layer.update(*tokens(40, 0))
        layer.summary(PageBounds(16))
    layer.update(*tokens(1, 1))
    layer.summary(PageBounds(16))
    with torch.inference_mode():
        layer.update(*tokens(1, 2))
    layer.update(*tokens(300, 3))
    assert layer.keys is not None
    assert torch.equal(layer.keys[:, :, 40:42], torch.cat([tokens(1, 1)[0], tokens(1, 2)[0]], dim=2))
    scratch = StoreLayer()
    scratch.update(*layer.read())
    assert torch.equal(layer.summary(PageBounds(16)), scratch.summary(PageBounds(16)))


@torch.enable_grad()
def test_gradients_pass_through_every_step() -> None:
    found = []
    for layer in (StoreLayer(), DynamicLayer()):
        given = [[x.requires_grad_(seed != 1) for x in tokens(count, seed)] for seed, count in enumerate((5, 1, 1, 2))]
        total = torch.zeros(())
        for keys, values in given:
            k, v = layer.update(keys, values)
            weight = torch.ones((), requires_grad=True)  # keys that need no gradient are held by the graph as well
            total = total + ((weight * k).square().sum() * v.square().sum())
        total.backward()
        found.append([x.grad for pair in given for x in pair])
    for ours, stock in zip(*found, strict=True):
        assert (ours is None) == (stock is None)
        assert ours is None or torch.allclose(ours, stock)


def test_dropped_tokens_are_seen_in_the_length_and_not_in_the_slots() -> None:
    layer = filled(40)
    layer.place(Extent([39, 36, 39], [1, 1, 1], [0, 3, 0], [40, 37, 40]))
    index = torch.cat([torch.arange(0, 10), torch.arange(30, 40)]).expand(3, 2, -1)
    layer.keep(index)
    assert (layer.length, layer.slots, layer.dropped) == (40, 20, 20)
    assert layer.get_seq_length() == 40
    assert layer.get_mask_sizes(5) == (25, 20)
    assert torch.equal(layer.keys, tokens(40, 0)[0].gather(2, index[..., None].expand(-1, -1, -1, 4)))  # type: ignore[arg-type]
    layer.update(*tokens(2, 1))
    assert layer.positions is not None
    assert layer.positions[1, 1].tolist() == [*range(10), *range(30, 42)]
    extent = layer.extent(2)
    assert extent is not None
    assert extent.key_start.tolist() == [0, 3, 0]
    assert extent.key_count.tolist() == [22, 19, 22]
    assert extent.query_start.tolist() == [20, 17, 20]
    bounds = layer.summary(PageBounds(4))
    assert bounds.shape[2] == 6
    assert torch.equal(bounds[1, :, 0, :4].float(), raised(layer.keys[1, :, 3:7].amax(dim=1)))  # type: ignore[index]


def test_heads_may_drop_different_tokens() -> None:
    layer = filled(8)
    index = torch.stack([torch.tensor([0, 2, 7]), torch.tensor([1, 5, 7])]).expand(3, -1, -1)
    layer.keep(index)
    layer.keep(torch.tensor([1, 2]).expand(3, 2, -1))  # of what is left
    assert layer.positions is not None
    assert layer.positions[0].tolist() == [[2, 7], [5, 7]]
    layer.reorder_cache(torch.tensor([2, 0, 0]))
    assert layer.positions.shape == (3, 2, 2)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (torch.arange(3), r"needs slots \[B, G, n\]"),
        (torch.tensor([0, 2, 2]).expand(3, 2, -1), "must ascend and lie in 0 .. 39"),
        (torch.tensor([0, 40]).expand(3, 2, -1), "must ascend and lie in 0 .. 39"),
        (torch.tensor([[0, 5], [5, 6]]).expand(3, -1, -1), "as many slots of padding"),
    ],
)
def test_slots_that_cannot_be_kept(index: Tensor, message: str) -> None:
    layer = filled(40)
    layer.place(Extent([37] * 3, [1] * 3, [3] * 3, [37] * 3))
    with pytest.raises(ValueError, match=message):
        layer.keep(index)


def test_what_was_dropped_does_not_come_back() -> None:
    layer = filled(40)
    layer.keep(torch.arange(10).expand(3, 2, -1))
    layer.update(*tokens(4, 1))
    layer.crop(-4)
    assert (layer.length, layer.slots) == (40, 10)
    assert layer.positions is not None
    assert layer.positions.shape[2] == 10
    with pytest.raises(ValueError, match="can go back 0"):
        layer.crop(-1)
    with pytest.raises(ValueError, match="0 or a negative number"):
        layer.crop(1)


@pytest.mark.parametrize("event", ["prompt", "crop", "reorder", "repeat", "select", "keep"])
def test_what_a_method_kept_over_steps_is_forgotten(event: str) -> None:
    layer = filled(40)
    for row in layer.state:
        row["choice"] = 1
    layer.update(*tokens(1, 1))
    assert layer.state == [{"choice": 1}] * 3
    {
        "prompt": lambda: layer.update(*tokens(2, 2)),
        "crop": lambda: layer.crop(-1),
        "reorder": lambda: layer.reorder_cache(torch.tensor([0, 1, 2])),
        "repeat": lambda: layer.batch_repeat_interleave(2),
        "select": lambda: layer.batch_select_indices(torch.tensor([0, 2])),
        "keep": lambda: layer.keep(torch.arange(5).expand(3, 2, -1)),
    }[event]()
    assert layer.state == [{}] * {"repeat": 6, "select": 2}.get(event, 3)


def test_layers_with_structures_of_their_own_stay() -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    fields: dict[str, Any] = {"sliding_window": 8, "layer_types": kinds}
    config = MistralConfig(**SIZE, **fields)
    cache = new_cache(config, Keep())
    assert [type(layer) for layer in cache.layers] == [
        DynamicSlidingWindowLayer, StoreLayer, DynamicSlidingWindowLayer,
    ]  # fmt: skip


def test_a_cache_that_is_in_use_takes_stores() -> None:
    cache = DynamicCache(config=LlamaConfig(**SIZE))
    before = [cache.update(*tokens(7, layer), layer) for layer in range(3)]
    assert adopt(cache, create("keep", sinks=2, recent=5))
    assert adopt(cache, Keep())  # and keeps them
    for layer, (keys, _) in zip(cache.layers, before, strict=True):
        assert isinstance(layer, StoreLayer)
        assert torch.equal(layer.keys, keys)  # type: ignore[arg-type]
        assert (layer.sinks, layer.recent) == (2, 5)


def test_a_cache_without_a_config_takes_stores_as_layers_come() -> None:
    cache = DynamicCache()
    assert adopt(cache, Keep())
    for layer in range(3):
        cache.update(*tokens(7, layer), layer)
    assert [type(layer) for layer in cache.layers] == [StoreLayer] * 3


def test_other_caches_stay_as_they_are() -> None:
    static = StaticCache(config=LlamaConfig(**SIZE), max_cache_len=8)
    assert not adopt(static, Keep())
    assert not adopt(object(), Keep())


def test_layers_whose_devices_differ_from_where_they_lie() -> None:
    layer = filled(5)
    layer.offload()
    layer.prefetch()
    assert torch.equal(layer.keys, tokens(5, 0)[0])  # type: ignore[arg-type]
    StoreLayer().prefetch()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: create("nonesuch"), ValueError, "unknown cache 'nonesuch'; known: keep"),
        (lambda: create("keep", size=3), ValueError, "cache 'keep' has no field 'size'; its fields are: sinks, recent"),
        (lambda: Keep(sinks=-1), ValueError, "keep.sinks must be at least 0, got -1"),
        (lambda: Keep(recent=True), TypeError, "keep.recent must be an integer, got True"),
    ],
)
def test_policies_that_there_are_none_of(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_a_policy_says_its_fields() -> None:
    policy: CachePolicy = create("keep", recent=64)
    assert policy.to_dict() == {"cache": "keep", "sinks": 0, "recent": 64}
