"""How a model turned q and k: by complex numbers, and back."""

from __future__ import annotations

import cmath
from dataclasses import replace

import pytest
import torch
from definitions import call_in, everywhere, rows_of

from gossamer import AttentionCall
from gossamer.rotary import Rotary

KINDS = {
    "all channels": Rotary.of_base(8, 50.0),
    "some channels": Rotary(torch.tensor([1.0, 0.3])),
    "interleaved": Rotary(torch.tensor([1.0, 0.3, 0.05]), interleaved=True),
    "scaled": Rotary(torch.tensor([1.0, 0.3, 0.05, 0.01]), scaling=1.7),
    "offset": Rotary(torch.tensor([1.0, 0.3, 0.05, 0.01]), offsets=torch.tensor([0, 5])),
}

each_kind = pytest.mark.parametrize("kind", KINDS)


def naive(rotary: Rotary, vector: list[float], position: int) -> list[float]:
    """One vector, each pair as a complex number times ``scaling * exp(i * position * frequency)``."""
    out, half = list(vector), len(rotary.frequencies)
    for n, frequency in enumerate(rotary.frequencies.tolist()):
        a, b = (2 * n, 2 * n + 1) if rotary.interleaved else (n, n + half)
        turned = complex(vector[a], vector[b]) * rotary.scaling * cmath.exp(1j * position * frequency)
        out[a], out[b] = turned.real, turned.imag
    return out


@each_kind
@pytest.mark.usefixtures("constants")
def test_pairs_are_turned_by_their_positions(kind: str) -> None:
    rotary = KINDS[kind]
    x, positions = torch.randn(2, 3, 4, 8), torch.tensor([[0, 1, 7, -3], [2, 3, 4, 900]])
    got = rotary.turn(x, positions)
    for b in range(2):
        for h in range(3):
            for i in range(4):
                own = int(positions[b, i]) + (0 if rotary.offsets is None else int(rotary.offsets[b]))
                expected = torch.tensor(naive(rotary, x[b, h, i].tolist(), own))
                torch.testing.assert_close(got[b, h, i], expected, atol=2e-4, rtol=1e-4)


@each_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_turning_back_undoes_it(kind: str, dtype: torch.dtype) -> None:
    x, positions = torch.randn(2, 3, 4, 8).to(dtype), torch.tensor([[0, 1, 7, -3], [2, 3, 4, 9000]])
    back = KINDS[kind].turn(KINDS[kind].turn(x, positions), positions, back=True)
    assert back.dtype == dtype
    torch.testing.assert_close(back, x, atol=3e-2 if dtype == torch.bfloat16 else 1e-5, rtol=1e-2)


@everywhere
def test_a_call_is_as_it_was_before(situation: str) -> None:
    call = call_in(situation, length=20, dim=8)
    rotary = Rotary(torch.tensor([0.5, 0.1, 0.01]), 1.3, True, torch.arange(call.batch) * 3)
    before = replace(call, rotary=rotary).before_rotary()
    assert before.rotary is None
    for b, row in enumerate(rows_of(call.extent)):
        for i in row.live_queries():
            turned = naive(rotary, before.q[b, 0, i].tolist(), row.query_start + i + 3 * b)
            torch.testing.assert_close(torch.tensor(turned), call.q[b, 0, i], atol=1e-4, rtol=1e-4)
        for j in row.live_keys():
            turned = naive(rotary, before.k[b, 1, j].tolist(), j - row.key_start + 3 * b)
            torch.testing.assert_close(torch.tensor(turned), call.k[b, 1, j], atol=1e-4, rtol=1e-4)


def test_what_is_none_is_named() -> None:
    with pytest.raises(ValueError, match=r"frequencies must be a list of numbers, got shape \(2, 2\)"):
        Rotary(torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"got shape \(0,\)"):
        Rotary(torch.ones(0))
    with pytest.raises(ValueError, match="scaling must be above 0, got 0"):
        Rotary(torch.ones(2), scaling=0.0)
    q = torch.randn(1, 1, 3, 6)
    with pytest.raises(ValueError, match="rotary turns 8 channels, but the head dimension is 6"):
        AttentionCall(q, q, rotary=Rotary.of_base(8))
    with pytest.raises(ValueError, match="does not say how q and k were turned"):
        AttentionCall(q, q).before_rotary()
