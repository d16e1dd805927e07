"""What benchmarks/gpu.py measures, a function a section. Each yields rows of plain numbers."""

from __future__ import annotations

import functools
import importlib.util
import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from decoder import Layer, Width
from gpu_timing import Timer, alternate
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from workloads import random_blocks_of

from gossamer import Extent, SparsePlan
from gossamer.attention import Policy
from gossamer.cli.specs import parse_method
from gossamer.ops import triton
from gossamer.ops.planners import triton_on_cpu

Rows = Iterator[dict[str, object]]
DENSITIES = (0.5, 0.2, 0.1, 0.05, 0.02)
LLAMA = (32, 8, 128)  # query heads, key/value heads, head dimension
SPARSE = ("minference", "vertical_slash(vertical_size=500,slash_size=3000)", "max_relative", "max_relative(alpha=0.4)")


@dataclass(frozen=True)
class Setting:
    """Where and how large. ``out_of_time`` is asked before each row."""

    device: torch.device
    quick: bool
    timer: Timer
    out_of_time: Callable[[], bool]

    @property
    def shape(self) -> tuple[int, int, int]:
        return (4, 1, 64) if self.quick else LLAMA

    def lengths(self, *full: int) -> tuple[int, ...]:
        if self.quick:
            return (256,) if self.device.type == "cpu" else (4096,)
        return full

    def tune(self) -> None:
        """Measure tile shapes for what is timed below."""
        _, groups, dim = self.shape
        for length in self.lengths(32768, 131072):
            full = SparsePlan.dense(groups, length, length, Extent.full(1, length, length))
            some = random_blocks_of(groups, length, 0.1, block_q=128, block_k=128)
            q, k, v = self.draw(length)(0)
            for plan in (full, some):
                triton.autotune(q, k, v, plan.to(self.device), scale=dim**-0.5)

    def draw(self, length: int, dim: int | None = None) -> Callable[[int], tuple[Tensor, Tensor, Tensor]]:
        heads, groups, default = self.shape

        def inputs(seed: int) -> tuple[Tensor, Tensor, Tensor]:
            generator = torch.Generator(self.device).manual_seed(seed)
            return tuple(  # pyright: ignore[reportReturnType]
                torch.randn(1, n, length, dim or default, generator=generator, device=self.device, dtype=torch.bfloat16)
                for n in (heads, groups, groups)
            )

        return inputs

    def draw_like_prompts(self, length: int) -> Callable[[int], tuple[Tensor, Tensor, Tensor]]:
        """Keys and queries that drift with the position, so that near ones match, and a hundred keys that all match."""
        heads, groups, dim = self.shape

        def inputs(seed: int) -> tuple[Tensor, Tensor, Tensor]:
            generator = torch.Generator(self.device).manual_seed(seed)

            def noise(n: int, tokens: int) -> Tensor:
                return torch.randn(1, n, tokens, dim, generator=generator, device=self.device, dtype=torch.bfloat16)

            topic = noise(groups, length // 512 + 1).repeat_interleave(512, 2)[:, :, :length]
            k, q = noise(groups, length), noise(heads, length)
            k += topic
            q.view(1, groups, heads // groups, length, dim).add_(topic[:, :, None], alpha=2)
            lines = torch.randint(length, (min(100, length),), generator=generator, device=self.device)
            k[:, :, lines] += 1.5 * q[:, :: heads // groups].float().mean(2, keepdim=True).bfloat16()
            return q, k, noise(groups, length)

        return inputs


def flops(length: int, heads: int, dim: int) -> float:
    """Of both products, over all causal pairs of all heads."""
    return 4.0 * heads * dim * (length * (length + 1) / 2)


def sdpa(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend | None = None) -> Tensor:
    run = functools.partial(F.scaled_dot_product_attention, q, k, v, is_causal=True, enable_gqa=True)
    if backend is None:
        return run()
    with sdpa_kernel(backend):
        return run()


def dense_contenders(setting: Setting) -> dict[str, Callable[..., object]]:
    """Dense attention by others, those that are installed."""
    if setting.device.type == "cpu":
        return {"sdpa": sdpa}
    found: dict[str, Callable[..., object]] = {
        "sdpa flash": functools.partial(sdpa, backend=SDPBackend.FLASH_ATTENTION),
        "sdpa cudnn": functools.partial(sdpa, backend=SDPBackend.CUDNN_ATTENTION),
    }
    if importlib.util.find_spec("flash_attn_interface"):
        from flash_attn_interface import flash_attn_func as flash3  # pyright: ignore[reportMissingImports]

        found["flash-attn 3"] = lambda q, k, v: flash3(*(t.transpose(1, 2) for t in (q, k, v)), causal=True)
    if importlib.util.find_spec("flash_attn"):
        from flash_attn import flash_attn_func as flash2  # pyright: ignore[reportMissingImports]

        found["flash-attn 2"] = lambda q, k, v: flash2(*(t.transpose(1, 2) for t in (q, k, v)), causal=True)
    if importlib.util.find_spec("flashinfer"):
        import flashinfer  # pyright: ignore[reportMissingImports]

        found["flashinfer"] = lambda q, k, v: flashinfer.single_prefill_with_kv_cache(
            *(t[0].transpose(0, 1) for t in (q, k, v)), causal=True
        )
    return found


def ours(plan: SparsePlan, dim: int) -> Callable[..., object]:
    return lambda q, k, v: triton.execute(q, k, v, plan, scale=dim**-0.5)


def flex(setting: Setting, plan: SparsePlan, heads: int) -> Callable[..., object]:
    """Compiled FlexAttention on the plan's blocks, whole ones apart; uncompiled on a CPU."""
    from torch.nn.attention.flex_attention import flex_attention

    mask = plan.to_block_mask(heads)
    torch._dynamo.config.recompile_limit = 64  # each mask compiles anew
    # Below the diagonal blocks are whole, and partial blocks are causal: cheaper than the plan's whole definition.
    mask.mask_mod = _causal
    run = flex_attention if setting.device.type == "cpu" else torch.compile(flex_attention, dynamic=False)
    return functools.partial(run, block_mask=mask, enable_gqa=True)


def _causal(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return kv_idx <= q_idx


def roofline(setting: Setting) -> Rows:
    """What the device can do: a large product in bf16, and copying memory."""
    size = 512 if setting.quick else 8192
    a, b = (torch.randn(size, size, device=setting.device, dtype=torch.bfloat16) for _ in range(2))
    seconds = statistics.median(setting.timer(lambda: a @ b) for _ in range(10))
    yield {"what": "bf16 product", "tflops": round(2 * size**3 / seconds / 1e12, 2)}
    source = torch.empty((1 << 20) if setting.quick else (2 << 30), dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    seconds = statistics.median(setting.timer(lambda: target.copy_(source)) for _ in range(10))
    yield {"what": "copy", "gb_per_s": round(2 * source.numel() / seconds / 1e9, 1)}


def dense(setting: Setting) -> Rows:
    """Our kernel on dense plans against dense attention by others."""
    heads, groups, default = setting.shape
    for length in setting.lengths(8192, 32768, 131072):
        for dim in (default,) if setting.quick or length != 32768 else (default, 64):
            if setting.out_of_time():
                return
            plan = SparsePlan.dense(groups, length, length, Extent.full(1, length, length)).to(setting.device)
            contenders = {"gossamer": ours(plan, dim), **dense_contenders(setting)}
            if length <= 32768:
                tiles = -(-length // 128)
                lower = torch.ones(1, groups, tiles, tiles, dtype=torch.bool).tril()
                blocks = SparsePlan.from_block_mask(lower, length, length, block_q=128, block_k=128)
                contenders["flex"] = flex(setting, blocks.to(setting.device), heads)
            series = alternate(setting.timer, contenders, setting.draw(length, dim))
            own = series["gossamer"].median
            others = {n: s.median for n, s in series.items() if n.startswith("sdpa") and s.median}
            best = min(others.values(), default=None)
            rates = {
                name: round(flops(length, heads, dim) / one.median / 1e12, 2)
                for name, one in series.items()
                if one.median
            }
            yield {
                "what": "dense",
                "length": length,
                "dim": dim,
                "share_of_best_sdpa": round(best / own, 3) if best and own else None,
                "tflops": rates,
                "series": {name: one.to_dict() for name, one in series.items()},
            }


def blocks(setting: Setting) -> Rows:
    """Random block plans: rate on the computed pairs, and efficiency against our own dense run."""
    heads, groups, dim = setting.shape
    for length in setting.lengths(32768, 131072):
        for block in (128,) if setting.quick or length > 32768 else (128, 64):
            if setting.out_of_time():
                return
            full = SparsePlan.dense(groups, length, length, Extent.full(1, length, length))
            plans = {"dense": full} | {
                f"{share:.0%}": random_blocks_of(groups, length, share, block_q=block, block_k=block)
                for share in DENSITIES
            }
            densities = {name: plan.density() for name, plan in plans.items()}
            plans = {name: plan.to(setting.device) for name, plan in plans.items()}
            contenders = {name: ours(plan, dim) for name, plan in plans.items()}
            compared = ("10%", "5%") if length <= 32768 and block == 128 else ()
            contenders |= {f"flex {name}": flex(setting, plans[name], heads) for name in compared}
            series = alternate(setting.timer, contenders, setting.draw(length))
            base = series["dense"].median
            for name, density in densities.items():
                own = series[name].median
                theirs = series[f"flex {name}"].median if name in compared else None
                yield {
                    "what": f"{name} in {block}x{block}",
                    "length": length,
                    "density": round(density, 5),
                    "tflops": round(density * flops(length, heads, dim) / own / 1e12, 2) if own else None,
                    "efficiency": round(base / own * density, 3) if own and base else None,
                    "speedup_over_flex": round(theirs / own, 3) if theirs and own else None,
                    **series[name].to_dict(),
                    **({"flex": series[f"flex {name}"].to_dict()} if name in compared else {}),
                }


@dataclass
class Attempt:
    """A method on the device, by itself and with the kernel. The last plan is kept."""

    spec: str
    dim: int
    made: SparsePlan | None = field(default=None, init=False)

    def plan(self, q: Tensor, k: Tensor, v: Tensor) -> SparsePlan:
        extent = Extent.full(1, q.shape[2], k.shape[2])
        with nullcontext() if q.is_cuda else triton_on_cpu():
            self.made = parse_method(self.spec).plan(q, k, scale=self.dim**-0.5, extent=extent, layer=0)
        return self.made

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> object:
        return triton.execute(q, k, v, self.plan(q, k, v), scale=self.dim**-0.5)


def whole(setting: Setting) -> Rows:
    """Plan and kernel together, on drifting inputs, against dense SDPA."""
    on_cuda = setting.device.type == "cuda"
    for length in setting.lengths(32768, 131072, 524288, 1048576):
        if setting.out_of_time():
            return
        attempts = [Attempt(spec, setting.shape[2]) for spec in SPARSE]
        contenders: dict[str, Callable[..., object]] = {"sdpa": sdpa}
        for attempt in attempts:
            contenders |= {f"plan {attempt.spec}": attempt.plan, attempt.spec: attempt.attend}
        if on_cuda:
            torch.cuda.reset_peak_memory_stats()
        rounds = 3 if length > 200_000 else 5
        series = alternate(setting.timer, contenders, setting.draw_like_prompts(length), rounds=rounds)
        peak = torch.cuda.max_memory_allocated() / 2**30 if on_cuda else None
        base = series["sdpa"].median
        yield {"what": "sdpa", "length": length, "peak_gib": _rounded(peak, 2), **series["sdpa"].to_dict()}
        for attempt in attempts:
            own, planning = series[attempt.spec].median, series[f"plan {attempt.spec}"].median
            plan = attempt.made
            yield {
                "what": attempt.spec,
                "length": length,
                "density": None if plan is None else _rounded(plan.to("cpu").density(), 5),
                "speedup_over_sdpa": round(base / own, 3) if base and own else None,
                "planning_share": round(planning / own, 3) if planning and own else None,
                "plan_mib": None if plan is None else round(plan.memory_bytes() / 2**20, 1),
                **series[attempt.spec].to_dict(),
                "plan": series[f"plan {attempt.spec}"].to_dict(),
            }


def model(setting: Setting) -> Rows:
    """Prefill of a Llama-3-8B-shaped model with random weights, to the logits of the last token."""
    width = Width(256, 4, 1, 64, 512) if setting.quick else Width()
    vocabulary, depth = (512, 2) if setting.quick else (128256, 32)
    layers = [Layer(width, setting.device) for _ in range(depth)]
    head = torch.randn(vocabulary, width.hidden, dtype=torch.bfloat16, device=setting.device)
    base: dict[int, float] = {}
    for length in setting.lengths(131072, 524288, 1048576):
        for spec in ("dense", "minference"):
            # Dense attention alone takes minutes beyond this.
            if setting.out_of_time() or (spec == "dense" and length > 200_000):
                continue
            policy = Policy(parse_method(spec), min_tokens=0)

            def prefill(policy: Policy = policy, length: int = length) -> Tensor:
                generator = torch.Generator(setting.device).manual_seed(0)
                x = torch.randn(length, width.hidden, dtype=torch.bfloat16, device=setting.device, generator=generator)
                for layer in layers:
                    x = layer.run(x, policy)
                return F.linear(F.rms_norm(x[-1:], (width.hidden,)), head)

            layers[0].run(torch.randn(length, width.hidden, device=setting.device).bfloat16(), policy)  # compiles
            for layer in layers:
                layer.reset()
            seconds = setting.timer(prefill)
            parts = [layer.watch.seconds() for layer in layers]
            records = [record for layer in layers for record in layer.records]
            if spec == "dense":
                base[length] = seconds
            yield {
                "what": spec,
                "length": length,
                "layers": depth,
                "seconds_whole": round(seconds, 3),
                "speedup_over_dense": round(base[length] / seconds, 3)
                if spec != "dense" and length <= 200_000
                else None,
                "density": _rounded(statistics.mean(r.density for r in records), 4),
                "dense_because": sorted({r.reason for r in records if r.reason}),
                **{f"{part}_s": round(sum(one[part] for one in parts), 3) for part in parts[0]},
            }


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None or math.isnan(value) else round(value, digits)


SECTIONS: dict[str, Callable[[Setting], Rows]] = {
    "roofline": roofline,
    "dense": dense,
    "blocks": blocks,
    "whole": whole,
    "model": model,
}
