"""Any method for each head: plans merged head by head."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from listed import LISTED, Listed

from gossamer import AttentionCall, Extent, SparsePlan, methods
from gossamer.methods import AShape, Auto, BlockSparse, Dense, MaxRelative, MInference, PerHead, TriShape, VerticalSlash
from gossamer.methods.merging import merge_plans
from gossamer.methods.per_head import planned_together
from gossamer.plan.count import count_pairs
from gossamer.testing import SITUATIONS, make_call

# One plan with columns, one with blocks of another size, one per key/value head, one with bands, one that is dense.
MIXED = (VerticalSlash(40, 130), BlockSparse(2, 48), MaxRelative(0.99, 1, 1, 20, 32, 64), AShape(7, 33), Dense())


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("turn", range(5))
def test_each_head_is_as_its_method_alone_has_it(turn: int, situation: str) -> None:
    call = make_call(situation, length=500, heads=4, groups=2, dim=16)
    chosen = [MIXED[(turn + head) % 5] for head in range(4)]
    plan = PerHead((chosen,)).plan(call)
    mask = plan.to_mask()
    for head, method in enumerate(chosen):
        alone = method.plan(call)
        assert torch.equal(mask[:, head], alone.to_mask()[:, head * alone.heads // 4]), method.name
    assert torch.equal(plan.count_pairs(), count_pairs(plan))


def test_block_sizes_become_their_common_divisor() -> None:
    call = make_call("padded chunk", length=500, heads=2, groups=1, dim=16)
    plan = PerHead(((BlockSparse(2, 96), BlockSparse(3, 64)),)).plan(call)
    assert (plan.block_q, plan.block_k) == (32, 32)


def test_columns_of_all_rows_stay_one_list() -> None:
    call = make_call("no padding", length=500, heads=2, groups=1, dim=16)
    both = PerHead(((VerticalSlash(40, 64), VerticalSlash(90, 64, 32)),)).plan(call)
    assert both.num_column_groups == 1
    other = PerHead(((VerticalSlash(40, 64), VerticalSlash(40, 64, exact=True)),)).plan(call)
    assert other.num_column_groups == other.num_query_blocks


def test_heads_of_one_method_are_planned_once_and_no_others_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = [VerticalSlash(40, 64), AShape(1, 2), VerticalSlash(50, 64), VerticalSlash(40, 64, last=32)]
    chosen += [AShape(1, 3), AShape(1, 3), VerticalSlash(60, 64), AShape(1, 3)]
    assert planned_together(chosen) == [[0, 2, 6], [1, 4, 5, 7], [3]]
    seen = []
    plan = VerticalSlash.plan
    monkeypatch.setattr(VerticalSlash, "plan", lambda self, call: seen.append((self, call)) or plan(self, call))
    call = make_call("no padding", length=300, heads=8, groups=4, dim=8)
    mask = PerHead((chosen,)).plan(call).to_mask()
    (together, part), (alone, single) = seen
    assert isinstance(together, VerticalSlash)
    assert (together.vertical_size, together.slash_size) == ((40, 50, 60), 64)
    assert torch.equal(part.q, call.q[:, [0, 2, 6]])
    assert torch.equal(part.k, call.k[:, [0, 1, 3]])
    assert alone is chosen[3]
    assert torch.equal(single.q, call.q[:, 3:4])
    for head, method in enumerate(chosen):
        whole = method.plan(call)
        assert torch.equal(mask[:, head], whole.to_mask()[:, head * whole.heads // 8]), head


@pytest.mark.parametrize("situation", ["no padding", "padded chunk"])
@pytest.mark.parametrize("listed", LISTED, ids=lambda listed: listed.id)
def test_groups_are_planned_as_in_a_call_of_their_own(listed: Listed, situation: str) -> None:
    call = replace(make_call(situation, length=300, heads=6, groups=3, dim=16), layer=0)
    method = listed.create(6)
    if not method.apart or method.name in ("per_head", "minference") or method.lacks(call) is not None:
        pytest.skip("its numbers belong to heads by their place, or the call lacks something")
    whole, mask = method.plan(call), method.plan(call).to_mask()
    share = 6 // whole.heads
    for groups in ([1], [0, 2]):
        heads = dict.fromkeys(head // share for group in groups for head in (2 * group, 2 * group + 1))
        assert torch.equal(method.plan(call.of_groups(groups)).to_mask(), mask[:, list(heads)])


@pytest.mark.parametrize("situation", ["no padding", "padded chunk"])
@pytest.mark.parametrize("listed", LISTED, ids=lambda listed: listed.id)
def test_heads_are_planned_as_without_the_others_of_their_group(listed: Listed, situation: str) -> None:
    call = replace(make_call(situation, length=300, heads=6, groups=2, dim=16), layer=0)
    method = listed.create(6)
    if not method.alone or method.lacks(call) is not None:
        pytest.skip("its heads are planned together, or the call lacks something")
    mask = method.plan(call).to_mask()
    for heads in ([4], [0, 2, 3, 5], [1, 5]):
        assert torch.equal(method.plan(call.of_heads(heads)).to_mask(), mask[:, heads])


def test_as_many_heads_of_a_group_are_planned_as_the_most_that_need_it(monkeypatch: pytest.MonkeyPatch) -> None:
    other = MaxRelative(last_rows=0)
    layer = (other, BlockSparse(2), BlockSparse(3), other, other, BlockSparse(2), other, other, other)
    seen, made = [], BlockSparse.plan
    monkeypatch.setattr(BlockSparse, "plan", lambda self, part: seen.append((self, part)) or made(self, part))
    call = make_call("no padding", length=300, heads=9, groups=3, dim=16)
    mask = PerHead((layer,)).plan(call).to_mask()
    ((together, part),) = seen
    assert torch.equal(part.q, call.q[:, [1, 2, 3, 5]])
    assert torch.equal(part.k, call.k[:, :2])
    assert together.blocks[:2] == (2, 3)
    for head, method in enumerate(layer):
        whole = method.plan(call)
        assert torch.equal(mask[:, head], whole.to_mask()[:, head * whole.heads // 9]), head


def test_bands_differ_between_heads_that_are_planned_together(monkeypatch: pytest.MonkeyPatch) -> None:
    call = make_call("left padding", length=300, heads=6, groups=3, dim=16)
    chosen = [AShape(4, 20), AShape(4, 33), AShape(0, 20), AShape(4, 20), Dense(), AShape(300, 1)]
    seen, made = [], AShape.plan
    monkeypatch.setattr(AShape, "plan", lambda self, part: seen.append(made(self, part)) or seen[-1])
    plan = PerHead((chosen,)).plan(call)
    assert [one.heads for one in seen] == [6]
    assert torch.as_tensor(plan.sink).tolist()[:4] == [4, 4, 0, 4]
    for head, method in enumerate(chosen):
        whole = method.plan(call)
        assert torch.equal(plan.to_mask()[:, head], whole.to_mask()[:, head * whole.heads // 6]), head
    assert torch.equal(plan.count_pairs(), count_pairs(plan))


@pytest.mark.parametrize("kind", [VerticalSlash, BlockSparse])
def test_budgets_differ_between_heads_that_are_planned_together(kind: type) -> None:
    call = make_call("left padding", length=600, heads=4, groups=2, dim=16)
    sizes = [1, 3, 2, 7] if kind is BlockSparse else [40, 31, 90, 140]
    chosen = [kind(size) if kind is BlockSparse else kind(size, 3 * size) for size in sizes]
    mask = PerHead((chosen,)).plan(call).to_mask()
    for head, method in enumerate(chosen):
        assert torch.equal(mask[:, head], method.plan(call).to_mask()[:, head])
    assert len({int(mask[:, head].sum()) for head in range(4)}) == 4


def test_plans_that_no_method_keeps_are_not_kept_when_merged() -> None:
    """Through an answer's steps each layer would hold them."""
    state: list[dict] = [{}]
    call = make_call("no padding", length=64, heads=2, groups=1, dim=16)
    method = PerHead([[VerticalSlash(8, 8), BlockSparse(2, 16)]])
    for _ in range(2):
        method.plan(replace(call, state=state))
    assert state == [{}]


