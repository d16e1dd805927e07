"""What plans cost: terms counted pair by pair, and the models over them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gossamer import AttentionCall, Extent, SparsePlan
from gossamer.calibrate import cost as module
from gossamer.calibrate.cost import Cost, CostModel, Flops, count_terms
from gossamer.methods import AShape, BlockSparse, VerticalSlash
from gossamer.profiles.costs import TERMS, Costs, Kernel, KernelCost, forget
from gossamer.profiles.machine import Machine

BLOCK = 16


def call_of(extent: Extent, heads: int = 4, groups: int = 2, query_len: int = 90, key_len: int = 90) -> AttentionCall:
    generator = torch.Generator().manual_seed(0)
    shapes = ((heads, query_len), (groups, key_len), (groups, key_len))
    q, k, v = (torch.randn(extent.batch, n, tokens, 8, generator=generator) for n, tokens in shapes)
    return AttentionCall(q, k, v, extent)


EXTENTS = {
    "causal": Extent.full(1, 90, 90),
    "both ways": Extent.full(1, 90, 90, causal=False),
    "window": Extent.full(2, 90, 90, limit=20),
    "window both ways": Extent.full(1, 90, 90, causal=False, limit=20),
    "padded": Extent.from_key_mask(torch.arange(90) >= torch.tensor([[0], [33]]), 90),
}


def with_lists(extent: Extent, heads: int, group: int) -> SparsePlan:
    """Blocks of every third, and columns of every tenth key in each group of query blocks."""
    plan = SparsePlan(heads, 90, 90, extent, BLOCK, BLOCK)
    blocks = torch.zeros(extent.batch, heads, plan.num_query_blocks, plan.num_key_blocks, dtype=torch.bool)
    blocks[..., ::3] = True
    blocks[:, 0] = False
    groups = -(-plan.num_query_blocks // group)
    columns = torch.zeros(extent.batch, heads, groups, 90, dtype=torch.bool)
    for b, count in enumerate(extent.key_count.tolist()):
        columns[b, :, :, 3:count:10] = True
    indptr = torch.nn.functional.pad(columns.sum(-1).flatten().cumsum(0), (1, 0))
    return SparsePlan.from_block_mask(
        blocks,
        90,
        90,
        extent=extent,
        block_q=BLOCK,
        block_k=BLOCK,
        column_group=group,
        column_indptr=indptr,
        column_indices=columns.flatten(0, 2).nonzero()[:, 1].to(torch.int32),
    )


@pytest.mark.parametrize("name", EXTENTS)
@pytest.mark.parametrize(("heads", "group"), [(4, 2), (2, 1), (4, 100)])
@pytest.mark.parametrize("part", [1 << 20, 1])
def test_terms_are_those_counted_by_hand(name: str, heads: int, group: int, part: int, monkeypatch) -> None:
    monkeypatch.setattr(module, "_ENTRIES", part)
    extent, share = EXTENTS[name], 4 // heads
    call, plan = call_of(extent), with_lists(extent, heads, group)
    terms = count_terms(call, plan)
    alone = replace(
        plan,
        block_indptr=torch.zeros_like(plan.block_indptr),
        block_indices=plan.block_indices[:0],
    )
    of_columns = alone.to_mask().sum(dim=(0, 2, 3)).repeat_interleave(share)
    assert terms["column_pairs"].tolist() == of_columns.tolist()
    assert (terms["pairs"] + of_columns).tolist() == plan.count_pairs().sum(0).repeat_interleave(share).tolist()
    assert terms["blocks"].tolist() == plan.block_mask().sum(dim=(0, 2, 3)).repeat_interleave(share).tolist()
    assert terms["columns"].tolist() == plan.column_mask().sum(dim=(0, 2, 3)).repeat_interleave(share).tolist()
    queries, keys = int(extent.query_count.sum()), int(extent.key_count.sum())
    assert terms["tokens"].tolist() == [queries + keys / 2] * 4
    assert set(terms) | {"calls"} == set(TERMS)


def test_a_plan_without_lists_has_pairs_alone() -> None:
    call = call_of(EXTENTS["causal"])
    terms = count_terms(call, AShape(3, 7).plan(call))
    assert [float(terms[name].sum()) for name in ("column_pairs", "blocks", "columns")] == [0, 0, 0]
    assert terms["pairs"].tolist() == [sum(min(i + 1, 3 + 7) for i in range(90))] * 4


def test_permuted_queries_count_as_many_rows_as_their_group_has() -> None:
    call, plan = call_of(EXTENTS["causal"]), with_lists(EXTENTS["causal"], 4, 1)
    order = torch.randperm(90, generator=torch.Generator().manual_seed(1)).to(torch.int32).expand(1, 4, 90)
    permuted = replace(plan, q_order=order)
    rows = torch.tensor([16, 16, 16, 16, 16, 10])
    columns = permuted.column_mask().sum(-1)[0, 0]
    assert count_terms(call, permuted)["column_pairs"].tolist() == [int((rows * columns).sum())] * 4


def test_an_empty_call_costs_a_call() -> None:
    extent = Extent.full(1, 0, 0)
    call = call_of(extent, query_len=0, key_len=0)
    model = model_of(call, dict.fromkeys(TERMS, 1.0))
    assert model.seconds(call, SparsePlan(4, 0, 0, extent)) == 1.0


def model_of(call: AttentionCall, seconds: dict[str, float]) -> CostModel:
    return CostModel(Costs(Machine.here(), (KernelCost(Kernel.of(call), seconds, 0.0, 0.0, 1, (90,)),)))


@pytest.mark.parametrize("term", TERMS)
def test_each_term_has_its_seconds(term: str) -> None:
    call = call_of(EXTENTS["padded"])
    plan = with_lists(call.extent, 4, 2)
    counts = {"calls": torch.tensor([0.25] * 4)} | count_terms(call, plan)
    assert model_of(call, {term: 3.0}).seconds(call, plan) == pytest.approx(3.0 * float(counts[term].sum()))


def test_heads_add_up_to_the_call_less_what_it_costs_by_itself() -> None:
    call = call_of(EXTENTS["causal"])
    plan = with_lists(call.extent, 4, 2)
    model = model_of(call, {name: float(i + 1) for i, name in enumerate(TERMS)})
    assert float(model.of_heads(call, plan).sum()) + 1.0 == pytest.approx(model.seconds(call, plan))
    assert model.of_heads(call, plan)[0] < model.of_heads(call, plan)[1]  # it has no blocks


def test_a_kernel_that_was_not_measured_is_named() -> None:
    call = call_of(EXTENTS["causal"])
    model = model_of(replace(call, q=call.q.double(), k=call.k.double(), v=call.values.double()), {"pairs": 1.0})
    with pytest.raises(ValueError, match=r"knows no .*float32, head dimension 8, only .*float64, head"):
        model.seconds(call, AShape(3, 7).plan(call))


def test_flops_are_those_of_both_products() -> None:
    call = call_of(EXTENTS["causal"])
    plan = VerticalSlash(31, 64).plan(call)
    wide = replace(call, v=torch.zeros(1, 2, 90, 24))
    pairs = int(plan.count_pairs().sum())
    assert Flops().seconds(call, plan) == pytest.approx(pairs * 2 * 16 / 1e12)
    assert Flops().seconds(wide, plan) == pytest.approx(pairs * 2 * 32 / 1e12)
    assert Flops().seconds(replace(call, v=None), plan) == pytest.approx(pairs * 2 * 16 / 1e12)
    shared = BlockSparse(2, block=16).plan(call)
    assert Flops().of_heads(call, shared).shape == (4,)


def test_models_have_names() -> None:
    models: list[Cost] = [CostModel(Costs(Machine.here())), Flops()]
    assert [model.name for model in models] == ["machine", "flops"]


def test_a_model_is_loaded_from_its_file_and_from_this_machine(tmp_path: Path, monkeypatch) -> None:
    call = call_of(EXTENTS["causal"])
    model = model_of(call, {"pairs": 2.0})
    path = tmp_path / "costs.json"
    monkeypatch.setenv("GOSSAMER_COST_MODEL", str(path))
    forget()
    with pytest.raises(ValueError, match="no cost model of this machine is at hand: there is no "):
        CostModel.here()
    model.costs.save(path)
    forget()
    assert CostModel.load(path) == CostModel.here() == model
    forget()
