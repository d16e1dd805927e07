"""The benchmark of a score product in integers rounds as it says, and counts what it says."""

import pytest
import torch


def test_a_row_in_int16_never_passes_an_int32_sum(script):
    """At the worst: rows that are equal up to the sign, one of them with all its size in one number."""
    quantised = script("quantised")
    for row in (torch.ones(256), torch.eye(256)[0] * 3, torch.randn(256, generator=torch.Generator().manual_seed(0))):
        row = row.double()[None]
        step = torch.maximum(row.abs().amax() / 32767, row.norm() / 46000)
        integers = quantised.int16(row) / step
        assert integers.sub(integers.round()).abs().max() < 1e-6
        assert integers.abs().max() <= 32767.5
        assert integers.square().sum() < 2**31


def test_rounding_to_integers_is_measured_beside_bf16(script):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, 256, 64, generator=generator) for n in (2, 1, 1))
    plain = script("quantised").error_row("random", q, k, v)["errors"]
    shifted = script("quantised").error_row("random", q, k + 8 * torch.randn(64, generator=generator), v)["errors"]
    assert plain["int16 by tokens"] < plain["bf16 throughout"] < plain["int8 by tokens"] < plain["int8 by blocks"]
    assert shifted["int8 by blocks"] == pytest.approx(plain["int8 by blocks"], rel=0.3)
    assert shifted["int8 by blocks, not smoothed"] > 2 * shifted["int8 by blocks"]


def test_speedups_of_integer_products_count_packing(script):
    parts = [{"pack_s": [1.0, 1.0], "attend_s": [3.0, 5.0]}, {"pack_s": [2.0, 2.0], "attend_s": [0.0, 1.0]}]
    assert [part["speedup"] for part in script("quantised").with_ratios(parts)] == [1.0, 2.0]
