"""Representatives of blocks: the votes of a prompt's queries, from the formula."""

from __future__ import annotations

import math

import pytest
import torch
from kept import held, keys_of
from torch import Tensor

from gossamer import AttentionCall, Extent
from gossamer.cache import StoreLayer
from gossamer.summaries import Representatives


def queries_of(slots: int, heads: int = 4, seed: int = 1) -> Tensor:
    return 2 * torch.randn(2, heads, slots, 5, generator=torch.Generator().manual_seed(seed))


def call_of(q: Tensor, k: Tensor, starts: list[int], first: int, stop: int, **fields: float) -> AttentionCall:
    """Of the queries in slots ``first`` to ``stop`` on the keys before."""
    live = torch.arange(stop)[None] >= torch.tensor(starts)[:, None]
    extent = Extent.from_key_mask(live, stop - first)
    return AttentionCall(q[:, :, first:stop], k[:, :, :stop], k[:, :, :stop], extent, **fields)  # type: ignore[arg-type]


def votes(
    q: Tensor, k: Tensor, kind: Representatives, scale: float, softcap: float | None, steps: set[int]
) -> list[float]:
    """Of one head and row without padding: tokens ``[n, D]``; queries of steps have none."""
    found = [0.0] * len(k)
    for i in sorted(set(range(0, len(q), kind.every)) - steps):
        near = range(max(0, i - kind.local + 1), i + 1)
        logits = [float(q[i] @ k[j]) * scale for j in near]
        logits = logits if softcap is None else [softcap * math.tanh(x / softcap) for x in logits]
        total = sum(math.exp(x) for x in logits)
        for j, logit in zip(near, logits, strict=True):
            found[j] += math.exp(logit) / total
    return found


@pytest.mark.parametrize(
    "kind", [Representatives(4, 2, 6, 1), Representatives(3, 1, 9, 2), Representatives(4, 4, 5, 3)]
)
@pytest.mark.parametrize("chunks", [(40,), (17, 1, 1, 14, 7)])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_blocks_are_represented_by_what_later_queries_attend(
    kind: Representatives, chunks: tuple[int, ...], softcap: float | None
) -> None:
    starts, q, k = [0, 5], queries_of(40), keys_of(40)
    kept, first = kind.begin(), 0
    for count in chunks:
        kept.seen(call_of(q, k, starts, first, first + count, scale=0.7, softcap=softcap))  # type: ignore[arg-type]
        first += count
    means = kept.of(held(k, starts))
    assert means.shape == (2, 4, (40 - kind.local) // kind.block, 5)
    for row, start in enumerate(starts):
        steps = {17 - start, 18 - start} if len(chunks) > 1 else set()
        for head in range(4):
            own_q, own_k = q[row, head, start:], k[row, head // 2, start:]
            found = votes(own_q, own_k, kind, 0.7, softcap, steps)
            for block in range((40 - start - kind.local) // kind.block):
                tokens = list(range(block * kind.block, (block + 1) * kind.block))
                tokens.sort(key=lambda token: -found[token])
                expected = own_k[tokens[: kind.count]].mean(dim=0)
                torch.testing.assert_close(means[row, head, block], expected, rtol=1e-4, atol=1e-5)


def test_without_votes_all_keys_of_a_block_represent_it() -> None:
    k = keys_of(20)
    means = Representatives(4, 2, 6, 1).begin().of(held(k, [0, 0]))
    torch.testing.assert_close(means, k[:, :, :12].unflatten(2, (3, 4)).mean(dim=3))


def test_they_follow_crops_and_rows() -> None:
    """What is cut off and comes again differently is represented anew; rows take their own along."""
    kind, layer = Representatives(4, 2, 6, 1), StoreLayer()
    q, k = queries_of(40), keys_of(40)
    kept = layer.begin(kind)

    def add(keys: Tensor, queries: Tensor) -> None:
        first = layer.length
        layer.update(keys, keys)
        layer.place(Extent.full(2, keys.shape[2], layer.length))
        kept.seen(AttentionCall(queries, *layer.read(), Extent.full(2, keys.shape[2], first + keys.shape[2])))

    with torch.inference_mode():
        add(k[:, :, :30], q[:, :, :30])
        layer.summary(kind)
    layer.crop(-14)
    assert layer.summary(kind).shape[2] == 2
    layer.reorder_cache(torch.tensor([1, 1]))
    other_q, other_k = q[[1, 1]].flip(2), k[[1, 1]].flip(2)
    add(other_k[:, :, :20], other_q[:, :, :20])
    found = layer.summary(kind)
    scratch = kind.begin()
    whole_q, whole_k = (torch.cat([x[[1, 1], :, :16], y[:, :, :20]], dim=2) for x, y in ((q, other_q), (k, other_k)))
    scratch.seen(AttentionCall(whole_q, whole_k, whole_k))
    expected = scratch.of(held(whole_k, [0, 0]))
    # Votes of the queries that were cut off remain on the keys that were not: of blocks of keys after them none do.
    torch.testing.assert_close(found[:, :, 4:], expected[:, :, 4:])
    assert found.shape == expected.shape


def test_bad_ones_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Representatives\.every must be at least 1, got 0"):
        Representatives(4, 2, 6, 0)