def test_needs_are_those_of_the_layers_heads() -> None:
    mixed = PerHead(((AShape(), VerticalSlash(exact=True)), (AShape(), VerticalSlash())))
    q = torch.randn(1, 2, 9, 8)
    across = [AttentionCall(q, q, extent=Extent.full(1, 9, 9, causal=False), layer=layer) for layer in (0, 1)]
    assert [mixed.lacks(call) for call in across] == ["causal", None]
    assert mixed.lacks(AttentionCall(q, q, layer=0)) is None


def test_the_layer_decides() -> None:
    call = make_call("no padding", length=300, heads=2, groups=1, dim=8)
    method = PerHead(((AShape(1, 5),) * 2, (AShape(2, 9),) * 2))
    for layer in range(2):
        plan = method.plan(AttentionCall(call.q, call.k, layer=layer))
        assert torch.equal(plan.to_mask(), method.layers[layer][0].plan(call).to_mask())


def test_another_shape_is_refused() -> None:
    call = make_call("no padding", length=64, heads=2, groups=1, dim=8)
    method = PerHead(((Dense(),) * 4,) * 2)
    with pytest.raises(ValueError, match="2 layers of 4 heads, but layer 0 with 2 heads"):
        method.plan(call)
    with pytest.raises(ValueError, match="pass layer="):
        method.plan(AttentionCall(call.q, call.k))
    with pytest.raises(ValueError, match="2 layers of 4 heads, but layer 2"):
        method.layer(2, 4)
    with pytest.raises(ValueError, match="0 layers of 0 heads"):
        PerHead().layer(0, 4)


