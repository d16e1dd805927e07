"""What the sections of benchmarks/gpu.py share: sizes, inputs, contenders."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from gpu_report import Row
from gpu_timing import ROUNDS, Budget, Timer
from timing import environment
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask

from gossamer import AttentionCall, Extent, SparsePlan
from gossamer.backends import triton
from gossamer.cli.specs import parse_method

LLAMA = (32, 8, 128)  # query heads, key/value heads, head dimension
SPARSE = ("minference", "vertical_slash(vertical_size=500,slash_size=3000)", "max_relative", "max_relative(alpha=0.4)")
# Of a few blocks: with the budgets above a short prompt's plan would be dense, and with less nothing would be chosen,
# since 30 columns and two bands are forced.
SPARSE_SHORT = (
    "minference(vertical_size=50,slash_size=192)",
    "max_relative(alpha=0.6,sink_blocks=1,window_blocks=1,last_rows=64,block_k=64)",
)
Contender = Callable[[AttentionCall], object]


class Cell(NamedTuple):
    """What is measured together: a name, and the rows that it yields."""

    name: str
    rows: Callable[[], Iterator[Row]]


@dataclass(frozen=True)
class Setting:
    """Where, how large, and how long."""

    device: torch.device
    quick: bool
    timer: Timer
    budget: Budget

    @property
    def interpreted(self) -> bool:
        return self.device.type == "cpu"

    @property
    def shape(self) -> tuple[int, int, int]:
        return (4, 1, 16 if self.interpreted else 64) if self.quick else LLAMA

    @property
    def methods(self) -> tuple[str, ...]:
        return SPARSE_SHORT if self.quick and self.interpreted else SPARSE

    def lengths(self, *full: int) -> tuple[int, ...]:
        if self.quick:
            return (512,) if self.interpreted else (8192,)
        return full

    def rounds(self, full: int = ROUNDS) -> dict[str, Any]:
        """Of `alternate`: one is enough where times mean nothing."""
        return {"rounds": 1, "warm_up": False} if self.interpreted else {"rounds": full}

    def draw(self, length: int, dim: int | None = None) -> Callable[[int], AttentionCall]:
        heads, groups, default = self.shape

        def inputs(seed: int) -> AttentionCall:
            generator = torch.Generator(self.device).manual_seed(seed)
            size, where = (length, dim or default), {"device": self.device, "dtype": torch.bfloat16}
            q, k, v = (torch.randn(1, n, *size, generator=generator, **where) for n in (heads, groups, groups))
            return AttentionCall(q, k, v)

        return inputs

    def draw_like_prompts(self, length: int) -> Callable[[int], AttentionCall]:
        """Keys and queries that drift with the position, so that near ones match, and a hundred keys that all match."""
        heads, groups, dim = self.shape

        def inputs(seed: int) -> AttentionCall:
            generator = torch.Generator(self.device).manual_seed(seed)

            def noise(n: int, tokens: int) -> Tensor:
                return torch.randn(1, n, tokens, dim, generator=generator, device=self.device, dtype=torch.bfloat16)

            topic = noise(groups, length // 512 + 1).repeat_interleave(512, 2)[:, :, :length]
            k, q = noise(groups, length), noise(heads, length)
            k += topic
            q.view(1, groups, heads // groups, length, dim).add_(topic[:, :, None], alpha=2)
            lines = torch.randint(length, (min(100, length // 8),), generator=generator, device=self.device)
            k[:, :, lines] += 1.5 * q[:, :: heads // groups].float().mean(2, keepdim=True).bfloat16()
            return AttentionCall(q, k, noise(groups, length), layer=0)

        return inputs


def flops(length: int, heads: int, dim: int) -> float:
    """Of both products, over all causal pairs of all heads."""
    return 4.0 * heads * dim * (length * (length + 1) / 2)


def full_plan(setting: Setting, length: int) -> SparsePlan:
    """Every causal pair, planned per key/value head."""
    plan = SparsePlan.dense(setting.shape[1], length, length, Extent.full(1, length, length))
    return plan.to(setting.device)


def sdpa(call: AttentionCall, backend: SDPBackend | None = None) -> Tensor:
    tensors = (call.q, call.k, call.values)
    run = functools.partial(F.scaled_dot_product_attention, *tensors, is_causal=True, enable_gqa=True)
    if backend is None:
        return run()
    with sdpa_kernel(backend):
        return run()


def torch_contenders(setting: Setting) -> dict[str, Contender]:
    """Torch's own dense attention, by each of its fast kernels. One that refuses says why in its row."""
    if setting.interpreted:
        return {"sdpa": sdpa}
    return {
        "sdpa flash": functools.partial(sdpa, backend=SDPBackend.FLASH_ATTENTION),
        "sdpa cudnn": functools.partial(sdpa, backend=SDPBackend.CUDNN_ATTENTION),
    }


