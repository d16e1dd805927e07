"""What tests of `Blocks` share: every planner that is here, calls, and scores of their blocks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gossamer import AttentionCall
from gossamer.backends import cpu, triton
from gossamer.blocks import Blocks
from gossamer.rules import Rule
from gossamer.testing import make_call

PLANNERS = ["torch"] + (["cpu"] if cpu.is_available() else [])
if triton.is_available() and triton.interprets():
    PLANNERS.append("triton")
every_planner = pytest.mark.parametrize("planner", PLANNERS)
INTERPRETED = pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning")


@pytest.fixture
def on(monkeypatch, planner: str) -> None:
    monkeypatch.setenv("GOSSAMER_PLANNER", planner)


def call_in(situation: str, length: int = 150) -> AttentionCall:
    return make_call(situation, length=length, heads=2, groups=1, dim=16)


def block_scores(blocks: Blocks, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (blocks.call.batch, blocks.heads, blocks.grid.query_blocks, blocks.grid.key_blocks)
    return torch.rand(shape, generator=generator)


def naive(call: AttentionCall, rule: Rule, *, first: int = 0, own: int = 1, last_rows: int = 0) -> Tensor:
    """By the definition of rules on all rows, of what is seen, and of what is forced."""
    blocks = Blocks(call, 16, 24)
    scores, grid = block_scores(blocks), blocks.grid
    seen, forced = torch.zeros(2, *scores.shape[:1], 1, *scores.shape[2:], dtype=torch.bool)
    extent = call.extent
    for b in range(call.batch):
        start, count, keys = (int(x[b]) for x in (extent.first_position, extent.query_count, extent.key_count))
        last = range(max(start, start + count - last_rows), start + count)
        reach = math.inf if extent.limit is None else extent.limit
        j, n = torch.arange(keys), torch.arange(grid.key_blocks)
        for i in range(start, start + count):
            m = i // 16 - start // 16
            distance = i - j if extent.causal else (i - j).abs()
            allowed = (distance >= 0) & (distance < reach)
            seen[b, 0, m, j[allowed] // 24] = True
            near = (-own < n - i // 24) & (n - i // 24 < (1 if extent.causal else own))
            forced[b, 0, m] |= (n < first) | near | any(p // 16 == i // 16 for p in last)
    forced &= seen
    picked = rule.select(scores.masked_fill(~seen, rule.unseen), forced)
    return ((picked | forced) & seen).expand_as(scores)
