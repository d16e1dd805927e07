"""What a tensor-parallel rank has of a method is what the whole has for its heads."""

import pytest
import torch

from gossamer import AttentionCall
from gossamer.methods import (
    AShape,
    Corrected,
    Dense,
    DuoAttention,
    LServe,
    MaxRelative,
    MoA,
    PerHead,
    SeerAttention,
    VerticalSlash,
)

HEADS, GROUPS = 8, 4


def gates(heads: int) -> list[list[float]]:
    return torch.rand(3, heads, generator=torch.Generator().manual_seed(heads)).tolist()


def mixed() -> PerHead:
    known = [AShape(sink=1, window=40), VerticalSlash(16, 32), Dense(), MaxRelative(0.3)]
    return PerHead([[known[(layer + head) % 4] for head in range(HEADS)] for layer in range(3)])


METHODS = {
    "moa": MoA(alphas=gates(HEADS), betas=gates(HEADS), least=1, new_tokens=0, block=16),
    "duo by key/value head": DuoAttention(gates(GROUPS), 0.4, sink=3, recent=20),
    "duo by query head": DuoAttention(gates(HEADS), 0.7, sink=3, recent=20),
    "duo, all full": DuoAttention(gates(GROUPS), 0.0, sink=3, recent=20),
    "duo, none full": DuoAttention(gates(GROUPS), 1.0, sink=3, recent=20),
    "lserve": LServe(gates(GROUPS), 0.4, sink=3, local=20, block=16),
    "lserve by blocks": LServe(gates(GROUPS), 0.6, sink=3, local=20, block=16, exact=False),
    "per head": mixed(),
    "corrected": Corrected(MaxRelative(0.3)),
    "plain": MaxRelative(0.3),
}


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("name", METHODS)
def test_a_rank_plans_its_heads_as_the_whole_does(name: str, ranks: int) -> None:
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(1, HEADS, 96, 16, generator=generator)
    k = torch.randn(1, GROUPS, 96, 16, generator=generator)
    method = METHODS[name]
    for layer in (0, 2):
        whole = method.plan(AttentionCall(q, k, layer=layer)).to_mask()
        whole = whole.repeat_interleave(HEADS // whole.shape[1], 1)
        for rank in range(ranks):
            mine = slice(rank * HEADS // ranks, (rank + 1) * HEADS // ranks)
            first = rank * GROUPS // ranks
            theirs = k[:, first : first + max(1, GROUPS // ranks)]
            part = method.of_rank(rank, ranks, HEADS, GROUPS)
            found = part.plan(AttentionCall(q[:, mine], theirs, layer=layer)).to_mask()
            assert torch.equal(found.repeat_interleave(HEADS // ranks // found.shape[1], 1), whole[:, mine])


def test_what_cannot_be_split_says_so() -> None:
    with pytest.raises(ValueError, match="8 heads with 4 key/value heads cannot be split over 3 ranks"):
        METHODS["duo by query head"].of_rank(0, 3, HEADS, GROUPS)
    with pytest.raises(ValueError, match="rank must be 0 to 1, got 2"):
        METHODS["per head"].of_rank(2, 2, HEADS, GROUPS)
    with pytest.raises(ValueError, match="for 8 heads, but the model has 16 query heads and 2 key/value"):
        METHODS["moa"].of_rank(0, 2, 16, 2)


def test_learned_numbers_of_all_heads_cannot_be_split() -> None:
    method = SeerAttention.__new__(SeerAttention)
    with pytest.raises(ValueError, match="seer_attention has learned belongs to the heads of the whole model"):
        method.of_rank(0, 2, HEADS, GROUPS)
