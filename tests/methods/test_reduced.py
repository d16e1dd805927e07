"""What methods that answer with a smaller call share: lists of places, gathered tokens, and the call itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from decode_steps import step

from gossamer import Extent, Policy
from gossamer.attention import attend
from gossamer.cache import StoreLayer
from gossamer.methods import Dense, MagicPIG, Reducing, RetroInfer
from gossamer.methods.reduced import gathered, listed, reduced_call


def test_places_are_listed_in_order() -> None:
    mask = torch.rand(3, 4, 50, generator=torch.Generator().manual_seed(0)) < 0.3
    mask[1, 2] = False
    found = listed(mask)
    assert found.shape == (3, 4, int(mask.sum(dim=2).max()))
    for row in range(3):
        for head in range(4):
            wanted = mask[row, head].nonzero()[:, 0].tolist()
            assert found[row, head].tolist() == wanted + [-1] * (found.shape[2] - len(wanted))
    assert listed(torch.zeros(2, 2, 5, dtype=torch.bool)).shape == (2, 2, 0)


@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize("form", ["room ahead", "contiguous", "heads last", "every other"])
def test_tokens_are_gathered_from_wherever_they_lie(heads: int, form: str) -> None:
    call = step(40, share=3, padding=(0, 7))
    k, v = call.k, call.values
    if form == "contiguous":
        k, v = k.contiguous(), v.contiguous()
    elif form == "heads last":
        k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    elif form == "every other":
        k, v = (torch.stack([x, x + 1], dim=-1)[..., 0] for x in (k, v))
    index = torch.randint(-1, 33, (2, heads, 11), generator=torch.Generator().manual_seed(1))
    found = gathered(replace(call, k=k, v=v), index)
    for x, own in zip((call.k, call.values), found, strict=True):
        for row, start in enumerate((0, 7)):
            for head in range(heads):
                slots = [start + max(t, 0) for t in index[row, head].tolist()]
                assert torch.equal(own[row, head], x[row, head * 2 // heads, slots])


def test_a_call_counts_what_it_reads() -> None:
    call = step(40, padding=(0, 7))
    k, v = gathered(call, torch.zeros(2, 4, 6, dtype=torch.int64))
    bias = torch.zeros(2, 4, 6)
    bias[0, 1, 2:] = -torch.inf
    made = reduced_call(call, k, v, bias)
    assert made.density == pytest.approx(44 / (4 * 73))
    assert (made.call.groups, made.call.key_len, made.call.store, made.call.state) == (4, 6, None, None)
    assert made.call.layer == call.layer
    assert made.call.extent.key_count.tolist() == [6, 6]


@pytest.mark.parametrize(
    "method",
    [
        MagicPIG(bits=3, hash_tables=8, sinks=2, local=5, buffer=16),
        RetroInfer(probe=0.1, estimate=0.3, size=4, segment=64, sinks=2, local=5, least=16, update=8),
    ],
    ids=lambda method: method.name,
)
def test_a_row_reads_the_same_whatever_its_companions(method: Reducing) -> None:
    both = step(150, padding=(0, 21))
    store = StoreLayer()
    k, v = store.update(*(x[1:, :, 21:].clone() for x in (both.k, both.values)))
    store.place(Extent.full(1, 1, 129))
    alone = replace(both, q=both.q[1:], k=k, v=v, extent=Extent.full(1, 1, 129), store=store, state=None)
    decisions = [Policy(Dense(), decode=method).decide(call) for call in (both, alone)]
    assert all(decision.reduced is not None for decision in decisions)
    (out, _), (out_alone, _) = (attend(call, Policy(Dense(), decode=method), return_lse=True) for call in (both, alone))
    assert torch.allclose(out[1:], out_alone, atol=1e-6)
