"""Efficient-vDiT's attention tile against its definition, tile by tile."""

from __future__ import annotations

import pytest
import torch
from clips import FRAMES, PATCHES, clip, text_of_blocks

from gossamer.methods import AttentionTile

# Sparsity in percent of the spec's table, by frames and references: the formula.
TABLE = {
    (8, 4): 18.75, (8, 3): 31.25, (8, 2): 46.875, (8, 1): 65.625,
    (24, 12): 22.917, (24, 8): 41.667, (24, 6): 53.125, (24, 4): 65.972, (24, 3): 72.917,
}  # fmt: skip


@pytest.mark.parametrize(("frames", "references"), TABLE)
def test_sparsity_is_that_of_the_papers_table(frames: int, references: int) -> None:
    call = clip(before=(0,), after=(0,), grid=(frames, 4, 4), dead=0)
    plan = AttentionTile(references, block=16).plan(call)
    formula = 1 - (references * frames + (frames - references) * (references + 1)) / frames**2
    assert 1 - plan.density() == pytest.approx(formula)
    assert 100 * formula == pytest.approx(TABLE[frames, references], abs=1e-2)


@pytest.mark.parametrize(("references", "block"), [(1, 1), (2, 1), (3, 1), (1, 16), (2, 16), (9, 16)])
def test_it_keeps_each_tile_of_the_definition(references: int, block: int) -> None:
    call = clip()
    mask = AttentionTile(references, block=block).plan(call).to_mask()
    chosen = {n * FRAMES // min(references, FRAMES) for n in range(min(references, FRAMES))}
    for row, before in enumerate((5, 3)):
        live = int(call.extent.key_count[row])

        def frame(token: int, before: int = before) -> int | None:
            inside = before <= token < before + PATCHES
            return (token - before) // (PATCHES // FRAMES) if inside else None

        expected = torch.zeros(call.query_len, call.key_len, dtype=torch.bool)
        for i in range(call.query_len):
            for j in range(live):
                of_i, of_j = frame(i), frame(j)
                expected[i, j] = of_i is None or of_j is None or of_i == of_j or of_i in chosen or of_j in chosen
        # A block is kept if one of the tiles is that it holds of live tokens; what holds text alone, or nothing, is.
        number = torch.arange(call.query_len) // block
        blocks = torch.zeros(int(number[-1]) + 1, int(number[-1]) + 1, dtype=torch.bool)
        some = expected[:live].nonzero()
        blocks[number[some[:, 0]], number[some[:, 1]]] = True
        blocks[torch.tensor(text_of_blocks(call, row, block)[0])] = True
        whole = blocks[number][:, number]
        whole[:, live:] = False
        assert torch.equal(mask[row, 0], whole)


def test_layers_may_have_references_of_their_own() -> None:
    method = AttentionTile(frames=4, layers=(1, 2), block=16)
    densities = [method.plan(clip(layer=layer)).density() for layer in range(2)]
    assert densities == [AttentionTile(k, block=16).plan(clip()).density() for k in (1, 2)]
    with pytest.raises(ValueError, match="for 2 layers of 1 heads, but layer 2"):
        method.plan(clip(layer=2))
    with pytest.raises(ValueError, match="layers must hold a number of frames from 1 on"):
        AttentionTile(layers=(0,))


def test_an_image_has_no_tiles() -> None:
    assert AttentionTile().lacks(clip(grid=(1, 12, 16))) == "several frames"
