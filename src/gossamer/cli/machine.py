"""The processor: what it is called, its instruction sets, and the dtype that it computes fast."""

from __future__ import annotations

import argparse
import re
from typing import Any

import torch

from gossamer.profiles.machine import cpu_info, cpu_model, usable_cores

__all__ = ["DTYPES", "add_dtype", "examine_cpu", "fast_dtype"]

# What --dtype takes.
DTYPES = ("auto", "float32", "bfloat16", "float16")

# Instruction sets that some kernel could use, as Linux names them.
_FEATURES = re.compile(r"avx2|fma|f16c|avx_vnni|avx512(f|bw|vl|dq|_bf16|_fp16|_vnni)|amx_\w+|asimd|sve2?|bf16|i8mm")
# Those that multiply bfloat16. Without them a matrix product takes several times as long in bfloat16 as in float32.
_BFLOAT16 = ("amx_bf16", "avx512_bf16", "bf16")


def add_dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="of the model; auto: what the machine computes fast (default)"
    )


def examine_cpu() -> dict[str, Any]:
    """The processor, its instruction sets, the cores that this process may use and torch's threads."""
    return {
        "model": cpu_model(),
        "usable_cores": usable_cores(),
        "torch_threads": torch.get_num_threads(),
        "features": _cpu_features(),
    }


def fast_dtype(device: torch.device | str = "cpu") -> tuple[torch.dtype, str]:
    """What ``--dtype auto`` takes on a device, and why."""
    if torch.device(device).type == "cuda":
        if torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.float16, "this GPU does not multiply bfloat16"
        return torch.bfloat16, "this GPU multiplies it fast"
    found = [name for name in _BFLOAT16 if name in _cpu_features()]
    if found:
        return torch.bfloat16, f"this processor multiplies it fast, with {found[0]}"
    return torch.float32, "this processor has no instructions that multiply bfloat16, which is slower here"


def _cpu_features() -> list[str]:
    found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", cpu_info(), re.MULTILINE)
    return [flag for flag in found[1].split() if _FEATURES.fullmatch(flag)] if found else []
