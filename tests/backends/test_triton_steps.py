"""Scores of pages and labels, and collisions of hashes, in Triton against their definitions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from triton_support import DEVICE, DTYPES, MARKS, moved

from gossamer import AttentionCall, Extent
from gossamer.backends import torch as definition
from gossamer.backends import triton
from gossamer.summaries import Held, Labels, LabelSet, PageBounds

pytestmark = MARKS

SIZES = [(2, 4, 64), (1, 7, 20), (3, 1, 80), (2, 5, 128), (1, 8, 256), (1, 1, 8)]


def step(groups: int, share: int, dim: int, dtype: torch.dtype = torch.float32, keys: int = 333) -> AttentionCall:
    """With left padding in the second row, and NaN in it."""
    generator = torch.Generator().manual_seed(keys + dim)
    q = torch.randn(2, groups * share, 1, dim, generator=generator).to(dtype)
    k = torch.randn(2, groups, keys, dim, generator=generator).to(dtype)
    k[1, :, :21] = torch.nan
    return AttentionCall(q, k, k, Extent([keys - 1, keys - 22], [1, 1], [0, 21], [keys, keys - 21]), scale=0.3)


def held(call: AttentionCall) -> Held:
    return Held(call.k, call.values, call.extent.key_start.tolist(), call.key_len)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize(("groups", "share", "dim"), SIZES)
def test_page_scores(dtype: torch.dtype, groups: int, share: int, dim: int) -> None:
    call = step(groups, share, dim, dtype)
    bounds = PageBounds(16).begin().of(held(call))
    bounds[1, :, 312 // 16 + 1 :] = torch.nan  # pages that the row does not have
    found = triton.page_scores(moved(call), bounds.to(DEVICE), 16)
    torch.testing.assert_close(found.cpu(), definition.page_scores(call, bounds, 16), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8, 16, 32])
@pytest.mark.parametrize(
    ("groups", "share", "dim", "count", "apart"),
    [(2, 4, 64, 8, False), (1, 7, 20, 5, False), (3, 1, 80, 80, False), (2, 5, 128, 17, True), (1, 1, 16, 1, False)],
)
def test_label_scores(bits: int, groups: int, share: int, dim: int, count: int, apart: bool) -> None:
    """Odd numbers of tokens, channels and heads; channels for each query head."""
    call = step(groups, share, dim)
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randperm(dim, generator=generator).tolist() for _ in range(groups * share if apart else 0)]
    labels = Labels(count, bits, tuple(map(tuple, rows)) or None).begin().of(held(call))
    sides = (None if x is None else x.to(DEVICE) for x in (labels.low, labels.step))
    there = LabelSet(labels.codes.to(DEVICE), labels.channels.to(DEVICE), *sides)
    found = triton.label_scores(moved(call), there).cpu()
    torch.testing.assert_close(found, definition.label_scores(call, labels), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("groups", "share", "tables"), [(2, 4, 150), (1, 1, 7), (3, 5, 33)])
def test_collisions(groups: int, share: int, tables: int) -> None:
    """Of codes that lie in a larger room, as a summary that grows has them; some far apart in memory."""
    generator = torch.Generator().manual_seed(tables)
    queries = torch.randint(-3, 3, (2, groups * share, tables), generator=generator, dtype=torch.int16)
    codes = torch.randint(-3, 3, (2, groups, 4, tables, 64), generator=generator, dtype=torch.int16)
    for some in (codes[:, :, :3], codes[:, :, 1::2], codes[:1].expand(2, -1, -1, -1, -1)):
        found = triton.collisions(queries.to(DEVICE), some.to(DEVICE))
        assert torch.equal(found.cpu(), definition.collisions(queries, some))


def test_nothing_to_score() -> None:
    call = replace(step(2, 2, 16), extent=Extent([0, 0], [0, 0], [0, 0], [0, 0]))
    bounds = torch.zeros(2, 2, 3, 32)
    assert bool((triton.page_scores(moved(call), bounds.to(DEVICE), 16) == float("-inf")).all())
    assert triton.page_scores(moved(call), bounds[:, :, :0].to(DEVICE), 16).shape == (2, 4, 0)
