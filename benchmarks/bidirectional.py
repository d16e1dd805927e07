"""Attention without causality, as over the patches of a video: kernels, and whole denoising steps of a small model.

    python benchmarks/bidirectional.py [--only kernels,steps] [--tokens 4096,16384,32768] [--weights FOLDER]
        [--threads N] [--quick] [--out FILE]

``kernels``: blocks of 64 by chance at 20% and 30% density, as they are and over tokens in orders of axes that differ by
head, against torch's SDPA, our own kernel with every pair, and FlexAttention, compiled, with the same blocks.
Efficiency is the time of our dense kernel times the density over that of the sparse one: 1 is ideal.

``steps``: the video model of ``models/train_video.py`` (random weights unless given: time does not depend on them),
with torch's attention, ours with every pair, and with methods. Of each a sampling begins, of 50 steps, and its first
four are timed one by one, with what of them is planning: in the first a method searches, in the third `AdaSpa` again
with kept sums, and in the others plans are used again. Where attention is dense each step is like the first, which is
timed alone.

One process, contenders in turn, medians of the rounds (`timing.alternate`); fewer rounds where calls are long. Rows
replace those of the file for the same case. The file stands in a folder of this machine, beside those of others.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from comparison import Row
from machines import machine, results
from timing import Bystanders, Series, alternate, write
from torch import Tensor
from workloads import DTYPES

import gossamer
from gossamer import AttentionCall, Extent, SparsePlan
from gossamer.backends import cpu
from gossamer.backends.torch import attend_rows
from gossamer.layout import TokenLayout
from gossamer.methods import PARO, AdaSpa, AttentionTile, Dense, Method, PerHead, SparseVDiT
from gossamer.methods.denoising import ORDERS, axis_order
from gossamer.plan import ceil_div

NAME = "bidirectional.json"
MODELS = Path(__file__).resolve().parent.parent / "models"
HEADS, BLOCK = 4, 64
DENSITIES = (0.2, 0.3)
STEPS = 4  # of a sampling
SAMPLING = 50
CHECKED_ROWS = 64  # of each head, against the definition


@dataclass(frozen=True)
class Case:
    """Queries, keys and values of a video's patches, ``[1, HEADS, frames * height * width, dim]``."""

    frames: int
    height: int
    width: int
    dim: int
    dtype: str
    flex: bool = True

    @property
    def tokens(self) -> int:
        return self.frames * self.height * self.width

    def extent(self) -> Extent:
        return Extent.full(1, self.tokens, self.tokens, causal=False)

    def draw(self, seed: int) -> AttentionCall:
        generator = torch.Generator().manual_seed(seed)
        shape = (1, HEADS, self.tokens, self.dim)
        q, k, v = (torch.randn(shape, generator=generator).to(DTYPES[self.dtype]) for _ in range(3))
        layout = TokenLayout((0,), self.frames, self.height, self.width)
        return AttentionCall(q, k, v, self.extent(), layout=layout)

    def dense(self) -> SparsePlan:
        return SparsePlan.dense(HEADS, self.tokens, self.tokens, self.extent())

    def blocks(self, density: float, *, ordered: bool) -> SparsePlan:
        """Blocks by chance and the diagonal; ``ordered``: over ranks, each head with another order of axes."""
        number = ceil_div(self.tokens, BLOCK)
        more: dict[str, Any] = {"extent": self.extent(), "block_q": BLOCK, "block_k": BLOCK}
        generator = torch.Generator().manual_seed(0)
        share = (density * number - 1) / (number - 1)  # besides the diagonal
        mask = torch.rand(1, HEADS, number, number, generator=generator) < share
        if ordered:
            call = self.draw(0)
            order = torch.stack([axis_order(call, ORDERS[1 + head]) for head in range(HEADS)], dim=1).int()
            more |= {"q_order": order, "k_order": order}
        return SparsePlan.from_block_mask(mask | torch.eye(number, dtype=torch.bool), self.tokens, self.tokens, **more)


CASES = (
    Case(16, 32, 32, 64, "bf16"),
    Case(16, 32, 32, 64, "fp32"),
    Case(16, 32, 32, 128, "bf16"),
    Case(16, 32, 32, 128, "fp32", flex=False),
    Case(32, 32, 32, 64, "bf16"),
    Case(32, 32, 32, 64, "fp32"),
    Case(32, 32, 32, 128, "bf16", flex=False),
)
QUICK_CASES = (Case(2, 16, 16, 32, "fp32", flex=False),)


