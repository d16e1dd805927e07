"""The cpu backend at the edges: nothing to do, very large tensors, forked workers."""

import math
import os
import subprocess
import sys

import pytest
import torch
from cpu_checks import check, needs_kernels

from gossamer import AttentionCall, Extent, SparsePlan
from gossamer.backends import cpu
from gossamer.plan import Grid

pytestmark = needs_kernels


@pytest.mark.parametrize(("batch", "query_len", "key_len"), [(0, 5, 5), (1, 0, 5), (2, 0, 0), (1, 5, 0), (1, 1, 0)])
def test_nothing_to_do(batch: int, query_len: int, key_len: int) -> None:
    extent = Extent([0] * batch, [query_len] * batch, [0] * batch, [key_len] * batch)
    plan = SparsePlan.dense(1, query_len, key_len, extent)
    q, k = torch.randn(batch, 2, query_len, 32), torch.randn(batch, 1, key_len, 32)
    call = AttentionCall(q, k, k, extent)
    out, lse = cpu.attend(call, plan)
    assert out.shape == q.shape
    assert bool((out == 0).all())
    assert bool((lse == -math.inf).all())
    grid = Grid(extent, 64, 64)
    blocks, width, everything = grid.query_blocks, grid.key_blocks, range(grid.query_blocks)
    means = cpu.pool_queries(call, grid), cpu.pool_keys(call, grid)
    assert [x.shape for x in means] == [(batch, 2, blocks, 32), (batch, 1, width, 32)]
    assert cpu.pooled_scores(call, grid, *means, everything).shape == (batch, 2, blocks, width)
    assert cpu.row_block_energy(call, grid, means[1], everything).shape == (batch, 1, blocks, width)
    assert cpu.antidiagonal_scores(call, grid, 16, everything).shape == (batch, 2, blocks, width)
    assert all(bool((mass == 0).all()) for mass in cpu.last_query_probe(call, 64))
    assert int(cpu.count(plan).sum()) == 0
    writer = cpu.ListWriter(batch, 2, blocks, width, q.device)
    assert cpu.finish(writer, None, heads=2, query_len=query_len, key_len=key_len, extent=extent).density() == 1.0


def test_a_last_dimension_of_one_has_any_stride() -> None:
    plan = SparsePlan.dense(1, 5, 5, Extent.full(1, 5, 5))
    x = torch.randn(1, 1, 1, 5).transpose(2, 3)
    assert x.stride(-1) != 1
    check(AttentionCall(x, x, x), plan)


@pytest.mark.parametrize("query_len", [3, 100])
def test_offsets_beyond_32_bits(query_len: int) -> None:
    """Heads more than 2^31 elements apart; the memory between them is never touched."""
    key_len, dim, gap = 200, 64, (1 << 31) + 64
    storage = torch.empty(gap + key_len * dim, dtype=torch.bfloat16)
    k = storage.as_strided((1, 2, key_len, dim), (0, gap, dim, 1))
    generator = torch.Generator().manual_seed(0)
    k.copy_(torch.randn(1, 2, key_len, dim, generator=generator))
    q = torch.randn(1, 4, query_len, dim, generator=generator).bfloat16()
    call = AttentionCall(q, k, k)
    assert not torch.equal(k[:, 0], k[:, 1])
    check(call, SparsePlan.dense(2, query_len, key_len, call.extent))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_forked_workers() -> None:
    """OpenMP's threads do not survive a fork; a child must neither wait for them nor compute anything else."""
    code = """
import os, sys, warnings
import torch
from gossamer import AttentionCall, SparsePlan
from gossamer.backends import cpu
warnings.simplefilter("ignore")
torch.set_num_threads(2)
q = torch.randn(1, 4, 200, 64)
call = AttentionCall(q, q, q)
plan = SparsePlan.dense(4, 200, 200, call.extent)
expected, _ = cpu.attend(call, plan)
children = []
for _ in range(2):
    child = os.fork()
    if child == 0:
        got = [cpu.attend(call, plan)[0].numpy().tobytes() for _ in range(2)]
        os._exit(0 if got == [expected.numpy().tobytes()] * 2 else 3)
    children.append(child)
codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
again, _ = cpu.attend(call, plan)
print(codes, torch.equal(again, expected))
"""
    assert output_of(code) == "[0, 0] True"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_forked_workers_that_import_late() -> None:
    """The parent's OpenMP threads are torch's, and nothing of gossamer saw the fork."""
    code = """
import os, signal, sys
import torch
torch.set_num_threads(2)
torch.randn(2000, 2000).exp()
child = os.fork()
if child == 0:
    signal.alarm(60)
    from gossamer import AttentionCall, SparsePlan
    from gossamer.backends import cpu
    q = torch.randn(1, 4, 200, 64)
    call = AttentionCall(q, q, q)
    plan = SparsePlan.dense(4, 200, 200, call.extent)
    two, _ = cpu.attend(call, plan)
    torch.set_num_threads(1)
    one, _ = cpu.attend(call, plan)
    os._exit(0 if torch.equal(one, two) else 3)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert output_of(code) == "0"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_planning_in_forked_workers_of_one_thread() -> None:
    """Planners call torch too, whose own operations wait for the parent's threads unless told to use one."""
    code = """
import os, signal, sys
import torch
from gossamer import AttentionCall, methods
torch.set_num_threads(2)
generator = torch.Generator().manual_seed(0)
q, k = (torch.randn(1, 4, 3000, 64, generator=generator) for _ in range(2))
def plans():
    made = (methods.create(name) for name in ("block_sparse", "vertical_slash", "max_relative"))
    return [m.plan(AttentionCall(q, k)).block_indices.numpy().tobytes() for m in made]
expected = plans()
child = os.fork()
if child == 0:
    signal.alarm(60)
    torch.set_num_threads(1)
    os._exit(0 if plans() == expected else 3)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert output_of(code) == "0"


def output_of(code: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120, check=True
    )
    return done.stdout.strip()
