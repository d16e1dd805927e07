"""The benchmark of a score product in integers rounds as it says, and counts what it says."""

import platform
import shutil
import subprocess
from pathlib import Path

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


def test_int8_is_what_a_loop_over_tiles_computes(script):
    """By hand: sums of integers times scales, an online softmax, probabilities in 255 steps. Three and a half tiles,
    of which some rows see none of the first."""
    quantised = script("quantised")
    generator = torch.Generator().manual_seed(0)
    q, k, v = (3 * torch.randn(n, 16, generator=generator, dtype=torch.float64) for n in (70, 224, 224))
    k, v = k + torch.arange(16), v / 3
    mask = torch.arange(224)[None] <= torch.arange(154, 224)[:, None]
    mask[10:20, :100] = False

    def integers(x):
        step = x.abs().max() / 127
        return (x / step).round().to(torch.int64), step

    queries = [integers(q[:64]), integers(q[64:])]
    top, total, out = torch.full((70,), -torch.inf), torch.zeros(70), torch.zeros(70, 16)
    top, total, out = top.double(), total.double(), out.double()
    for tile in torch.arange(224).split(64):
        keys, key_step = integers((k - k.mean(0))[tile])
        values, value_step = integers(v[tile])
        logits = torch.cat([(codes @ keys.T) * (step * key_step / 4) for codes, step in queries])
        logits = logits.masked_fill(~mask[:, tile], -torch.inf)
        raised = torch.maximum(top, logits.amax(1))
        base = raised.clamp(min=-1e300)
        weights, shrink = (logits - base[:, None]).exp(), (top - base).exp()
        steps = (255 * weights).round().to(torch.int64)
        out = out * shrink[:, None] + (steps @ values) * (value_step / 255)
        top, total = raised, total * shrink + weights.sum(1)
    got = quantised.attend_int8(q, k, v, mask, values=True)
    torch.testing.assert_close(got, out / total[:, None], rtol=1e-9, atol=1e-9)
    exact = quantised.attend(q, k, v, mask)
    alone = quantised.attend_int8(q, k, v, mask)
    assert 0 < (alone - exact).norm() < (got - exact).norm()


def test_smoothing_takes_away_what_all_keys_share(script):
    """Offsets of video-like keys cost int8 nothing once their mean is gone, and a scale a token is closer than one a
    block."""
    quantised = script("quantised")
    found = quantised.error_row("video", *quantised.video_like((4, 8, 16), 2, 64), causal=False)["errors"]
    assert found["int8 by blocks, not smoothed"] > 1.5 * found["int8 by blocks"]
    assert found["int8 by blocks"] > 1.1 * found["int8 by tokens"]
    assert found["int8 by blocks, values too"] > 2 * found["int8 by blocks"]


def test_the_name_of_a_downloaded_model_has_no_version(script):
    quantised = script("quantised")
    assert quantised.short_name(Path("cache/smollm2-b179c9523d0e6a0f")) == "smollm2"
    assert quantised.short_name(Path("models/reference")) == "reference"


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["avx2", "avx512", "avx512_bf16", "amx"])
def test_the_native_part_compiles_against_the_kernels(script, isa):
    """What it takes of csrc/ has not moved."""
    quantised = script("quantised")
    compiler = shutil.which("g++")
    if compiler is None or platform.machine() != "x86_64":
        pytest.skip("no g++ for x86-64")
    flags = ["-std=c++17", "-fsyntax-only", "-w", *quantised.SETS[isa][0], *quantised.more_flags(isa)]
    done = subprocess.run([compiler, *flags, str(quantised.SOURCE)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_speedups_of_integer_products_count_packing(script):
    parts = [{"pack_s": [1.0, 1.0], "attend_s": [3.0, 5.0]}, {"pack_s": [2.0, 2.0], "attend_s": [0.0, 1.0]}]
    assert [part["speedup"] for part in script("quantised").with_ratios(parts)] == [1.0, 2.0]
    parts = [part | {"scores_s": seconds} for part, seconds in zip(parts, ([2.0, 3.0], [1.0, 1.0]), strict=True)]
    assert [part["scores_speedup"] for part in script("quantised").with_ratios(parts)] == [1.0, 2.5]
