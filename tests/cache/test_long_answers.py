"""Ten thousand steps: caches that hold so much hold no more, and what methods keep for steps does not grow."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from gossamer import AttentionCall, Extent, Policy
from gossamer.attention import attend
from gossamer.cache import StoreLayer, create
from gossamer.methods import Dense, InfLLM, LServe, Quest

# All were run for 10,000 steps; here one is, and what would leak in the others shows in fewer.
STEPS = {"tiers": 10_000}
MOST_GROWTH = 6 << 20  # bytes from a third of the steps on

CASES: dict[str, tuple[dict[str, Any], Any]] = {
    "streaming_llm": ({"sinks": 4, "recent": 60}, None),
    "tiers": ({"hot": 64, "resident": 128, "block": 16}, Quest(budget=64, page=16, dense_layers=0)),
    "tiers+lserve": ({"hot": 64, "resident": 256, "block": 64}, LServe(budget=256, page=64)),
    "tiers+infllm": ({"hot": 64, "resident": 128, "block": 16}, InfLLM(blocks=2, block=16, init=16, local=64)),
}


def resident() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("name", CASES)
@torch.inference_mode()
def test_memory_does_not_grow(name: str, tmp_path: Path) -> None:
    fields, method = CASES[name]
    more = {"folder": str(tmp_path)} if name.startswith("tiers") else {}
    layer = create(name.partition("+")[0], **fields, **more).layer(0, 1)
    assert isinstance(layer, StoreLayer)
    policy = Policy(Dense("gossamer"), decode=method, max_density=2)
    generator = torch.Generator().manual_seed(0)
    before, held, steps = 0, 0, STEPS.get(name, 2_000)
    for n in range(steps):
        new = torch.randn(3, 1, 2, 1, 16, generator=generator)
        k, v = layer.update(new[0], new[1])
        extent = layer.extent(1) or Extent.full(1, 1, k.shape[2])
        layer.place(extent)
        call = AttentionCall(new[2], k, v, extent, layer=3, store=layer, state=layer.state)
        attend(call, policy)
        layer.attended(call)
        if n == steps // 3:
            before, held = resident(), layer.nbytes
    assert layer.length == steps
    assert layer.nbytes <= 1.5 * held
    # Summaries of what is in the file stay in memory: a bounded few bytes a token.
    assert resident() - before < MOST_GROWTH


def test_what_everything_takes_grows_with_it_alone() -> None:
    """Of a cache that keeps all, a sixteenth of room ahead."""
    layer = StoreLayer()
    one = torch.zeros(1, 2, 1, 16)
    with torch.inference_mode():
        for _ in range(3_000):
            layer.update(one, one)
    assert layer._room is not None
    assert layer._room[0].shape[2] <= 3_000 * 17 / 16 + 64
