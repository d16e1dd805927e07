"""Tile shapes, warps and stages: a table by architecture and head dimension, and measured choices by length bucket.

The table follows from what fits a multiprocessor's shared memory and registers, by the compiler's own account:
``tests/backends/compile_triton_table.py`` asks for it. It is not yet measured on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["Config", "Problem", "candidates", "choose", "choose_backward", "forget", "tune"]


@dataclass(frozen=True, slots=True)
class Config:
    """Rows and keys of a tile, warps of a program, stages of the load pipeline.

    ``descriptors`` loads runs of keys through tensor descriptors where the device, Triton and the tensors allow it.
    """

    tile_m: int
    tile_n: int
    warps: int
    stages: int
    descriptors: bool = False


@dataclass(frozen=True, slots=True)
class Problem:
    """What a configuration depends on. Lengths count by bucket: their number of bits, never the length itself."""

    capability: tuple[int, int]
    dim: int
    element_size: int
    rows: int
    block_k: int
    bucket: int
    blocks: bool = True
    columns: bool = False

    @classmethod
    def of(
        cls, q: Tensor, v: Tensor, heads: int, block_q: int, block_k: int, key_len: int, *, blocks: bool, columns: bool
    ) -> Problem:
        """For a plan of ``heads`` heads: its block sizes, and whether it lists ``blocks`` and ``columns``."""
        capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else (0, 0)
        return cls(
            capability,
            power_of_two(max(q.shape[-1], v.shape[-1])),
            q.element_size(),
            power_of_two(block_q * (q.shape[1] // heads)),
            block_k,
            key_len.bit_length(),
            blocks,
            columns,
        )


# (generation, largest padded head dimension) -> for 2-byte elements, with 128 rows or more and with fewer. Two stages
# copy a tile while its predecessor's last product runs, three while all of it runs.
_HOPPER, _AMPERE, _SMALL, _TURING = 90, 80, 86, 75
_TABLE: dict[tuple[int, int], tuple[Config, Config]] = {
    (_HOPPER, 64): (Config(128, 64, 4, 3, True), Config(64, 64, 4, 3, True)),
    (_HOPPER, 128): (Config(128, 128, 8, 3, True), Config(64, 64, 4, 3, True)),
    (_HOPPER, 256): (Config(128, 32, 8, 4, True), Config(64, 32, 4, 3, True)),
    (_AMPERE, 64): (Config(128, 64, 4, 3), Config(64, 64, 4, 3)),
    (_AMPERE, 128): (Config(128, 64, 8, 3), Config(64, 64, 4, 3)),
    (_AMPERE, 256): (Config(128, 32, 8, 3), Config(64, 32, 8, 3)),
    (_SMALL, 64): (Config(128, 64, 4, 3), Config(64, 64, 4, 3)),
    (_SMALL, 128): (Config(128, 32, 8, 3), Config(64, 32, 4, 3)),
    (_SMALL, 256): (Config(64, 32, 8, 2), Config(64, 32, 8, 2)),
    (_TURING, 64): (Config(128, 64, 4, 2), Config(64, 64, 4, 2)),
    (_TURING, 128): (Config(64, 32, 4, 2), Config(64, 32, 4, 2)),
    (_TURING, 256): (Config(64, 32, 8, 1), Config(64, 32, 8, 1)),
}
# Exact fp32 products have no tensor cores: they are unrolled, and of a tile whose operands overflow the registers the
# assembler puts everything into local memory.
_FP32 = {64: Config(64, 32, 8, 1), 128: Config(32, 16, 8, 1), 256: Config(32, 16, 8, 1)}
# Of the backward kernels, whose accumulators and operands are more: rows and keys of a tile by the largest padded head
# dimension, of 2-byte elements and of fp32.
_BACKWARD = {64: Config(64, 64, 4, 2), 128: Config(64, 64, 8, 2), 256: Config(32, 32, 8, 1)}
_BACKWARD_FP32 = {64: Config(32, 32, 8, 1), 128: Config(32, 16, 8, 1), 256: Config(16, 16, 8, 1)}
_INTERPRETED_BACKWARD = Config(64, 64, 4, 1)
_INTERPRETED = Config(128, 64, 4, 1)  # the fewer steps, the sooner; capability (0, 0)
_SMALL_MEMORY = ((8, 6), (8, 9), (12, 0), (12, 1))  # 100 KiB of shared memory, unlike others of their generation
_MOST_WITH_COLUMNS = 64  # keys of a tile: what finds columns takes the registers of more
_FEWEST_REGISTERS, _MOST_REGISTERS = 40, 160  # of a candidate's scores and output, a thread
_MOST_CANDIDATES = 12
_SMALLEST = 16  # of a matrix product
_SMALLEST_EVEN = 32  # below it, a tile with masked keys is better than one that divides the block

_tuned: dict[Problem, Config] = {}


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n and at least 16."""
    return max(_SMALLEST, 1 << max(0, n - 1).bit_length())


