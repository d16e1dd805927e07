"""The error of the cpu backend against fp64, beside that of torch's SDPA in the same dtype, up to 128K keys."""

import functools
import math
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from cpu_checks import every_native_kernel, needs_kernels
from torch import Tensor

from gossamer import AttentionCall, SparsePlan
from gossamer.backends import cpu

pytestmark = needs_kernels
HARDWARE_FLUSHES = ("avx512_bf16", "amx")  # their dot products take what lies below the normal range as 0
CONTENTS = ["normal", "sharp", "outlier", "constant keys", "denormal"]
# Denormals are slow where the hardware does not flush them.
SIZES = [(250, 1000, content) for content in CONTENTS] + [(64, 16384, content) for content in CONTENTS[:-1]]
SIZES += [(32, 131072, "normal"), (32, 131072, "outlier")]


def draw(content: str, query_len: int, key_len: int, dtype: torch.dtype) -> AttentionCall:
    generator = torch.Generator().manual_seed(key_len)
    q = torch.randn(1, 2, query_len, 64, generator=generator)
    k = torch.randn(1, 1, key_len, 64, generator=generator)
    v = torch.randn(1, 1, key_len, 64, generator=generator)
    tiny = 1e-7 if dtype == torch.float16 else 1e-39
    if content == "sharp":
        q *= 6
    elif content == "outlier":  # one key with a logit of about 80 for every query
        direction = torch.full((64,), 1 / 8)
        q += 8 * direction
        k[:, :, key_len // 3] = 80 * direction
    elif content == "constant keys":
        k = k[:, :, :1].expand_as(k).clone()
    elif content == "denormal":
        k, v = k * tiny, v * tiny
    return AttentionCall(q.to(dtype), k.to(dtype), v.to(dtype), scale=1 / 8)


@dataclass
class Truth:
    call: AttentionCall
    plan: SparsePlan
    out: Tensor  # fp64
    largest_logit: float
    sdpa: float  # its error


@functools.lru_cache(maxsize=2)
def truth(content: str, query_len: int, key_len: int, dtype: torch.dtype) -> Truth:
    call = draw(content, query_len, key_len, dtype)
    plan = SparsePlan.dense(1, query_len, key_len, call.extent)
    mask = call.extent.allowed(torch.arange(query_len), key_len)[:, None]
    logits = (call.q.double() @ call.k.double().transpose(-1, -2) * call.scale).masked_fill(~mask, -math.inf)
    out = logits.softmax(-1) @ call.values.double()
    sdpa = F.scaled_dot_product_attention(
        call.q, call.k, call.values, attn_mask=mask, scale=call.scale, enable_gqa=True
    )
    return Truth(call, plan, out, float(logits.max()), error(sdpa, out))


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize(("query_len", "key_len", "content"), SIZES)
@every_native_kernel
def test_no_worse_than_sdpa(
    monkeypatch, isa: str, dtype: torch.dtype, query_len: int, key_len: int, content: str
) -> None:
    if isa == "portable" and key_len > 1000:
        pytest.skip("slow; the arithmetic is that of the other lengths")
    monkeypatch.setenv(cpu.ENVIRONMENT, isa)
    known = truth(content, query_len, key_len, dtype)
    out, _ = cpu.attend(known.call, known.plan)
    if content == "outlier":
        assert known.largest_logit > 75
    own = error(out, known.out)
    if content == "denormal" and dtype == torch.bfloat16 and isa in HARDWARE_FLUSHES:
        assert float((out.double() - known.out).abs().max()) <= torch.finfo(dtype).tiny
    else:
        # SDPA may be exact by chance; then a rounding of the last bit is allowed.
        assert own <= 1.2 * known.sdpa + 0.02 * torch.finfo(dtype).eps, (
            f"{own:.2e} is {own / known.sdpa:.2f} times {known.sdpa:.2e}"
        )


@pytest.mark.parametrize(("sharpness", "query_len", "key_len"), [(1, 1, 4096), (6, 1, 4096), (6, 250, 500)])
@pytest.mark.parametrize("dim", [128, 192, 256])
@every_native_kernel
def test_no_worse_than_sdpa_with_large_heads(
    monkeypatch, isa: str, dtype: torch.dtype, dim: int, query_len: int, key_len: int, sharpness: int
) -> None:
    """Over several draws: the error of one row's few logits is a matter of luck."""
    monkeypatch.setenv(cpu.ENVIRONMENT, isa)
    generator = torch.Generator().manual_seed(dim)
    own = theirs = 0.0
    for _ in range(12 if query_len == 1 else 2):
        q = (sharpness * torch.randn(1, 2, query_len, dim, generator=generator)).to(dtype)
        k = torch.randn(1, 1, key_len, dim, generator=generator).to(dtype)
        v = torch.randn(1, 1, key_len, dim, generator=generator).to(dtype)
        call = AttentionCall(q, k, v)
        mask = call.extent.allowed(torch.arange(query_len), key_len)[:, None]
        logits = (q.double() @ k.double().mT * call.scale).masked_fill(~mask, -math.inf)
        expected = logits.softmax(-1) @ v.double()
        out, _ = cpu.attend(call, SparsePlan.dense(1, query_len, key_len, call.extent))
        sdpa = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=call.scale, enable_gqa=True)
        own += error(out, expected) ** 2
        theirs += error(sdpa, expected) ** 2
    assert own**0.5 <= 1.2 * theirs**0.5, f"{own**0.5:.2e} is {(own / theirs) ** 0.5:.2f} times {theirs**0.5:.2e}"


@pytest.mark.parametrize("bad", [("k", math.inf), ("k", -math.inf), ("k", math.nan), ("v", math.inf), ("q", math.inf)])
@every_native_kernel
def test_infinities_are_handled_like_sdpa(monkeypatch, isa: str, dtype: torch.dtype, bad: tuple[str, float]) -> None:
    """A key of -inf drops out, +inf and NaN spoil the rows that see them.

    SDPA under a mask spoils all rows. Here a value that is not finite spoils, by 0 * inf, rows of its own tile only.
    """
    monkeypatch.setenv(cpu.ENVIRONMENT, isa)
    where, value = bad
    call = draw("normal", 130, 130, dtype)
    call = replace(call, q=call.q.abs())  # so that an infinite key has a logit of one sign
    plan = SparsePlan.dense(1, 130, 130, call.extent)
    clean, _ = cpu.attend(call, plan)
    spoilt = getattr(call, where).clone()
    spoilt[:, :, 70] = value
    call = replace(call, **{where: spoilt})
    out, _ = cpu.attend(call, plan)
    untouched = 64 if where == "v" else 70
    assert torch.equal(out[:, :, :untouched], clean[:, :, :untouched])
    for row in range(70, 130, 7):
        seen = slice(0, row + 1)
        q, k, v = call.q[:, :, [row]].double(), call.k[:, :, seen].double(), call.values[:, :, seen].double()
        expected = F.scaled_dot_product_attention(q, k, v, scale=call.scale, enable_gqa=True)[:, :, 0]
        got = out[:, :, row]
        assert torch.equal(got.isnan(), expected.isnan()), row
        assert torch.equal(got.isinf(), expected.isinf()), row
        finite = expected.isfinite()
        torch.testing.assert_close(got[finite].double(), expected[finite], atol=0.03, rtol=0.03)
