"""SpargeAttn's choice against one written from its formulas, and that each of its parts decides something."""

import math
from dataclasses import replace

import pytest
import torch
from definitions import Row
from naive import QueryBlock, assert_chosen, tokens
from torch import Tensor

from gossamer import AttentionCall
from gossamer.methods import PerHead, Sparge
from gossamer.testing import SITUATIONS, make_call

pytestmark = pytest.mark.usefixtures("smallest_constants")


def similarity(x: Tensor) -> float:
    """Mean cosine of all pairs."""
    unit = [row / max(float(row.norm()), 1e-12) for row in x]
    return sum(float(a @ b) for a in unit for b in unit) / len(unit) ** 2


def naive(call: AttentionCall, method: Sparge, smoothed: bool = True):
    def chosen(b: int, row: Row, head: int, block: QueryBlock) -> set[int]:
        group = head // call.share
        q = tokens(call.q, b, head, -row.query_start, block.positions)
        if not block.seen:
            return set()
        everything = tokens(call.k, b, group, row.key_start, list(range(row.key_count)))
        centre = everything.mean(dim=0) if smoothed else torch.zeros_like(everything[0])
        keys = {n: everything[positions] for n, positions in block.seen.items()}
        similar = [n for n, k in keys.items() if similarity(k - centre) > method.similarity]
        if similarity(q) <= method.similarity:
            return set(block.seen)
        logit = {n: call.scale * float(q.mean(dim=0) @ keys[n].mean(dim=0)) for n in similar}
        total = sum(math.exp(x) for x in logit.values())
        kept, held = set(), 0.0
        for n in sorted(similar, key=lambda n: (-logit[n], n)):
            held += math.exp(logit[n]) / total
            if held <= method.p or not kept:
                kept.add(n)
        first = set(range(method.sink_blocks))
        return kept | (set(block.seen) - set(similar)) | block.own | first

    return chosen


def alike(situation: str, length: int = 120, dim: int = 8) -> AttentionCall:
    """Runs of tokens that are more alike or less; without them hardly a block is self-similar."""
    call = make_call(situation, length=length, heads=4, groups=2, dim=dim)
    generator = torch.Generator().manual_seed(7)

    def blended(x: Tensor) -> Tensor:
        runs = torch.randn(*x.shape[:2], x.shape[2] // 8 + 1, dim, generator=generator)
        weight = torch.rand(*runs.shape[:3], 1, generator=generator) * 4
        return x + (runs * weight).repeat_interleave(8, dim=2)[:, :, : x.shape[2]]

    return replace(call, q=blended(call.q), k=blended(call.k))


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize(
    "method", [Sparge(0.5, 0.7, 0, 16, 8), Sparge(0.3, 0.4, 1, 8, 16), Sparge(0.7, 0.9, 0, 16, 16)], ids=str
)
def test_blocks_are_those_of_the_formulas(situation: str, method: Sparge) -> None:
    call = alike(situation)
    for scale in (call.scale, 3.0, -0.7):
        scaled = replace(call, scale=scale)
        assert_chosen(scaled, method.plan(scaled), naive(scaled, method))


def test_a_block_whose_tokens_differ_is_computed_by_all() -> None:
    """Its mean is near zero, and says nothing of the key in it that the queries ask for."""
    q, k = torch.zeros(1, 1, 64, 4), torch.zeros(1, 1, 64, 4)
    q[..., 0], k[..., 0] = 1.0, -4.0
    k[0, 0, :8, 0] = 2.0
    k[0, 0, 16:24, 1] = torch.tensor([9.0, -9.0] * 4)
    k[0, 0, 16:24, 0] = torch.tensor([3.0, -5.0] * 4)
    call = AttentionCall(q, k, scale=2.0)
    with_veto = Sparge(0.5, 0.9, 0, 8, 8).plan(call).block_mask()[0, 0]
    without = Sparge(0.0, 0.9, 0, 8, 8).plan(call).block_mask()[0, 0]
    assert with_veto[3:, 2].all()
    assert not without[3:, 2].any()


def test_the_mean_that_all_keys_share_is_taken_off_before_they_are_compared() -> None:
    call = alike("no padding")
    shifted = replace(call, k=call.k + 20.0)
    method = Sparge(0.5, 0.7, 0, 8, 8)
    assert torch.equal(method.plan(call).block_mask(), method.plan(shifted).block_mask())
    with pytest.raises(AssertionError):
        assert_chosen(shifted, method.plan(shifted), naive(shifted, method, smoothed=False))


def test_what_crosses_p_is_out_and_one_is_in() -> None:
    """Equal means: two of four blocks hold exactly half."""
    q, k = torch.ones(1, 1, 32, 4), torch.ones(1, 1, 32, 4)
    k[..., 3] = torch.tensor([1.0, -1.0] * 2).repeat_interleave(8)  # so that the mean taken off leaves something
    call = AttentionCall(q * torch.tensor([1.0, 1.0, 1.0, 0.0]), k)
    last = {p: Sparge(0.0, p, 0, 8, 8).plan(call).block_mask()[0, 0, 3].tolist() for p in (0.0, 0.5, 0.74, 0.75)}
    assert last[0.0] == [True, False, False, True]
    assert last[0.5] == last[0.74] == [True, True, False, True]
    assert last[0.75] == [True, True, True, True]


def test_heads_with_thresholds_of_their_own_are_planned_together() -> None:
    call = replace(alike("left padding"), layer=0)
    each = [Sparge(0.5, 0.7, 0, 8, 8), Sparge(0.3, 0.7, 0, 8, 8), Sparge(0.5, 0.3, 0, 8, 8), Sparge(0.6, 0.9, 0, 8, 8)]
    mixed = PerHead([each]).plan(call).block_mask()
    for head, method in enumerate(each):
        assert torch.equal(mixed[:, head], method.plan(call).block_mask()[:, head])


def test_defaults_are_the_published_ones() -> None:
    expected = {"similarity": 0.6, "p": 0.98, "sink_blocks": 0, "block_q": 128, "block_k": 64}
    assert Sparge().to_dict() == {"method": "sparge", **expected}
