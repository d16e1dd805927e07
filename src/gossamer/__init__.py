"""gossamer: dynamic sparse attention for long prompts.

A method turns ``(q, k)`` into a `SparsePlan`; an executor turns ``(q, k, v, plan)`` into the output.
`enable` puts a method into an unmodified transformers model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gossamer import methods
from gossamer.attention import Policy, sparse_attention
from gossamer.plan import Extent, SparsePlan
from gossamer.profiles import HeadPattern, Profile

if TYPE_CHECKING:
    from gossamer.integrations.transformers import enable as enable

__version__ = "0.1.0"
# Without "enable": a star import must not import transformers.
__all__ = ["Extent", "HeadPattern", "Policy", "Profile", "SparsePlan", "methods", "sparse_attention"]


def __getattr__(name: str) -> Any:
    # `import gossamer` needs torch alone; transformers is imported when `enable` is first used.
    if name == "enable":
        from gossamer.integrations.transformers import enable

        return enable
    raise AttributeError(f"module 'gossamer' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), "enable"])
