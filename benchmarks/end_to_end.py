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
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from timing import Bystanders, machine, write
from torch import Tensor

from gossamer import methods, sparse_attention
from gossamer.attention import CallRecord, Policy
from gossamer.cli.specs import parse_method, split_specs
from gossamer.evaluate.runner import parse_lengths

RESULTS = Path(__file__).parent / "results" / "end_to_end.json"
MLP_ROWS = 4096  # tokens that the MLP takes at once


@dataclass(frozen=True)
class Width:
    hidden: int = 4096
    heads: int = 32
    groups: int = 8
    dim: int = 128
    mlp: int = 14336


@dataclass
class Layer:
    """One decoder layer; its seconds are kept by part."""

    width: Width
    seconds: dict[str, float] = field(default_factory=dict)
    records: list[CallRecord] = field(default_factory=list)

    def __post_init__(self) -> None:
        w = self.width

        def weight(rows: int, columns: int) -> Tensor:
            return torch.randn(rows, columns, dtype=torch.bfloat16) * columns**-0.5

        self.qkv = weight((w.heads + 2 * w.groups) * w.dim, w.hidden)
        self.out = weight(w.hidden, w.heads * w.dim)
        self.gate, self.up = weight(w.mlp, w.hidden), weight(w.mlp, w.hidden)
        self.down = weight(w.hidden, w.mlp)

    def run(self, x: Tensor, policy: Policy) -> Tensor:
        """Hidden states ``[S, hidden]`` after the layer."""
        w, tokens = self.width, x.shape[0]
        projected = self._timed("projections", lambda: F.linear(F.rms_norm(x, (w.hidden,)), self.qkv))
        q, k, v = projected.split([w.heads * w.dim, w.groups * w.dim, w.groups * w.dim], dim=-1)
        q, k, v = (t.view(1, tokens, -1, w.dim).transpose(1, 2) for t in (q, k, v))
        q, k = self._timed("projections", lambda: (rotate(q), rotate(k)))
        attended = self._timed(
            "attention", lambda: sparse_attention(q, k, v, policy, layer=0, record=self.records.append)
        )
        assert isinstance(attended, Tensor)
        attended = attended.transpose(1, 2).reshape(tokens, -1)
        x = self._timed("projections", lambda: x + F.linear(attended, self.out))
        return self._timed("mlp", lambda: self._mlp(x))

    def _mlp(self, x: Tensor) -> Tensor:
        for rows in x.split(MLP_ROWS):
            normed = F.rms_norm(rows, (self.width.hidden,))
            rows += F.linear(F.silu(F.linear(normed, self.gate)) * F.linear(normed, self.up), self.down)
        return x

    def _timed(self, part: str, call):
        started = time.perf_counter()
        result = call()
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - started
        return result


def rotate(x: Tensor) -> Tensor:
    """Rotary positions, base 500,000, in float32."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[2])[:, None] * 5e5 ** (-torch.arange(half) / half)
    cos, sin = angle.cos(), angle.sin()
    turned = torch.empty_like(x)
    for head in range(x.shape[1]):  # a head at a time: float32 copies of all would not fit
        a, b = x[:, head, :, :half].float(), x[:, head, :, half:].float()
        turned[:, head, :, :half] = a * cos - b * sin
        turned[:, head, :, half:] = b * cos + a * sin
    return turned


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
                layer.seconds, layer.records = {}, []
            started = time.perf_counter()
            for layer in layers:
                x = layer.run(x, Policy(method))
            total = time.perf_counter() - started
            records = [record for layer in layers for record in layer.records]
            row = {
                "method": name,
                "length": length,
                "layers": len(layers),
                "total_s": round(total, 3),
                "density": round(sum(r.density for r in records) / len(records), 4),
                "plan_s": round(sum(r.plan_seconds for r in records), 3),
                "dense_because": [r.reason for r in records if r.reason],
                **{part + "_s": round(sum(layer.seconds[part] for layer in layers), 3) for part in layers[0].seconds},
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
