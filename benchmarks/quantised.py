"""Whether a product of queries and keys in integers would pay: its error beside that of bf16, and the time it saves.

    python benchmarks/quantised.py [--models DIR,DIR] [--length 4k] [--layers 1,4,10,19,28] [--rounds N]
        [--only errors,speed] [--out FILE]

*Errors*: output against float64 in the L2 norm, for random inputs and for some layers of models in float32. Only what
is named is rounded; the rest is exact. bf16 is what such inputs have anyway, and what the kernel then rounds besides.

*Speed*: benchmarks/native/integer_scores.cpp, the CPU kernel itself with this product as it is, in integers, and left
out (the most that any faster product could give), on one thread, in turns. Packing counts, with means and rounding. A
machine measures the sets that it has; AVX2 stands for machines with AVX-VNNI and without AVX-512.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from attributes import ROOT, capture, numbers
from machines import cpu_flags, machine, results
from peak import program
from timing import write
from torch import Tensor

from gossamer.evaluate.runner import parse_lengths

SOURCE = Path(__file__).parent / "native" / "integer_scores.cpp"
BLOCK, ROWS = 64, 192
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni")
# By instruction set: what the compiler is told, and what the processor must have.
SETS = {
    "avx2": ((*_AVX2, "-mavxvnni"), {"avx2", "avx_vnni"}),
    "avx512": (_AVX512, {"avx512_vnni", "avx512dq"}),
    "amx": ((*_AVX512, "-mavx512bf16"), {"amx_int8", "amx_bf16", "avx512_bf16"}),
}


def int8(x: Tensor, block: int = 1) -> Tensor:
    """``[..., n, D]`` rounded to int8 with a scale for each block of tokens, as numbers again."""
    parts = F.pad(x, (0, 0, 0, -x.shape[-2] % block)).unflatten(-2, (-1, block))
    step = parts.abs().amax((-2, -1), keepdim=True).clamp(min=1e-30) / 127
    return ((parts / step).round() * step).flatten(-3, -2)[..., : x.shape[-2], :]


def int16(x: Tensor) -> Tensor:
    """To int16 with a scale for each token, at which no sum of products passes int32: norms are at most 46000 steps."""
    largest, norm = x.abs().amax(-1, keepdim=True), x.norm(dim=-1, keepdim=True)
    step = torch.maximum(largest / 32767, norm / 46000).clamp(min=1e-30)
    return (x / step).round() * step


def bf16(x: Tensor) -> Tensor:
    return x.bfloat16().to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, rounded: bool = False) -> Tensor:
    """Probabilities in bf16 before the product with values, where they are rounded."""
    logits = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    return (bf16(weights) if rounded else weights) @ v / weights.sum(-1, keepdim=True)


def errors(q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> dict[str, float]:
    """Of one head, ``[S, D]``, on some query rows, by what is rounded."""
    q, k, v = q[rows].double(), k.double(), v.double()
    mask = torch.arange(len(k)) <= rows[:, None]
    smooth = k - k.mean(0)  # changes all logits of a row alike, hence no weight
    outs = {
        "bf16 queries and keys": attend(bf16(q), bf16(k), v, mask),
        "bf16 throughout": attend(bf16(q), bf16(k), bf16(v), mask, rounded=True),
        "int8 by blocks, not smoothed": attend(int8(q, BLOCK), int8(k, BLOCK), v, mask),
        "int8 by blocks": attend(int8(q, BLOCK), int8(smooth, BLOCK), v, mask),
        "int8 by tokens": attend(int8(q), int8(smooth), v, mask),
        "int8 by tokens, keys alone": attend(q, int8(smooth), v, mask),
        "int16 by tokens": attend(int16(q), int16(k), v, mask),
    }
    exact = attend(q, k, v, mask)
    return {name: float((out - exact).norm() / exact.norm()) for name, out in outs.items()}


def error_row(name: str, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Any]:
    """Means over the heads of ``[H, S, D]``, on blocks of rows that are spread over the prompt."""
    blocks = torch.linspace(1, q.shape[1] // BLOCK - 1, ROWS // BLOCK).long()
    rows = (blocks[:, None] * BLOCK + torch.arange(BLOCK)).flatten()
    heads = [errors(q[h], k[h * len(k) // len(q)], v[h * len(v) // len(q)], rows) for h in range(len(q))]
    means = {what: round(statistics.mean(one[what] for one in heads), 7) for what in heads[0]}
    return {"inputs": name, "length": q.shape[1], "dim": q.shape[-1], "heads": len(q), "errors": means}


def error_rows(models: list[Path], length: int, layers: list[int]) -> Iterator[dict[str, Any]]:
    for dim in (64, 128):
        generator = torch.Generator().manual_seed(0)
        yield error_row("random", *(torch.randn(n, 2048, dim, generator=generator) for n in (4, 2, 2)))
    for model in models:
        for call in capture(model, length, layers, torch.float32):
            yield error_row(f"{model.name}, layer {call.layer}", call.q[0], call.k[0], call.values[0])


def speed_rows(rounds: int) -> Iterator[dict[str, Any]]:
    """By instruction set, head dimension, and density: all tiles of 2K keys, a tenth of those of 8K."""
    headers = sorted((ROOT / "csrc" / "kernels").iterdir())
    for isa, (flags, needed) in SETS.items():
        if not needed <= cpu_flags():
            print(f"{isa}: this processor lacks {', '.join(sorted(needed - cpu_flags()))}")
            continue
        more = ("-fno-strict-aliasing", f"-I{ROOT / 'csrc'}", f"-DGOSSAMER_{isa.upper()}")
        built = program(SOURCE, f"integer-scores-{isa}", (*flags, *more), headers)
        if built is None:
            print(f"{isa}: no compiler here takes {SOURCE.name}")
            continue
        for dim in (64, 128):
            for keys, tiles in ((2048, 32), (8192, 13)):
                command = [str(built), *map(str, (keys, dim, tiles, rounds))]
                parts = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
                sizes = {"isa": isa, "dtype": "bf16" if isa == "amx" else "fp32", "dim": dim, "keys": keys}
                yield from ({**sizes, "tiles": tiles, **part} for part in with_ratios(parts))


def with_ratios(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds how many times as fast each is as the first, packing included: the median over rounds, and the quartiles."""
    whole = [[a + b for a, b in zip(part["pack_s"], part["attend_s"], strict=True)] for part in parts]
    for part, seconds in zip(parts, whole, strict=True):
        ratios = [base / own for base, own in zip(whole[0], seconds, strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else 3 * ratios
        if part.get("scores") == "no product":
            del part["difference"]  # it says nothing
        part |= {"speedup": round(median, 3), "quartiles": [round(low, 3), round(high, 3)]}
    return parts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", default=str(ROOT / "models" / "reference"), help="folders, with commas between them"
    )
    parser.add_argument("--length", default="4k")
    parser.add_argument("--layers", default="1,4,10,19,28", help="those that a model has")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", default="errors,speed")
    parser.add_argument("--out", type=Path, help="a JSON file; else in this machine's folder of results")
    arguments = parser.parse_args()
    models = [Path(name) for name in arguments.models.split(",") if name]
    layers = [int(n) for n in numbers(arguments.layers)]
    sections: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
        "errors": lambda: error_rows(models, parse_lengths(arguments.length)[0], layers),
        "speed": lambda: speed_rows(arguments.rounds),
    }
    out = results("quantised.json") if arguments.out is None else arguments.out
    report = json.loads(out.read_text()) if out.exists() else {}
    report |= {"machine": machine(), "date": date.today().isoformat()}
    for name in arguments.only.split(","):
        report[name] = []
        for row in sections[name]():
            report[name].append(row)
            print(json.dumps(row), flush=True)
    write(out, report)
    return 0


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
