"""Whether products in integers would pay: their error beside that of bf16, and the time they save.

    python benchmarks/quantised.py [--models DIR,DIR] [--length 4k] [--layers 1,4,10,19,28] [--rounds N]
        [--only errors,speed] [--out FILE]

*Errors*: output against float64 in the L2 norm, for inputs that are random, like those of a video, and of some layers
of models in float32. Only what is named is rounded; the rest is exact. bf16 is what such inputs have anyway, and what
the kernel then rounds besides. *Values too* also has probabilities and values in int8, as PAROAttention (2506.16054).

*Speed*: benchmarks/native/integer_scores.cpp, the CPU kernel itself with the product of queries and keys as it is, in
integers, and left out (the most that any faster product could give), on one thread, in turns, in seconds of that
thread. Of bf16 also both products in int8, and both left out. Packing counts, with means and rounding. A machine
measures the sets that it has; AVX2 stands for machines with AVX-VNNI and without AVX-512.
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

NATIVE = Path(__file__).parent / "native"
SOURCE, HEADER = NATIVE / "integer_scores.cpp", NATIVE / "integer_products.h"
BLOCK, ROWS = 64, 192
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni")
# By instruction set: what the compiler is told, and what the processor must have.
SETS = {
    "avx2": ((*_AVX2, "-mavxvnni"), {"avx2", "avx_vnni"}),
    "avx512": (_AVX512, {"avx512_vnni", "avx512dq"}),
    "avx512_bf16": ((*_AVX512, "-mavx512bf16"), {"avx512_vnni", "avx512_bf16"}),
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
    """Of one head, ``[R, D]`` on ``[T, D]``, with a mask ``[R, T]``; every row attends some key. Probabilities in bf16
    before the product with values, where they are rounded."""
    logits = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    return (bf16(weights) if rounded else weights) @ v / weights.sum(-1, keepdim=True)


def attend_int8(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, block: int = BLOCK, values: bool = False) -> Tensor:
    """`attend` as SageAttention (2410.02367) does it: keys less their mean, which changes all logits of a row alike and
    hence no weight; queries and keys in int8, with a scale for ``block`` tokens.

    With ``values`` their product with probabilities is in int8 too: values with a scale for each tile of 64 tokens;
    probabilities, relative to the largest logit up to their tile, as a flash kernel has them, in 255 steps of 1. What
    they are divided by is summed before they are rounded.
    """
    q, k = int8(q, block), int8(k - k.mean(0), block)
    if not values:
        return attend(q, k, v, mask)
    logits = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
    tiles = F.pad(logits, (0, -logits.shape[-1] % BLOCK), value=-torch.inf).unflatten(-1, (-1, BLOCK))
    so_far = tiles.amax(-1).cummax(-1).values
    base = so_far.clamp(min=torch.finfo(q.dtype).min)[..., None]  # of tiles before the first key, any number
    steps = ((tiles - base).exp() * 255).round().flatten(-2)[..., : logits.shape[-1]]
    shrink = (so_far - so_far[..., -1:]).exp().repeat_interleave(BLOCK, -1)[..., : logits.shape[-1]]
    total = (logits - so_far[..., -1:]).exp().sum(-1, keepdim=True)
    return (steps / 255 * shrink) @ int8(v, BLOCK) / total


def errors(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, *, causal: bool = True) -> dict[str, float]:
    """Of one head, ``[S, D]``, on some query rows, by what is rounded."""
    q, k, v = q[rows].double(), k.double(), v.double()
    mask = torch.arange(len(k)) <= rows[:, None] if causal else torch.ones(len(rows), len(k), dtype=torch.bool)
    outs = {
        "bf16 queries and keys": attend(bf16(q), bf16(k), v, mask),
        "bf16 throughout": attend(bf16(q), bf16(k), bf16(v), mask, rounded=True),
        "int8 by blocks, not smoothed": attend(int8(q, BLOCK), int8(k, BLOCK), v, mask),
        "int8 by blocks": attend_int8(q, k, v, mask),
        "int8 by blocks, values too": attend_int8(q, k, v, mask, values=True),
        "int8 by tokens": attend_int8(q, k, v, mask, block=1),
        "int8 by tokens, keys alone": attend(q, int8(k - k.mean(0)), v, mask),
        "int16 by tokens": attend(int16(q), int16(k), v, mask),
    }
    exact = attend(q, k, v, mask)
    return {name: float((out - exact).norm() / exact.norm()) for name, out in outs.items()}


def error_row(name: str, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True) -> dict[str, Any]:
    """Means over the heads of ``[H, S, D]``, on blocks of rows that are spread over the prompt."""
    blocks = torch.linspace(1, q.shape[1] // BLOCK - 1, ROWS // BLOCK).long()
    rows = (blocks[:, None] * BLOCK + torch.arange(BLOCK)).flatten()
    group = len(q) // len(k)
    heads = [errors(q[h], k[h // group], v[h // group], rows, causal=causal) for h in range(len(q))]
    means = {what: round(statistics.mean(one[what] for one in heads), 7) for what in heads[0]}
    return {"inputs": name, "length": q.shape[1], "dim": q.shape[-1], "heads": len(q), "errors": means}


def video_like(sizes: tuple[int, int, int], heads: int, dim: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """``[heads, F H W, dim]`` as of patches of a video: attention is about as near as a head's reach, its own on each
    axis; neighbours have similar values; keys have channels with an offset that all tokens share, as SageAttention
    found them (its section 4.2)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    axes = torch.meshgrid(*(torch.arange(n).float() for n in sizes), indexing="ij")
    places = torch.stack([axis.flatten() for axis in axes], dim=-1)
    reach = torch.tensor(sizes) * (0.1 + 0.4 * torch.rand(heads, 1, 3, generator=generator))
    # Random Fourier features: products of two tokens' are near exp(-distance^2 / 2), distances in reaches.
    angles = (places / reach) @ normal(heads, 3, dim // 2)
    near = torch.cat([angles.cos(), angles.sin()], dim=-1) * (2 / dim) ** 0.5
    q, k = (((8 * dim**0.5) ** 0.5 * near + 0.3 * normal(*near.shape)) for _ in range(2))
    offsets = 4 * normal(heads, 1, dim) * (torch.rand(heads, 1, dim, generator=generator) < 0.1)
    values = near @ normal(heads, dim, dim) + 0.3 * normal(*near.shape)
    return q, k + offsets, values


def error_rows(models: list[Path], length: int, layers: list[int]) -> Iterator[dict[str, Any]]:
    for dim in (64, 128):
        generator = torch.Generator().manual_seed(0)
        yield error_row("random", *(torch.randn(n, 2048, dim, generator=generator) for n in (4, 2, 2)))
        yield error_row("like a video, both directions", *video_like((8, 16, 16), 4, dim), causal=False)
    for model in models:
        for call in capture(model, length, layers, torch.float32):
            yield error_row(f"{short_name(model)}, layer {call.layer}", call.q[0], call.k[0], call.values[0])


def short_name(model: Path) -> str:
    """Of a folder, without what a cache of downloads adds to tell versions apart."""
    name, _, version = model.name.rpartition("-")
    return name if name and len(version) == 16 else model.name


def speed_rows(rounds: int) -> Iterator[dict[str, Any]]:
    """By instruction set, head dimension, and density: all tiles of 2K keys, a tenth of those of 8K."""
    headers = [HEADER, *sorted((ROOT / "csrc" / "kernels").iterdir())]
    for isa, (flags, needed) in SETS.items():
        if not needed <= cpu_flags():
            print(f"{isa}: this processor lacks {', '.join(sorted(needed - cpu_flags()))}")
            continue
        built = program(SOURCE, f"integer-scores-{isa}", (*flags, *more_flags(isa)), headers)
        if built is None:
            print(f"{isa}: no compiler here takes {SOURCE.name}")
            continue
        for dim in (64, 128):
            for keys, tiles in ((2048, 32), (8192, 13)):
                command = [str(built), *map(str, (keys, dim, tiles, rounds))]
                parts = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
                sizes = {
                    "isa": isa,
                    "dtype": "bf16" if isa in ("amx", "avx512_bf16") else "fp32",
                    "dim": dim,
                    "keys": keys,
                }
                yield from ({**sizes, "tiles": tiles, **part} for part in with_ratios(parts))


def more_flags(isa: str) -> tuple[str, ...]:
    """What the compiler is told besides the instruction set."""
    return "-fno-strict-aliasing", f"-I{ROOT / 'csrc'}", f"-DGOSSAMER_{isa.upper()}"


def with_ratios(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds how many times as fast each is as the first, packing included: the median over rounds, and the quartiles."""
    whole = [[a + b for a, b in zip(part["pack_s"], part["attend_s"], strict=True)] for part in parts]
    for part, seconds in zip(parts, whole, strict=True):
        ratios = [base / own for base, own in zip(whole[0], seconds, strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else 3 * ratios
        if part.get("scores") in ("no product", "neither product"):
            del part["difference"]  # it says nothing
        part |= {"speedup": round(median, 3), "quartiles": [round(low, 3), round(high, 3)]}
        if "scores_s" in part:
            alone = zip(parts[0]["scores_s"], part["scores_s"], strict=True)
            part["scores_speedup"] = round(statistics.median(base / own for base, own in alone), 3)
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
