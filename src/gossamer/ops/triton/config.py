"""Tile shapes, warps and stages: a table by architecture and head dimension, and measured choices by length bucket.

The table follows from what fits a multiprocessor's shared memory and registers, by the compiler's own account. It is
not yet measured on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["Config", "Problem", "candidates", "choose", "forget", "tune"]


@dataclass(frozen=True, slots=True)
class Config:
    """Rows and keys of a tile, warps of a program, stages of the load pipeline.

    ``descriptors`` loads runs of keys through tensor descriptors where the device, Triton and the tensors allow it.
    ``warp_specialize`` asks Triton to give loads and products warps of their own; no table entry or candidate does:
    Triton 3.9 fails to compile this kernel so for Hopper with 4 warps and for Blackwell, and ignores it with 8.
    """

    tile_m: int
    tile_n: int
    warps: int
    stages: int
    descriptors: bool = False
    warp_specialize: bool = False


@dataclass(frozen=True, slots=True)
class Problem:
    """What a configuration depends on. Lengths count by bucket: their number of bits, never the length itself."""

    capability: tuple[int, int]
    dim: int
    element_size: int
    rows: int
    block_k: int
    bucket: int

    @classmethod
    def of(cls, q: Tensor, v: Tensor, heads: int, block_q: int, block_k: int, key_len: int) -> Problem:
        """For a plan of ``heads`` heads and its blocks."""
        capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else (0, 0)
        return cls(
            capability,
            power_of_two(max(q.shape[-1], v.shape[-1])),
            q.element_size(),
            power_of_two(block_q * (q.shape[1] // heads)),
            block_k,
            key_len.bit_length(),
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
_WIDE = Config(64, 32, 4, 1)  # fp32
_SMALL_MEMORY = ((8, 6), (8, 9), (12, 0), (12, 1))  # 100 KiB of shared memory, unlike others of their generation
_MOST_REGISTERS = 192
_SMALLEST = 16  # of a matrix product
_SMALLEST_EVEN = 32  # below it, a tile with masked keys is better than one that divides the block

_tuned: dict[Problem, Config] = {}


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n and at least 16."""
    return max(_SMALLEST, 1 << max(0, n - 1).bit_length())


def choose(problem: Problem) -> Config:
    """The tuned configuration for a problem, else the table's, fitted to its blocks."""
    return _tuned.get(problem) or _fit(_from_table(problem), problem)


def candidates(problem: Problem) -> list[Config]:
    """What `tune` tries: the table's choice and its neighbours, with and without descriptors where those exist."""
    start = _from_table(problem)
    shapes = {(start.tile_m, start.tile_n), (start.tile_m, 64), (64, 64), (64, 32), (128, 32)}
    found = [_fit(start, problem)]
    for tile_m, tile_n in sorted(shapes):
        for warps in (4, 8):
            # Scores and output in registers, of which a thread has 255; Triton spills the rest.
            if tile_m * (tile_n + problem.dim) > 32 * warps * _MOST_REGISTERS:
                continue
            for stages in (2, 3, 4):
                for descriptors in {start.descriptors, False}:
                    config = _fit(Config(tile_m, tile_n, warps, stages, descriptors), problem)
                    if config not in found:
                        found.append(config)
    return found


def tune(problem: Problem, seconds: Callable[[Config], float], among: Iterable[Config] | None = None) -> Config:
    """Keep the fastest configuration for all problems of the same kind and length bucket, and return it.

    Args:
        seconds: measures one configuration; infinity for one that does not run.
    """
    best = min(candidates(problem) if among is None else among, key=seconds)
    _tuned[problem] = best
    return best


def forget() -> None:
    """Drop what `tune` has kept."""
    _tuned.clear()


def _from_table(problem: Problem) -> Config:
    major = problem.capability[0]
    if problem.element_size > 2:
        return _WIDE
    level = _HOPPER if major in (9, 10) else _AMPERE if major >= 8 else _TURING
    if problem.capability in _SMALL_MEMORY:
        level = _SMALL
    tall, short = next(configs for (at, dim), configs in _TABLE.items() if at == level and problem.dim <= dim)
    return tall if problem.rows >= tall.tile_m else short


def _fit(config: Config, problem: Problem) -> Config:
    """Rows no more than a query block has, and keys that divide a key block where they can."""
    tile_m = min(config.tile_m, problem.rows)
    divisor = problem.block_k & -problem.block_k
    tile_n = min(config.tile_n, power_of_two(problem.block_k))
    if divisor >= _SMALLEST_EVEN:
        tile_n = min(tile_n, divisor)
    return replace(config, tile_m=tile_m, tile_n=tile_n, warps=config.warps if tile_m >= 64 else 4)
