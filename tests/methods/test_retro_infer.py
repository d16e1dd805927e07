"""RetroInfer from its formula: clusters ranked, read and estimated."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from decode_steps import step
from torch import Tensor

import gossamer
from gossamer import Policy, backends
from gossamer.cache import StoreLayer
from gossamer.call import AttentionCall
from gossamer.methods import Dense, Reduced, RetroInfer
from gossamer.plan import Extent
from gossamer.policy import TOO_DENSE, TRAINING
from gossamer.summaries import ClusterSet

pytestmark = pytest.mark.filterwarnings("ignore:gossamer runs its torch reference path:RuntimeWarning")

SMALL = RetroInfer(probe=0.1, estimate=0.3, size=4, segment=64, sinks=2, local=5, least=16, update=8)


def attended(made: Reduced) -> tuple[Tensor, Tensor]:
    call = made.call
    return backends.attend(call, gossamer.SparsePlan.dense(call.groups, 1, call.key_len, call.extent))


def naive(call: AttentionCall, method: RetroInfer, row: int, group: int, clusters: ClusterSet) -> tuple[Any, int]:
    """For each query head its output and lse by sums of exponentials, in float64; and how many keys were read."""
    start, count = int(call.extent.key_start[row]), int(call.extent.key_count[row])
    keys, values = (x[row, group, start : start + count].double() for x in (call.k, call.values))
    heads = range(group * call.share, (group + 1) * call.share)
    centroids, means = (x[row, group].double() for x in (clusters.centroids, clusters.means))
    sizes, number = clusters.sizes[row, group].tolist(), clusters.counts[row]
    owners = [int(n) for n in clusters.owners[row, group]] + [-1] * count

    def logits_of(head: int, k: Tensor) -> Tensor:
        logits = call.scale * (k @ call.q[row, head, 0].double())
        return logits if call.softcap is None else call.softcap * torch.tanh(logits / call.softcap)

    shares = [0.0] * number
    filled = [n for n in range(number) if sizes[n]]
    for head in heads:
        for n, weight in zip(filled, logits_of(head, centroids[filled]).softmax(dim=0).tolist(), strict=True):
            shares[n] += weight
    ranked = sorted(filled, key=lambda n: -shares[n])
    read = max(1, round(method.probe * number))
    probed, estimated = ranked[:read], ranked[read : read + round(method.estimate * number)]
    tokens = [t for t in range(count) if owners[t] < 0 or owners[t] in probed]
    found = []
    for head in heads:
        exact = logits_of(head, keys[tokens]).exp()
        near = logits_of(head, centroids[estimated]).exp()
        n = torch.tensor([float(sizes[c]) for c in estimated], dtype=torch.float64)
        total = exact.sum() + (near * n).sum()
        if call.sinks is not None:
            total = total + call.sinks[head].double().exp()
        out = exact @ values[tokens] + near @ (means[estimated] * n[:, None])
        found.append((out / total, math.log(float(total))))
    return found, len(tokens) + len(estimated)


def assert_as_naive(call: AttentionCall, method: RetroInfer, tolerance: float = 1e-5) -> None:
    decision = Policy(Dense(), decode=method).decide(call)
    assert decision.reduced is not None
    assert call.store is not None
    clusters = call.store.summary(method.clusters(call))
    out, lse = attended(decision.reduced)
    total = 0
    for row in range(call.batch):
        for group in range(call.groups):
            wanted, read = naive(call, method, row, group, clusters)
            total += read
            for head, (one, one_lse) in enumerate(wanted, group * call.share):
                assert torch.allclose(out[row, head, 0].double(), one, atol=tolerance, rtol=tolerance)
                assert float(lse[row, head, 0]) == pytest.approx(one_lse, abs=tolerance, rel=tolerance)
    assert decision.density == pytest.approx(total / (call.groups * int(call.extent.key_count.sum())))


@pytest.mark.parametrize(("groups", "share", "dim"), [(2, 1, 8), (2, 2, 64), (1, 4, 5), (1, 8, 80), (1, 2, 256)])
def test_a_step_reads_and_estimates_by_the_formula(groups: int, share: int, dim: int) -> None:
    assert_as_naive(step(141, groups=groups, share=share, dim=dim), SMALL)


def test_odd_arguments() -> None:
    call = replace(step(141), scale=0.7)
    for method in (
        replace(SMALL, probe=0.0, estimate=0.0),
        replace(SMALL, probe=0.0, estimate=1.0),
        replace(SMALL, size=1, sinks=0, local=1, least=1, update=1),
        replace(SMALL, size=40, segment=7),
    ):
        assert_as_naive(call, method)
    assert_as_naive(replace(call, softcap=2.0), SMALL)
    assert_as_naive(replace(call, sinks=torch.tensor([0.3, -1.0, 2.0, 0.0])), SMALL)


def test_in_16_bits() -> None:
    call = step(141, dim=64)
    call = replace(call, q=call.q.bfloat16(), k=call.k.bfloat16(), v=call.values.bfloat16())
    store = StoreLayer()
    k, v = store.update(call.k, call.values)
    store.place(call.extent)
    assert_as_naive(replace(call, k=k, v=v, store=store), SMALL, tolerance=2e-2)


def test_an_answer_is_read_whole_until_it_is_clustered() -> None:
    call = step(91, padding=(0, 8))
    store = call.store
    assert isinstance(store, StoreLayer)
    for n in range(20):
        new = torch.randn(2, 2, 1, 8, generator=torch.Generator().manual_seed(n))
        k, v = store.update(new, new)
        counts = [k.shape[2], k.shape[2] - 8]
        extent = Extent([c - 1 for c in counts], [1, 1], [0, 8], counts)
        store.place(extent)
        assert_as_naive(replace(call, q=torch.randn(2, 4, 1, 8), k=k, v=v, extent=extent), SMALL)


@dataclass
class Stub:
    """A store with clusters of a test's making."""

    found: ClusterSet
    sinks: int = 0
    recent: int = 0

    def summary(self, kind: Any) -> Any:
        del kind
        return self.found


