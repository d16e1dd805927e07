"""`Rotary`: how a model turned its queries and keys by position, and back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.plan import on_device

__all__ = ["Rotary"]

# Angles of so many tokens are held at once.
_ROWS = 4096


@dataclass(frozen=True, eq=False)
class Rotary:
    """Rotary position embedding (RoFormer, 2104.09864), as far as it is one: an angle grows evenly with the position.

    Of the first ``2 * len(frequencies)`` channels each pair is turned by ``position * frequency``; the others, if there
    are any, are left alone. All of them is the usual case.

    Fields:
        frequencies: fp32 ``[R / 2]``, radians a token.
        scaling: factor of what is turned (YaRN).
        interleaved: pairs are channels ``2 i`` and ``2 i + 1``, not ``i`` and ``i + R / 2``.
        offsets: int64 ``[B]``, what the model's positions lie above the call's: the left padding, where a model counts
            it. None for 0.
    """

    frequencies: Tensor
    scaling: float = 1.0
    interleaved: bool = False
    offsets: Tensor | None = None

    def __post_init__(self) -> None:
        if self.frequencies.ndim != 1 or not self.frequencies.numel():
            raise ValueError(f"Rotary.frequencies must be a list of numbers, got shape {tuple(self.frequencies.shape)}")
        if not self.scaling > 0:
            raise ValueError(f"Rotary.scaling must be above 0, got {self.scaling}")

    @classmethod
    def of_base(cls, dim: int, base: float = 10_000.0) -> Rotary:
        """The original frequencies, ``base ** (-2 i / dim)``, for all ``dim`` channels."""
        return cls(base ** -(torch.arange(0, dim - 1, 2, device="cpu").float() / dim))

    @property
    def channels(self) -> int:
        """R, the channels that are turned."""
        return 2 * self.frequencies.numel()

    def turn(self, x: Tensor, positions: Tensor, *, back: bool = False) -> Tensor:
        """Turn ``x`` ``[B, heads, n, D]`` by its tokens' positions of the call, int64 ``[B, n]``; or undo it.

        Returns:
            as ``x``, computed in fp32 (fp64 for fp64).
        """
        out = torch.empty_like(x)
        for start in range(0, x.shape[2], _ROWS):
            part = slice(start, start + _ROWS)
            out[:, :, part] = self._turned(x[:, :, part], positions[:, part], back).to(x.dtype)
        return out

    def factors(self, positions: Tensor, dtype: torch.dtype, *, back: bool = False) -> tuple[Tensor, Tensor]:
        """Cosine and sine, times `scaling`, by which a token's pairs are turned: ``[B, n, R / 2]``."""
        own = positions if self.offsets is None else positions + on_device(self.offsets, positions.device)[:, None]
        angles = own[..., None].to(dtype) * on_device(self.frequencies, positions.device).to(dtype)
        factor = 1 / self.scaling if back else self.scaling
        return angles.cos() * factor, angles.sin() * (-factor if back else factor)

    def _turned(self, x: Tensor, positions: Tensor, back: bool) -> Tensor:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        cos, sin = (factor[:, None] for factor in self.factors(on_device(positions, x.device), x.dtype, back=back))
        turned, rest = x[..., : self.channels], x[..., self.channels :]
        one, other = (turned[..., 0::2], turned[..., 1::2]) if self.interleaved else turned.chunk(2, dim=-1)
        pair = one * cos - other * sin, other * cos + one * sin
        both = torch.stack(pair, dim=-1).flatten(-2) if self.interleaved else torch.cat(pair, dim=-1)
        return torch.cat([both, rest], dim=-1)
