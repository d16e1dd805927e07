"""Token-exact slashes in C++ give exactly the blocks and columns of the torch construction."""

import pytest
import torch

from gossamer.backends import cpu
from gossamer.backends.cpu import planning
from gossamer.methods._exact_slash import exact_slash_blocks
from gossamer.plan import Extent, SparsePlan

pytestmark = [
    pytest.mark.skipif(not cpu.is_available(), reason=f"no C++ kernels: {cpu.why_unavailable()}"),
    pytest.mark.usefixtures("poisoned_memory"),
]
PARTS = ("block_indptr", "block_indices", "column_indptr", "column_indices")
EXTENTS = {
    "no padding": lambda length: (Extent.full(2, length, length), length),
    "left padding": lambda length: (
        Extent([-(length // 3), 0], [length // 3, 0], [length - length // 3, length]),
        length,
    ),
    "chunked": lambda length: (Extent.full(2, length - length // 2, length), length - length // 2),
    "static cache": lambda length: (Extent([0, 0], [0, 0], [length // 2, length]), length),
}


def draw(length: int, share: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    columns, slashes = (torch.rand(2, 3, length, generator=generator) < share for _ in range(2))
    slashes[0, 1] = False  # a head without any
    return columns, slashes


def plans(columns, slashes, extent, query_len, monkeypatch) -> tuple[SparsePlan, SparsePlan]:
    ours = exact_slash_blocks(columns, slashes, extent, query_len)
    monkeypatch.setenv(planning.ENVIRONMENT, "torch")
    oracle = exact_slash_blocks(columns, slashes, extent, query_len)
    monkeypatch.delenv(planning.ENVIRONMENT)
    return ours, oracle


@pytest.mark.parametrize("situation", EXTENTS)
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 1.0])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 200, 4200])
def test_the_plan_is_that_of_torch(monkeypatch, situation: str, share: float, length: int) -> None:
    extent, query_len = EXTENTS[situation](length)
    columns, slashes = draw(length, share, length)
    ours, oracle = plans(columns, slashes, extent, query_len, monkeypatch)
    for part in PARTS:
        assert torch.equal(getattr(ours, part), getattr(oracle, part)), part


def test_chunks_and_threads_do_not_matter(monkeypatch) -> None:
    columns, slashes = draw(700, 0.05, 0)
    extent = Extent.full(2, 700, 700)
    expected = exact_slash_blocks(columns, slashes, extent, 700)
    monkeypatch.setattr("gossamer.methods._exact_slash._BITMAP_BYTES", 1200)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            again = exact_slash_blocks(columns, slashes, extent, 700)
            assert all(torch.equal(getattr(again, part), getattr(expected, part)) for part in PARTS)
    finally:
        torch.set_num_threads(before)


def test_bad_input_is_named() -> None:
    columns, slashes = draw(64, 0.1, 0)
    with pytest.raises(ValueError, match=r"must be \[B, H, T\] for the extent's 1 batch rows"):
        planning.exact_slashes(columns, slashes, Extent.full(1, 64, 64), at=0, stop=1)
    with pytest.raises(ValueError, match="must rise from 0, got 2 to 1"):
        planning.exact_slashes(columns, slashes, Extent.full(2, 64, 64), at=2, stop=1)
