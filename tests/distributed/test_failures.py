"""What goes wrong in a ring ends it with an error that says what: nobody waits for ever."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch

from gossamer import Extent, SparsePlan
from gossamer.distributed import Layout, RingPlan, ring_attention

LENGTH = 64


def tensors(tokens: int) -> list[torch.Tensor]:
    return [torch.randn(1, heads, tokens, 8).requires_grad_() for heads in (4, 2, 2)]


def attend_until_one_ends(rank: int, ends: str, folder: str) -> str:
    """All attend, forward and backward, until rank 1 ends, or waits until the others were told; what they are told."""
    layout = Layout("striped", LENGTH, torch.distributed.get_world_size(), 8)
    plan = RingPlan.dense(layout, rank, heads=2)
    given = tensors(layout.tokens(rank))
    group = torch.distributed.new_group(timeout=timedelta(seconds=2))
    out = attend(given, plan, group)
    if rank == 1 and ends in ("before", "hangs"):
        while ends == "hangs" and not all((Path(folder) / f"told {other}").exists() for other in (0, 2)):
            time.sleep(0.05)
        os._exit(0)
    try:
        if ends == "backward":
            out.sum().backward() if rank != 1 else os._exit(0)
        else:
            attend(given, plan, group)
    except RuntimeError as error:
        (Path(folder) / f"told {rank}").touch()
        return str(error)
    return "nothing"


@pytest.mark.parametrize("ends", ["before", "backward", "hangs"])
def test_a_rank_that_ends_or_hangs_ends_the_others(ends: str, tmp_path: Path) -> None:
    answers = ranks.run(attend_until_one_ends, 3, tmp_path, ends, str(tmp_path))
    assert answers[1] is None
    told = [torch.load(path) for path in (answers[0], answers[2])]
    assert all("a rank of the group has ended" in message for message in told)


def attend(given: list[torch.Tensor], plan: RingPlan, group: Any = None) -> torch.Tensor:
    q, k, v = given
    return ring_attention(q, k, v, plan, group=group)[0]


def misused(rank: int) -> list[str]:
    layout = Layout("striped", LENGTH, 2, 8)
    plan, given = RingPlan.dense(layout, rank, heads=2), tensors(layout.tokens(rank))

    def message(given: list[torch.Tensor], plan: RingPlan) -> str:
        try:
            attend(given, plan)
        except ValueError as error:
            return str(error)
        return "nothing"

    short = [x[:, :, 1:] for x in given]
    alone = RingPlan.dense(Layout("striped", LENGTH, 1, 8), 0, heads=2)
    return [
        message(short, plan),
        message(given, RingPlan.dense(layout, rank, heads=3)),
        message(given, RingPlan.dense(layout, 1 - rank, heads=2)),
        message(tensors(LENGTH), alone),
        message(given, RingPlan.dense(layout, rank, heads=2, batch=2)),
    ]


def test_what_does_not_fit_is_refused_by_all(tmp_path: Path) -> None:
    for path in ranks.run(misused, 2, tmp_path):
        tokens, heads, rank, group, batch = torch.load(path)
        assert "use Layout.split" in tokens
        assert "3 heads" in heads
        assert "batch 2" in batch
        assert "the plan is of rank" in rank
        assert "for 1 ranks, but the group has 2" in group or "the plan is of rank 0" in group


def test_without_a_process_group_it_says_what_to_call() -> None:
    plan = RingPlan.dense(Layout("striped", LENGTH, 2, 8), 0, heads=2)
    with pytest.raises(ValueError, match="init_process_group"):
        attend(tensors(32), plan)


def test_a_plan_of_another_length_is_refused() -> None:
    plan = SparsePlan.dense(2, 32, 32, Extent.full(1, 32, 32))
    with pytest.raises(ValueError, match="a ring of 64 positions"):
        RingPlan(plan, Layout("striped", LENGTH, 2, 8), 0)