def choose(problem: Problem) -> Config:
    """The tuned configuration for a problem, else the table's, fitted to its blocks."""
    return _tuned.get(problem) or _fit(_from_table(problem), problem)


def choose_backward(problem: Problem) -> Config:
    """The table's configuration for the kernels of gradients: it fits no block, which they cut into tiles."""
    if problem.capability[0] == 0:
        return _INTERPRETED_BACKWARD
    table = _BACKWARD_FP32 if problem.element_size > 2 else _BACKWARD
    return next(config for dim, config in table.items() if problem.dim <= dim)


def candidates(problem: Problem) -> list[Config]:
    """What `tune` tries, at most twelve: the table's choice, the same without descriptors, and its neighbours.

    Left out is what would not fit a thread's registers: a kernel that spills is slow, and slow to compile.
    """
    start = _from_table(problem)
    wanted = [start, replace(start, descriptors=False)]
    if problem.element_size > 2:
        wanted += [replace(start, tile_m=start.tile_m // 2), replace(start, tile_m=start.tile_m // 2, warps=4)]
    else:
        shapes = dict.fromkeys([(start.tile_m, start.tile_n), (start.tile_m, 64), (64, 64), (64, 32), (128, 32)])
        for stages in (3, 2):
            for tile_m, tile_n in shapes:
                for warps in (8, 4):
                    # Of scores and output, which a thread holds besides operands and addresses.
                    if _FEWEST_REGISTERS <= tile_m * (tile_n + problem.dim) // (32 * warps) <= _MOST_REGISTERS:
                        wanted.append(replace(start, tile_m=tile_m, tile_n=tile_n, warps=warps, stages=stages))
    return list(dict.fromkeys(_fit(config, problem) for config in wanted))[:_MOST_CANDIDATES]


def tune(problem: Problem, seconds: Callable[[Config], float], among: Iterable[Config] | None = None) -> Config:
    """Keep the fastest configuration for all problems of the same kind and length bucket, and return it.

    Args:
        seconds: measures one configuration; infinity for one that does not run. Where none runs, none is kept.
    """
    measured = {config: seconds(config) for config in (candidates(problem) if among is None else among)}
    best = min(measured, key=lambda config: measured[config])
    if measured[best] < math.inf:
        _tuned[problem] = best
    return best


def forget() -> None:
    """Drop what `tune` has kept."""
    _tuned.clear()


def _from_table(problem: Problem) -> Config:
    major = problem.capability[0]
    if major == 0:
        return _INTERPRETED
    if problem.element_size > 2:
        return next(config for dim, config in _FP32.items() if problem.dim <= dim)
    level = _HOPPER if major in (9, 10) else _AMPERE if major >= 8 else _TURING
    if problem.capability in _SMALL_MEMORY:
        level = _SMALL
    tall, short = next(configs for (at, dim), configs in _TABLE.items() if at == level and problem.dim <= dim)
    config = tall if problem.rows >= tall.tile_m else short
    return replace(config, tile_n=min(config.tile_n, _MOST_WITH_COLUMNS)) if problem.columns else config


def _fit(config: Config, problem: Problem) -> Config:
    """Rows no more than a query block has, and keys that divide a key block where there are any and they can."""
    tile_m = min(config.tile_m, problem.rows)
    divisor = problem.block_k & -problem.block_k
    tile_n = config.tile_n
    if problem.blocks:
        tile_n = min(tile_n, power_of_two(problem.block_k))
        if divisor >= _SMALLEST_EVEN:
            tile_n = min(tile_n, divisor)
    few = tile_m < min(64, config.tile_m)
    return replace(config, tile_m=tile_m, tile_n=tile_n, warps=4 if few else config.warps)
