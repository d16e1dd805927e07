"""Many requests under load, poisoned.

    python tests/integrations/vllm_plugin/many.py [--requests 1000] [--dtype float32] [--seed 0] [--stock]

Requests of 3 to 3,000 tokens, a third of which begin as others do, are given to one engine at once, under a dense plan
or under one of few pairs that they name. Each row is attended a second time with NaN in every foreign page, dead slot
and freed block and in other rows' keys, queries and values, and must agree bit for bit: attention of a row is, by its
bits, what it is alone. Then each request alone, without poison: under the dense plan its tokens must be those that it
had among the others; under another a chunk of few queries runs dense, and company decides what the chunks are.

Bits of what the whole model puts out are not compared, for they differ without gossamer too: a request's chunks depend
on its company, and the sums of vLLM's kernel, which runs the rows of few queries, on the chunks. How many first
log-probabilities have the same bits is told, and the largest difference; with ``--stock`` of an engine without
gossamer.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from integrations.vllm_plugin.serving import SPARSE, prompt, run, tokens

SETTINGS = {"method": "dense", "kernel": "gossamer", "min_tokens": 0, "max_density": 2, "policies": {"few": SPARSE}}
PREFIXES = [prompt(length, 99) for length in (128, 512, 1500)]


def requests(count: int, seed: int) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    made: list[dict[str, Any]] = []
    for n in range(count):
        ids = prompt(draw.choice((3, 40, 90, 200, 400, 900, 1500)) + draw.randrange(40), n)
        if n % 3 == 0:
            ids = draw.choice(PREFIXES) + ids
        made.append({"ids": ids} | ({"policy": "few"} if n % 4 == 0 else {}))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stock", action="store_true")
    arguments = parser.parse_args()
    asked = requests(arguments.requests, arguments.seed)
    # Few pages: requests wait, are preempted and get pages that others freed.
    args = {
        "dtype": arguments.dtype,
        "max_num_batched_tokens": 1500,
        "max_num_seqs": 24,
        "num_gpu_blocks_override": 160,
    }
    job = {"gossamer": None if arguments.stock else SETTINGS, "max_tokens": 4, "args": args}
    if arguments.stock:
        asked = [{"ids": one["ids"]} for one in asked]
    started = time.monotonic()
    among = run(job | {"waves": [asked], "poison": not arguments.stock})
    print(
        f"{among['checks']} rows attended twice, {among['wrong']} differ; {time.monotonic() - started:.0f} s",
        flush=True,
    )
    alone = run(job | {"waves": [[one] for one in asked], "args": args | {"enable_prefix_caching": False}})
    dense = [n for n, one in enumerate(asked) if "policy" not in one]
    other = [n for n in dense if tokens(among)[n] != tokens(alone)[n]]
    print(f"{len(dense)} dense requests, {len(other)} with other tokens than alone; {time.monotonic() - started:.0f} s")
    apart = [abs(among["answers"][n]["logprob"] - alone["answers"][n]["logprob"]) for n in dense]
    same = apart.count(0)
    print(
        f"{same} of {len(dense)} first log-probabilities have the same bits, others differ by {max(apart):.1e} at most"
    )
    if among["wrong"] or other or not (among["checks"] or arguments.stock):
        sys.exit(1)


if __name__ == "__main__":
    main()
