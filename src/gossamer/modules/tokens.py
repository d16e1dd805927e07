"""What the trainable layers share: rows of different lengths, projections to heads, and parts of one softmax joined."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor, nn

from gossamer.plan import Extent

__all__ = ["Factory", "Heads", "Tokens", "join"]


class Factory(TypedDict):
    """Where and as what parameters are made."""

    device: torch.device | str | None
    dtype: torch.dtype | None


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """Which tokens of ``x [B, T, ...]`` are live. Layers see every row from its first live token on.

    So padding changes nothing that a layer counts by position: spans, grids, windows.

    Fields:
        starts, lengths: int64 ``[B]`` on the CPU: slot of the first live token of each row, and how many are live.
        slots: T.
    """

    starts: Tensor
    lengths: Tensor
    slots: int

    @classmethod
    def of(cls, x: Tensor, mask: Tensor | None = None) -> Tokens:
        """Of a layer's input ``[B, T, E]`` and its mask.

        Args:
            mask: None, all are live; bool ``[B, T]``, live tokens without holes; or integers ``[B]``, how many tokens
                of each row are live, from the first slot on.

        Raises:
            ValueError: ``x`` is not ``[B, T, E]``, or the mask has another shape, a hole, or a length beyond T.
            TypeError: the mask is of floating point.
        """
        if x.ndim != 3:
            raise ValueError(f"x must be [batch, tokens, width], got shape {tuple(x.shape)}")
        batch, slots = x.shape[:2]
        if mask is None:
            whole = torch.full((batch,), slots, dtype=torch.int64, device="cpu")
            return cls(torch.zeros_like(whole), whole, slots)
        if mask.dtype == torch.bool:
            if mask.shape != (batch, slots):
                raise ValueError(f"a bool mask must be [{batch}, {slots}], got shape {tuple(mask.shape)}")
            extent = Extent.from_key_mask(mask, slots)
            return cls(extent.key_start, extent.key_count, slots)
        if mask.is_floating_point() or mask.is_complex():
            raise TypeError(f"mask must be bool [batch, tokens] or integer lengths [batch], got {mask.dtype}")
        lengths = mask.to("cpu", torch.int64)
        if lengths.shape != (batch,) or bool(((lengths < 0) | (lengths > slots)).any()):
            raise ValueError(f"lengths must be {batch} integers of 0 to {slots}, got {mask.tolist()}")
        return cls(torch.zeros_like(lengths), lengths, slots)

    @property
    def whole(self) -> bool:
        """Whether every token is live."""
        return bool((self.lengths == self.slots).all())

    def live(self, device: torch.device | str = "cpu") -> Tensor:
        """After `align`: bool ``[B, T]``."""
        return torch.arange(self.slots, device=device) < self.lengths.to(device)[:, None]

    def extent(self, *, causal: bool) -> Extent:
        """After `align`: what attention among the tokens allows."""
        zero = torch.zeros_like(self.lengths)
        return Extent(zero, self.lengths, zero, self.lengths, causal=causal)

    def align(self, x: Tensor) -> Tensor:
        """``[B, T, ...]`` with each row's first live token in slot 0, and zeros in dead slots."""
        return x if self.whole else self._cleared(self._moved(x, self.starts))

    def restore(self, x: Tensor) -> Tensor:
        """Back to the slots of the input; dead ones are 0."""
        return x if self.whole else self._moved(self._cleared(x), -self.starts)

    def _cleared(self, x: Tensor) -> Tensor:
        """Zeros in dead slots, whatever they hold."""
        dead = ~self.live(x.device).view(*x.shape[:2], *[1] * (x.ndim - 2))
        return x.masked_fill(dead, 0)

    def _moved(self, x: Tensor, by: Tensor) -> Tensor:
        if not bool(by.any()):
            return x
        slot = (torch.arange(self.slots, device="cpu") + by[:, None]) % max(1, self.slots)
        return x[torch.arange(len(x), device=x.device)[:, None], slot.to(x.device)]


class Heads(nn.Module):
    """The projections of an attention layer, ``q_proj``, ``k_proj``, ``v_proj`` and ``o_proj``.

    Args:
        width: E, a multiple of ``heads``.
        bias: of all four.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"width must be a multiple of heads, got {width} and {heads}")
        self.heads = heads
        factory: Factory = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(width, width, bias=bias, **factory)
        self.k_proj = nn.Linear(width, width, bias=bias, **factory)
        self.v_proj = nn.Linear(width, width, bias=bias, **factory)
        self.o_proj = nn.Linear(width, width, bias=bias, **factory)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``[B, T, E]`` to queries, keys and values ``[B, H, T, D]``."""
        q, k, v = (proj(x).unflatten(-1, (self.heads, -1)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def merge(self, out: Tensor) -> Tensor:
        """``[B, H, T, D]`` to ``[B, T, E]``."""
        return self.o_proj(out.transpose(1, 2).flatten(2))


def join(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """One softmax over disjoint sets of keys, from the output ``[.., Dv]`` and LSE ``[..]`` of each; differentiable.

    A row that attends nothing in any part has an output of 0.
    """
    levels = torch.stack([lse for _, lse in parts])
    empty = (levels == float("-inf")).all(0)
    weights = levels.masked_fill(empty, 0.0).softmax(0)
    out = parts[0][0].new_zeros(())
    for (part, _), weight in zip(parts, weights, strict=True):
        out = out + part * weight[..., None].to(part.dtype)
    return out.masked_fill(empty[..., None], 0.0)
