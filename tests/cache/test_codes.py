"""Encodings: what is packed comes back, within the bound that each has."""

import pytest
import torch
from torch import Tensor

from gossamer.cache import bitmaps, integers

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * 3 + 1).to(dtype)


def nbytes(found: integers.Quantised | bitmaps.Sparse) -> int:
    return sum(t.numel() * t.element_size() for t in found.tensors)


@pytest.mark.parametrize("bits", integers.BITS)
def test_packed_codes_come_back(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (3, 5, 24), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    packed = integers.pack(codes, bits)
    assert packed.shape == (3, 5, 24 * bits // 8)
    assert torch.equal(integers.unpack(packed, bits), codes)


def test_the_first_code_lies_in_the_lowest_bits() -> None:
    codes = torch.tensor([1, 2, 3, 0], dtype=torch.uint8)
    assert integers.pack(codes, 2).tolist() == [1 + 2 * 4 + 3 * 16]
    assert integers.pack(codes, 4).tolist() == [1 + 2 * 16, 3]


def naive_scales(x: Tensor, group: int, over: str) -> tuple[Tensor, Tensor]:
    """The least and the largest number of each element's group, in fp64."""
    x = x.double()
    low, high = torch.empty_like(x), torch.empty_like(x)
    for t in range(x.shape[2]):
        for d in range(x.shape[3]):
            if over == "tokens":
                own = x[:, :, t // group * group : (t // group + 1) * group, d]
            else:
                own = x[:, :, t, d // group * group : (d // group + 1) * group]
            low[:, :, t, d], high[:, :, t, d] = own.amin(-1), own.amax(-1)
    return low, high


@pytest.mark.parametrize("over", ["tokens", "channels"])
@pytest.mark.parametrize("bits", integers.BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_number_is_off_by_more_than_half_a_scale(dtype: torch.dtype, bits: int, over: integers.Over) -> None:
    x = random(2, 2, 16, 24, dtype=dtype)
    found = integers.quantise(x, bits, 8, over)
    axis = 2 if over == "tokens" else 3
    scale = found.scale.double().repeat_interleave(8, dim=axis)
    error = (found.decode(torch.float32).double() - x.double()).abs()
    assert bool((error <= scale / 2 + 1e-6 * x.double().abs().max()).all())  # sums of fp32
    low, high = naive_scales(x, 8, over)
    eps = torch.finfo(dtype).eps
    ideal = (high - low) / (2**bits - 1)
    assert bool((scale <= ideal * (1 + 2 * eps) + 2 * eps * low.abs()).all())  # rounded outwards, no further


def test_keys_are_scaled_by_channel_and_values_by_token() -> None:
    x = random(1, 1, 64, 64)
    outlier = x.clone()
    outlier[..., 3] = 1000.0 * x[..., 3]
    rest = [c for c in range(64) if c != 3]
    by_channel, by_token = (integers.quantise(outlier, 4, 32, over).decode() for over in ("tokens", "channels"))  # type: ignore[arg-type]
    plain = integers.quantise(x, 4, 32, "tokens").decode()
    assert torch.equal(by_channel[..., rest], plain[..., rest])
    assert float((by_token - outlier)[..., :32].abs().mean()) > 10 * float(
        (by_channel - outlier)[..., rest].abs().mean()
    )


def test_dead_tokens_enter_no_scale() -> None:
    x = random(1, 2, 16, 8)
    live = torch.arange(16)[None] >= 5
    dirty = x.clone()
    dirty[:, :, :5] = torch.tensor([float("nan"), 1e30, -1e30, float("inf"), 0.0])[:, None]
    one, other = (integers.quantise(t, 4, 8, "tokens", live) for t in (x, dirty))
    assert torch.equal(one.scale, other.scale)
    assert torch.equal(one.decode()[:, :, 5:], other.decode()[:, :, 5:])
    assert torch.equal(one.scale[:, :, :1], integers.quantise(x[:, :, 5:8], 4, 3, "tokens").scale)


def test_constant_groups_come_back_exactly() -> None:
    x = torch.full((1, 1, 8, 8), -2.5)
    assert torch.equal(integers.quantise(x, 2, 8, "tokens").decode(), x)


def test_bytes_of_integers_are_what_is_held() -> None:
    found = integers.quantise(random(2, 3, 64, 32, dtype=torch.bfloat16), 4, 32, "tokens")
    assert nbytes(found) == 2 * 3 * (64 * 16 + 2 * 2 * 32 * 2)


@pytest.mark.parametrize(("bits", "group", "message"), [(3, 8, "2, 4 or 8 bits"), (4, 7, "no multiple")])
def test_quantise_says_what_does_not_fit(bits: int, group: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        integers.quantise(random(1, 1, 16, 8), bits, group, "tokens")


@pytest.mark.parametrize("dim", [64, 80, 128, 20])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.7])
def test_each_token_keeps_exactly_the_rest(dim: int, sparsity: float) -> None:
    x = random(2, 2, 9, dim).round()  # many are equal, and some are 0
    found = bitmaps.compress(x, sparsity)
    count = dim - int(sparsity * dim)
    assert found.packed.shape[-1] == count
    decoded = found.decode()
    for index in torch.cartesian_prod(*(torch.arange(n) for n in (2, 2, 9))):
        row = x[tuple(index)].tolist()
        stay = sorted(sorted(range(dim), key=lambda d: (-abs(row[d]), d))[:count])
        assert found.packed[tuple(index)].tolist() == [row[d] for d in stay]
        assert decoded[tuple(index)].tolist() == [row[d] if d in stay else 0.0 for d in range(dim)]
        bits = [int(byte) >> bit & 1 for byte in found.bitmap[tuple(index)] for bit in range(8)]
        assert [d for d, bit in enumerate(bits) if bit] == stay


def test_a_share_that_floats_round_down_counts_whole() -> None:
    assert [bitmaps.pruned_elements(0.29, 100), bitmaps.pruned_elements(0.7, 128)] == [29, 89]


def test_products_with_sparse_keys_are_those_with_pruned_ones() -> None:
    x = random(1, 2, 12, 64)
    q = random(1, 2, 1, 64, seed=1)
    pruned = torch.where(bitmaps.largest(x, 32), x, 0.0)
    assert torch.equal(q @ bitmaps.compress(x, 0.5).decode().transpose(-1, -2), q @ pruned.transpose(-1, -2))


def test_bytes_of_bitmaps_are_below_half() -> None:
    x = random(1, 2, 64, 128, dtype=torch.bfloat16)
    found = bitmaps.compress(x, 0.7)
    assert nbytes(found) == 2 * 64 * (16 + 39 * 2)
    assert nbytes(found) < 0.5 * x.numel() * x.element_size()


def test_some_tokens_are_decoded_alone() -> None:
    x = random(2, 2, 16, 24)
    forms = [integers.quantise(x, 4, 8, over) for over in ("tokens", "channels")]  # type: ignore[arg-type]
    for found in (*forms, bitmaps.compress(x, 0.5)):
        for first, last in ((0, 16), (3, 4), (7, 9), (5, 5), (8, 16)):
            assert torch.equal(found.between(first, last), found.decode()[:, :, first:last])


def test_other_tensors_of_the_same_form() -> None:
    x = random(3, 2, 16, 24)
    for found in (integers.quantise(x, 2, 4, "tokens"), bitmaps.compress(x, 0.25)):
        assert torch.equal(found.like([t[[2, 0]] for t in found.tensors]).decode(), found.decode()[[2, 0]])


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, float("nan")])
def test_compress_says_what_does_not_fit(sparsity: float) -> None:
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        bitmaps.compress(random(1, 1, 2, 8), sparsity)
