"""Steps on a cache that is eight times the memory it may take: what is chosen of the file, beside reading all of it.

    python benchmarks/tiers.py [--length 65536] [--share 8] [--layers 4] [--dtype float32] [--methods LIST]
        [--steps 24] [--folder DIR] [--threads N] [--out FILE]

A stack of layers of 32 query heads on 8 with 128 channels; keys that drift with the position, as in ``decoding.py``,
are in tiers (`gossamer.cache.Tiers`): of each layer's tokens an eighth is in memory, half of it the newest and half the
blocks that were read last, and all older ones are in a file, which is read and written past the system's own cache
where the file system can (*direct*). A step adds a token to each layer and attends its own query; queries look for one
topic for four steps, and then for another. Every contender makes the same steps on a copy of the same cache: ``whole``
reads the file at each step, methods what they choose, ``memory`` has all in memory and reads all. Seconds are of a step
of all layers, the first ones left out; *ratio* is the seconds of ``whole`` over the method's.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from decoding import DIM, GROUPS, HEADS, TOPICS
from machines import machine, results
from timing import Bystanders, write
from torch import Tensor

from gossamer.attention import CallRecord, attend
from gossamer.cache import StoreLayer
from gossamer.cache.tiers import TieredLayer, Tiers
from gossamer.call import AttentionCall
from gossamer.cli.specs import parse_method, split_specs
from gossamer.methods import Dense
from gossamer.plan import Extent
from gossamer.policy import Policy

TIMED = "infllm(local=2048),quest(budget=2048),lserve(budget=2048)"
STRETCH, STAYS, WARM = 128, 4, 8  # tokens of a topic; steps that look for one; steps that do not count


def keys_of(length: int, dtype: torch.dtype, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values, and the topics that they drift through ``[TOPICS, GROUPS, DIM]``."""
    generator = torch.Generator().manual_seed(layer)
    topic = torch.randn(TOPICS, GROUPS, DIM, generator=generator)
    which = torch.randint(TOPICS, (length // STRETCH + 1,), generator=generator).repeat_interleave(STRETCH)[:length]
    k, v = (torch.randn(1, GROUPS, length, DIM, generator=generator).to(dtype) for _ in range(2))
    return k.add_(topic[which].transpose(0, 1).to(dtype)), v, topic


def filled(policy: Tiers | None, length: int, dtype: torch.dtype, layers: int) -> tuple[list[StoreLayer], list[Tensor]]:
    """Stores of a prompt, and their topics."""
    stores, topics = [], []
    for layer in range(layers):
        store = StoreLayer() if policy is None else policy.layer(layer, layers)
        k, v, topic = keys_of(length, dtype, layer)
        store.update(k, v)
        store.place(Extent.full(1, 1, length))
        store.before_update(1)  # what is due goes to the file
        stores.append(store)
        topics.append(topic)
    return stores, topics


def run(
    name: str, stores: list[StoreLayer], topics: list[Tensor], steps: int, dtype: torch.dtype
) -> tuple[list[float], float]:
    """Seconds of each step, and the share of the keys that they attend."""
    decode = None if name in ("whole", "memory") else parse_method(name)
    policy = Policy(Dense("gossamer"), decode=decode)
    generator = torch.Generator().manual_seed(1)
    records: list[CallRecord] = []
    seconds = []
    for n in range(steps + WARM):
        if n % STAYS == 0:
            sought = torch.randint(TOPICS, (), generator=generator)
        new = torch.randn(len(stores), 2, 1, GROUPS, 1, DIM, generator=generator).to(dtype)
        noise = torch.randn(len(stores), HEADS, DIM, generator=generator)
        started = time.perf_counter()
        for layer, store in enumerate(stores):
            q = noise[layer] + 2 * topics[layer][sought].repeat_interleave(HEADS // GROUPS, dim=0)
            k, v = store.update(*new[layer])
            extent = Extent.full(1, 1, k.shape[2])
            store.place(extent)
            call = AttentionCall(
                q[None, :, None].to(dtype), k, v, extent, layer=layer + 2, store=store, state=store.state
            )
            attend(call, policy, record=records.append)
            store.attended(call)
        seconds.append(time.perf_counter() - started)
    return seconds[WARM:], sum(record.density for record in records) / len(records)


@torch.inference_mode()
def measured(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    dtype = getattr(torch, arguments.dtype)
    hot = arguments.length // arguments.share // 2
    policy = Tiers(hot=hot, resident=hot, folder=arguments.folder)
    rows: list[dict[str, Any]] = []
    for name in ["memory", "whole", *split_specs(arguments.methods)]:
        stores, topics = filled(None if name == "memory" else policy, arguments.length, dtype, arguments.layers)
        steps = arguments.steps if name != "whole" else max(3, arguments.steps // 4)
        seconds, density = run(name, stores, topics, steps, dtype)
        pools = [store.pool for store in stores if isinstance(store, TieredLayer) and store.pool is not None]
        row = {
            "method": name,
            "length": arguments.length,
            "dtype": arguments.dtype,
            "layers": arguments.layers,
            "median_s": round(statistics.median(seconds), 5),
            "mean_s": round(statistics.fmean(seconds), 5),
            "density": round(density, 5),
            "memory_bytes": sum(store.nbytes for store in stores),
            "file_bytes": sum(store.file_bytes for store in stores if isinstance(store, TieredLayer)),
            "found_in_memory": round(sum(p.found for p in pools) / max(1, sum(p.found + p.read for p in pools)), 4),
            "direct": all(store.is_direct for store in stores if isinstance(store, TieredLayer)),
            "each_s": [round(s, 5) for s in seconds],
        }
        rows.append(row)
        whole = next((r["mean_s"] for r in rows if r["method"] == "whole"), None)
        row["ratio"] = None if whole is None or name == "memory" else round(whole / row["mean_s"], 2)
        print(*(row[k] for k in ("method", "mean_s", "median_s", "density", "found_in_memory", "ratio")), flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--length", type=int, default=65536)
    parser.add_argument("--share", type=int, default=8, help="of the tokens, one in so many is in memory")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--methods", default=TIMED)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--folder", default=None, help="of the file; default: the system's folder for temporary files")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=None, help="default: in the folder of this machine's results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    bystanders = Bystanders()
    rows = measured(arguments)
    setting = {"heads": HEADS, "groups": GROUPS, "dim": DIM, "threads": arguments.threads, "share": arguments.share}
    report = {"date": date.today().isoformat(), "machine": machine(), "setting": setting}
    write(arguments.out or results("tiers.json"), report | {"bystanders": bystanders.share(), "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