def sdpa(call: AttentionCall) -> Tensor:
    return F.scaled_dot_product_attention(call.q, call.k, call.values)


def flex_of(plan: SparsePlan) -> Callable[[AttentionCall], Tensor]:
    """FlexAttention with a plan's blocks, all of them whole."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    blocks = plan.block_mask()
    order = blocks.int().argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    count = blocks.sum(-1).to(torch.int32)
    mask = BlockMask.from_kv_blocks(
        torch.zeros_like(count),
        torch.zeros_like(order),
        count,
        order,
        BLOCK_SIZE=(plan.block_q, plan.block_k),
        seq_lengths=(plan.query_len, plan.key_len),
    )
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    return lambda call: compiled(call.q, call.k, call.values, block_mask=mask)


def kernels(arguments: argparse.Namespace) -> Iterator[Row]:
    """A row for each case and density."""
    for case in QUICK_CASES if arguments.quick else CASES:
        if arguments.tokens and case.tokens not in arguments.tokens:
            continue
        plans = {("blocks", d): case.blocks(d, ordered=False) for d in DENSITIES}
        plans |= {("ordered", d): case.blocks(d, ordered=True) for d in DENSITIES}
        contenders: dict[Any, Callable[[AttentionCall], object]] = {"sdpa": sdpa}
        contenders["dense"] = partial(attended, case.dense())
        contenders |= {name: partial(attended, plan) for name, plan in plans.items()}
        why_not = None if case.flex else "left out: it takes long to compile"
        if case.flex:
            others, why_not = compiled_flex(case, plans)
            contenders |= others
        check_kernels(contenders, plans, case.draw(0))
        others = Bystanders()
        rounds = 1 if arguments.quick else rounds_of(case.tokens // 4)
        series = alternate(contenders, case.draw, rounds=rounds)
        about = {"frames": case.frames, "height": case.height, "width": case.width, "tokens": case.tokens}
        about |= {"dim": case.dim, "dtype": case.dtype, "heads": HEADS, "block": BLOCK}
        about |= {"isa": cpu.active_isa(DTYPES[case.dtype]), "used_by_others": others.share(), "rounds": rounds}
        for density in DENSITIES:
            yield about | {"wanted": density} | compared(series, plans, density, why_not)


def rounds_of(tokens: int) -> int:
    """Of a model's steps, fewer where they take long; of kernels alone those of a quarter of the tokens."""
    return 5 if tokens <= 4096 else 3 if tokens <= 16384 else 1


def attended(plan: SparsePlan, call: AttentionCall) -> Tensor:
    return cpu.attend(call, plan)[0]


def compiled_flex(case: Case, plans: Mapping[Any, SparsePlan]) -> tuple[dict[Any, Any], str | None]:
    """FlexAttention of each density, or why there is none."""
    made, call = {}, case.draw(0)
    try:
        for density in DENSITIES:
            made["flex", density] = flex_of(plans["blocks", density])
            made["flex", density](call)
    except Exception as error:  # whatever the compiler raises
        return {}, f"{type(error).__name__}: {error}".splitlines()[0]
    return made, None


def check_kernels(contenders: Mapping[Any, Any], plans: Mapping[Any, SparsePlan], call: AttentionCall) -> None:
    """Raise unless all pairs give what torch's SDPA does, and a plan what its definition does on some rows."""
    tolerance = 1e-2 if call.q.dtype == torch.bfloat16 else 1e-5
    check_close("dense", contenders["dense"](call), contenders["sdpa"](call), tolerance)
    # By chance: even ones may all lie in a few blocks of another order of axes.
    rows = torch.randperm(call.query_len, generator=torch.Generator().manual_seed(0))[:CHECKED_ROWS]
    for name in contenders.keys() - {"sdpa", "dense"}:
        kind, density = name
        expected, _ = attend_rows(call, plans["ordered" if kind == "ordered" else "blocks", density], rows)
        check_close(f"{kind} of {density}", contenders[name](call)[:, :, rows], expected, tolerance)