def test_layers_hold_methods_alone() -> None:
    with pytest.raises(TypeError, match=r"per_head\.layers must hold methods for single heads, got str"):
        PerHead((("a_shape",),))  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"minference\.layers must hold methods for single heads, got PerHead"):
        MInference(((PerHead(),),))
    with pytest.raises(ValueError, match=r"same number of heads in each, got \[1, 2\]"):
        PerHead(((Dense(),), (Dense(), Dense())))


def test_dictionaries_hold_dictionaries() -> None:
    method = PerHead(((TriShape(last=7), MaxRelative(0.25)),))
    data = method.to_dict()
    assert data["layers"][0][1]["alpha"] == 0.25
    assert methods.from_dict(data) == method
    assert methods.create("per_head", layers=data["layers"]) == method


def plan(**fields) -> SparsePlan:
    return SparsePlan(**({"heads": 2, "query_len": 70, "key_len": 70, "extent": Extent.full(1, 70, 70)} | fields))


def test_merging_is_for_plans_of_one_call() -> None:
    with pytest.raises(ValueError, match="plans of one call"):
        merge_plans([plan(), plan(query_len=60, key_len=60, extent=Extent.full(1, 60, 60))], [0, 1])
    order = torch.arange(70, dtype=torch.int32).expand(1, 2, 70)
    with pytest.raises(ValueError, match="without an order"):
        merge_plans([plan(), plan(k_order=order)], [0, 1])
    with pytest.raises(ValueError, match="2 heads cannot stand for 3"):
        merge_plans([plan(), plan()], [0, 1, 0])


@pytest.mark.parametrize(
    "other", [plan(window=9), Dense().plan(make_call("no padding", length=70, heads=2, groups=2, dim=8))]
)
def test_pairs_are_counted_plan_by_plan(other: SparsePlan, monkeypatch: pytest.MonkeyPatch) -> None:
    one = AShape(1, 5).plan(make_call("no padding", length=70, heads=2, groups=2, dim=8))
    counted = []
    monkeypatch.setattr("gossamer.plan.count.count_pairs", lambda plan: counted.append(plan) or count_pairs(plan))
    merged = merge_plans([one, other], [0, 1])
    found = merged.count_pairs()
    assert counted == [other]
    assert torch.equal(found, count_pairs(merged))


def test_heads_may_have_other_plans_in_other_batch_rows() -> None:
    call = make_call("left padding", length=300, heads=4, groups=2, dim=8)
    plans = [AShape(4, 20).plan(call), BlockSparse(2).plan(call)]
    with pytest.raises(ValueError, match="same sink in all batch rows"):
        merge_plans(plans, [[0, 1, 1, 0]] + [[1, 1, 1, 0]] * (call.batch - 1))
    plans = [VerticalSlash(30, 64).plan(call), BlockSparse(2).plan(call)]
    owner = [[(b + h) % 2 for h in range(4)] for b in range(call.batch)]
    masks, merged = [plan.to_mask() for plan in plans], merge_plans(plans, owner)
    for b, of_row in enumerate(owner):
        for head, number in enumerate(of_row):
            assert torch.equal(merged.to_mask()[b, head], masks[number][b, head])
    assert torch.equal(merged.count_pairs(), count_pairs(merged))


def test_a_plan_may_be_of_some_heads_alone() -> None:
    call = make_call("no padding", length=300, heads=4, groups=2, dim=8)
    part = AttentionCall(call.q[:, 2:], call.k[:, 1:])
    plans = [BlockSparse(1).plan(call), BlockSparse(3).plan(part)]
    merged = merge_plans(plans, [0, 0, 0, 1], [[0, 1, 2, 3], [0, 0, 0, 1]]).to_mask()
    assert torch.equal(merged[:, :3], plans[0].to_mask()[:, :3])
    assert torch.equal(merged[:, 3], plans[1].to_mask()[:, 1])


@pytest.mark.parametrize("start", [0, 24])
def test_groups_of_columns_stay_where_their_rows_stay_together(start: int) -> None:
    """Else each row of blocks would hold a list of its own, and the kernel gather its keys alone."""
    q, k = torch.randn(1, 1, 160, 8), torch.randn(1, 1, 160 + start, 8)
    call = AttentionCall(q, k, k)
    keys = Auto(0.3, group=4, block=16)._keys(call)
    blocks = BlockSparse(2, block=32).plan(call)
    merged = merge_plans([keys, blocks], [0])
    assert merged.column_group == 4
    assert torch.equal(merged.to_mask(), keys.to_mask())
    coarse = BlockSparse(2, block=8).plan(call)
    merged = merge_plans([keys, coarse], [0])
    assert merged.column_group == (8 if start % 16 == 0 else 1)
    assert torch.equal(merged.to_mask(), keys.to_mask())
