"""SparseD against a naive one, written from the formulas."""

from __future__ import annotations

import math

import pytest
import torch
from clips import clip, weights
from torch import Tensor

from gossamer import AttentionCall, Extent
from gossamer.layout import DenoisingStep, TokenLayout
from gossamer.methods import SparseD

BLOCK = 16


def text(
    prompts: tuple[int, ...], filled: tuple[int, ...], *, step: int = 20, state: list | None = None, seed: int = 0
):
    """Prompts, and what is to be filled in after them."""
    counts = [a + b for a, b in zip(prompts, filled, strict=True)]
    tokens, batch = max(counts), len(counts)
    generator = torch.Generator().manual_seed(seed)
    q = 2 * torch.randn(batch, 4, tokens, 16, generator=generator)
    k, v = (torch.randn(batch, 2, tokens, 16, generator=generator) for _ in "kv")
    extent = Extent([0] * batch, [tokens] * batch, [0] * batch, counts, causal=False)
    given = {"layout": TokenLayout(prompts), "step": DenoisingStep(step, 50)}
    return AttentionCall(q, k, v, extent, scale=0.4, state=[{} for _ in counts] if state is None else state, **given)


def best(scores: Tensor, share: float) -> list[int]:
    budget = max(1, math.floor(len(scores) * share) + 1)
    return sorted(range(len(scores)), key=lambda n: (-float(scores[n]), n))[:budget]


def tile_means(mass: Tensor, first: int, blocks: int) -> Tensor:
    """Of a query block's rows ``[rows, T]``: the mean over tiles padded with zeros."""
    return torch.stack([mass[:, first + n * BLOCK : first + (n + 1) * BLOCK].sum() / BLOCK**2 for n in range(blocks)])


def naive(call: AttentionCall, share: float, prompts: tuple[int, ...], *, isolated: bool = True) -> list[Tensor]:
    """As the authors' code has it: bool ``[H, M, N]`` of each batch row."""
    everything, chosen = weights(call), []
    for row, prompt in enumerate(prompts):
        live = int(call.extent.key_count[row])
        blocks, filled = math.ceil(live / BLOCK), live - prompt
        first = next((i for i in range(blocks) if live - i * BLOCK <= filled), blocks - 1)
        slot = torch.arange(call.key_len)
        alone = weights(call, ((slot >= first * BLOCK) & (slot < live)).expand(call.batch, -1))
        rows = math.ceil(call.query_len / BLOCK)
        mask = torch.zeros(call.heads, rows, blocks, dtype=torch.bool)
        for head in range(call.heads):
            for m in range(rows):
                queries = slice(m * BLOCK, (m + 1) * BLOCK)
                taken = best(tile_means(everything[row, head, queries], 0, blocks), share)
                if isolated:
                    apart = tile_means(alone[row, head, queries], first * BLOCK, blocks - first)
                    taken = [n for n in taken if n < first] + [first + n for n in best(apart, share)]
                mask[head, m, taken] = True
        chosen.append(mask)
    return chosen


@pytest.mark.parametrize(
    ("prompts", "filled"),
    [
        ((96, 64), (64, 96)),  # multiples of the block
        ((101, 60), (50, 91)),  # a block that holds both
        ((130, 90), (7, 47)),  # fewer to fill in than a block: the last block stands for them
        ((128, 9), (3, 122)),
        ((0, 131), (131, 0)),  # no prompt, and nothing to fill in
    ],
)
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_it_selects_as_the_authors_code(share: float, prompts: tuple[int, ...], filled: tuple[int, ...]) -> None:
    call = text(prompts, filled)
    for isolated in (True, False):
        mask = SparseD(share, block=BLOCK, isolated=isolated).plan(call).block_mask()
        for row, expected in enumerate(naive(call, share, prompts, isolated=isolated)):
            assert torch.equal(mask[row, :, :, : expected.shape[2]], expected)
            assert not mask[row, :, :, expected.shape[2] :].any()
        call = text(prompts, filled)


def test_budgets_are_one_above_the_floor() -> None:
    call = text((80,), (80,))
    counts = SparseD(0.25, block=BLOCK, isolated=False).plan(call).block_mask().sum(dim=-1)
    assert counts.unique().tolist() == [3]  # floor(10 / 4) + 1


@pytest.mark.parametrize(("total", "skip", "dense"), [(50, 0.2, 12), (128, 0.2, 27), (10, 0.0, 2), (4, 0.1, 2)])
def test_two_more_steps_are_dense_than_the_share_of_all(total: int, skip: float, dense: int) -> None:
    method = SparseD(0.3, skip, BLOCK)
    state: list = [{}]
    ran_dense = 0
    for step in range(min(total, dense + 2)):
        call = text((80,), (80,), state=state, seed=step)
        call = AttentionCall(call.q, call.k, call.v, call.extent, state=state, layout=call.layout,
                             step=DenoisingStep(step, total))  # fmt: skip
        if method.lacks(call) is not None:
            assert method.lacks(call) == f"step {dense - 1} or later"
            ran_dense += 1
        elif method.plan(call).density() == 1.0:
            ran_dense += 1
    assert ran_dense == dense == int(total * skip) + 2


def test_the_plan_is_of_the_last_dense_step() -> None:
    state: list = [{}]
    chooses = text((101,), (50,), step=11, state=state)
    SparseD(block=BLOCK).plan(chooses)
    kept = SparseD(block=BLOCK).plan(text((101,), (50,), step=30, state=state, seed=3)).block_mask()
    assert torch.equal(kept[0], naive(chooses, 0.3, (101,))[0])


def test_selection_uses_the_calls_own_scale() -> None:
    """The authors' code for LLaDA has the root of the number of heads, 2 here, for that of the head dimension."""
    call = text((80,), (80,))
    own = SparseD(block=BLOCK).mask(AttentionCall(call.q, call.k, None, call.extent, layout=call.layout))
    heads = SparseD(block=BLOCK).mask(AttentionCall(call.q, call.k, None, call.extent, scale=0.5, layout=call.layout))
    assert not torch.equal(own, heads)
    plain = AttentionCall(call.q, call.k, None, call.extent, scale=0.25, layout=call.layout)
    assert torch.equal(own[0], naive(plain, 0.3, (80,))[0])


def test_it_needs_the_number_of_steps() -> None:
    assert SparseD().lacks(clip(total=None)) == "the number of steps"
    with pytest.raises(TypeError, match="isolated must be true or false"):
        SparseD(isolated=1)  # pyright: ignore[reportArgumentType]
