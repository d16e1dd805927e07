"""What share of a prefill linear layers, attention and the rest are, and what other linear layers would give.

    python benchmarks/linear.py MODEL [--lengths 1024,4096,8000] [--at 4096] [--rounds 3] [--only shares,variants]
        [--methods LIST] [--variants LIST] [--out FILE]

*shares*: seconds in all linear layers (the head reads the last token alone), in attention with its planning, and in the
rest, for each length and method; medians over the rounds.

*variants*: the model's linear layers are replaced by those of a library; the head, attention (dense, gossamer's kernel)
and all else stay. Variants and the float32 model take turns on the same prompts; seconds are medians, the ratio is that
within a round. KL (nats) and top-1 agreement are of the predictions at every 16th position of the first prompt, beside
those of the float32 model. gossamer's `enable` changes no linear layer: this only measures.

Results are `linear_<model>.json` in the folder of this machine.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from contenders import Prompts, kept
from machines import machine, results
from timing import Bystanders, wake_threads, write
from torch import Tensor, nn

from gossamer.cli.pretrained import file_hash, model_folder
from gossamer.cli.specs import parse_method, split_specs
from gossamer.integrations.transformers import enable

DENSE = "dense(kernel=gossamer)"
WARM_UP = 512
EVERY = 16
Row = dict[str, Any]


class Timed(nn.Module):
    """A module that counts the seconds of its calls. Input and output keep their dtype, whatever it computes in."""

    def __init__(self, inner: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.inner, self.dtype, self.seconds = inner, dtype, 0.0

    def forward(self, x: Tensor) -> Tensor:
        started = time.perf_counter()
        out = self.inner(x if self.dtype is None else x.to(self.dtype)).to(x.dtype)
        self.seconds += time.perf_counter() - started
        return out


def linear_layers(model: nn.Module) -> list[tuple[nn.Module, str, nn.Linear]]:
    """All linear layers but the head, each with its parent and its name there."""
    return [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear) and name != "lm_head"
    ]


def replaced(model: nn.Module, make: Callable[[nn.Linear], Callable[[Tensor], Tensor]], dtype: Any = None) -> None:
    for parent, name, layer in linear_layers(model):
        setattr(parent, name, Timed(make(layer), dtype))


def quantised_dynamically(engine: str) -> Callable[[nn.Module], None]:
    """torch.ao's linear layers: int8 weights by output channel where the engine can, activations by the tensor."""

    def apply(model: nn.Module) -> None:
        from torch.ao.quantization import quantize_dynamic
        from torch.ao.quantization.qconfig import default_dynamic_qconfig, per_channel_dynamic_qconfig

        torch.backends.quantized.engine = engine
        config = default_dynamic_qconfig if engine == "qnnpack" else per_channel_dynamic_qconfig
        replaced(model, lambda layer: quantize_dynamic(nn.Sequential(layer), {nn.Linear: config}))

    return apply


def torchao(model: nn.Module) -> None:
    """torchao's int8 weights by channel and activations by token."""
    from torchao.quantization import (  # pyright: ignore[reportMissingImports]
        Int8DynamicActivationInt8WeightConfig,
        quantize_,
    )

    def make(layer: nn.Linear) -> nn.Module:
        alone = nn.Sequential(layer)
        quantize_(alone, Int8DynamicActivationInt8WeightConfig())
        return alone

    replaced(model, make)


def compiled(make: Callable[[nn.Module], None]) -> Callable[[nn.Module], None]:
    """Each layer compiled by inductor with its weights frozen, which packs them."""

    def apply(model: nn.Module) -> None:
        import torch._inductor.config as inductor

        inductor.freezing = True
        make(model)
        for module in model.modules():
            if isinstance(module, Timed):
                module.inner = torch.compile(module.inner, dynamic=True)

    return apply


def half(dtype: torch.dtype) -> Callable[[nn.Module], None]:
    return lambda model: replaced(model, lambda layer: layer.to(dtype), dtype)


def packed_by_onednn(model: nn.Module) -> None:
    """oneDNN's float32 product with weights that were packed beforehand."""
    from torch.utils import mkldnn

    replaced(model, lambda layer: mkldnn.MkldnnLinear(layer, torch.float32))


def ipex(model: nn.Module) -> None:
    import intel_extension_for_pytorch  # pyright: ignore[reportMissingImports]

    intel_extension_for_pytorch.optimize(model.eval(), inplace=True)
    replaced(model, lambda layer: layer)


def plain(model: nn.Module) -> None:
    replaced(model, lambda layer: layer)


VARIANTS: dict[str, Callable[[nn.Module], None]] = {
    "torch float32": plain,
    "oneDNN float32 packed": packed_by_onednn,
    "inductor float32 packed": compiled(plain),
    "torch bfloat16": half(torch.bfloat16),
    "torch float16": half(torch.float16),
    "torch.ao int8 x86": quantised_dynamically("x86"),
    "torch.ao int8 fbgemm": quantised_dynamically("fbgemm"),
    "torch.ao int8 onednn": quantised_dynamically("onednn"),
    "torch.ao int8 qnnpack": quantised_dynamically("qnnpack"),
    "torchao int8": torchao,
    "torchao int8 compiled": compiled(torchao),
    "IPEX float32": ipex,
}
BASE = next(iter(VARIANTS))


@contextmanager
def engine_of(name: str) -> Iterator[None]:
    """torch.ao's engine also has to be that of the variant when it runs."""
    before = torch.backends.quantized.engine
    if name.startswith("torch.ao"):
        torch.backends.quantized.engine = name.split()[-1]
    try:
        yield
    finally:
        torch.backends.quantized.engine = before


