"""The error of the C++ executor against fp64, beside that of torch's SDPA in the same dtype, up to 128K keys."""

import math

import pytest
import torch
import torch.nn.functional as F
from executor_checks import DTYPES
from torch import Tensor

from gossamer import Extent, SparsePlan
from gossamer.backends import cpu

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason=f"no C++ kernels: {cpu.why_unavailable()}")
# The emulation is too slow for these lengths; it shares its arithmetic with the others.
NATIVE = [isa for isa in cpu.supported_isas() if isa != "amx_emulated"] or ["portable"]
HARDWARE_FLUSHES = ("avx512_bf16", "amx")  # their dot products take what lies below the normal range as 0


def draw(content: str, query_len: int, key_len: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
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
    return q.to(dtype), k.to(dtype), v.to(dtype)


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("content", ["normal", "sharp", "outlier", "constant keys", "denormal"])
@pytest.mark.parametrize(("query_len", "key_len"), [(250, 1000), (64, 16384), (32, 131072)])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("isa", NATIVE)
def test_no_worse_than_sdpa(
    monkeypatch, isa: str, dtype: torch.dtype, query_len: int, key_len: int, content: str
) -> None:
    if isa == "portable" and key_len > 20000:
        pytest.skip("slow; the arithmetic is that of the other lengths")
    monkeypatch.setenv(cpu.ENVIRONMENT, isa)
    q, k, v = draw(content, query_len, key_len, dtype)
    plan = SparsePlan.dense(1, query_len, key_len, Extent.full(1, query_len, key_len))
    out, _ = cpu.execute(q, k, v, plan, scale=1 / 8)
    mask = plan.rows_mask(torch.arange(query_len))
    logits = (q.double() @ k.double().transpose(-1, -2) / 8).masked_fill(~mask, -math.inf)
    if content == "outlier":
        assert float(logits.max()) > 75
    expected = logits.softmax(-1) @ v.double()
    sdpa = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1 / 8, enable_gqa=True)
    own, theirs = error(out, expected), error(sdpa, expected)
    if content == "denormal" and dtype == torch.bfloat16 and isa in HARDWARE_FLUSHES:
        assert float((out.double() - expected).abs().max()) <= torch.finfo(dtype).tiny
    else:
        # SDPA may be exact by chance; then a rounding of the last bit is allowed.
        assert own <= 1.2 * theirs + 0.02 * torch.finfo(dtype).eps, (
            f"{own:.2e} is {own / theirs:.2f} times {theirs:.2e}"
        )


@pytest.mark.parametrize("sharpness", [1, 6])
@pytest.mark.parametrize(("query_len", "key_len"), [(1, 4096), (250, 500)])
@pytest.mark.parametrize("dim", [128, 192, 256])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("isa", NATIVE)
def test_no_worse_than_sdpa_with_large_heads(
    monkeypatch, isa: str, dtype: torch.dtype, dim: int, query_len: int, key_len: int, sharpness: int
) -> None:
    """Over several draws: the error of one row's few logits is a matter of luck."""
    monkeypatch.setenv(cpu.ENVIRONMENT, isa)
    generator = torch.Generator().manual_seed(dim)
    plan = SparsePlan.dense(1, query_len, key_len, Extent.full(1, query_len, key_len))
    mask = plan.rows_mask(torch.arange(query_len))
    own = theirs = 0.0
    for _ in range(12 if query_len == 1 else 2):
        q = (sharpness * torch.randn(1, 2, query_len, dim, generator=generator)).to(dtype)
        k = torch.randn(1, 1, key_len, dim, generator=generator).to(dtype)
        v = torch.randn(1, 1, key_len, dim, generator=generator).to(dtype)
        scale = dim**-0.5
        expected = (q.double() @ k.double().mT * scale).masked_fill(~mask, -math.inf).softmax(-1) @ v.double()
        out, _ = cpu.execute(q, k, v, plan, scale=scale)
        sdpa = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
        own += error(out, expected) ** 2
        theirs += error(sdpa, expected) ** 2
    assert own**0.5 <= 1.2 * theirs**0.5, f"{own**0.5:.2e} is {(own / theirs) ** 0.5:.2f} times {theirs**0.5:.2e}"


@pytest.mark.parametrize("bad", [("k", math.inf), ("k", -math.inf), ("k", math.nan), ("v", math.inf), ("q", math.inf)])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("isa", NATIVE)
def test_infinities_are_handled_like_sdpa(monkeypatch, isa: str, dtype: torch.dtype, bad: tuple[str, float]) -> None:
    """A key of -inf drops out, +inf and NaN spoil the rows that see them.

    SDPA under a mask spoils all rows. Here a value that is not finite spoils, by 0 * inf, rows of its own tile only.
    """
    monkeypatch.setenv(cpu.ENVIRONMENT, isa)
    where, value = bad
    q, k, v = draw("normal", 130, 130, dtype)
    q = q.abs()  # so that an infinite key has a logit of one sign
    plan = SparsePlan.dense(1, 130, 130, Extent.full(1, 130, 130))
    clean, _ = cpu.execute(q, k, v, plan, scale=1 / 8)
    {"q": q, "k": k, "v": v}[where][:, :, 70] = value
    out, _ = cpu.execute(q, k, v, plan, scale=1 / 8)
    untouched = 64 if where == "v" else 70
    assert torch.equal(out[:, :, :untouched], clean[:, :, :untouched])
    for row in range(70, 130):
        seen = slice(0, row + 1)
        expected = F.scaled_dot_product_attention(
            q[:, :, [row]].double(), k[:, :, seen].double(), v[:, :, seen].double(), scale=1 / 8, enable_gqa=True
        )[:, :, 0]
        got = out[:, :, row]
        assert torch.equal(got.isnan(), expected.isnan()), row
        assert torch.equal(got.isinf(), expected.isinf()), row
        finite = expected.isfinite()
        torch.testing.assert_close(got[finite].double(), expected[finite], atol=0.03, rtol=0.03)
