"""Routing attention against its formula; its known leak; clusters that were planted; decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gossamer.modules import KeysAndValues, RoutingAttention
from gossamer.modules.centroids import Centroids
from gossamer.modules.routing import attend_members, attend_prefix, members


def layer(**options: Any) -> RoutingAttention:
    return RoutingAttention(8, 2, **{"clusters": 3, "window": 4, "dtype": torch.float64} | options).eval()


def drawn(tokens: int) -> list[Tensor]:
    return [torch.randn(2, 2, tokens, 4, dtype=torch.float64) for _ in range(3)]


def row(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return (keys @ q * q.shape[-1] ** -0.5).softmax(0) @ values


def naive(q: Tensor, k: Tensor, v: Tensor, means: Tensor, window: int, length: int, causal: bool, kept: Any) -> Tensor:
    """One head, cluster by cluster and query by query."""
    total, hits = torch.zeros_like(v), torch.zeros(len(v))
    unit = torch.nn.functional.normalize
    for c, mean in enumerate(means):
        ranks = [(unit(x, dim=-1) @ mean)[:length].argsort(descending=True) for x in (q, k)]
        nearest = [sorted(rank[:window].tolist()) for rank in ranks]
        for i in nearest[0]:
            seen = [j for j in nearest[1] if j <= i or not causal]
            keys, values = torch.cat([kept[0][c], k[seen]]), torch.cat([kept[1][c], v[seen]])
            total[i] += row(q[i], keys, values) if len(keys) else 0.0
            hits[i] += 1
    return total / hits.clamp(min=1)[:, None]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("memory", [0, 2])
def test_clusters_are_the_formula(causal: bool, memory: int) -> None:
    q, k, v = drawn(11)
    means = Centroids(2, 3, 4, dtype=torch.float64)
    kept = torch.randn(2, 2, 3, memory, 4, dtype=torch.float64)
    live = torch.arange(11) < torch.tensor([[11], [6]])
    lists = [members(means.scores(x), live, 4) for x in (q, k)]
    out = attend_members(q, k, v, *lists, causal=causal, scale=0.5, memory=(kept[0], kept[1]) if memory else None)
    for b, length in enumerate([11, 6]):
        for h in range(2):
            given = (q[b, h], k[b, h], v[b, h], means.means[h], 4, length, causal, kept[:, h])
            torch.testing.assert_close(out[b, h], naive(*given))


def test_choosing_by_the_prefix_is_the_formula() -> None:
    q, k, v = drawn(9)
    means = Centroids(2, 3, 4, dtype=torch.float64)
    out = attend_prefix(q, k, v, means, window=3, scale=0.5)
    near, scores = means.nearest(q), means.scores(k)
    for b, h, i in torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(9)).tolist():
        chosen = scores[b, h, : i + 1, near[b, h, i]].argsort(descending=True)[:3]
        torch.testing.assert_close(out[b, h, i], row(q[b, h, i], k[b, h, chosen], v[b, h, chosen]))


@pytest.mark.parametrize("memory", [0, 2])
def test_one_query_by_the_prefix_is_the_last_of_the_whole_call(memory: int) -> None:
    q, k, v = drawn(9)
    means, live = Centroids(2, 3, 4, dtype=torch.float64), torch.arange(9) >= torch.tensor([[0], [7]])
    kept = torch.randn(2, 2, 3, memory, 4, dtype=torch.float64)
    options: Any = {"window": 3, "scale": 0.5, "live": live, "memory": (kept[0], kept[1]) if memory else None}
    whole, one = (attend_prefix(x, k, v, means, **options) for x in (q, q[:, :, -1:]))
    torch.testing.assert_close(one, whole[:, :, -1:])


def test_a_step_scores_keys_against_one_centroid_and_copies_none_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    routing, x, cache = layer(assign="prefix"), torch.randn(1, 40, 8, dtype=torch.float64), KeysAndValues()
    scored, places, score = [], [], Centroids.scores

    def watch(self: Centroids, of: Tensor) -> Tensor:
        scored.append(of.shape[2])
        return score(self, of)

    with torch.no_grad():
        whole = routing(x)
        outs = [routing(x[:, :8], cache=cache)]
        monkeypatch.setattr(Centroids, "scores", watch)
        for n in range(8, 40):
            outs.append(routing(x[:, n : n + 1], cache=cache))
            assert cache.held is not None
            places.append(cache.held[0].data_ptr())
    torch.testing.assert_close(torch.cat(outs, 1), whole)
    assert set(scored) == {1}  # the query's nearest centroid, and no key
    assert [n for n in range(1, 32) if places[n] != places[n - 1]] == [8, 24]  # at 16 and at 32 tokens


def test_a_cache_keeps_gradients_and_what_inference_mode_made() -> None:
    k = torch.randn(3, 1, 1, 4, 2, requires_grad=True)
    cache = KeysAndValues()
    for one in k:
        held = cache.append(one, one)[0]
    held.sum().backward()
    assert k.grad is not None
    assert torch.equal(k.grad, torch.ones_like(k))
    cache = KeysAndValues()
    with torch.inference_mode():
        for one in k:
            cache.append(one, one)
    with torch.no_grad():
        held = cache.append(k[0], k[0])[0]
    assert torch.equal(held, torch.cat([*k, k[0]], 2))


@pytest.mark.parametrize("causal", [True, False])
def test_one_cluster_of_everything_is_dense(causal: bool) -> None:
    routing = layer(clusters=1, window=20, causal=causal, memory=0)
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    parts = routing.projections.split(x)
    dense = torch.nn.functional.scaled_dot_product_attention(*parts, is_causal=causal)
    torch.testing.assert_close(routing(x), routing.projections.merge(dense))


def test_no_value_of_the_future_is_read() -> None:
    q, k, v = drawn(12)
    live = torch.ones(2, 12, dtype=torch.bool)
    means = Centroids(2, 3, 4, dtype=torch.float64)
    lists = [members(means.scores(x), live, 5) for x in (q, k)]
    moved = v.clone()
    moved[:, :, 7:] += 5.0
    out, other = (attend_members(q, k, x, *lists, causal=True, scale=0.5) for x in (v, moved))
    torch.testing.assert_close(out[:, :, :7], other[:, :, :7], rtol=0, atol=0)


@pytest.mark.parametrize("assign", ["balanced", "prefix"])
def test_membership_leaks_from_the_future_only_where_clusters_are_balanced(assign: Any) -> None:
    torch.manual_seed(0)
    routing, x = layer(assign=assign, local_heads=0), torch.randn(1, 16, 8, dtype=torch.float64)
    moved = x.clone()
    moved[:, 8:] = 3.0 * torch.randn(1, 8, 8, dtype=torch.float64)
    leaks = not torch.allclose(routing(x)[:, :8], routing(moved)[:, :8], rtol=0, atol=1e-9)
    assert leaks == (assign == "balanced")


@pytest.mark.parametrize("options", [{}, {"shared": True, "normalise": "layer"}, {"local_heads": 0}], ids=str)
def test_steps_are_the_whole_call_by_prefix(options: Any) -> None:
    routing = layer(assign="prefix", **options)
    x, cache = torch.randn(2, 10, 8, dtype=torch.float64), KeysAndValues()
    outs = [routing(part, cache=cache) for part in (x[:, :4], x[:, 4:5], x[:, 5:])]
    torch.testing.assert_close(torch.cat(outs, 1), routing(x))


@pytest.mark.parametrize("options", [{}, {"assign": "prefix"}, {"causal": False}], ids=str)
def test_padding_changes_nothing_of_routing(options: Any) -> None:
    routing, x = layer(**options), torch.randn(2, 9, 8, dtype=torch.float64)
    live = torch.tensor([[False] * 2 + [True] * 7, [True] * 8 + [False]])
    out = routing(x, live)
    torch.testing.assert_close(out[0, 2:], routing(x[:1, 2:])[0])
    torch.testing.assert_close(out[1, :8], routing(x[1:, :8])[0])
    assert not bool(out[~live].any())


def test_planted_clusters_are_found() -> None:
    torch.manual_seed(0)
    codes = torch.eye(4, dtype=torch.float64)[torch.arange(32) % 4]
    points = (codes + 0.05 * torch.randn(32, 4, dtype=torch.float64))[None, None]
    means, live = Centroids(1, 4, 4, dtype=torch.float64), torch.ones(1, 32, dtype=torch.bool)
    means.means[0] = torch.eye(4, dtype=torch.float64) + 0.4  # all lean to one side
    means.started.fill_(True)
    for _ in range(3):
        means.update(points, points, live)
    found = members(means.scores(points), live, 8)[0, 0]
    assert torch.equal((found % 4).sort(0).values, torch.arange(4)[:, None].expand(4, 8))


@pytest.mark.parametrize("how", ["sum", "mean"])
def test_centroids_move_as_the_formula_says(how: Any) -> None:
    q, k, _ = drawn(6)
    means, live = Centroids(2, 3, 4, decay=0.9, update=how, dtype=torch.float64), torch.ones(2, 6, dtype=torch.bool)
    before, unit = means.means.clone(), torch.nn.functional.normalize
    groups = [[[] for _ in range(3)] for _ in range(2)]
    for x in (q, k):
        for b, h, i in torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(6)).tolist():
            point = unit(x[b, h, i], dim=0)
            groups[h][int((before[h] @ point).argmax())].append(point)
    means.update(q, k, live)
    for h in range(2):
        for c, points in enumerate(groups[h]):
            total = torch.stack(points).sum(0) / (len(points) if how == "mean" else 2) if points else None
            expected = before[h, c] if total is None else unit(0.9 * before[h, c] + 0.1 * total, dim=0)
            torch.testing.assert_close(means.means[h, c], expected)


def test_centroids_of_a_narrow_model_move_as_those_of_a_wide_one() -> None:
    torch.manual_seed(0)
    wide, narrow = Centroids(1, 2, 8), Centroids(1, 2, 8, dtype=torch.bfloat16)
    narrow.load_state_dict(wide.state_dict())
    narrow = narrow.half().to(torch.bfloat16)
    assert narrow.means.dtype == torch.float32
    assert torch.equal(narrow.means, wide.means)
    start, live = wide.means.clone(), torch.ones(2, 9, dtype=torch.bool)
    for _ in range(40):
        q, k = (start[:, torch.randint(2, (2, 9))].transpose(0, 1) + 0.3 * torch.randn(2, 1, 9, 8)).unbind(0)
        q, k = (x[None].bfloat16().expand(2, -1, -1, -1) for x in (q, k))
        wide.update(q.float(), k.float(), live)
        narrow.update(q, k, live)
    assert float((wide.means - start).abs().max()) > 0.003
    torch.testing.assert_close(narrow.means, wide.means, atol=2e-3, rtol=0)
    assert Centroids(1, 2, 8).double().means.dtype == torch.float64


def test_training_reaches_everything_but_the_centroids() -> None:
    routing = layer().train()
    x = torch.randn(2, 12, 8, dtype=torch.float64)
    (routing(x).square().sum() + routing.commitment(x)).backward()
    assert all(p.grad is not None and bool(p.grad.abs().max() > 0) for p in routing.parameters())
    assert not routing.centroids.means.requires_grad
    assert bool(routing.centroids.started)


def test_wrong_arguments_of_routing_are_named() -> None:
    for options, message in (
        ({"local_heads": 2}, "local_heads must be"),
        ({"window": 0}, "window must be"),
        ({"assign": "future"}, "assign must be"),
        ({"normalise": "no"}, "normalise must be"),
        ({"assign": "prefix", "causal": False}, "is causal"),
        ({"clusters": 0}, "clusters must be"),
        ({"decay": 1.0}, "decay must be"),
        ({"update": "max"}, "update must be"),
    ):
        with pytest.raises(ValueError, match=message):
            layer(**options)
    with pytest.raises(ValueError, match="a cache serves"):
        layer()(torch.zeros(1, 3, 8), torch.tensor([3]), KeysAndValues())


def test_padding_may_hold_anything() -> None:
    layer, x = RoutingAttention(16, 2, 3, window=4).eval(), torch.randn(2, 12, 16)
    spoilt = x.clone()
    spoilt[1, 9:] = torch.nan
    lengths = torch.tensor([12, 9])
    assert torch.equal(layer(spoilt, lengths), layer(x, lengths))
