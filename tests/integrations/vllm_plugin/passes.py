"""Whether memory stays where it is when the same lengths come again.

    python tests/integrations/vllm_plugin/passes.py [--method max_relative] [--stock] [--passes 4] [--prompts 100]

One engine, in this process, reads prompts of mixed lengths one by one, then others of the same lengths in the same
order, and so on. A server that is new to a length takes memory for it (the linear layers keep what they compile for a
number of tokens, and the allocator what lies between buffers of other sizes), with gossamer and without: see
``soak.py``. What requests leave behind shows where no length is new: in the last pass.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from integrations.vllm_plugin.serving import REFERENCE, environment, prompt

PAGES, LONGEST = 40, 900
MOST_GROWTH = 0.002  # of the last pass over the one before


def resident() -> float:
    """MiB of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="max_relative")
    parser.add_argument("--stock", action="store_true")
    parser.add_argument("--passes", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    os.environ |= environment(VLLM_CPU_OMP_THREADS_BIND=str(arguments.core), OMP_NUM_THREADS="1")
    from vllm import LLM, SamplingParams

    asked: dict[str, Any] = {} if arguments.stock else {"gossamer": {"method": arguments.method, "min_tokens": 256}}
    llm = LLM(
        str(REFERENCE),
        additional_config=asked,
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype="float32",
        max_model_len=4096,
        enable_prefix_caching=False,
        num_gpu_blocks_override=PAGES,
    )
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, detokenize=False)
    draw = random.Random(0)
    lengths = [4000, LONGEST, *(draw.randrange(40, LONGEST) for _ in range(arguments.prompts))]  # each page first
    memory = [resident()]
    for n in range(arguments.passes):
        for length in lengths:
            llm.generate([{"prompt_token_ids": prompt(length, n)}], params, use_tqdm=False)
        memory.append(resident())
        print(f"after pass {n + 1}: {memory[-1]:.1f} MiB", flush=True)
    rise = memory[-1] / memory[-2] - 1
    report = {"prompts": len(lengths), "memory_mib": [round(one, 1) for one in memory], "last_pass": round(rise, 5)}
    print(json.dumps(report))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if rise > MOST_GROWTH else 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # threads of the engine are not waited for
