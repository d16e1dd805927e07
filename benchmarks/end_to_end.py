"""Prefill of decoder layers with the shape of an 8B Llama, end to end: norms, projections, attention, MLP.

    python benchmarks/end_to_end.py [--lengths 32k,64k] [--layers 1] [--methods ...] [--quick] [--out FILE]

Hidden size 4096, 32 query heads on 8 key/value heads of 128, MLP 14336, random weights, bfloat16. With random weights
attention is nearly uniform: a method whose plan follows the data (max_relative) then finds little to leave out, while
one with a fixed budget (minference) computes what it always does. Times say what a layer costs, never what is lost.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from decoder import Layer, Width
from timing import Bystanders, machine, write

from gossamer import methods
from gossamer.attention import Policy
from gossamer.cli.specs import parse_method, split_specs
from gossamer.evaluate.runner import parse_lengths

RESULTS = Path(__file__).parent / "results" / "end_to_end.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="32k,64k,128k")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--methods", default="dense,dense(kernel=gossamer),minference,max_relative")
    parser.add_argument("--longest-sdpa", default="64k", help="torch's dense attention is left out beyond this length")
    parser.add_argument("--quick", action="store_true", help="a narrow layer at 2K; writes nothing without --out")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    width = Width(256, 4, 2, 64, 512) if arguments.quick else Width()
    lengths = (2048,) if arguments.quick else parse_lengths(arguments.lengths)
    out = arguments.out or (None if arguments.quick else RESULTS)
    layers = [Layer(width) for _ in range(arguments.layers)]
    bystanders, rows = Bystanders(), []
    for length in lengths:
        for name in split_specs(arguments.methods):
            method = parse_method(name)
            is_sdpa = isinstance(method, methods.Dense) and method.kernel == "torch"
            if is_sdpa and length > parse_lengths(arguments.longest_sdpa)[0]:
                continue
            x = torch.randn(length, width.hidden, generator=torch.Generator().manual_seed(0)).bfloat16()
            for layer in layers:
                layer.reset()
            started = time.perf_counter()
            for layer in layers:
                x = layer.run(x, Policy(method))
            total = time.perf_counter() - started
            parts = [layer.watch.seconds() for layer in layers]
            records = [record for layer in layers for record in layer.records]
            row = {
                "method": name,
                "length": length,
                "layers": len(layers),
                "total_s": round(total, 3),
                "density": round(sum(r.density for r in records) / len(records), 4),
                "plan_s": round(sum(r.plan_seconds for r in records), 3),
                "dense_because": [r.reason for r in records if r.reason],
                **{f"{part}_s": round(sum(one[part] for one in parts), 3) for part in parts[0]},
            }
            rows.append(row)
            print(json.dumps(row), flush=True)
            if out is not None:
                report = {
                    "machine": machine(),
                    "threads": torch.get_num_threads(),
                    "used_by_others": bystanders.share(),
                }
                write(out, {**report, "width": width.__dict__, "rows": rows})
    return 0


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
