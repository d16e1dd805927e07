"""Profiles of one rank of a tensor-parallel model: its heads, and their plans as the whole model has them."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from gossamer import AttentionCall, Profile
from gossamer.methods import AShape, BlockSparse, Corrected, Dense, DuoAttention, MaxRelative, Method, VerticalSlash
from gossamer.profiles import Provenance
from gossamer.profiles.models import SHAPE

# Each plans a query head by itself, but the last, which plans a key/value head with all its query heads.
MIXED = (VerticalSlash(20, 64), BlockSparse(2), AShape(7, 33), Dense(), VerticalSlash(40, 64), MaxRelative(last_rows=0))


def config(groups: Any) -> str:
    """As a provenance has it."""
    return json.dumps(dict.fromkeys(SHAPE, 8) | {"num_key_value_heads": groups})


@pytest.mark.parametrize("groups", [4, 2, 8, None])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_shards_are_the_heads_of_each_rank_in_order(groups: int | None, ranks: int) -> None:
    heads = tuple(AShape(i, 7) for i in range(8))
    profile = Profile((heads, heads[::-1]), ((0.5, None) * 4, tuple(map(float, range(8)))), Provenance("a model"))
    shards = [profile.shard(rank, ranks, groups) for rank in range(ranks)]
    for layer in range(2):
        assert [head for shard in shards for head in shard.layers[layer]] == list(profile.layers[layer])
        assert [x for shard in shards for x in (shard.scores or ((),) * 2)[layer]] == list(
            (profile.scores or ())[layer]
        )
    assert {(shard.provenance.model, shard.errors, shard.heads) for shard in shards} == {("a model", None, 8 // ranks)}


def of_rank(call: AttentionCall, rank: int, ranks: int) -> AttentionCall:
    """What servers give a rank: its query heads, and the key/value heads that they read."""
    many = call.heads // ranks
    heads = slice(rank * many, (rank + 1) * many)
    groups = sorted({head // call.share for head in range(heads.start, heads.stop)})
    k, v = (x[:, groups[0] : groups[-1] + 1] for x in (call.k, call.values))
    return AttentionCall(call.q[:, heads], k, v, layer=call.layer)


def made_call(groups: int) -> AttentionCall:
    generator = torch.Generator().manual_seed(groups)
    q, k, v = (torch.randn(1, heads, 300, 16, generator=generator) * 2 for heads in (8, groups, groups))
    return AttentionCall(q, k, v, layer=1)


@pytest.mark.parametrize("groups", [2, 4, 8])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_each_ranks_plans_are_those_of_the_whole_model(groups: int, ranks: int) -> None:
    """Where a rank has some query heads of a key/value head, of methods that plan these each by itself."""
    known = MIXED if ranks <= groups else MIXED[:-1]
    layers = [[known[(layer + head) % len(known)] for head in range(8)] for layer in range(2)]
    profile = Profile(layers, provenance=Provenance(config=config(groups)))
    call = made_call(groups)
    whole = profile.method.plan(call).to_mask()
    for rank in range(ranks):
        mine = profile.shard(rank, ranks).method.plan(of_rank(call, rank, ranks)).to_mask()
        assert torch.equal(mine, whole[:, rank * 8 // ranks : (rank + 1) * 8 // ranks]), rank


def test_methods_of_a_group_choose_by_the_query_heads_that_a_rank_has() -> None:
    one, other, call = MaxRelative(0.5, last_rows=0), MaxRelative(0.9, last_rows=0), made_call(2)
    profile = Profile(((one, other) * 4,) * 2)
    for rank in range(4):
        part = of_rank(call, rank, 4)
        mine = profile.shard(rank, 4, 2).method.plan(part).to_mask()
        for head, method in enumerate((one, other)):
            assert torch.equal(mine[:, head], method.plan(part).to_mask()[:, 0])


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ((2, 2, 4), ValueError, "rank must be 0 to 1, got 2"),
        ((-1, 2, 4), ValueError, "rank must be 0 to 1, got -1"),
        ((0, 0, 4), ValueError, "ranks must be at least 1, got 0"),
        ((0, 2, 5), ValueError, "multiple of the 5 key/value heads"),
        ((0, 2, 0), ValueError, "multiple of the 0 key/value heads"),
        ((0, 3, 4), ValueError, "12 heads with 4 key/value heads cannot be split over 3 ranks"),
        ((0, 4, 6), ValueError, "12 heads with 6 key/value heads cannot be split over 4 ranks"),
        ((0, 5), ValueError, "12 heads cannot be split over 5 ranks"),
        ((0, 24, 12), ValueError, "cannot be split over 24 ranks"),
        ((0.0, 2, 4), TypeError, r"rank must be an integer, got 0\.0"),
        ((0, True, 4), TypeError, "ranks must be an integer, got True"),
        ((0, 2, "4"), TypeError, "groups must be an integer, got '4'"),
    ],
)
def test_shards_that_do_not_divide_are_refused(given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Profile.uniform(1, 12, Dense()).shard(*given)


def test_key_value_heads_are_known_from_where_the_profile_was_made() -> None:
    profile = Profile.uniform(1, 12, Dense())
    with pytest.raises(ValueError, match="12 heads with 6 key/value heads cannot be split over 4"):
        replace(profile, provenance=Provenance(config=config(6))).shard(0, 4)
    for unknown in ("", "none", config(None), config("6"), "[]"):
        assert replace(profile, provenance=Provenance(config=unknown)).shard(0, 4).heads == 3


def gated(method: Method) -> DuoAttention:
    found = method.base if isinstance(method, Corrected) else method
    assert isinstance(found, DuoAttention)
    return found


GATES = (tuple(n / 8 for n in (3, 7, 1, 0, 6, 2, 5, 4)),)


@pytest.mark.parametrize(
    "method", [DuoAttention(GATES, sink=2, recent=9), Corrected(DuoAttention(GATES), pruned_mean=False)]
)
def test_numbers_of_the_whole_models_heads_go_to_the_ranks_that_have_them(method: Method) -> None:
    profile = Profile(((Dense(), *(method,) * 7),))
    whole = profile.layers[0]
    assert profile.shard(0, 1) == profile
    full = gated(method).full[0]
    for rank in (0, 1):
        mine = slice(4 * rank, 4 * rank + 4)
        part = profile.shard(rank, 2).layers[0]
        assert [type(one) for one in part] == [type(one) for one in whole[mine]]
        assert all(gated(one).full[0] == full[mine] for one in part if not isinstance(one, Dense))
