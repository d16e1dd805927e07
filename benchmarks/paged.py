"""A chunk of a long prompt over a paged cache: keys and values copied out of the pages first, or read where they lie.

    python benchmarks/paged.py [--lengths 32768,65536] [--chunk 2048] [--methods LIST] [--layouts amx,vec]
        [--dtype bfloat16] [--threads N] [--rounds N] [--out FILE]

One process, the two ways in turn, medians of the rounds after one that does not count. Each call plans and attends, as
the plug-in for vLLM does for each layer and chunk: 32 query heads on 8, 128 channels, pages of 128 tokens in no order.
*ratio* is the median of the seconds with a copy over those without, in the same round. *planning* is the part of the
seconds that goes to the plan. *copies*: whether keys or values were copied after all, for what no kernel computes of
pages. Memory is the process's peak above what it held before the first call. Rows replace those of the file for the
same method, length, layout and dtype.

``amx`` and ``vec`` are vLLM's layouts. ``vec`` has each channel's tokens side by side, so that a single key is spread
over the page.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from machines import machine, results
from timing import Bystanders, timed, wake_threads, write
from torch import Tensor

from gossamer import AttentionCall, Extent
from gossamer.attention import CallRecord, attend
from gossamer.cli.specs import parse_method, split_specs
from gossamer.integrations.vllm.pages import LAYOUTS, paged, read
from gossamer.paged import FORMS, Paged
from gossamer.policy import Policy

HEADS, GROUPS, DIM, PAGE = 32, 8, 128, 128
TOPICS = 64
METHODS = "dense(kernel=gossamer),max_relative,minference"
TAKE: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"copied": read, "in place": paged}


@dataclass(frozen=True)
class Chunk:
    """Queries ``[1, H, S, D]`` at the end of a sequence in a cache."""

    q: Tensor
    cache: Tensor
    table: Tensor
    length: int
    layout: str

    def call(self, way: str) -> AttentionCall:
        k, v = TAKE[way](self.cache, self.table, 0, self.length, self.layout)
        return AttentionCall(self.q, k, v, Extent.full(1, self.q.shape[2], self.length), layer=0)


def draw(length: int, chunk: int, layout: str, dtype: torch.dtype, seed: int) -> Chunk:
    """Keys and queries that drift with the position, and a hundred keys that all match, as in planning.py."""
    generator = torch.Generator().manual_seed(seed)
    topic = torch.randn(1, GROUPS, TOPICS, DIM, generator=generator)
    topic = topic[:, :, torch.arange(length // 512 + 1) % TOPICS].repeat_interleave(512, 2)[:, :, :length]
    k, v = (torch.randn(1, GROUPS, length, DIM, generator=generator) for _ in range(2))
    q = torch.randn(1, HEADS, chunk, DIM, generator=generator)
    q += 2 * topic[:, :, -chunk:].repeat_interleave(HEADS // GROUPS, 1)
    k += topic
    k[:, :, torch.randint(length, (100,), generator=generator)] += 1.5 * q[:, :: HEADS // GROUPS].mean(2, keepdim=True)
    number = length // PAGE
    table = torch.randperm(number + 3, generator=generator)[:number].to(torch.int32)
    cache = torch.full((number + 3, GROUPS, PAGE, 2 * DIM), torch.nan, dtype=dtype)
    halves = cache.view(number + 3, GROUPS, 2, PAGE * DIM)
    for half, (rows, form) in enumerate(zip((k, v), LAYOUTS[layout], strict=True)):
        ordered = torch.empty(number, GROUPS, PAGE * DIM, dtype=dtype)
        place = FORMS[form](ordered, PAGE, DIM)
        place.copy_(rows.view(place.shape))
        halves[table.long(), :, half] = ordered
    return Chunk(q.to(dtype), cache, table, length, layout)


def peak_above(run: Callable[[], object]) -> int | None:
    """Bytes that a call needs at most beyond what the process holds; None where the system does not tell."""
    status, forget = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not forget.exists():
        return None

    def now(name: str) -> int:
        line = next(line for line in status.read_text().splitlines() if line.startswith(name))
        return int(line.split()[1]) << 10

    forget.write_text("5")  # the peak begins anew
    before = now("VmRSS")
    run()
    return now("VmHWM") - before


class Contest:
    """The two ways under one method."""

    def __init__(self, name: str) -> None:
        self.name, self.policy = name, Policy(parse_method(name), 0)
        self.wall: dict[str, list[float]] = {way: [] for way in TAKE}
        self.planning: dict[str, list[float]] = {way: [] for way in TAKE}
        self.peaks: dict[str, int | None] = {}
        self.density, self.copies = 1.0, False

    def run(self, chunk: Chunk, round_: int) -> None:
        """Both ways once; round 0 does not count, and takes the memory."""
        outputs: dict[str, Tensor] = {}
        calls: dict[str, AttentionCall] = {}
        records: list[CallRecord] = []

        def once(way: str) -> None:
            calls[way] = chunk.call(way)
            out = attend(calls[way], self.policy, record=records.append)
            assert isinstance(out, Tensor)
            outputs[way] = out

        for way in list(TAKE)[round_ % 2 :] + list(TAKE)[: round_ % 2]:
            wake_threads()
            if round_ == 0:
                self.peaks[way] = peak_above(functools.partial(once, way))
                calls.clear()
                continue
            seconds, _ = timed(once, way)
            self.wall[way].append(seconds)
            self.planning[way].append(records[-1].plan_seconds)
            self.copies |= any(isinstance(x, Paged) and x.at_hand() is not x for x in (calls[way].k, calls[way].v))
            calls.clear()
        self.density = records[-1].density
        if not torch.equal(*outputs.values()):
            raise RuntimeError(f"{self.name}: the two ways differ")

    def row(self, length: int, layout: str, dtype: str) -> dict[str, Any]:
        pairs = zip(self.wall["copied"], self.wall["in place"], strict=True)
        return {
            "method": self.name,
            "length": length,
            "layout": layout,
            "dtype": dtype,
            "density": round(self.density, 4),
            "ratio": round(statistics.median(copied / in_place for copied, in_place in pairs), 3),
            "copies": self.copies,
            "ways": {way: self._of(way) for way in TAKE},
        }

    def _of(self, way: str) -> dict[str, Any]:
        peak = self.peaks[way]
        return {
            "median_s": round(statistics.median(self.wall[way]), 4),
            "planning_s": round(statistics.median(self.planning[way]), 4),
            "each_s": [round(seconds, 4) for seconds in self.wall[way]],
            "peak_mib": None if peak is None else round(peak / (1 << 20)),
        }


def what(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[field] for field in ("method", "length", "layout", "dtype"))


def print_row(row: dict[str, Any]) -> None:
    ways = ", ".join(
        f"{way} {own['median_s']:.3f} s (planning {own['planning_s']:.3f}, peak {own['peak_mib']} MiB)"
        for way, own in row["ways"].items()
    )
    print(*what(row), f"{row['ratio']:.3f} at density {row['density']:.3f}; {ways}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--lengths", default="32768,65536")
    parser.add_argument("--chunk", type=int, default=2048)
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--layouts", default="amx,vec")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32", "float16"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--out", type=Path, default=None, help="default: in the folder of this machine's results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    bystanders, rows = Bystanders(), []
    for length in map(int, arguments.lengths.split(",")):
        for layout in arguments.layouts.split(","):
            contests = [Contest(name) for name in split_specs(arguments.methods)]
            for n in range(arguments.rounds + 1):
                chunk = draw(length, arguments.chunk, layout, getattr(torch, arguments.dtype), n)
                for contest in contests:
                    contest.run(chunk, n)
            for contest in contests:
                rows.append(contest.row(length, layout, arguments.dtype))
                print_row(rows[-1])
            sys.stdout.flush()
    setting = {"heads": HEADS, "groups": GROUPS, "dim": DIM, "page": PAGE, "chunk": arguments.chunk}
    setting |= {"threads": arguments.threads, "rounds": arguments.rounds}
    path = arguments.out or results("paged.json")
    measured = {what(row) for row in rows}
    before = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = [row for row in before if what(row) not in measured] + rows
    report = {
        "date": date.today().isoformat(),
        "machine": machine(),
        "setting": setting,
        "bystanders": bystanders.share(),
        "rows": rows,
    }
    write(path, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
