"""What caches that drop or encode tokens lose and save, on a pretrained model, beside one that keeps everything.

    python benchmarks/caches.py MODEL [--lengths 4096,16384] [--steps 64] [--texts N] [--caches LIST] [--out FILE]
    python benchmarks/caches.py steps [--lengths 4096,32768] [--dtypes bfloat16,float32] [--caches LIST] [--rounds N]

The model reads windows of a text densely into each cache, and the last tokens one by one (`gossamer.evaluate.caches`):
divergence from a whole cache, share of equal predictions, loss, bytes of the cache and their share, seconds of a step.
Of `duo_attention`, gates come from a file: `duo_attention(gates=@FOLDER)`. Rows replace those of the file for the same
cache, length and model.

*steps* needs no model: seconds of a decode step of caches that encode, beside one that does not (`steps_of_caches.py`).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

import torch
from machines import machine, results
from steps_of_caches import step_rows
from timing import Bystanders, write

COMPARED = ",".join(
    [f"{name}(budget={budget})" for budget in (256, 1024) for name in ("snapkv", "pyramidkv")]
    + ["streaming_llm(recent=252)", "streaming_llm(recent=1020)"]
    + ["int8", "kivi(bits=4)", "kivi(bits=2)"]
    + ["mustafar(key_sparsity=0.5,value_sparsity=0.5)", "mustafar"]
)
ENCODED = "int8,kivi(bits=4),kivi(bits=2),mustafar(key_sparsity=0.5,value_sparsity=0.5),mustafar"


def measured(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    from gossamer.cli.generation import load_checked, load_tokenizer
    from gossamer.cli.pretrained import model_folder
    from gossamer.cli.specs import parse_cache, split_specs
    from gossamer.evaluate.caches import compare_caches
    from gossamer.evaluate.haystack import load_haystack

    path = model_folder(arguments.model)
    loaded, tokenizer = load_checked(path, arguments.dtype), load_tokenizer(path)
    ids = tokenizer(load_haystack(arguments.text).text, return_tensors="pt")["input_ids"]
    caches = {name: parse_cache(name) for name in split_specs(arguments.caches)}
    name = arguments.name or arguments.model.stem
    rows = []
    for length in map(int, arguments.lengths.split(",")):
        if length > ids.shape[1]:
            raise ValueError(f"the text has {ids.shape[1]} tokens, fewer than {length}; give a longer one with --text")
        found: dict[str, list[Any]] = {}
        for n in range(arguments.texts):
            start = n * max(1, (ids.shape[1] - length) // max(1, arguments.texts))
            text = ids[:, start : start + length]
            for cache, loss in compare_caches(loaded, text, caches, arguments.steps).items():
                found.setdefault(cache, []).append(loss)
        for cache, some in found.items():
            means = {
                f.name: statistics.fmean(getattr(loss, f.name) for loss in some) for f in dataclasses.fields(some[0])
            }
            setting = {"texts": arguments.texts, "steps": arguments.steps}
            row = {"cache": cache, "length": length, "model": name, "dtype": arguments.dtype} | setting
            rows.append(row | {key: round(value, 6) for key, value in means.items()})
            print(*what(rows[-1]), f"KL {means['kl']:.5f}", f"bytes {means['share']:.4f}", flush=True)
    return rows


def timed_steps(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    from gossamer.cli.specs import split_specs

    lengths = [int(length) for length in arguments.lengths.split(",")]
    return step_rows(split_specs(arguments.caches), lengths, arguments.dtypes.split(","), arguments.rounds)


def what(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(field) for field in ("cache", "length", "model", "dtype"))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("model", type=Path, help="folder or GGUF file; or: steps")
    parser.add_argument("--lengths", default=None)
    parser.add_argument("--dtype", default="float32", help="of a model")
    parser.add_argument("--dtypes", default="bfloat16,float32", help="of steps")
    parser.add_argument("--rounds", type=int, default=9, help="of steps")
    parser.add_argument("--caches", default=None, metavar="LIST")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--texts", type=int, default=4)
    parser.add_argument("--text", default="package", help="file; default: gossamer's own text")
    parser.add_argument("--name", default=None, help="of the model in the rows; default: its file's")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=None, help="default: in the folder of this machine's results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    bystanders, of_steps = Bystanders(), str(arguments.model) == "steps"
    arguments.lengths = arguments.lengths or ("4096,32768" if of_steps else "4096,16384")
    arguments.caches = arguments.caches or (ENCODED if of_steps else COMPARED)
    rows = timed_steps(arguments) if of_steps else measured(arguments)
    path = arguments.out or results("caches.json")
    part, mine = "steps" if of_steps else "rows", {what(row) for row in rows}
    report = json.loads(path.read_text()) if path.exists() else {"rows": []}
    rows = [row for row in report.get(part, []) if what(row) not in mine] + rows
    report |= {"date": date.today().isoformat(), "machine": machine(), "threads": arguments.threads}
    write(path, report | {"bystanders": bystanders.share(), part: rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
