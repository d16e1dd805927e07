"""MagicPIG from its formula, and the statistics that it promises."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from decode_steps import LAYER, step
from torch import Tensor

import gossamer
from gossamer import Policy, backends
from gossamer.cache import StoreLayer
from gossamer.call import AttentionCall
from gossamer.methods import Dense, MagicPIG
from gossamer.methods.magicpig import collision_probability
from gossamer.plan import Extent
from gossamer.policy import TOO_DENSE, TRAINING
from gossamer.summaries.hashes import planes

pytestmark = pytest.mark.filterwarnings("ignore:gossamer runs its torch reference path:RuntimeWarning")

SMALL = MagicPIG(bits=3, hash_tables=8, sinks=2, local=5, buffer=16)
Weighed = dict[int, float]
"""Positions that are attended, with their bias."""


def ends(method: MagicPIG, count: int, prompt: int) -> tuple[int, int]:
    """The middle of the prompt, and then tokens as the buffer fills."""
    end = first = max(prompt - method.local, method.sinks + method.buffer)
    if count - method.local < first:
        return 0, 0
    while end + method.buffer <= count - method.local:
        end += method.buffer
    return first, end


def naive(call: AttentionCall, method: MagicPIG, row: int, head: int, prompt: int) -> Weighed:
    start, count = int(call.extent.key_start[row]), int(call.extent.key_count[row])
    keys, q = call.k[row, head // call.share, start : start + count].double(), call.q[row, head, 0].double()
    first, end = ends(method, count, prompt - start)
    mean = keys[method.sinks : first].mean(dim=0)
    normals = planes(len(q), method.bits, method.hash_tables, method.seed).double().T.unflatten(0, (method.bits, -1))
    attended: Weighed = {}
    for t in range(count):
        if t < method.sinks or t >= end:
            attended[t] = 0.0
            continue
        key, collisions = keys[t] - mean, 0
        for table in range(method.hash_tables):
            own = normals[:, table]
            collisions += bool(((own @ key > 0) == (own @ q > 0)).all())
        if collisions >= 2:
            angle = math.acos(float(q @ key / (q.norm() * key.norm())))
            p = (1 - angle / math.pi) ** method.bits
            w = 1 - (1 - p) ** method.hash_tables - method.hash_tables * p * (1 - p) ** (method.hash_tables - 1)
            attended[t] = -math.log(w + 1e-4)
    return attended


def naive_out(call: AttentionCall, row: int, head: int, attended: Weighed) -> tuple[Tensor, float]:
    slots = [int(call.extent.key_start[row]) + t for t in attended]
    keys, values = (x[row, head // call.share, slots].double() for x in (call.k, call.values))
    logits = call.scale * (keys @ call.q[row, head, 0].double())
    if call.softcap is not None:
        logits = call.softcap * torch.tanh(logits / call.softcap)
    logits = logits + torch.tensor(list(attended.values()), dtype=torch.float64)
    if call.sinks is not None:
        sink = call.sinks[head, None].double()
        weights = torch.cat([logits, sink]).softmax(dim=0)[:-1]
        return weights @ values, float(torch.cat([logits, sink]).logsumexp(dim=0))
    return logits.softmax(dim=0) @ values, float(logits.logsumexp(dim=0))


def assert_as_naive(call: AttentionCall, method: MagicPIG, prompt: int, tolerance: float = 1e-5) -> None:
    decision = Policy(Dense(), decode=method).decide(call)
    assert decision.reduced is not None
    reduced = decision.reduced.call
    out, lse = backends.attend(reduced, gossamer.SparsePlan.dense(call.heads, 1, reduced.key_len, reduced.extent))
    read = 0
    for row in range(call.batch):
        for head in range(call.heads):
            attended = naive(call, method, row, head, prompt)
            wanted, wanted_lse = naive_out(call, row, head, attended)
            assert torch.allclose(out[row, head, 0].double(), wanted, atol=tolerance, rtol=tolerance)
            assert float(lse[row, head, 0]) == pytest.approx(wanted_lse, abs=tolerance, rel=tolerance)
            read += len(attended)
    assert decision.density == pytest.approx(read / (call.heads * int(call.extent.key_count.sum())))


@pytest.mark.parametrize(("groups", "share", "dim"), [(2, 1, 8), (2, 2, 64), (1, 4, 5), (1, 8, 80), (1, 2, 256)])
def test_a_step_samples_and_weighs_by_the_formula(groups: int, share: int, dim: int) -> None:
    assert_as_naive(step(91, groups=groups, share=share, dim=dim), SMALL, 91)


def test_odd_arguments() -> None:
    call = replace(step(91), scale=0.7)
    assert_as_naive(call, replace(SMALL, bits=1, hash_tables=2, sinks=0, local=1, buffer=1, seed=9), 91)
    assert_as_naive(replace(call, softcap=2.0), SMALL, 91)
    assert_as_naive(replace(call, sinks=torch.tensor([0.3, -1.0, 2.0, 0.0])), SMALL, 91)


def test_in_16_bits() -> None:
    call = step(91, dim=64)
    call = replace(call, q=call.q.bfloat16(), k=call.k.bfloat16(), v=call.values.bfloat16())
    store = StoreLayer()
    k, v = store.update(call.k, call.values)
    store.place(call.extent)
    assert_as_naive(replace(call, k=k, v=v, store=store), SMALL, 91, tolerance=2e-2)


def test_tokens_that_come_later_are_hashed_as_the_buffer_fills() -> None:
    call, prompt = step(91, padding=(0, 8)), 91
    store = call.store
    assert isinstance(store, StoreLayer)
    for n in range(40):
        new = torch.randn(2, 2, 1, 8, generator=torch.Generator().manual_seed(n))
        k, v = store.update(new, new)
        counts = [k.shape[2], k.shape[2] - 8]
        extent = Extent([c - 1 for c in counts], [1, 1], [0, 8], counts)
        store.place(extent)
        assert_as_naive(replace(call, q=torch.randn(2, 4, 1, 8), k=k, v=v, extent=extent), SMALL, prompt)


def test_a_short_prompt_is_hashed_once_there_are_enough() -> None:
    call = step(20, padding=(0,))
    store, decide = call.store, Policy(Dense(), decode=SMALL).decide
    assert isinstance(store, StoreLayer)
    assert decide(call).reason == TOO_DENSE
    new = torch.randn(1, 2, 30, 8)
    k, v = store.update(new, new)
    assert store.prompt == 20
    extent = Extent.full(1, 1, 50)
    assert_as_naive(replace(call, k=k, v=v, extent=extent), SMALL, 20)


def test_what_the_store_asks_for_is_attended_as_it_is() -> None:
    call = step(300, padding=(0,), sinks=9, recent=40)
    made = SMALL.reduce(call)
    assert made is not None
    assert made.call.bias is not None
    assert bool((made.call.bias[..., -49:] == 0).all())
    assert torch.equal(made.call.k[0, 0, -49:], call.k[0, 0, [*range(9), *range(260, 300)]])
    assert bool((made.call.bias[..., :-49] != 0).all())


def test_weights_are_the_frequency_of_two_collisions() -> None:
    """Over random planes, for angles from near to far: within five standard deviations."""
    bits, tables, draws = 3, 8, 4000
    generator = torch.Generator().manual_seed(0)
    for angle in (0.3, 1.0, 1.6, 2.4):
        q, k = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([math.cos(angle), math.sin(angle), 0.0])
        normals = torch.randn(draws, bits, tables, 3, generator=generator)
        equal = ((normals @ q > 0) == (normals @ k > 0)).all(dim=1).sum(dim=1) >= 2
        w = float(collision_probability(torch.tensor(angle, dtype=torch.float64), bits, tables))
        assert 0.001 < w < 0.9999
        assert abs(float(equal.float().mean()) - w) < 5 * math.sqrt(w * (1 - w) / draws)


def test_hashes_collide_as_random_planes_do() -> None:
    """The codes that the cache keeps, over 150 tables of one seed: no more than the planes of a seed are random."""
    call = step(600, padding=(0,), groups=1, share=1, dim=64)
    method = MagicPIG(bits=4, hash_tables=2000, sinks=2, local=5)
    assert call.store is not None
    kind = method.hashes(call)
    found = call.store.summary(kind)
    codes = kind.codes(call.q[:, :, 0])
    counts = backends.backend_of(call, "collisions").collisions(codes, found.codes)[0, 0, 2:595].double()
    keys = call.k[0, 0, 2:595] - call.k[0, 0, 2:595].mean(dim=0)
    cosine = (keys @ call.q[0, 0, 0]) / (keys.norm(dim=-1) * call.q[0, 0, 0].norm())
    p = (1 - cosine.double().acos() / math.pi) ** 4
    off = (counts / 2000 - p) / (p * (1 - p) / 2000).sqrt()
    assert float(off.abs().max()) < 5
    assert 0.8 < float(off.std()) < 1.2


def test_the_mean_over_seeds_is_dense_attention() -> None:
    """Sums and denominators of the estimate, whose expectation is exact but for the 1e-4; within five deviations."""
    call, method, seeds = step(200, padding=(0,), groups=1, share=2), SMALL, 400
    sums, denominators = [], []
    for seed in range(seeds):
        made = replace(method, seed=seed).reduce(call)
        assert made is not None
        plan = gossamer.SparsePlan.dense(2, 1, made.call.key_len, made.call.extent)
        out, lse = backends.attend(made.call, plan)
        denominators.append(lse[0, :, 0].double().exp())
        sums.append(out[0, :, 0].double() * denominators[-1][:, None])
    mean = call.k[0, 0, 2:195].mean(dim=0)
    for head in range(2):
        q, keys = call.q[0, head, 0], call.k[0, 0] - mean
        angle = ((keys @ q) / (keys.norm(dim=-1) * q.norm())).double().acos()
        w = collision_probability(angle, method.bits, method.hash_tables)
        kept = torch.where((torch.arange(200) >= 2) & (torch.arange(200) < 195), w / (w + 1e-4), 1.0)
        weights = (call.scale * (call.k[0, 0] @ q)).double().exp() * kept
        for found, wanted in (
            (torch.stack(denominators)[:, head, None], weights.sum()[None]),
            (torch.stack(sums)[:, head], weights @ call.values[0, 0].double()),
        ):
            error = found.std(dim=0) / math.sqrt(seeds)
            assert bool(((found.mean(dim=0) - wanted).abs() < 5 * error).all())
            assert bool((error < 0.2 * weights.sum()).all())


def test_without_bits_and_in_some_layers_it_is_dense() -> None:
    call = step(400)
    for method, layer in ((replace(SMALL, bits=0), LAYER), (MagicPIG(), 0), (MagicPIG(), 16)):
        assert Policy(Dense(), decode=method).decide(replace(call, layer=layer)).reason == TOO_DENSE
    assert Policy(Dense(), decode=SMALL).decide(replace(call, layer=None)).reduced is not None
    assert replace(SMALL, bits=0).reduce(call) is None


def test_sampling_nearly_everything_is_nearly_dense() -> None:
    call = step(300)
    made = MagicPIG(bits=1, hash_tables=200, sinks=2, local=5, buffer=16).reduce(call)
    assert made is not None
    assert made.density == 1.0
    out, _ = backends.attend(made.call, gossamer.SparsePlan.dense(4, 1, made.call.key_len, made.call.extent))
    dense, _ = backends.attend(call, gossamer.SparsePlan.dense(2, 1, 300, call.extent))
    assert torch.allclose(out, dense, atol=2e-4)
    assert Policy(Dense(), decode=MagicPIG(bits=1, hash_tables=200, sinks=2, local=5)).decide(call).reason == TOO_DENSE


def test_why_a_step_is_dense() -> None:
    policy, call = Policy(Dense(), decode=SMALL), step(400)
    assert policy.decide(call).is_dense is False
    assert policy.decide(replace(call, store=None)).reason == "magicpig needs store"
    assert policy.decide(replace(call, bias=torch.zeros(2, 2, 400))).reason == "magicpig needs a call without a bias"
    assert policy.decide(replace(call, q=call.q.clone().requires_grad_())).reason == TRAINING
    with pytest.raises(ValueError, match="answers a call with a smaller one"):
        SMALL.plan(call)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"bits": -1}, ValueError, "magicpig.bits must be at least 0, got -1"),
        ({"hash_tables": 1}, ValueError, "magicpig.hash_tables must be at least 2, got 1"),
        ({"local": 0}, ValueError, "magicpig.local must be at least 1, got 0"),
        ({"bits": 16}, ValueError, "at most 15 bits and 32767 tables, got 16"),
        ({"dense_layers": 3}, TypeError, "must be a list of layers, 0 or more, got 3"),
        ({"dense_layers": [-1]}, TypeError, "must be a list of layers, 0 or more"),
    ],
)
def test_fields_that_cannot_be(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MagicPIG(**fields)
