"""What a decode step reads: Quest, LServe and their bound, from the formulas; and plans that attend just that."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from decode_steps import LAYER, best, softmax, step
from definitions import raised
from torch import Tensor

import gossamer
from gossamer import Policy, backends
from gossamer.cache import StoreLayer
from gossamer.call import AttentionCall
from gossamer.methods import (
    Dense,
    DoubleSparsity,
    LServe,
    Method,
    OracleTopK,
    PerHead,
    Quest,
    Reducing,
    create,
    decoding,
)
from gossamer.methods.registry import class_of
from gossamer.plan import Extent
from gossamer.policy import TOO_DENSE
from gossamer.scores import page_scores

pytestmark = pytest.mark.filterwarnings("ignore:gossamer runs its torch reference path:RuntimeWarning")


def naive_bounds(call: AttentionCall, row: int, head: int, size: int) -> list[float]:
    """Each page's bound for one head, channel by channel."""
    start, count = int(call.extent.key_start[row]), int(call.extent.key_count[row])
    q, keys = call.q[row, head, 0].tolist(), call.k[row, head // call.share, start : start + count]
    bounds = [
        (raised(page.amax(dim=0)).tolist(), (-raised(-page.amin(dim=0))).tolist()) for page in keys.float().split(size)
    ]
    return [call.scale * sum(max(x * high, x * low) for x, high, low in zip(q, *both, strict=True)) for both in bounds]


def naive_shared(scores: list[list[float]]) -> list[float]:
    return [sum(column) for column in zip(*map(softmax, scores), strict=True)]


def naive_quest(call: AttentionCall, method: Quest) -> Tensor:
    """bool ``[B, heads, T]``, which slots a head reads."""
    heads = call.heads if method.per_query_head else call.groups
    read = torch.zeros(call.batch, heads, call.key_len, dtype=torch.bool)
    for row in range(call.batch):
        start, count = int(call.extent.key_start[row]), int(call.extent.key_count[row])
        for head in range(heads):
            of = [head] if method.per_query_head else range(head * call.share, (head + 1) * call.share)
            scores = [naive_bounds(call, row, h, method.page) for h in of]
            one = scores[0] if len(scores) == 1 else naive_shared(scores)
            for page in best(one, method.budget // method.page, {len(one) - 1}):
                first = start + page * method.page
                read[row, head, first : min(first + method.page, start + count)] = True
    return read


@pytest.mark.parametrize("per_query_head", [False, True])
@pytest.mark.parametrize(("groups", "share", "dim"), [(2, 1, 8), (2, 2, 8), (1, 4, 5), (1, 8, 64)])
@pytest.mark.parametrize("page", [1, 7, 16])
def test_quest_reads_the_pages_with_the_largest_bounds(
    per_query_head: bool, groups: int, share: int, dim: int, page: int
) -> None:
    method = Quest(budget=48, page=page, per_query_head=per_query_head)
    call = step(91, groups=groups, share=share, dim=dim)
    plan = method.plan(call)
    assert torch.equal(plan.to_mask()[:, :, 0], naive_quest(call, method))
    plan.check()
    assert torch.equal(plan.count_pairs(), naive_quest(call, method).sum(dim=2))


def test_a_step_after_a_step_reads_by_its_own_query() -> None:
    call, method = step(100, padding=(0, 0)), Quest(budget=32)
    store = call.store
    assert isinstance(store, StoreLayer)
    for seed in range(3):
        new = torch.randn(2, 2, 1, 8, generator=torch.Generator().manual_seed(seed))
        k, v = store.update(new, new)
        extent = Extent.full(2, 1, k.shape[2])
        call = replace(call, q=torch.randn(2, 4, 1, 8), k=k, v=v, extent=extent)
        assert torch.equal(method.plan(call).to_mask()[:, :, 0], naive_quest(call, method))


def test_the_score_of_a_page_bounds_the_logits_in_it() -> None:
    call = step(150)
    for size in (4, 16, 64):
        scores = page_scores(call, size)
        for row, dead in enumerate((0, 21)):
            k = call.k[row, :, dead:].repeat_interleave(call.share, dim=0)
            logits = call.scale * (call.q[row] @ k.transpose(-1, -2))[:, 0]
            for page, some in enumerate(logits.split(size, dim=-1)):
                assert bool((scores[row, :, page] >= some.amax(dim=-1) - 1e-5).all())
            assert bool((scores[row, :, math.ceil((150 - dead) / size) :] == -math.inf).all())


@pytest.mark.parametrize("per_query_head", [False, True])
def test_the_bound_reads_the_tokens_with_the_largest_weights(per_query_head: bool) -> None:
    call, budget = step(90), 20
    mask = OracleTopK(budget=budget, per_query_head=per_query_head).plan(call).to_mask()[:, :, 0]
    for row, start in enumerate((0, 21)):
        for head in range(mask.shape[1]):
            of = [head] if per_query_head else [head * call.share, head * call.share + 1]
            k = call.k[row, of[0] // call.share, start:]
            logits = [(call.scale * (k @ call.q[row, h, 0])).tolist() for h in of]
            one = logits[0] if per_query_head else naive_shared(logits)
            chosen = best(one, budget, {len(one) - 1})
            assert set((mask[row, head].nonzero()[:, 0] - start).tolist()) == chosen


def test_the_bound_holds_more_of_the_weights_than_quest() -> None:
    call = step(400, padding=(0,), share=4)
    k = call.k.repeat_interleave(call.share, dim=1)
    weights = (call.scale * (call.q @ k.transpose(-1, -2))).softmax(dim=-1)[:, :, 0]

    def held(method: Method) -> float:
        mask = method.plan(call).to_mask()[:, :, 0].repeat_interleave(call.share, dim=1)
        return float((weights * mask).sum(dim=-1).mean())

    assert held(OracleTopK(budget=64)) > held(Quest(budget=64)) > 64 / 400


_STREAMS = {"gates": ((0.0, 1.0),) * (LAYER + 1), "sink": 1, "step_local": 3}


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("quest", {"budget": 64}), ("double_sparsity", {"budget": 64}), ("oracle_topk", {"budget": 64}),
        ("lserve", {"budget": 64, "page": 64, "logical": 16}),
        ("lserve", {"budget": 64, "page": 64, "logical": 16, **_STREAMS}),
        ("infllm", {"blocks": 1, "block": 8, "init": 1, "local": 8}),
    ],
)  # fmt: skip
def test_what_the_store_asks_for_is_in_every_choice(name: str, fields: dict[str, Any]) -> None:
    call = step(300, sinks=5, recent=40)
    mask = create(name, **fields).plan(call).to_mask()
    for row, start in enumerate((0, 21)):
        assert bool(mask[row, :, 0, start : start + 5].all())
        assert bool(mask[row, :, 0, 260:].all())
        assert not bool(mask[row, :, 0, :start].any())


def test_forced_tokens_are_part_of_the_budget() -> None:
    plans = [Quest(budget=96).plan(step(300, padding=(0,), recent=recent)) for recent in (0, 40)]
    counts = [plan.count_pairs() for plan in plans]
    assert torch.equal(*counts)
    assert counts[0].tolist() == [[92, 92]]  # the newest page has 12 tokens


PLANNING = [name for name in decoding() if not issubclass(class_of(name), Reducing)]
METHODS: list[Method] = [
    Quest(budget=48), Quest(budget=32, page=8, per_query_head=True), OracleTopK(budget=20),
    OracleTopK(budget=20, per_query_head=True), DoubleSparsity(budget=20, group_factor=2),
    DoubleSparsity(budget=20, group_factor=2, bits=8, channels=(((0, 5, 2, 7), (4, 5, 6, 1)),) * (LAYER + 1)),
    DoubleSparsity(budget=20, bits=16, channels=(((0,), (5,), (2,), (7,)),) * (LAYER + 1), per_query_head=True),
    LServe(budget=64, page=32, logical=8),
    LServe(gates=((0.0, 1.0),) * (LAYER + 1), sink=5, step_local=20, budget=64, page=32, logical=8),
    LServe(gates=((0.0, 1.0, 0.5, 0.2),) * (LAYER + 1), sink=5, step_local=20, budget=64, page=32, logical=8),
]  # fmt: skip


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plans_attend_what_they_name(method: Method, dtype: torch.dtype) -> None:
    call = step(150)
    assert call.v is not None
    call = replace(call, q=call.q.to(dtype), k=call.k.to(dtype), v=call.v.to(dtype))
    plan = method.plan(call)
    plan.check()
    assert torch.equal(plan.count_pairs(), plan.to_mask()[:, :, 0].sum(dim=2))
    out, lse = backends.attend(call, plan)
    wide = replace(call, q=call.q.double(), k=call.k.double().nan_to_num(), v=call.values.double().nan_to_num())
    expected, expected_lse = backends.attend(wide, plan)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert torch.allclose(out.double(), expected, atol=tolerance, rtol=tolerance)
    assert torch.allclose(lse.double(), expected_lse.double(), atol=tolerance, rtol=tolerance)


_FEW: dict[str, dict[str, Any]] = {
    "quest": {"budget": 32},
    "lserve": {"budget": 48, "page": 16, "logical": 4},
    "double_sparsity": {"budget": 20, "group_factor": 4},
    "infllm": {"blocks": 2, "block": 8, "init": 8, "local": 16},
    "oracle_topk": {"budget": 20},
}


@pytest.mark.parametrize("name", _FEW)
@pytest.mark.parametrize(("dim", "share"), [(64, 1), (80, 4), (96, 7), (128, 8), (256, 4)])
def test_head_dimensions(name: str, dim: int, share: int) -> None:
    call = step(100, dim=dim, groups=1 if share in (1, 8) else 2, share=share)
    plan = create(name, **_FEW[name]).plan(call)
    assert plan.density() < 0.7
    out, _ = backends.attend(call, plan)
    wide = replace(call, q=call.q.double(), k=call.k.double().nan_to_num(), v=call.values.double().nan_to_num())
    assert torch.allclose(out.double(), backends.attend(wide, plan)[0], atol=1e-5)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_row_reads_the_same_whatever_its_padding(method: Method) -> None:
    alone, padded = step(90, padding=(0,)), step(90, padding=(0,))
    pad = torch.full((1, 2, 37, 8), torch.nan)
    store = StoreLayer()
    assert padded.v is not None
    k, v = store.update(torch.cat([pad, padded.k], dim=2), torch.cat([pad, padded.v], dim=2))
    extent = Extent([89], [1], [37], [90])
    store.place(extent)
    padded = replace(padded, k=k, v=v, extent=extent, store=store, state=store.state)
    masks = [method.plan(call).to_mask() for call in (alone, padded)]
    assert torch.equal(masks[0], masks[1][..., 37:])


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_what_is_known_before_is_no_more_than_what_is_read(method: Method) -> None:
    for keys in (30, 64, 100, 400):
        call = step(keys)
        assert method.least_density(call) <= method.plan(call).density() + 1e-9


@pytest.mark.parametrize("name", PLANNING)
def test_a_budget_for_everything_is_dense_bit_for_bit(name: str) -> None:
    call = step(150)
    fields: dict[str, Any] = {"lserve": {"budget": 192}, "infllm": {}}.get(name, {"budget": 150})
    policy = Policy(Dense(), decode=create(name, **fields))
    decision = policy.decide(call)
    assert decision.plan is None
    assert decision.reason == TOO_DENSE
    given: dict[str, Any] = {"extent": call.extent, "layer": LAYER, "store": call.store, "state": call.state}
    out = gossamer.sparse_attention(call.q, call.k, call.values, policy, **given)
    assert torch.equal(out, gossamer.sparse_attention(call.q, call.k, call.values, Dense(), **given))


@pytest.mark.parametrize("name", PLANNING)
def test_a_plan_of_everything_attends_everything(name: str) -> None:
    call = step(150)
    assert call.v is not None
    plan = create(name, **({"blocks": 10_000} if name == "infllm" else {"budget": 10_000})).plan(call)
    assert plan.density() == 1.0
    dense = gossamer.SparsePlan.dense(call.groups, 1, call.key_len, call.extent)
    for got, wanted in zip(backends.attend(call, plan), backends.attend(call, dense), strict=True):
        assert torch.allclose(got, wanted, atol=1e-6)


@pytest.mark.parametrize("method", [Quest(budget=32), DoubleSparsity(budget=32), OracleTopK(budget=32)])
def test_the_first_layers_read_everything(method: Method) -> None:
    policy = Policy(Dense(), decode=method)
    reasons = [policy.decide(replace(step(400), layer=layer)).reason for layer in (0, 1, 2, None)]
    assert reasons == [TOO_DENSE, TOO_DENSE, None, None]


def lserve_pages(call: AttentionCall, method: LServe) -> Tensor:
    return method.plan(call).block_mask()[:, :, 0]


def test_lserve_scores_a_page_by_the_best_of_its_logical_pages() -> None:
    call, method = step(400, share=1), LServe(budget=96, page=32, logical=8)
    chosen = lserve_pages(call, method)
    for row in range(2):
        for head in range(2):
            logical = naive_bounds(call, row, head, 8)
            scores = [max(logical[n : n + 4]) for n in range(0, len(logical), 4)]
            expected = best(scores, 3, {len(scores) - 1})
            assert set(chosen[row, head].nonzero()[:, 0].tolist()) == expected


def test_lserve_reads_what_it_chose_for_some_steps() -> None:
    call, method = step(510, padding=(0, 0)), LServe(budget=96, page=32, logical=8, interval=3)
    store = call.store
    assert isinstance(store, StoreLayer)
    chosen = []
    for seed in range(7):
        new = torch.randn(2, 2, 1, 8, generator=torch.Generator().manual_seed(seed))
        k, v = store.update(new, new)
        q = torch.randn(2, 4, 1, 8, generator=torch.Generator().manual_seed(100 + seed))
        call = replace(call, q=q, k=k, v=v, extent=Extent.full(2, 1, k.shape[2]))
        anew = replace(call, state=None)
        pages = lserve_pages(call, method)
        assert bool(pages[..., -1].all())
        chosen.append(pages)
        if seed % 3 == 0:
            assert torch.equal(pages, lserve_pages(anew, method))
        else:
            before = torch.nn.functional.pad(chosen[-2], (0, pages.shape[-1] - chosen[-2].shape[-1]))
            before[..., -1] = True  # the newest page joins, a page that was the newest stays
            assert torch.equal(pages, before)
            assert not torch.equal(pages, lserve_pages(anew, method))


@pytest.mark.parametrize("event", ["prompt", "crop", "reorder"])
def test_lserve_chooses_anew_when_the_cache_changes(event: str) -> None:
    call, method = step(510, padding=(0, 0)), LServe(budget=96, page=32, logical=8, interval=100)
    store = call.store
    assert isinstance(store, StoreLayer)
    method.plan(call)
    new = torch.randn(2, 2, 2, 8)
    if event == "prompt":
        store.update(new, new)
    elif event == "crop":
        store.crop(-40)
    else:
        store.reorder_cache(torch.tensor([1, 0]))
    k, v = store.read()
    call = replace(call, q=torch.randn(2, 4, 1, 8), k=k, v=v, extent=Extent.full(2, 1, k.shape[2]), state=store.state)
    assert torch.equal(lserve_pages(call, method), lserve_pages(replace(call, state=None), method))


def test_lserve_streams_by_gates() -> None:
    call = step(300)
    mask = LServe(((1.0, 0.0),) * (LAYER + 1), sink=3, step_local=9, budget=64, page=32, logical=8).plan(call).to_mask()
    for row, start in enumerate((0, 21)):
        streamed = mask[row, 1, 0].nonzero()[:, 0].tolist()
        assert streamed == [*range(start, start + 3), *range(291, 300)]
        assert int(mask[row, 0].sum()) > 64


def test_why_a_step_is_dense() -> None:
    policy, call = Policy(Dense(), decode=Quest(budget=32)), step(400)
    assert policy.decide(call).reason is None
    assert policy.decide(replace(call, store=None)).reason == "quest needs store"
    windowed = Extent([399, 378], [1, 1], [0, 21], [400, 379], limit=50)
    assert policy.decide(replace(call, extent=windowed)).reason == "quest needs a cache without the model's own window"
    for method in (Quest(), PerHead(((Dense(), Quest()),))):
        with pytest.raises(ValueError, match=f"{method.name} plans no prompt, .* as decode="):
            Policy(method)


@pytest.mark.parametrize("decode", [Dense(), "quest", create("a_shape")])
def test_only_some_methods_choose_what_a_step_reads(decode: Any) -> None:
    with pytest.raises(
        ValueError, match=r"must be a method that chooses .* quest, double_sparsity, .*oracle_topk, lserve"
    ):
        Policy(Dense(), decode=decode)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Quest(budget=15), "quest.budget must be at least 16, got 15"),
        (lambda: Quest(page=0), "quest.page must be at least 1, got 0"),
        (lambda: Quest(dense_layers=-1), "quest.dense_layers must be at least 0, got -1"),
        (lambda: OracleTopK(budget=0), "oracle_topk.budget must be at least 1, got 0"),
        (lambda: LServe(page=40), "lserve.page must be a multiple of logical, got 40 and 16"),
        (lambda: LServe(budget=10), "lserve.budget must be at least 64, got 10"),
        (lambda: LServe(interval=0), "lserve.interval must be at least 1, got 0"),
    ],
)
def test_fields_out_of_range(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_the_bound_ranks_products_in_fp32() -> None:
    """Rounded to bf16, 64 and 64.2 are one number, of which the first would be taken."""
    keys = torch.full((1, 1, 8, 16), 1.0)
    keys[..., 5, 0] = 1.0 + 1 / 64
    q = torch.full((1, 1, 1, 16), 1.0)
    call = AttentionCall(q.bfloat16() * 4, keys.bfloat16(), keys.bfloat16(), scale=1.0)
    mask = OracleTopK(budget=2, dense_layers=0).plan(replace(call, store=StoreLayer())).to_mask()[0, 0, 0]
    assert mask.nonzero().flatten().tolist() == [5, 7]
