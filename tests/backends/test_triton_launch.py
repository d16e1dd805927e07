"""How the Triton backend launches attention: tensor descriptors, tiles of any size, a bitmap of limited size."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from triton_checks import check, draw, launch, plan_for, run
from triton_support import FULL_SIZE, MARKS, ON_GPU

from gossamer import Extent, SparsePlan
from gossamer.backends.triton import config
from gossamer.testing import SITUATIONS, make_call, random_plan

pytestmark = MARKS
DESCRIPTORS = config.Config(32, 32, 4, 2, descriptors=True)


@pytest.mark.parametrize(
    ("part", "dim"), [("blocks", 80), ("bands", 64), ("columns", 80), ("left padding", 128), ("static cache", 64)]
)
def test_descriptors(part: str, dim: int) -> None:
    """Runs of keys loaded through tensor descriptors: odd lengths, dead slots full of NaN, head dimensions that a tile
    pads, and columns, which never use them."""
    situation = part if part in SITUATIONS else "no padding"
    dtype = torch.float16 if part in ("blocks", "left padding") else torch.bfloat16
    call = make_call(situation, length=121 * FULL_SIZE, heads=4, groups=2, dim=dim, dtype=dtype)
    plan = plan_for(call, dim, heads=2)
    nothing = torch.zeros(1, dtype=torch.int32)[:0]
    if part == "bands":
        plan = replace(plan, block_indptr=None, block_indices=nothing, sink=[7, 40], window=[130, 30])
    if part != "columns":
        plan = replace(plan, column_indptr=None, column_indices=nothing)
    with mock.patch.object(launch, "_descriptor", wraps=launch._descriptor) as made:
        check(call, plan, DESCRIPTORS)
    assert made.call_count == (2 if not ON_GPU or torch.cuda.get_device_capability() >= (9, 0) else 0)


def test_tensors_that_no_descriptor_describes() -> None:
    """Rows whose distance is no multiple of 16 bytes, a base off that grid, four-byte elements: plain loads."""
    plan = random_plan(5, batch=1, heads=2, query_len=70, key_len=70, block_q=32, block_k=32)
    call = draw(plan, heads=2, groups=2, dim=64, dtype=torch.float16)
    k, v = (F.pad(t, (3, 5))[..., 3:-5] for t in (call.k, call.values))
    uneven = draw(plan, heads=2, groups=2, dim=60, dtype=torch.float16)
    for other in (uneven, replace(call, k=k, v=v), draw(plan, heads=2, groups=2, dim=64)):
        assert not launch.describable(other.k)
        check(other, plan, DESCRIPTORS)
    assert launch.describable(torch.zeros(1, 2, 5, 64, dtype=torch.bfloat16))
    assert not launch.describable(torch.zeros(1, 1, 1, 64, dtype=torch.bfloat16).expand(1, 2, 5, 64))


def test_a_small_bitmap_at_a_time(monkeypatch) -> None:
    """Heads take turns with the bitmap of selected blocks when it would be large."""
    call = make_call("left padding", length=70, heads=6, groups=2, dim=16)
    plan = plan_for(call, 8, heads=6)
    expected = run(call, plan)
    for rows in (0, 2, 5):
        monkeypatch.setattr(launch, "_MOST_BITMAP_BYTES", rows * plan.num_query_blocks * 4)
        for got, wanted in zip(run(call, plan), expected, strict=True):
            assert torch.equal(got, wanted)


@pytest.mark.parametrize(
    ("heads_that_fit", "expected"), [(1, (1, 1)), (3, (3, 3)), (5, (3, 3)), (7, (6, 6)), (12, (12, 6))]
)
def test_heads_of_a_group_share_a_launch(heads_that_fit: int, expected: tuple[int, int]) -> None:
    """Of 12 rows of the plan, 6 a key/value head."""
    assert launch._rows_at_once(12, 6, launch._MOST_BITMAP_BYTES // heads_that_fit) == expected


@pytest.mark.parametrize("part", ["dense", "bands", "columns"])
def test_tiles_larger_than_a_block(part: str) -> None:
    """The configuration of the table for Hopper, on a plan of smaller blocks that lists none."""
    length = 200
    plan = SparsePlan.dense(1, length, length, Extent.full(1, length, length))
    if part == "bands":
        plan = replace(plan, sink=9, window=70)
    elif part == "columns":
        listed = torch.arange(0, length, 3, dtype=torch.int32)
        plan = replace(
            plan,
            window=5,
            column_group=plan.num_query_blocks,
            column_indptr=torch.tensor([0, listed.numel()]),
            column_indices=listed,
        )
    chosen = config.choose(
        config.Problem((9, 0), 128, 2, 128, plan.block_k, 17, blocks=False, columns=part == "columns")
    )
    assert chosen.tile_n == (64 if part == "columns" else 128)
    check(draw(plan, heads=2, groups=1, dim=32, dtype=torch.float16), plan, chosen)
