"""Every summary that is kept up beside a layer's tokens is what it would be if it were made anew."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import pytest
import torch
from kept import keys_of
from torch import Tensor

from gossamer.cache import StoreLayer
from gossamer.plan import Extent
from gossamer.summaries import Clusters, ClusterSet, Hashes, HashSet, Held, Kept, Labels, PageBounds, Summary

BY_HEAD = tuple(tuple((3 * head + n) % 5 for n in range(4)) for head in range(4))
KINDS: list[Summary[Any]] = [
    PageBounds(16), PageBounds(1), *(Labels(3, bits) for bits in (4, 8, 16, 32)), Labels(4, 4, BY_HEAD),
    Labels(2, 16, BY_HEAD[:2]), Hashes(3, 7, 2, 5, 16, 0), Hashes(1, 2, 0, 1, 1, 3),
    Clusters(4, 24, 2, 5, 16, 8), Clusters(2, 100, 0, 1, 30, 16),
]  # fmt: skip
every_kind = pytest.mark.parametrize("kind", KINDS, ids=str)


def tensors(found: Any) -> list[tuple[str, Any]]:
    if isinstance(found, HashSet):  # rows have what is before their end
        codes = found.codes.transpose(2, 3).flatten(3, 4)
        rows = [(end, codes[b, ..., :end], found.norms[b, :, :end]) for b, end in enumerate(found.ends)]
        means = [found.mean[b] if end else None for b, end in enumerate(found.ends)]
        return [("rows", tuple(rows)), ("means", tuple(means))]
    if isinstance(found, ClusterSet):  # positions from each row's own last cluster on are in none
        owners = [tuple(head[head >= 0].tolist()) for row in found.owners for head in row]
        parts = found.centroids, found.means, found.sizes
        own = [tuple(x[b, :, :count] for x in parts) for b, count in enumerate(found.counts)]
        return [("owners", tuple(owners)), ("counts", found.counts), ("rows", tuple(own))]
    if not is_dataclass(found):
        return [("", found)]
    return [(f.name, getattr(found, f.name)) for f in fields(found)]


def same(own: Any, other: Any) -> bool:
    if isinstance(own, tuple):
        return len(own) == len(other) and all(map(same, own, other))
    return torch.equal(own, other) if isinstance(own, Tensor) else own == other


def assert_from_scratch(layer: StoreLayer, kind: Summary[Any]) -> None:
    scratch = StoreLayer()
    with torch.no_grad():
        scratch.update(*layer.read())
    scratch.starts, scratch.prompt = layer.starts, layer.prompt
    found, wanted = layer.summary(kind), scratch.summary(kind)
    for (name, own), (_, other) in zip(tensors(found), tensors(wanted), strict=True):
        if not isinstance(own, Tensor):
            assert same(own, other), name
            continue
        assert own.shape == other.shape, name
        for row, start in enumerate(layer.starts or ()):
            part = tokens_of(own, layer.slots, min(layer.starts or [0]), start)
            assert torch.equal(*(x[row] if part is None else x[row].narrow(*part) for x in (own, other))), name


def tokens_of(x: Tensor, slots: int, first: int, start: int) -> tuple[int, int, int] | None:
    """Where a row that begins later than another has entries of its own: of its tokens, or its pages."""
    for size in (1, 16):
        for dim in range(1, x.ndim - 1 if start > first else 0):
            if x.shape[dim + 1] == -(-(slots - first) // size):
                return dim, 0, -(-(slots - start) // size)
    return None


@every_kind
@pytest.mark.parametrize("padding", [(0, 0, 0), (0, 9, 21)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_after_whatever_happens_to_a_cache(kind: Summary[Any], padding: tuple[int, ...], dtype: torch.dtype) -> None:
    draw, layer, batch = random.Random(1), StoreLayer(), 3
    with torch.no_grad():
        keys = keys_of(70, batch=3).to(dtype)
        for row, dead in enumerate(padding):
            keys[row, :, :dead] = torch.nan
        layer.update(keys, keys.nan_to_num())
        layer.place(Extent([69 - n for n in padding], [1] * 3, list(padding), [70 - n for n in padding]))
        for step in range(50):
            what = draw.choice(["add"] * 5 + ["several", "prompt", "crop", "reorder", "select", "repeat"])
            new = {"add": 1, "several": draw.randrange(2, 60), "prompt": draw.randrange(65, 130)}.get(what, 0)
            if new:
                layer.update(*(keys_of(new, batch=batch, seed=step).to(dtype),) * 2)
            elif what == "crop":
                layer.crop(-draw.randrange(0, layer.length - 30))
            elif what == "reorder":
                layer.reorder_cache(torch.tensor([draw.randrange(batch) for _ in range(batch)]))
            elif what == "repeat" and batch < 6:
                layer.batch_repeat_interleave(2)
                batch *= 2
            elif what == "select" and batch > 2:
                layer.batch_select_indices(torch.tensor(sorted(draw.sample(range(batch), 2))))
                batch = 2
            if draw.random() < 0.7:
                assert_from_scratch(layer, kind)


@every_kind
def test_after_tokens_were_dropped(kind: Summary[Any]) -> None:
    layer = StoreLayer()
    with torch.no_grad():
        layer.update(keys_of(90), keys_of(90))
        layer.place(Extent.full(2, 1, 90))
        layer.summary(kind)
        layer.keep(torch.arange(7, 80).expand(2, 2, -1))
        assert_from_scratch(layer, kind)
        layer.update(keys_of(1, seed=1), keys_of(1, seed=1))
        assert_from_scratch(layer, kind)
        layer.reset()
        layer.update(keys_of(40, seed=2), keys_of(40, seed=2))
        layer.place(Extent.full(2, 1, 40))
        assert_from_scratch(layer, kind)


@every_kind
def test_a_copy_goes_its_own_way(kind: Summary[Any]) -> None:
    layer = StoreLayer()
    with torch.no_grad():
        layer.update(keys_of(90), keys_of(90))
        layer.place(Extent.full(2, 1, 90))
        layer.summary(kind)
        other = copy.deepcopy(layer)
        other.crop(-60)
        other.update(keys_of(90, seed=4), keys_of(90, seed=4))
        for one in (layer, other):
            assert_from_scratch(one, kind)


@every_kind
def test_inference_mode_may_be_left_between_steps(kind: Summary[Any]) -> None:
    layer = StoreLayer()
    with torch.inference_mode():
        layer.update(keys_of(90), keys_of(90))
        layer.place(Extent.full(2, 1, 90))
        layer.summary(kind)
    with torch.no_grad():
        layer.update(keys_of(40, seed=1), keys_of(40, seed=1))
        assert_from_scratch(layer, kind)


@dataclass(frozen=True)
class Count(Summary[int]):
    """A kind that no store knows of."""

    more: int = 0

    def begin(self) -> Kept[int]:
        return _Count(self.more)


class _Count(Kept[int]):
    def __init__(self, more: int) -> None:
        self.more, self.cuts, self.rows = more, [], []

    def of(self, held: Held) -> int:
        return held.slots + held.values.shape[3] + held.prompt + self.more

    def cut(self, slots: int) -> None:
        self.cuts.append(slots)

    def take_rows(self, index: Tensor) -> None:
        self.rows.append(index.tolist())


def test_a_summary_of_somebody_else_is_told_everything() -> None:
    layer = StoreLayer()
    with torch.no_grad():
        layer.update(keys_of(80), keys_of(80))
        assert layer.summary(Count()) == 80 + 5 + 80
        layer.update(keys_of(1), keys_of(1))
        layer.update(keys_of(64), keys_of(64))  # a draft is no prompt
        assert layer.summary(Count(3)) == 145 + 5 + 80 + 3
        layer.crop(-70)
        assert layer.summary(Count()) == 75 + 5 + 75
        layer.update(keys_of(65), keys_of(65))
        layer.reorder_cache(torch.tensor([1, 1]))
        assert layer.summary(Count()) == 140 + 5 + 140
    kept = layer._summaries[Count()]
    assert isinstance(kept, _Count)
    assert (kept.cuts, kept.rows) == ([75], [[1, 1]])
    assert set(layer._summaries) == {Count(), Count(3)}