def singletons(call: AttentionCall, order: Sequence[int]) -> ClusterSet:
    """Each token by itself, in clusters of any order."""
    index = torch.tensor(order)
    owners = torch.empty(len(order), dtype=torch.int32)
    owners[index] = torch.arange(len(order), dtype=torch.int32)
    shape = call.batch, call.groups, len(order)
    return ClusterSet(
        call.k[:, :, index], call.values[:, :, index], torch.ones(shape, dtype=torch.int64), owners.expand(shape),
        (len(order),) * call.batch,
    )  # fmt: skip


def test_with_one_token_a_cluster_the_estimate_is_exact() -> None:
    call = step(60, padding=(0, 0))
    found = singletons(call, range(55))
    made = replace(SMALL, probe=0.1, estimate=0.9).reduce(replace(call, store=Stub(found)))
    assert made is not None
    dense = backends.attend(call, gossamer.SparsePlan.dense(2, 1, 60, call.extent))
    for own, wanted in zip(attended(made), dense, strict=True):
        assert torch.allclose(own, wanted, atol=1e-5)


def test_the_order_of_clusters_changes_nothing() -> None:
    call = step(60, padding=(0, 0))
    outs = []
    for order in (range(55), torch.randperm(55, generator=torch.Generator().manual_seed(1)).tolist()):
        made = SMALL.reduce(replace(call, store=Stub(singletons(call, order))))
        assert made is not None
        assert made.density < 0.6
        outs.append(attended(made))
    for own, wanted in zip(*outs, strict=True):
        assert torch.allclose(own, wanted, atol=1e-6)


def test_everything_probed_is_dense() -> None:
    call = step(150)
    made = replace(SMALL, probe=1.0).reduce(call)
    assert made is not None
    assert made.density == 1.0
    dense = backends.attend(call, gossamer.SparsePlan.dense(2, 1, 150, call.extent))
    for own, wanted in zip(attended(made), dense, strict=True):
        assert torch.allclose(own, wanted, atol=1e-5)
    assert Policy(Dense(), decode=replace(SMALL, probe=1.0)).decide(call).reason == TOO_DENSE


def test_the_estimate_brings_a_step_nearer_to_dense_attention() -> None:
    call = step(400, padding=(0,), dim=16, share=4)
    dense, _ = backends.attend(call, gossamer.SparsePlan.dense(2, 1, 400, call.extent))
    errors = []
    for estimate in (0.0, 0.3, 0.9):
        made = replace(SMALL, estimate=estimate).reduce(call)
        assert made is not None
        errors.append(float((attended(made)[0] - dense).norm()))
    assert errors[2] < errors[1] < errors[0]


def test_what_the_store_asks_for_is_attended_as_it_is() -> None:
    call = step(300, padding=(0,), sinks=9, recent=40)
    assert call.store is not None
    owners = call.store.summary(SMALL.clusters(call)).owners
    assert bool((owners[..., :9] < 0).all())
    assert owners.shape[2] == 260
    assert_as_naive(call, SMALL)


def test_a_row_too_short_for_clusters_is_read_whole() -> None:
    assert_as_naive(step(150, padding=(0, 135)), SMALL)


def test_why_a_step_is_dense() -> None:
    policy, call = Policy(Dense(), decode=SMALL), step(400)
    assert policy.decide(step(22)).reason == TOO_DENSE
    assert policy.decide(replace(call, store=None)).reason == "retro_infer needs store"
    assert policy.decide(replace(call, bias=torch.zeros(2, 2, 400))).reason == "retro_infer needs a call without a bias"
    assert Policy(Dense(), decode=RetroInfer()).decide(call).reason == TOO_DENSE
    assert policy.decide(replace(call, q=call.q.clone().requires_grad_())).reason == TRAINING


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"probe": 1.5}, "retro_infer.probe must lie in"),
        ({"estimate": -0.1}, "retro_infer.estimate must lie in"),
        ({"size": 0}, "retro_infer.size must be at least 1, got 0"),
        ({"local": 0}, "retro_infer.local must be at least 1, got 0"),
        ({"sinks": -1}, "retro_infer.sinks must be at least 0, got -1"),
    ],
)
def test_fields_that_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RetroInfer(**fields)
