"""The modes of Sparse-vDiT against their definitions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from clips import FRAMES, HEIGHT, PATCHES, WIDTH, clip, ranks_of_tokens, text_of_blocks, weights
from torch import Tensor

from gossamer import AttentionCall, backends
from gossamer.methods import SparseVDiT
from gossamer.methods.denoising import layout_of

BLOCK = 16


def with_text(call: AttentionCall, patches: Tensor) -> Tensor:
    """Pairs of patches ``[B, heads, P, P]`` among all pairs; text attends and is attended by all."""
    mask = torch.zeros(call.batch, patches.shape[1], call.query_len, call.key_len, dtype=torch.bool)
    for row, before in enumerate(layout_of(call).before):
        live, end = int(call.extent.key_count[row]), before + PATCHES
        mask[row, :, :, :live] = True
        mask[row, :, before:end, before:end] = patches[row]
    return mask


@pytest.mark.parametrize("share", [0.01, 0.2, 1.0])
def test_diagonal(share: float) -> None:
    call = clip()
    mask = SparseVDiT("diagonal", share, BLOCK).plan(call).to_mask()
    place = torch.arange(PATCHES)
    near = (place[:, None] - place).abs() < max(1, round(share * PATCHES / 2))
    expected = with_text(call, near.expand(2, 1, -1, -1))
    assert bool((mask | ~expected).all())
    for row, before in enumerate((5, 3)):  # blocks that hold text and patches are whole
        rows = range(-(-before // BLOCK) * BLOCK, (before + PATCHES) // BLOCK * BLOCK)
        assert torch.equal(mask[row, 0, rows.start : rows.stop], expected[row, 0, rows.start : rows.stop])


@pytest.mark.parametrize("share", [0.05, 0.25, 0.5])
def test_multi_diagonal(share: float) -> None:
    """By rank of (height, width, frame): the frames of a place side by side."""
    call = clip(before=(0, 0), after=(0, 0), dead=0)
    mask = SparseVDiT("multi_diagonal", share, BLOCK).plan(call).to_mask()[:, 0]
    f, place = torch.arange(PATCHES) // (HEIGHT * WIDTH), torch.arange(PATCHES) % (HEIGHT * WIDTH)
    block = (place * FRAMES + f) // BLOCK
    reach = max(0, round(share * PATCHES / BLOCK - 1) // 2)
    assert torch.equal(mask[0], (block[:, None] - block).abs() <= reach)
    assert torch.equal(mask[1], mask[0])
    # Seen frame by frame: the same place in every frame, which are diagonals HEIGHT * WIDTH apart.
    assert bool(mask[0][place[:, None] == place].all())


@pytest.mark.parametrize("share", [0.05, 0.5])
def test_multi_diagonal_beside_text(share: float) -> None:
    """Rows of different lengths, with padding: text attends and is attended by all, other blocks are as without it."""
    call = clip(before=(5, 3), after=(4, 40), dead=20)
    mask = SparseVDiT("multi_diagonal", share, BLOCK).plan(call).to_mask()[:, 0]
    f, place = torch.arange(PATCHES) // (HEIGHT * WIDTH), torch.arange(PATCHES) % (HEIGHT * WIDTH)
    reach = max(0, round(share * PATCHES / BLOCK - 1) // 2)
    for row in range(2):
        live = int(call.extent.key_count[row])
        block = ranks_of_tokens(call, row, place * FRAMES + f) // BLOCK
        of_queries, of_keys = (torch.tensor(text) for text in text_of_blocks(call, row, BLOCK))
        keys = block[:live]
        expected = ((block[:, None] - keys).abs() <= reach) | of_queries[block][:, None] | of_keys[keys]
        assert torch.equal(mask[row, :, :live], expected)
        assert not mask[row, :, live:].any()


def test_stripes_are_the_keys_with_the_most_mass_and_stay() -> None:
    call = clip()
    method = SparseVDiT("stripe", 0.1, BLOCK, every=1)
    mask = method.plan(call).to_mask()
    for row, before in enumerate((5, 3)):
        mass = weights(call)[:, :, : int(call.extent.key_count[row])].sum(dim=2)  # of live queries
        middle = slice(before + 2 * BLOCK, before + 3 * BLOCK)
        for head in range(4):
            of_patches = mass[row, head, before : before + PATCHES]
            best = of_patches.argsort(descending=True, stable=True)[: round(0.1 * PATCHES)].sort().values
            found = mask[row, head, middle, before : before + PATCHES]
            assert torch.equal(found[0].nonzero()[:, 0], best)
            assert bool((found == found[0]).all())
    later = method.plan(clip(seed=1, state=call.state)).to_mask()
    assert torch.equal(later, mask)
    assert not torch.equal(method.plan(clip(seed=1)).to_mask(), mask)


def test_stripes_are_found_by_some_of_the_queries() -> None:
    """A direction that all queries share lies on a few keys, and every fourth query block finds them."""
    call = clip(before=(0,), after=(0,), dead=0, heads=2, groups=2)
    q, k = call.q.clone() / 4, call.k.clone() / 4
    planted = torch.tensor([3, 50, 120, 191])
    q[..., 0], k[..., 0] = 5.0, 0.0
    k[:, :, planted, 0] = 6.0
    call = AttentionCall(q, k, call.v, call.extent, layout=call.layout)
    mask = SparseVDiT("stripe", 4 / PATCHES, BLOCK, every=4).plan(call).to_mask()
    assert torch.equal(mask[0, :, 30].nonzero()[:, 1].view(2, 4), planted.expand(2, 4))


def test_a_head_that_is_skipped_gives_nothing() -> None:
    call = clip()
    plan = SparseVDiT("skip").plan(call)
    assert plan.density() == 0
    out, lse = backends.attend(call, plan)
    assert not out.any()
    assert bool((lse == float("-inf")).all())
    assert SparseVDiT("dense").plan(call).density() == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mode": "tile"}, "mode must be one of dense, skip, diagonal, multi_diagonal, stripe, got 'tile'"),
        ({"share": 1.5}, r"share must lie in \[0, 1\]"),
        ({"every": 0}, "every must be at least 1"),
    ],
)
def test_fields_are_checked(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseVDiT(**fields)
