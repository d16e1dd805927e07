"""gossamer: dynamic sparse attention for long prompts.

A method turns a call into a `SparsePlan`; a backend turns ``(q, k, v, plan)`` into the output.
`enable` puts a method into an unmodified model of transformers or diffusers; `compress` replaces its linear layers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from gossamer import methods
from gossamer.attention import sparse_attention
from gossamer.call import AttentionCall
from gossamer.methods import Method
from gossamer.plan import Extent, SparsePlan
from gossamer.policy import Policy
from gossamer.profiles import Profile

if TYPE_CHECKING:
    from gossamer.compressed.model import compress as compress
    from gossamer.integrations.transformers import enable as enable
    from gossamer.integrations.transformers import verify as verify

__version__ = "0.1.0"
# `import gossamer` needs torch alone: what these are for is imported when one of them is first used.
_OF_MODELS = {
    "compress": "compressed.model",
    "enable": "integrations.enabling",
    "verify": "integrations.transformers",
}
# Without them: a star import must not import transformers.
__all__ = ["AttentionCall", "Extent", "Method", "Policy", "Profile", "SparsePlan", "methods", "sparse_attention"]


def __getattr__(name: str) -> Any:
    if name in _OF_MODELS:
        return getattr(importlib.import_module(f"gossamer.{_OF_MODELS[name]}"), name)
    raise AttributeError(f"module 'gossamer' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_OF_MODELS])