def prefill(model: Any, ids: list[int], method: str, keep: Any = 1) -> tuple[Row, Tensor]:
    """Seconds of the parts, and the logits that are kept."""
    timed = [module for module in model.modules() if isinstance(module, Timed)]
    for module in timed:
        module.seconds = 0.0
    wake_threads()
    with enable(model, parse_method(method)) as handle:
        started = time.perf_counter()
        logits = model(input_ids=torch.tensor([ids]), use_cache=True, logits_to_keep=keep).logits[0]
        total = time.perf_counter() - started
        layers = list(handle.stats())
    linear = sum(module.seconds for module in timed)
    attention = sum(layer.plan_seconds + layer.attention_seconds for layer in layers)
    parts = {"total_s": total, "linear_s": linear, "attention_s": attention, "rest_s": total - linear - attention}
    return parts | {"density": statistics.fmean(layer.density for layer in layers)}, logits


def medians(runs: list[Row]) -> Row:
    return {name: round(statistics.median(run[name] for run in runs), 4) for name in runs[0]}


def shares(model: Any, prompts: Prompts, arguments: argparse.Namespace) -> Iterator[Row]:
    """Parts of a prefill by length and method."""
    methods = split_specs(arguments.methods)
    plain(model)
    for length in arguments.lengths:
        bystanders = Bystanders()
        runs: dict[str, list[Row]] = {name: [] for name in methods}
        for number in range(arguments.rounds):
            turned = number % len(methods)
            for name in [*methods[turned:], *methods[:turned]]:
                prefill(model, prompts.ids(WARM_UP, 10**6), name)
                runs[name].append(prefill(model, prompts.ids(length, number), name)[0])
        share = bystanders.share()
        for name in methods:
            found = medians(runs[name])
            found |= {f"{part}_share": round(found[f"{part}_s"] / found["total_s"], 4) for part in PARTS}
            yield {"length": length, "method": name, **found, "rounds": arguments.rounds, "used_by_others": share}


PARTS = ("linear", "attention", "rest")


def beside(expected: Tensor, found: Tensor) -> Row:
    """KL divergence and share of equal choices of logits ``[positions, vocabulary]``."""
    p, q = expected.float().log_softmax(-1), found.float().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).clamp(min=0).mean()
    same = (p.argmax(-1) == q.argmax(-1)).float().mean()
    return {"kl": float(kl), "top1": round(float(same), 4), "positions": len(p)}


def variants(model: Any, prompts: Prompts, arguments: argparse.Namespace) -> Iterator[Row]:
    """Other linear layers beside torch's, one of them at a time with the float32 model in turn."""
    base = copy.deepcopy(model)
    plain(base)
    length = arguments.at
    positions = torch.tensor(kept(length, EVERY))
    expected = None
    for name in arguments.variants.split(","):
        try:
            with engine_of(name):
                other = copy.deepcopy(model)
                VARIANTS[name](other)
                prefill(other, prompts.ids(WARM_UP, 10**6), DENSE)
                prefill(other, prompts.ids(WARM_UP + 64, 10**6), DENSE)  # dynamic shapes are compiled at the second
        except (ImportError, RuntimeError, NotImplementedError, OSError, AttributeError, ValueError) as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            yield {"variant": name, "length": length, "unavailable": f"{type(error).__name__}: {lines[0][:200]}"}
            continue
        runs: list[Row] = []
        bases: list[Row] = []
        bystanders = Bystanders()
        for number in range(arguments.rounds):
            ids = prompts.ids(length, number)
            for one in (number % 2, 1 - number % 2):
                with engine_of(name if one else ""):
                    (runs if one else bases).append(prefill(other if one else base, ids, DENSE)[0])
        share = bystanders.share()
        ids = prompts.ids(length, 0)
        expected = prefill(base, ids, DENSE, positions)[1] if expected is None else expected
        with engine_of(name):
            found = beside(expected, prefill(other, ids, DENSE, positions)[1])
        pairs = list(zip(bases, runs, strict=True))
        found |= {
            f"{part}_ratio": round(statistics.median(a[f"{part}_s"] / b[f"{part}_s"] for a, b in pairs), 3)
            for part in ("linear", "total")
        }
        yield {
            "variant": name,
            "length": length,
            **medians(runs),
            **found,
            "rounds": arguments.rounds,
            "used_by_others": share,
        }
        del other


SECTIONS: dict[str, Callable[[Any, Prompts, argparse.Namespace], Iterator[Row]]] = {
    "shares": shares,
    "variants": variants,
}


def identity(row: Row) -> tuple[Any, ...]:
    return row["length"], row.get("method"), row.get("variant")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--name", help="of the model in the results (default: the file's)")
    parser.add_argument("--lengths", type=lambda text: [int(n) for n in text.split(",")], default=[1024, 4096, 8000])
    parser.add_argument("--at", type=int, default=4096, help="length of the variants' prompts")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", default=f"{DENSE},minference(vertical_size=256,slash_size=1024)")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--only", default=",".join(SECTIONS))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.utils.logging.disable_progress_bar()
    folder = model_folder(arguments.model)
    name = arguments.name or arguments.model.stem
    out = arguments.out or results(f"linear_{name}.json")
    report: Row = json.loads(out.read_text()) if out.exists() else {}
    known = {"name": name} | ({"sha256": file_hash(arguments.model)} if arguments.model.is_file() else {})
    report |= {"machine": machine(), "date": date.today().isoformat(), "model": known, "threads": arguments.threads}
    prompts = Prompts(folder)
    for section in arguments.only.split(","):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for row in SECTIONS[section](model, prompts, arguments):
            old = [other for other in report.get(section, []) if identity(other) != identity(row)]
            report[section] = sorted([*old, row], key=lambda row: row["length"])
            write(out, report)
            print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
