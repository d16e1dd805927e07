"""Triton's interpreter, hastened for tests: it takes a third of its time, and computes the same.

It patches the whole language at each call of a function, of which one patch a module is enough, and it computes every
sum and product of integers twice to detect overflows, of which it tells nobody unless it debugs.
"""

import dataclasses
from typing import Any


class _Patched:
    def restore(self) -> None:
        """Leaves the patch: nothing else uses the language in a process that interprets it."""


def hasten() -> None:
    """Has no effect where Triton is not installed, or its interpreter is another."""
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
