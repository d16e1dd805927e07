"""Queries and keys before their rotary embedding, in C++ against the definition."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cpu_checks import every_kernel, needs_kernels, poisoned, same_on_threads

from gossamer import AttentionCall
from gossamer.backends import cpu
from gossamer.rotary import Rotary
from gossamer.testing import SITUATIONS, make_call

pytestmark = [needs_kernels, poisoned]

KINDS = {
    "all channels": Rotary.of_base(44),
    "some channels": Rotary.of_base(18, 100.0),
    "scaled": Rotary(torch.linspace(0.01, 1.0, 20), 1.3),
    "interleaved": Rotary(torch.linspace(0.01, 1.0, 20), 1.3, True),
    "offsets": Rotary(torch.linspace(0.01, 1.0, 20), offsets=torch.tensor([3, 40])),
}


@every_kernel
@pytest.mark.parametrize("kind", KINDS)
def test_calls_are_as_they_were(monkeypatch: pytest.MonkeyPatch, isa: str, dtype: torch.dtype, kind: str) -> None:
    monkeypatch.setenv(cpu.ENVIRONMENT, isa)
    monkeypatch.setattr("gossamer.backends.cpu.rotary._TOKENS", 37)
    call = make_call("padded chunk", length=90, heads=4, groups=2, dim=44, dtype=dtype)
    call = replace(call, rotary=KINDS[kind])
    expected = call.before_rotary()

    def before() -> tuple[torch.Tensor, torch.Tensor]:
        plain = cpu.before_rotary(call)
        assert plain.rotary is None
        return plain.q.nan_to_num(nan=5.0), plain.k.nan_to_num(nan=5.0)

    # The last bit of 16 may be rounded otherwise.
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    for got, one in zip(same_on_threads(before), (expected.q, expected.k), strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got, one.nan_to_num(nan=5.0), atol=1e-5, rtol=tolerance)


@pytest.mark.parametrize("situation", SITUATIONS)
def test_any_strides(situation: str) -> None:
    call = make_call(situation, length=30, heads=4, groups=2, dim=16)
    q, k = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (call.q, call.k))
    expected, got = cpu.before_rotary(call), cpu.before_rotary(replace(call, q=q, k=k))
    torch.testing.assert_close(got.q, expected.q, equal_nan=True)
    torch.testing.assert_close(got.k, expected.k, equal_nan=True)


def test_calls_that_do_not_say_how_are_named() -> None:
    q = torch.randn(1, 1, 3, 6)
    with pytest.raises(ValueError, match="does not say how q and k were turned"):
        cpu.before_rotary(AttentionCall(q, q))
