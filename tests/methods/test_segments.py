"""Orders of keys inside segments, against sorted lists of positions."""

import pytest
import torch
from definitions import call_in, everywhere, rows_of

from gossamer.methods.segments import order_in_segments, reorder_keys


@everywhere
def test_keys_are_ordered_by_mass_inside_full_segments(situation: str) -> None:
    call = call_in(situation, length=37)
    drawn = torch.randint(0, 5, (call.batch, 2, call.extent.longest), generator=torch.Generator().manual_seed(1))
    order = order_in_segments(call, drawn.float(), 8)
    assert order.shape == (call.batch, 2, call.key_len)
    for b, row in enumerate(rows_of(call.extent)):
        full = row.key_count // 8 * 8
        for h in range(2):
            mass = drawn[b, h].tolist()
            expected = [j for s in range(0, full, 8) for j in sorted(range(s, s + 8), key=lambda j: (-mass[j], j))]
            assert order[b, h].tolist() == [*expected, *range(full, call.key_len)]


@everywhere
@pytest.mark.parametrize("heads", [2, 4])
def test_a_reordered_call_has_each_heads_keys_by_rank(situation: str, heads: int) -> None:
    call = call_in(situation, length=37)
    drawn = torch.rand(call.batch, heads, call.extent.longest, generator=torch.Generator().manual_seed(1))
    order = order_in_segments(call, drawn, 8)
    got = reorder_keys(call, order, 8)
    assert (got.groups, got.key_len, got.v) == (heads, call.key_len, None)
    assert got.extent.limit == (None if call.extent.limit is None else call.extent.limit + 7)
    for b, row in enumerate(rows_of(call.extent)):
        for h in range(heads):
            slots = [row.key_start + int(order[b, h, rank]) for rank in range(row.key_count)]
            live = slice(row.key_start, row.key_start + row.key_count)
            assert torch.equal(got.k[b, h, live], call.k[b, h * call.groups // heads, slots])
