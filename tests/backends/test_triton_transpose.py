"""A plan's lists by key, against loops over its masks."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer.backends.triton import transpose


def lists_of(mask: Tensor) -> tuple[Tensor, Tensor]:
    """CSR of the rows of bool ``[.., width]``."""
    rows = mask.flatten(0, -2)
    return F.pad(rows.sum(-1).cumsum(0), (1, 0)), rows.nonzero()[:, 1].int()


@pytest.fixture(params=["at once", "in parts"])
def parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "in parts":
        monkeypatch.setattr(transpose, "MOST_ENTRIES", 40)


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize("seed", range(4))
def test_query_blocks_by_key_block(seed: int) -> None:
    heads, blocks, key_blocks = 5, 7, 9
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(heads, blocks, key_blocks, generator=generator) < [0.0, 0.1, 0.5, 1.0][seed]
    indptr, rows = transpose.query_blocks_of(*lists_of(mask), blocks, key_blocks)
    expected = lists_of(mask.transpose(1, 2))
    assert torch.equal(indptr, expected[0])
    assert torch.equal(rows, expected[1])
    assert rows.dtype == torch.int32


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize("tile", [16, 64])
@pytest.mark.parametrize("seed", range(4))
def test_columns_by_key(seed: int, tile: int) -> None:
    """Each key of each list is found once, in a tile of its head's keys; tiles hold each key once."""
    groups, lists, width = 4, 6, 150
    generator = torch.Generator().manual_seed(seed)
    share = [0.01, 0.2, 0.7, 1.0][seed]
    mask = torch.rand(groups, lists, width, generator=generator) < share
    mask[1] = False  # a head without columns
    seen = torch.zeros_like(mask)
    covered = []
    for part in transpose.transposed_columns(*lists_of(mask), groups, width, tile):
        covered += range(part.first_group, part.first_group + part.groups)
        for n, t in itertools.product(range(part.groups), range(part.tiles)):
            group, number = part.first_group + n, n * part.tiles + t
            begin, end = part.gathered_indptr[n : n + 2].tolist()
            keys = part.gathered[begin:end]
            assert torch.equal(keys.long(), mask[group].any(dim=0).nonzero()[:, 0])
            first, past = part.list_indptr[number : number + 2].tolist()
            assert part.lists[first:past].tolist() == sorted(set(part.lists[first:past].tolist()))
            for entry in range(first, past):
                for place in range(tile):
                    if int(part.members[entry, place // 32]) >> (place % 32) & 1:
                        key = int(keys[t * tile + place])
                        assert not seen[group, int(part.lists[entry]), key]
                        seen[group, int(part.lists[entry]), key] = True
    assert covered == list(range(groups))
    assert torch.equal(seen, mask)
