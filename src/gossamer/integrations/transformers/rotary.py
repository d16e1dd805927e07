"""How a model turns its queries and keys by position: asked of its rotary module, and verified on the model itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.jit import is_tracing  # pyright: ignore[reportPrivateImportUsage]

from gossamer.integrations.transformers.owners import Observation
from gossamer.plan import Extent
from gossamer.rotary import Rotary

__all__ = ["Positions", "rotary_module", "verified"]

# Rows of one batch that have the same two tokens, at these positions: what differs between them is the turn alone.
_AT = ((0, 1), (37, 38))
_CHANGING = ("dynamic", "longrope")


def rotary_module(model: Any) -> nn.Module:
    """The one module from which the model's layers have their angles.

    Raises:
        ValueError: there is none, or several, or its frequencies change with the length.
    """
    named = [m for n, m in model.named_modules() if n.rpartition(".")[2] == "rotary_emb" and hasattr(m, "inv_freq")]
    if len(named) != 1 or named[0].inv_freq.ndim != 1:
        raise ValueError(f"{type(model).__name__} has no rotary module with one list of angles for all layers")
    kind = getattr(named[0], "rope_type", "default")
    if kind in _CHANGING:
        raise ValueError(f"the frequencies of {type(model).__name__} change with the length (rope type {kind!r})")
    return named[0]


def verified(model: Any, module: nn.Module, observe: Callable[[Callable[[Observation], None]], None]) -> Rotary:
    """The rotary embedding of all layers, after two tokens were run at two places.

    Args:
        observe: has calls shown to a visitor.

    Raises:
        ValueError: some layer turns its queries or keys otherwise, or not at all.
    """
    seen: list[tuple[int | None, Tensor, Tensor]] = []
    observe(lambda observed: seen.append((observed.call.layer, observed.call.q, observed.call.k)))
    tokens = torch.tensor([[0, 1]] * len(_AT), device=model.device)
    with torch.inference_mode():
        model.base_model(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            position_ids=torch.tensor(_AT, device=model.device),
            use_cache=False,
        )
    frequencies = module.inv_freq.detach().float().cpu()  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    scaling = float(getattr(module, "attention_scaling", 1.0))
    found = [Rotary(frequencies, 1.0, interleaved) for interleaved in (False, True)]
    for layer, q, k in seen:
        found = [rotary for rotary in found if all(_turns(rotary, x) for x in (q, k))]
        if not found:
            raise ValueError(f"layer {layer} of {type(model).__name__} does not turn queries and keys by it")
    if not seen:
        raise ValueError(f"no attention of {type(model).__name__} has a plain causal mask")
    return replace(found[0], scaling=scaling)


def _turns(rotary: Rotary, x: Tensor) -> bool:
    """Whether the second row of ``[2, heads, 2, D]`` is the first one, turned on."""
    if rotary.channels > x.shape[-1]:
        return False
    first, second = x.float()
    further = torch.full((1, x.shape[2]), _AT[1][0] - _AT[0][0], device=x.device)
    error = (rotary.turn(first[None], further)[0] - second).norm()
    # In 16 bits both are rounded.
    return bool(error <= (1e-3 if x.dtype == torch.float32 else 2e-2) * second.norm() + 1e-6)


class Positions:
    """A forward hook on the rotary module: which positions the model has given its tokens, last."""

    def __init__(self, rotary: Rotary) -> None:
        self.rotary = rotary
        self.last: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling() or is_tracing():
            return
        given = kwargs.get("position_ids", args[1] if len(args) > 1 else None)
        self.last = given.detach().cpu() if isinstance(given, Tensor) and given.ndim == 2 else None

    def of(self, extent: Extent) -> Rotary | None:
        """For a call of this forward; None where its live tokens do not stand one after the other.

        Keys that were cached are taken to have been given positions as the new ones are.
        """
        last, rows = self.last, extent.batch
        if last is None or last.shape[0] not in (1, rows):
            return None
        offsets = torch.zeros(rows, dtype=torch.int64, device="cpu")
        for b in range(rows):
            first, count = int(extent.first_query[b]), int(extent.query_count[b])
            own = last[b % last.shape[0], first : first + count]
            if own.shape[0] != count or not torch.equal(own, torch.arange(count, device="cpu") + own[:1]):
                return None
            offsets[b] = int(own[0]) - int(extent.first_position[b]) if count else 0
        return replace(self.rotary, offsets=offsets) if bool(offsets.any()) else self.rotary

    def __deepcopy__(self, memo: Any) -> Positions:
        return Positions(self.rotary)