def check_close(what: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
    """By the norm of the difference over that of what is expected."""
    error = float((found - expected).float().norm() / expected.float().norm())
    if not error < tolerance:
        raise AssertionError(f"{what} is {error:.1e} off what is expected, above {tolerance}")


def compared(series: Mapping[Any, Series], plans: Mapping[Any, SparsePlan], density: float, why_not: str | None) -> Row:
    """What was timed at a density, and what follows."""
    share = plans["blocks", density].density()
    dense = series["dense"].median
    row: Row = {"density": round(share, 5), "sdpa": series["sdpa"].to_dict(), "dense": series["dense"].to_dict()}
    for name in ("blocks", "ordered"):
        own = series[name, density]
        row[name] = own.to_dict() | {
            "efficiency": round(dense * share / own.median, 3),
            "times_dense": round(dense / own.median, 3),
            "times_sdpa": round(series["sdpa"].median / own.median, 3),
        }
    row["ordered"]["times_blocks"] = round(series["blocks", density].median / series["ordered", density].median, 3)
    if ("flex", density) in series:
        flex = series["flex", density]
        row["flex"] = flex.to_dict()
        row["blocks"]["times_flex"] = round(flex.median / series["blocks", density].median, 3)
    else:
        row["no_flex"] = why_not
    return row


@dataclass(frozen=True)
class Clip:
    """What the video model is given: so many frames and pixels, in patches of 1 x 2 x 2."""

    frames: int
    side: int
    dtype: str

    @property
    def tokens(self) -> int:
        return self.frames * (self.side // 2) ** 2

    def draw(self, text_dim: int, seed: int) -> tuple[Tensor, Tensor]:
        """Latents and text."""
        generator = torch.Generator().manual_seed(seed)
        latents = torch.randn(1, 3, self.frames, self.side, self.side, generator=generator)
        text = torch.randn(1, 7, text_dim, generator=generator)
        return latents.to(DTYPES[self.dtype]), text.to(DTYPES[self.dtype])


CLIPS = (Clip(16, 32, "bf16"), Clip(16, 32, "fp32"), Clip(16, 64, "bf16"), Clip(32, 64, "bf16"))
QUICK_CLIPS = (Clip(4, 16, "fp32"),)
# Each at about a fifth of the pairs.
METHODS: dict[str, Callable[[int], Method]] = {
    "dense": lambda _: Dense(kernel="gossamer"),
    "adaspa": lambda _: AdaSpa(sparsity=0.8, search=(0, 2)),
    "paro": lambda _: PARO("HWF", density=0.2),
    "paro, an order a head": lambda layers: PerHead(
        [[PARO(ORDERS[1 + head], density=0.2) for head in range(HEADS)]] * layers
    ),
    "attention_tile": lambda _: AttentionTile(1),
    "sparse_vdit": lambda _: SparseVDiT("multi_diagonal", 0.2),
}


@dataclass
class Contender:
    """A model, and what its steps took in each run: seconds, of planning, and of attention."""

    model: Any
    handle: Any = None
    steps: int = 1
    runs: list[list[tuple[float, float, float]]] = field(default_factory=list)
    density: list[float] = field(default_factory=list)

    def __call__(self, given: tuple[Tensor, Tensor]) -> None:
        taken = []
        if self.handle is not None:
            self.handle.restart()
            self.handle.reset()
        for n in range(self.steps):
            started = time.perf_counter()
            self.model(given[0], torch.tensor([1000.0 * (1 - n / SAMPLING)]), given[1], return_dict=False)
            taken.append(time.perf_counter() - started)
        parts, self.density = [(0.0, 0.0)] * self.steps, [1.0] * self.steps
        if self.handle is not None:
            layers = [[x for x in self.handle.stats(step=n) if x.layer is not None] for n in self.handle.steps]
            parts = [(sum(x.plan_seconds for x in one), sum(x.attention_seconds for x in one)) for one in layers]
            self.density = [round(statistics.fmean(x.density for x in one), 4) for one in layers]
        self.runs.append([(whole, *part) for whole, part in zip(taken, parts, strict=True)])

    def medians(self) -> list[Row]:
        """Of each step, over the runs."""
        names = ("seconds", "plan_s", "attention_s")
        found = []
        for n, density in enumerate(self.density):
            medians = [statistics.median(run[n][part] for run in self.runs) for part in range(3)]
            row: Row = {name: round(seconds, 6) for name, seconds in zip(names, medians, strict=True)}
            found.append(row | {"density": density})
        return found


def steps(arguments: argparse.Namespace) -> Iterator[Row]:
    """A row for each clip and contender."""
    clips = QUICK_CLIPS if arguments.quick else CLIPS
    for clip in clips:
        if arguments.tokens and clip.tokens not in arguments.tokens:
            continue
        model, text_dim = video_model(arguments.weights, clip.dtype, arguments.quick)
        contenders = {"torch": Contender(model)}
        for name, make in METHODS.items():
            own, method = copy.deepcopy(model), make(len(model.blocks))
            enabled = gossamer.enable(own, method, steps=SAMPLING, min_tokens=0)
            contenders[name] = Contender(own, enabled, 1 if name == "dense" else STEPS)
        verified(contenders, clip.draw(text_dim, 0))
        others = Bystanders()
        rounds = 1 if arguments.quick else rounds_of(clip.tokens)
        series = alternate(contenders, partial(clip.draw, text_dim), rounds=rounds, warm_up=False)
        share = others.share()
        about = {"frames": clip.frames, "side": clip.side, "tokens": clip.tokens, "dtype": clip.dtype}
        for name, contender in contenders.items():
            row = about | {"method": name, "used_by_others": share, "rounds": rounds}
            yield row | {"steps": contender.medians()} | series[name].to_dict()
            if contender.handle is not None:
                contender.handle.disable()


def video_model(weights: Path | None, dtype: str, quick: bool) -> tuple[Any, int]:
    """The model, and the dimension of its text."""
    sys.path.insert(0, str(MODELS))
    try:
        import train_video
        from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
    finally:
        sys.path.remove(str(MODELS))
    with tempfile.TemporaryDirectory() as folder:
        if weights is None:
            torch.manual_seed(0)
            config = train_video.CONFIG | ({"num_layers": 1} if quick else {})
            WanTransformer3DModel(**config).save_pretrained(folder)
        # As it is loaded for use: some parts stay in fp32.
        model = WanTransformer3DModel.from_pretrained(
            weights or folder, torch_dtype=DTYPES[dtype], local_files_only=True
        )
    return model.eval(), train_video.CONFIG["text_dim"]


def verified(contenders: Mapping[str, Contender], given: tuple[Tensor, Tensor]) -> None:
    """Raise unless our kernel with every pair gives what torch's attention does; it warms both up."""
    first = torch.tensor([1000.0])
    expected, found = (
        contenders[name].model(given[0], first, given[1], return_dict=False)[0] for name in ("torch", "dense")
    )
    check_close("the model, dense,", found, expected, 3e-2 if given[0].dtype == torch.bfloat16 else 1e-4)


SECTIONS: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = {"kernels": kernels, "steps": steps}
_IDENTITY = ("tokens", "dim", "dtype", "wanted", "method", "isa")


def identity(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in _IDENTITY)


def merged(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """New rows in the place of old ones of the same case, others behind them."""
    found = {identity(row): row for row in old}
    found.update({identity(row): row for row in new})
    return sorted(found.values(), key=lambda row: (row["tokens"], row["dtype"], row.get("dim", 0)))


@torch.inference_mode()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--tokens", type=lambda text: [int(n) for n in text.split(",")], help="of these sizes alone")
    parser.add_argument("--weights", type=Path, help="folder of a trained transformer of the model's size")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="small sizes; writes nothing unless --out is given")
    parser.add_argument("--out", type=Path, help=f"default: {NAME} in the folder of this machine in results/")
    arguments = parser.parse_args()
    chosen = arguments.only.split(",")
    if unknown := sorted(set(chosen) - set(SECTIONS)):
        parser.error(f"--only takes {', '.join(SECTIONS)}; got {unknown[0]!r}")
    if not cpu.is_available():
        print(cpu.why_unavailable(), file=sys.stderr)
        return 1
    torch.set_num_threads(arguments.threads)
    out = arguments.out or (None if arguments.quick else results(NAME))
    report = json.loads(out.read_text()) if out is not None and out.exists() else {}
    for name in chosen:
        for row in SECTIONS[name](arguments):
            row |= {"date": date.today().isoformat(), "threads": arguments.threads}
            print(json.dumps({key: value for key, value in row.items() if not isinstance(value, dict)}), flush=True)
            report["machine"] = machine()
            report[name] = merged(report.get(name, []), [row])
            if out is not None:
                write(out, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
