"""LongGen's two patterns, pair by pair from their rule."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from definitions import call_in, everywhere, rows_of

from gossamer.methods import LongGen, PerHead

CHANGES: list[dict[str, Any]] = [
    {},
    {"sink": 0},
    {"sink": 3, "recent": 1},
    {"sink": 0, "recent": 1, "stride": 3},
    {"stride": 4, "offset": 3},
    {"sink": 0, "stride": 100},
]


@everywhere
@pytest.mark.parametrize("change", CHANGES)
def test_blocks_are_those_of_the_rule(situation: str, change: dict[str, int]) -> None:
    call = replace(call_in(situation, length=40), layer=0, scale=-0.7)
    method = LongGen(**{"recent": 2, "block": 4} | change)
    mask = method.plan(call).to_mask()
    for b, row in enumerate(rows_of(call.extent)):
        # A query beyond all keys, as in cross-attention, has the last key block for its own.
        last = max(row.key_count - 1, 0) // 4
        for i in row.live_queries():
            own = (row.query_start + i) // 4
            own = own if row.causal else min(own, last)
            for j in row.live_keys():
                block = (j - row.key_start) // 4
                strided = method.stride > 0 and (block + method.offset) % method.stride == 0
                kept = abs(own - block) < method.recent or block < method.sink or strided
                expected = kept and row.allowed(i, j)
                assert mask[b, :, i, j].tolist() == [expected] * mask.shape[1], (b, i, j)


def test_heads_of_other_offsets_are_planned_as_alone() -> None:
    call = replace(call_in("no padding", length=200), layer=0)
    heads = [LongGen(sink=0, recent=1, stride=3, offset=h % 3, block=16) for h in range(call.heads)]
    together = PerHead((tuple(heads),)).plan(call).to_mask()
    for h, method in enumerate(heads):
        assert torch.equal(together[:, h], method.plan(call).to_mask()[:, 0])
    assert not torch.equal(together[:, 0], together[:, 1])


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"recent": 0}, "longgen.recent must be at least 1"),
        ({"sink": -1}, "longgen.sink must be at least 0"),
        ({"stride": -1}, "longgen.stride must be at least 0"),
        ({"block": 0}, "longgen.block must be at least 1"),
        ({"stride": 4, "offset": 4}, "offset must be below the stride, got 4 and 4"),
        ({"offset": 1}, "offset must be below the stride, got 1 and 0"),
    ],
)
def test_fields_out_of_range_are_refused(fields: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        LongGen(**fields)
