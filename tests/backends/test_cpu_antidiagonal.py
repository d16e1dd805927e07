"""Antidiagonal scores in C++ against the torch oracle: every instruction set, dtype and situation."""

import math

import pytest
import torch
from torch import Tensor

from gossamer import Extent, estimators
from gossamer.backends import cpu
from gossamer.backends.cpu import planning
from gossamer.plan import ceil_div
from gossamer.testing import SITUATIONS, Case, make_case

pytestmark = [
    pytest.mark.skipif(not cpu.is_available(), reason=f"no C++ kernels: {cpu.why_unavailable()}"),
    pytest.mark.usefixtures("poisoned_memory"),
]
every_isa = pytest.mark.parametrize("isa", cpu.supported_isas() or ["portable"])


def ours(case: Case, block_q: int, block_k: int, stride: int) -> Tensor:
    """In two parts, as the generator may yield them."""
    blocks = ceil_div(case.query_len, block_q)
    sizes = {"extent": case.extent, "block_q": block_q, "block_k": block_k, "stride": stride}
    parts = [
        planning.antidiagonal_scores(case.q, case.k, scale=case.scale, **sizes, at=at, stop=stop)
        for at, stop in ((0, blocks // 2), (blocks // 2, blocks))
    ]
    return torch.cat(parts, dim=2)


def oracle(case: Case, block_q: int, block_k: int, stride: int) -> Tensor:
    """Of the inputs' values in fp32, where torch does not round the logits."""
    parts = estimators._antidiagonals_in_torch(case.q, case.k, case.scale, case.extent, block_q, block_k, stride)
    return torch.cat([scores for _, scores in parts], dim=2)


def assert_agrees(case: Case, block_q: int, block_k: int, stride: int) -> None:
    # A score sums up to block_q / stride rows of mass 1 over up to block_k / stride cells.
    torch.testing.assert_close(
        ours(case, block_q, block_k, stride), oracle(case, block_q, block_k, stride), atol=2e-6, rtol=2e-5
    )


@every_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize(
    ("length", "block_q", "block_k", "stride", "dim"),
    [
        (1, 64, 128, 8, 16),
        (7, 32, 16, 8, 1),
        (333, 32, 48, 16, 20),  # 3 cells a block: a tile of 63
        (190, 100, 70, 1, 33),  # a block of 70 cells takes two tiles
        (130, 128, 128, 128, 80),
    ],
)
def test_scores(
    monkeypatch,
    isa: str,
    dtype: torch.dtype,
    situation: str,
    length: int,
    block_q: int,
    block_k: int,
    stride: int,
    dim: int,
) -> None:
    monkeypatch.setenv(cpu.ENVIRONMENT, isa)
    case = make_case(situation, length=length, heads=4, groups=2, dim=dim, dtype=dtype)
    assert_agrees(case, block_q, block_k, stride)


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize(("heads", "groups", "stride"), [(2, 2, 8), (8, 1, 4), (3, 1, 16)])
def test_scores_of_many_panels_and_tiles(situation: str, heads: int, groups: int, stride: int) -> None:
    assert_agrees(make_case(situation, length=3001, heads=heads, groups=groups, dim=24), 64, 128, stride)


def test_the_largest_head_dimension() -> None:
    assert_agrees(make_case("left padding", length=400, heads=2, groups=1, dim=256), 64, 64, 8)


def test_rows_that_see_nothing_hold_nothing() -> None:
    case = make_case("no padding", length=100, heads=1, groups=1, dim=8)
    q, k = case.q.expand(3, -1, -1, -1), case.k.expand(3, -1, -1, -1)
    extent = Extent([-40, -200, 0], [40, 0, 100], [60, 100, 0])
    got = ours(Case(q, k, k, extent, 1.0), 32, 32, 4)
    assert bool((got[0, :, 0] == 0).all())
    assert bool((got[1:] == 0).all())
    assert float(got[0].sum()) == pytest.approx(15)


def test_logits_that_overflow_an_exponential() -> None:
    case = make_case("no padding", length=1500, heads=2, groups=1, dim=16)
    large = Case(case.q, case.k, case.v, case.extent, 100.0)
    torch.testing.assert_close(ours(large, 64, 64, 8), oracle(large, 64, 64, 8), atol=2e-3, rtol=2e-3)


def test_dead_slots_and_padding_queries_may_hold_nan() -> None:
    case = make_case("left padding", length=300, heads=2, groups=1, dim=16)
    expected = ours(case, 64, 32, 8)
    position = case.extent.key_positions(case.key_len)
    dead = (position < 0)[:, None, :, None]
    spoilt = Case(
        case.q.masked_fill(dead, math.nan), case.k.masked_fill(dead, math.nan), case.v, case.extent, case.scale
    )
    assert torch.equal(ours(spoilt, 64, 32, 8), expected)


def test_scores_do_not_depend_on_threads_strides_or_parts() -> None:
    case = make_case("left padding", length=2500, heads=4, groups=2, dim=40, dtype=torch.bfloat16)
    q, k = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (case.q, case.k))
    moved = Case(q, k, case.v, case.extent, case.scale)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = ours(case, 64, 128, 8)
        for threads in (2, 5):
            torch.set_num_threads(threads)
            assert torch.equal(ours(moved, 64, 128, 8), expected)
    finally:
        torch.set_num_threads(before)
    whole = planning.antidiagonal_scores(
        case.q, case.k, scale=case.scale, extent=case.extent, block_q=64, block_k=128, stride=8, at=0, stop=40
    )
    assert torch.equal(whole, expected)


def test_bad_input_is_named() -> None:
    case = make_case("no padding", length=10, heads=2, groups=1, dim=8)
    fields = {"scale": 1.0, "extent": case.extent, "block_q": 4, "at": 0}
    with pytest.raises(ValueError, match="stride must divide block_q and block_k, got 4 for blocks 4 and 6"):
        planning.antidiagonal_scores(case.q, case.k, **fields, block_k=6, stride=4, stop=1)
    with pytest.raises(ValueError, match="query blocks 0 to 4 do not lie in 10 queries in blocks of 4"):
        planning.antidiagonal_scores(case.q, case.k, **fields, block_k=8, stride=4, stop=4)
