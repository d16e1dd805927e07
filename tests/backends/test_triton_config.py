"""Tile shapes of the Triton backend: the table, and what tuning tries and keeps."""

import math
from typing import Any
from unittest import mock

import pytest

from gossamer.backends import triton
from gossamer.backends.triton import config, forward

pytestmark = pytest.mark.skipif(not triton.is_available(), reason=f"{triton.why_unavailable()}")
launch: Any = pytest.importorskip("gossamer.backends.triton.launch", reason="Triton is not installed")
NOTHING = tuple(range(len(launch.Arguments._fields)))  # for a launch that is replaced


def problem(**changes) -> config.Problem:
    fields: dict[str, Any] = dict(capability=(9, 0), dim=128, element_size=2, rows=128, block_k=128, bucket=17)
    return config.Problem(**(fields | changes))


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0), (0, 0)])
@pytest.mark.parametrize("dim", [16, 64, 128, 256])
def test_every_architecture_has_a_configuration(capability: tuple[int, int], dim: int) -> None:
    for block_k in (1, 16, 48, 64, 100, 128):
        chosen = config.choose(problem(capability=capability, dim=dim, block_k=block_k))
        assert chosen.tile_n & (chosen.tile_n - 1) == 0
        assert chosen.tile_n >= 16
        assert block_k % chosen.tile_n == 0 or block_k in (1, 48, 100)


@pytest.mark.parametrize(
    ("capability", "kilobytes", "unread"),
    [((7, 5), 64, 1), ((8, 0), 163, 1), ((8, 6), 99, 1), ((8, 9), 99, 1), ((9, 0), 227, 0), ((12, 0), 99, 1)],
)
@pytest.mark.parametrize("rows", [16, 64, 128, 512])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_configurations_fit_shared_memory(
    capability: tuple[int, int], kilobytes: int, unread: int, rows: int, dim: int
) -> None:
    """Queries, and keys and values by stage; before Hopper products read registers, which frees one stage."""
    chosen = config.choose(problem(capability=capability, dim=dim, rows=rows))
    tiles = max(1, chosen.stages - unread) * 2 * chosen.tile_n
    assert (chosen.tile_m + tiles) * dim * 2 <= kilobytes << 10
    assert chosen.descriptors == (capability == (9, 0))


def test_candidates_with_and_without_descriptors() -> None:
    hopper = config.candidates(problem())
    assert {c.descriptors for c in hopper} == {True, False}
    assert len(set(hopper)) == len(hopper)
    assert not any(c.descriptors for c in config.candidates(problem(capability=(8, 0))))


def test_candidates_are_few() -> None:
    """Each is compiled, which takes seconds."""
    for rows in (16, 64, 512):
        for dim in (64, 128, 256):
            for changes in ({}, {"element_size": 4}, {"columns": True}, {"blocks": False}, {"capability": (8, 0)}):
                case = problem(rows=rows, dim=dim, **changes)
                found = config.candidates(case)
                assert found[0] == config.choose(case)
                assert len(found) <= 12
                assert len(set(found)) == len(found)


@pytest.mark.parametrize("dim", [64, 80, 128, 256])
def test_tiles_of_exact_products_are_small(dim: int) -> None:
    """Beyond these the assembler spills the operands; see `test_chosen_tiles_fit_the_registers_of_hopper`."""
    for rows in (16, 64, 512):
        for chosen in config.candidates(problem(element_size=4, dim=config.power_of_two(dim), rows=rows)):
            assert chosen.tile_m * chosen.tile_n * dim <= 64 * 32 * 64


def test_a_plan_without_blocks_has_tiles_larger_than_a_block() -> None:
    fitted = config.choose(problem(block_k=64))
    free = config.choose(problem(block_k=64, blocks=False))
    assert (fitted.tile_n, free.tile_n) == (64, 128)
    assert config.choose(problem(columns=True)).tile_n == 64


def test_what_does_not_compile_takes_forever() -> None:
    from triton.errors import TritonError

    def failing(error: Exception) -> Any:
        return mock.patch.object(launch, "launch", side_effect=error)

    chosen = config.choose(problem())
    for error in (TritonError("out of resources"), RuntimeError("PassManager::run failed")):
        with failing(error):
            assert forward._seconds(NOTHING, chosen) == math.inf
    with failing(RuntimeError("an illegal memory access")), pytest.raises(RuntimeError, match="illegal"):
        forward._seconds(NOTHING, chosen)
    with mock.patch.object(launch, "launch") as launched, mock.patch("triton.testing.do_bench") as bench:
        bench.return_value = 2.0
        assert forward._seconds(NOTHING, chosen) == 2e-3
    launched.assert_called_with(launch.Arguments(*NOTHING), config=chosen)
    assert bench.call_args.kwargs["warmup"] + bench.call_args.kwargs["rep"] <= 40


def test_tuning_of_what_never_runs_keeps_the_table(monkeypatch) -> None:
    monkeypatch.setattr(forward, "_seconds", lambda arguments, chosen: math.inf)
    with pytest.raises(RuntimeError, match="none of 12 tile shapes runs"):
        forward._tune(problem(), ())
    assert config._tuned == {}


def test_tuning_holds_for_a_bucket_of_lengths() -> None:
    plan_len = {length: problem(bucket=length.bit_length()) for length in (70_000, 100_000, 140_000)}
    slow = config.choose(plan_len[70_000])
    fast = next(c for c in config.candidates(plan_len[70_000]) if c != slow)
    try:
        config.tune(plan_len[70_000], lambda c: 1.0 if c == fast else 2.0)
        assert config.choose(plan_len[100_000]) == fast
        assert config.choose(plan_len[140_000]) == slow
    finally:
        config.forget()
