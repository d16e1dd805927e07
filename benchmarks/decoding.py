"""Seconds of a decode step's attention by methods that choose what it reads, beside reading the whole cache.

    python benchmarks/decoding.py [--lengths 32768,131072] [--dtypes float32,bfloat16] [--methods LIST] [--rounds 9]
        [--steps 4] [--threads N] [--out FILE]

One layer, 32 query heads on 8 with 128 channels, its cache a store of random keys and values (`gossamer.cache`). In
each round every contender makes some steps in turn: a token is added, then the method plans (bounds of pages are kept
up there) and the plan is attended. *dense* attends the whole cache by gossamer's own kernel, *sdpa* by torch's. A
contender's figures are medians over the rounds of the mean step; *ratio* is the median of dense's seconds over its own
in the same round. Adding a token counts for none of them: it is the same for all.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from machines import machine, results
from timing import wake_threads, write

from gossamer import AttentionCall, Policy, methods
from gossamer.backends import attend
from gossamer.cache import Keep, StoreLayer
from gossamer.cli.specs import parse_method, split_specs
from gossamer.plan import Extent, SparsePlan

HEADS, GROUPS, DIM = 32, 8, 128
LAYER = 31  # not one of those that a method leaves dense
METHODS = "quest(budget=2048),lserve(budget=2048),oracle_topk(budget=2048)"


def filled(length: int, dtype: torch.dtype) -> StoreLayer:
    """A store of so many tokens."""
    store = Keep().layer(LAYER, LAYER + 1)
    draw = torch.Generator().manual_seed(length)
    keys, values = (torch.randn(1, GROUPS, length, DIM, generator=draw).to(dtype) for _ in range(2))
    store.update(keys, values)
    return store


def next_call(store: StoreLayer, dtype: torch.dtype) -> AttentionCall:
    """A token is added, and asks."""
    q, k, v = (torch.randn(1, heads, 1, DIM).to(dtype) for heads in (HEADS, GROUPS, GROUPS))
    keys, values = store.update(k, v)
    extent = Extent.full(1, 1, keys.shape[2])
    store.place(extent)
    return AttentionCall(q, keys, values, extent, layer=LAYER, store=store, state=store.state)


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    found = run()
    return time.perf_counter() - started, found


def step(name: str, policy: Policy | None, call: AttentionCall) -> tuple[float, float, float]:
    """Seconds of planning and attending, and the share of the cache that is read."""
    if name == "sdpa":
        taken, _ = timed(lambda: F.scaled_dot_product_attention(call.q, call.k, call.v, enable_gqa=True))
        return 0.0, taken, 1.0
    if policy is None:
        plan = SparsePlan.dense(call.groups, 1, call.key_len, call.extent)
        return 0.0, timed(lambda: attend(call, plan))[0], 1.0
    planned, decision = timed(lambda: policy.decide(call))
    if decision.plan is None:
        raise SystemExit(f"{name} read the whole cache: {decision.reason}")
    return planned, timed(lambda: attend(call, decision.plan))[0], decision.density


def measure(length: int, dtype: torch.dtype, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    specs = split_specs(arguments.methods)
    policies: dict[str, Policy | None] = {"dense": None, "sdpa": None}
    policies |= {spec: Policy(methods.create("dense"), decode=parse_method(spec)) for spec in specs}
    store = filled(length, dtype)
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in policies}
    for turn in range(arguments.rounds + 1):  # the first does not count
        for name, policy in policies.items():
            wake_threads()
            steps = [step(name, policy, next_call(store, dtype)) for _ in range(arguments.steps)]
            if turn:
                found[name].append(tuple(statistics.fmean(part) for part in zip(*steps, strict=True)))  # type: ignore[arg-type]
    rows = []
    for name, taken in found.items():
        whole = [planned + attended for planned, attended, _ in taken]
        dense = [planned + attended for planned, attended, _ in found["dense"]]
        rows.append(
            {
                "contender": name,
                "length": length,
                "dtype": str(dtype).removeprefix("torch."),
                "seconds": round(statistics.median(whole), 7),
                "plan_s": round(statistics.median(planned for planned, _, _ in taken), 7),
                "attend_s": round(statistics.median(attended for _, attended, _ in taken), 7),
                "plan_share": round(statistics.median(a / (a + b) for a, b, _ in taken), 4),
                "read": round(statistics.median(density for _, _, density in taken), 5),
                "ratio": round(statistics.median(a / b for a, b in zip(dense, whole, strict=True)), 3),
                "rounds": [round(one, 7) for one in whole],
            }
        )
        row = rows[-1]
        print(
            f"{row['dtype']:9} {length:7} {name:28} {1e3 * row['seconds']:9.3f} ms  "
            f"{row['ratio']:6.2f} x dense  planning {row['plan_share']:.0%}  read {row['read']:.2%}",
            file=sys.stderr,
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="32768,131072")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=4, help="of each contender in a round")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, default=results("decoding.json"))
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    rows = []
    with torch.inference_mode():
        for dtype in split_specs(arguments.dtypes):
            for length in map(int, split_specs(arguments.lengths)):
                rows += measure(length, getattr(torch, dtype), arguments)
    data = {"machine": machine(), "date": date.today().isoformat(), "threads": torch.get_num_threads()}
    write(arguments.out, data | {"rounds": arguments.rounds, "rows": rows})


if __name__ == "__main__":
    main()
