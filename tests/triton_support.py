"""What the tests of the Triton backend share: a device, or Triton's interpreter, hastened."""

import dataclasses
from dataclasses import replace
from typing import Any

import pytest
import torch

from gossamer.backends import triton
from gossamer.call import AttentionCall

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
FULL_SIZE = 16 if ON_GPU else 1  # the interpreter is slow
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MARKS = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning"),  # the interpreter's NumPy
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
    pytest.mark.skipif(not triton.is_available(), reason=f"{triton.why_unavailable()}"),
    pytest.mark.usefixtures("poisoned_memory"),
]


def moved(call: AttentionCall) -> AttentionCall:
    """On the device."""
    sinks, bias = (None if x is None else x.to(DEVICE) for x in (call.sinks, call.bias))
    return replace(call, q=call.q.to(DEVICE), k=call.k.to(DEVICE), v=call.values.to(DEVICE), sinks=sinks, bias=bias)


class _Patched:
    def restore(self) -> None:
        """Leaves the patch: nothing else uses the language in a process that interprets it."""


def _hasten() -> None:
    """Makes Triton's interpreter three times as fast; it computes the same.

    It patches the whole language at each call of a function, of which one patch a module is enough, and it computes
    every sum and product of integers twice to detect overflows, of which it tells nobody unless it debugs. Nothing
    happens where Triton is not installed, or its interpreter is another.
    """
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    module: Any = interpreter
    if not hasattr(module, "_LangPatchScope") or hasattr(module._patch_lang, "patched"):
        return
    patch = module._patch_lang

    def patch_once(function: Any) -> _Patched:
        if id(function.__globals__) not in patch_once.patched:
            patch_once.patched.add(id(function.__globals__))
            patch(function)
        return _Patched()

    patch_once.patched = set()
    module._patch_lang = patch_once
    builder = module.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


_hasten()