def dense_contenders(setting: Setting) -> dict[str, Contender]:
    """Dense attention by others, those that are installed."""
    found = torch_contenders(setting)
    if setting.interpreted:
        return found
    if importlib.util.find_spec("flash_attn_interface"):
        from flash_attn_interface import flash_attn_func as flash3  # pyright: ignore[reportMissingImports]

        found["flash-attn 3"] = lambda call: flash3(*tokens_first(call), causal=True)
    if importlib.util.find_spec("flash_attn"):
        from flash_attn import flash_attn_func as flash2  # pyright: ignore[reportMissingImports]

        found["flash-attn 2"] = lambda call: flash2(*tokens_first(call), causal=True)
    if importlib.util.find_spec("flashinfer"):
        import flashinfer  # pyright: ignore[reportMissingImports]

        found["flashinfer"] = lambda call: flashinfer.single_prefill_with_kv_cache(
            *(t[0] for t in tokens_first(call)), causal=True
        )
    return found


def tokens_first(call: AttentionCall) -> list[Tensor]:
    """q, k and v as ``[B, tokens, heads, D]``."""
    return [t.transpose(1, 2) for t in (call.q, call.k, call.values)]


def ours(plan: SparsePlan) -> Contender:
    return lambda call: triton.attend(call, plan)


def flex(setting: Setting, plan: SparsePlan, heads: int) -> Contender:
    """Compiled FlexAttention on the plan's blocks, whole ones apart; uncompiled on a CPU.

    The mask is made by the first call, which does not count: what goes wrong there is this contender's failure.
    """

    @functools.cache
    def mask() -> BlockMask:
        found = plan.to_block_mask(heads)
        # Below the diagonal blocks are whole, and partial blocks are causal: cheaper than the plan's whole definition.
        found.mask_mod = _causal
        return found

    run = _flex_attention(setting.interpreted)
    return lambda call: run(call.q, call.k, call.values, block_mask=mask(), enable_gqa=True)


@functools.cache
def _flex_attention(interpreted: bool) -> Callable[..., object]:
    """One function for all plans: those of one length and one block size share what is compiled."""
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.config.recompile_limit = 64
    return flex_attention if interpreted else torch.compile(flex_attention, dynamic=False)


def _causal(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return kv_idx <= q_idx


@dataclass
class Attempt:
    """A method on the device, by itself and with the kernel. The last plan is kept."""

    spec: str
    made: SparsePlan | None = field(default=None, init=False)

    def plan(self, call: AttentionCall) -> SparsePlan:
        self.made = None  # its memory is no longer needed
        with planned_by("triton"):
            self.made = parse_method(self.spec).plan(call)
        return self.made

    def attend(self, call: AttentionCall) -> object:
        return triton.attend(call, self.plan(call))


def on_triton(setting: Setting) -> ExitStack:
    """Without a device the library would choose the CPU's kernels: have it interpret the device's."""
    stack = ExitStack()
    if setting.interpreted:
        stack.enter_context(environment("GOSSAMER_BACKEND", "triton"))
        stack.enter_context(planned_by("triton"))
    return stack


def planned_by(backend: str) -> AbstractContextManager[None]:
    """Plans by that backend, where a device does not decide: without one, Triton interprets on CPU tensors."""
    return environment("GOSSAMER_PLANNER", backend)
