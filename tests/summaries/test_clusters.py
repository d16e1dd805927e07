"""Clusters: k-means by its definition, token by token, and which tokens are in them."""

from __future__ import annotations

import pytest
import torch
from kept import held, keys_of
from torch import Tensor

from gossamer.summaries import Clusters, ClusterSet
from gossamer.summaries.clusters import cluster


def naive_nearest(x: Tensor, centroids: list[Tensor]) -> int:
    products = [float(x @ centroid) for centroid in centroids]
    return products.index(max(products))


def naive_cluster(keys: Tensor, segments: int, count: int) -> list[int]:
    """Of one head's keys ``[n, D]``."""
    x = keys.double() - keys.double().mean(dim=0)
    found, tokens, each = [], len(x), count // segments
    for n in range(segments):
        own = x[n * tokens // segments : (n + 1) * tokens // segments]
        centroids = [own[int((i + 0.5) * len(own) / each)] for i in range(each)]
        for _ in range(9):
            owners = [naive_nearest(token, centroids) for token in own]
            for i in range(each):
                members = own[[owner == i for owner in owners]]
                if len(members):
                    centroids[i] = members.mean(dim=0) / members.mean(dim=0).norm()
        found += centroids
    return [naive_nearest(token, found) for token in x]


@pytest.mark.parametrize(("tokens", "segments", "count"), [(64, 1, 8), (61, 1, 8), (130, 3, 24), (9, 1, 1), (8, 1, 8)])
def test_the_partition_is_that_of_k_means(tokens: int, segments: int, count: int) -> None:
    keys = keys_of(tokens, batch=1, groups=3, dim=6)[0] + 2
    owners, sizes = cluster(keys, segments, count)
    for head in range(3):
        wanted = naive_cluster(keys[head], segments, count)
        assert owners[head].tolist() == wanted
        assert sizes[head].tolist() == [wanted.count(n) for n in range(count)]


def test_a_head_is_clustered_as_if_it_were_alone() -> None:
    keys = keys_of(500, batch=1, groups=3, dim=6)[0]
    owners, _ = cluster(keys, 2, 32)
    for head in (2, 0, 1):
        assert torch.equal(cluster(keys[head : head + 1], 2, 32)[0][0], owners[head])


def checked(found: ClusterSet, keys: Tensor, starts: list[int], ends: list[int], sinks: int) -> None:
    """Every token of a row's middle in one cluster, whose size, mean key and mean value are those of its tokens."""
    for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
        for head in range(keys.shape[1]):
            owners = found.owners[row, head]
            assert (owners >= 0).nonzero()[:, 0].tolist() == list(range(sinks, end)) if end else int(owners.max()) < 0
            assert int(found.sizes[row, head].sum()) == max(end - sinks, 0)
            own = keys[row, head, start:]
            for n in range(found.counts[row]):
                members = own[: len(owners)][owners[: len(own)] == n]
                assert int(found.sizes[row, head, n]) == len(members)
                if len(members):
                    assert torch.allclose(found.centroids[row, head, n], members.mean(dim=0), atol=1e-5)
                    assert torch.allclose(found.means[row, head, n], members.mean(dim=0).roll(1) * 0.5, atol=1e-5)
            assert int(found.sizes[row, head, found.counts[row] :].sum()) == 0


@pytest.mark.parametrize("starts", [[0, 0], [0, 33]])
def test_sizes_and_means(starts: list[int]) -> None:
    keys, kind = keys_of(300), Clusters(8, 100, 3, 20, 64, 32)
    keys[0, :, : starts[0]] = keys[1, :, : starts[1]] = torch.nan
    found = kind.begin().of(held(keys, starts))
    ends = [280 - start for start in starts]
    checked(found, keys, starts, ends, 3)
    assert found.counts == tuple(
        # A multiple of 8 and of the segments near an eighth of the tokens.
        {0: 24, 33: 32}[start] if start else 24
        for start in starts
    )  # 277 tokens in 3 segments: 35 to a multiple of 24; 244 in 2: 30 to a multiple of 8


def test_an_answer_is_clustered_step_by_step() -> None:
    keys, kept = keys_of(300), Clusters(8, 100, 3, 20, 64, 32).begin()
    kept.of(held(keys[:, :, :100], [0, 0]))
    for count, end, clusters in ((131, 80, 8), (132, 112, 16), (170, 144, 24), (300, 272, 56)):
        found = kept.of(held(keys[:, :, :count], [0, 0], prompt=100))
        checked(found, keys, [0, 0], [end, end], 3)
        assert found.counts == (clusters,) * 2


def test_a_short_prompt_has_none_until_there_are_enough() -> None:
    keys, kept = keys_of(300), Clusters(8, 100, 3, 20, 64, 32).begin()
    assert kept.of(held(keys[:, :, :86], [0, 0], prompt=10)).counts == (0, 0)
    found = kept.of(held(keys[:, :, :87], [0, 0], prompt=10))
    checked(found, keys, [0, 0], [67, 67], 3)
    mixed = kept.of(held(keys[:, :, :100], [0, 40], prompt=100))
    checked(mixed, keys, [0, 40], [80, 0], 3)
