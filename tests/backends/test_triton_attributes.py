"""A plan's attributes in Triton against the definition: on a CUDA device where there is one, else interpreted."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from triton_checks import check, draw, given, run
from triton_support import DTYPES, MARKS

from gossamer import SparsePlan
from gossamer.backends.triton import config
from gossamer.call import AttentionCall
from gossamer.plan import Grid
from gossamer.testing import SITUATIONS, make_call, random_plan

pytestmark = MARKS
SMALL = config.Config(32, 16, 4, 1)


def blocks_of(call: AttentionCall, heads: int, share: float, **fields: Any) -> SparsePlan:
    grid = Grid(call.extent, fields["block_q"], fields["block_k"])
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(call.batch, heads, grid.query_blocks, grid.key_blocks, generator=generator) < share
    return SparsePlan.from_block_mask(mask, call.query_len, call.key_len, extent=call.extent, **fields)


@pytest.mark.parametrize("situation", SITUATIONS)
def test_means_in_every_situation(situation: str) -> None:
    turn = SITUATIONS.index(situation)
    call = make_call(situation, length=100, heads=4, groups=2, dim=16, dtype=list(DTYPES.values())[turn % 3])
    plan = blocks_of(call, [2, 4][turn % 2], 0.4, block_q=[32, 17][turn // 2 % 2], block_k=[8, 16, 5][turn % 3],
                     pruned_mean=True)  # fmt: skip
    check(call, plan, None if turn % 2 else SMALL)


@pytest.mark.parametrize("situation", SITUATIONS)
def test_skip_in_every_situation(situation: str) -> None:
    turn = SITUATIONS.index(situation)
    call = make_call(situation, length=220, heads=4, groups=2, dim=16, dtype=list(DTYPES.values())[turn % 3])
    plan = blocks_of(call, [2, 4][turn % 2], 0.8, block_q=32, block_k=[64, 128][turn // 3 % 2], skip=0.5)
    check(replace(call, scale=0.6), plan, None if turn % 2 else SMALL)


@pytest.mark.parametrize("seed", range(3))
def test_both(seed: int) -> None:
    """With all that a model may ask for; heads of a group in more rows than a tile."""
    attributes: dict[str, Any] = {"pruned_mean": True, "skip": [0.2, 1.0, 0.1][seed]}
    plan = random_plan(
        seed, batch=2, heads=[2, 4][seed % 2], query_len=70, key_len=300, padded=seed == 1, causal=seed != 2,
        limit=190 if seed == 2 else None, **attributes,
    )  # fmt: skip
    fields: dict[str, Any] = {"softcap": 3.0 if seed == 2 else None, "scale": [0.4, -0.3, 0.4][seed]}
    fields["sinks"] = torch.randn(4, generator=torch.Generator().manual_seed(0)) if seed else None
    check(draw(plan, heads=4, groups=2, dim=[16, 40, 32][seed], value_dim=[None, 24, 80][seed], **fields), plan)


def test_more_means_than_a_tile_has_places() -> None:
    call = make_call("chunk", length=400, heads=2, groups=1, dim=16)
    check(call, blocks_of(call, 1, 0.3, block_q=64, block_k=4, pruned_mean=True))
    nothing = blocks_of(call, 2, 0.0, block_q=64, block_k=16, pruned_mean=True)
    assert not nothing.block_indices.numel()
    check(call, nothing)


def test_attributes_are_not_ignored() -> None:
    plan = random_plan(1, batch=1, heads=2, query_len=130, key_len=200, pruned_mean=True, skip=0.2)
    call = draw(plan, heads=2, groups=1, dim=16, scale=0.6)
    variants: list[dict[str, Any]] = [{}, {"pruned_mean": True}, {"skip": 0.2}, {"pruned_mean": True, "skip": 0.2}]
    results = [run(call, plan.with_attributes(**attributes))[0] for attributes in variants]
    for n, one in enumerate(results):
        assert not any(torch.allclose(one, other, atol=1e-3) for other in results[n + 1 :])


def test_means_are_told_from_selected_blocks_by_a_bitmap() -> None:
    plan = random_plan(1, batch=1, heads=2, query_len=130, key_len=200, pruned_mean=True)
    call = draw(plan, heads=2, groups=1, dim=16)
    assert given(call, plan).needs_bitmap
    assert not given(call, plan.with_attributes()).needs_bitmap
