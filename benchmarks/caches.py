"""What caches that drop or encode tokens lose and save, on a pretrained model, beside one that keeps everything.

    python benchmarks/caches.py MODEL [--lengths 4096,16384] [--steps 64] [--texts N] [--caches LIST] [--out FILE]

The model reads windows of a text densely into each cache, and the last tokens one by one (`gossamer.evaluate.caches`):
divergence from a whole cache, share of equal predictions, loss, bytes of the cache and their share, seconds of a step.
Of `duo_attention`, gates come from a file: `duo_attention(gates=@FOLDER)`. Rows replace those of the file for the same
cache, length and model.
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
from timing import Bystanders, write

COMPARED = ",".join(
    [f"{name}(budget={budget})" for budget in (256, 1024) for name in ("snapkv", "pyramidkv")]
    + ["streaming_llm(recent=252)", "streaming_llm(recent=1020)"]
    + ["int8", "kivi(bits=4)", "kivi(bits=2)"]
    + ["mustafar(key_sparsity=0.5,value_sparsity=0.5)", "mustafar"]
)


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


def what(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[field] for field in ("cache", "length", "model", "dtype"))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("model", type=Path, help="folder or GGUF file")
    parser.add_argument("--lengths", default="4096,16384")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--caches", default=COMPARED, metavar="LIST")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--texts", type=int, default=4)
    parser.add_argument("--text", default="package", help="file; default: gossamer's own text")
    parser.add_argument("--name", default=None, help="of the model in the rows; default: its file's")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=None, help="default: in the folder of this machine's results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    bystanders = Bystanders()
    rows = measured(arguments)
    path = arguments.out or results("caches.json")
    mine = {what(row) for row in rows}
    before = json.loads(path.read_text())["rows"] if path.exists() else []
    report = {"date": date.today().isoformat(), "machine": machine(), "threads": arguments.threads}
    report |= {"bystanders": bystanders.share(), "rows": [row for row in before if what(row) not in mine] + rows}
    write(path, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
