"""Linear layers that store a weight's zeros as bits, or the whole weight as bits."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.compressed.billm import Binarised

__all__ = ["OneBitLinear", "PackedLinear", "SparseLinear", "bits_of", "bools_of"]


def bits_of(x: Tensor) -> Tensor:
    """uint8 ``[..., ceil(n / 8)]`` of bool ``[..., n]``; the first of eight is the lowest bit."""
    padded = F.pad(x, (0, -x.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (padded.to(torch.uint8) << _places(x.device)).sum(-1, dtype=torch.uint8)


def bools_of(x: Tensor, number: int) -> Tensor:
    """bool ``[..., number]`` of `bits_of`."""
    return ((x[..., None] >> _places(x.device)) & 1).flatten(-2)[..., :number].bool()


def _places(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)


class PackedLinear(nn.Module):
    """``x W^T + b`` with a weight that is stored in another form.

    Attributes:
        in_features, out_features, dtype: of the weight.
    """

    def __init__(self, out_features: int, in_features: int, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features, self.dtype = out_features, in_features, dtype
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """``[out, in]``, made anew each time."""
        raise NotImplementedError

    def _apply(self, fn: Any, recurse: bool = True) -> PackedLinear:
        """Move; means and scales stay in fp16, and the values become what the model is."""
        super()._apply(fn, recurse)
        for name in ("mean", "scale"):
            if name in self._buffers:
                self._buffers[name] = getattr(self, name).half()
        return self

    def check(self) -> None:
        """Raise ValueError where what was read from a file is no such weight."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Of what is stored, without the bias."""
        return sum(x.numel() * x.element_size() for x in self.buffers())

    def forward(self, x: Tensor) -> Tensor:
        """``[..., out]`` of inputs ``[..., in]``; forward only."""
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bytes={self.nbytes}"


class SparseLinear(PackedLinear):
    """A weight with zeros: a bit for each number, and those that are not 0.

    Buffers: ``bitmap`` uint8 ``[out, ceil(in / 8)]``; ``values`` of the weight's dtype ``[n]``, row by row; ``starts``
    int64 ``[out + 1]``, where each row's begin.
    """

    bitmap: Tensor
    values: Tensor
    starts: Tensor

    def __init__(self, in_features: int, bitmap: Tensor, values: Tensor, starts: Tensor, bias: Tensor | None) -> None:
        super().__init__(len(bitmap), in_features, bias, values.dtype)
        self.register_buffer("bitmap", bitmap)
        self.register_buffer("values", values)
        self.register_buffer("starts", starts)

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None = None) -> SparseLinear:
        """Of a weight ``[out, in]``."""
        kept = weight != 0
        starts = F.pad(kept.sum(1).cumsum(0), (1, 0))
        return cls(weight.shape[1], bits_of(kept), weight.detach()[kept], starts, bias)

    @classmethod
    def empty(cls, linear: nn.Linear, values: int) -> SparseLinear:
        """One to read a file into, in place of a linear layer, with so many numbers that are not 0."""
        out_features, in_features, device = linear.out_features, linear.in_features, linear.weight.device
        bitmap = torch.empty(out_features, -(-in_features // 8), dtype=torch.uint8, device=device)
        starts = torch.empty(out_features + 1, dtype=torch.int64, device=device)
        numbers = torch.empty(values, dtype=linear.weight.dtype, device=device)
        return cls(in_features, bitmap, numbers, starts, linear.bias)

    def check(self) -> None:
        counts = bools_of(self.bitmap, 8 * self.bitmap.shape[1])
        beyond = bool(counts[:, self.in_features :].any())
        starts = F.pad(counts.sum(1).cumsum(0), (1, 0))
        if beyond or not torch.equal(starts, self.starts) or int(starts[-1]) != len(self.values):
            raise ValueError(f"its bitmap has {int(starts[-1])} numbers, and {len(self.values)} are there")
        if not bool(self.values.isfinite().all()):
            raise ValueError("its numbers are not finite")

    @property
    def weight(self) -> Tensor:
        kept = bools_of(self.bitmap, self.in_features)
        return torch.zeros(kept.shape, dtype=self.values.dtype, device=kept.device).masked_scatter_(kept, self.values)


class OneBitLinear(PackedLinear):
    """A weight of `binarise`: signs, groups, and means and scales of each row and block.

    Besides the sign there is a bit for the group and, at a block of 128, one for means and scales: about 3.1 bits a
    weight.

    Buffers: ``positive``, ``high`` uint8 ``[out, ceil(in / 8)]`` and ``salient`` uint8 ``[ceil(in / 8)]``, bits;
    ``second`` uint8 ``[out, ceil(salient / 8)]``, of the salient columns alone; ``mean``, ``scale`` fp16
    ``[4, out, blocks]``.
    """

    positive: Tensor
    high: Tensor
    salient: Tensor
    second: Tensor
    mean: Tensor
    scale: Tensor

    def __init__(
        self,
        in_features: int,
        columns: int,
        block: int,
        buffers: dict[str, Tensor],
        bias: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(len(buffers["positive"]), in_features, bias, dtype)
        self.columns, self.block = columns, block
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)

    @classmethod
    def of(cls, found: Binarised, bias: Tensor | None = None, dtype: torch.dtype = torch.float32) -> OneBitLinear:
        """Of what `binarise` found; a block is at most as long as the inputs, or 128."""
        buffers = {name: bits_of(getattr(found, name)) for name in ("positive", "high", "salient")}
        buffers["second"] = bits_of(found.second[:, found.salient])
        buffers |= {name: getattr(found, name).half() for name in ("mean", "scale")}
        return cls(
            found.positive.shape[1],
            int(found.salient.sum()),
            min(found.block, max(128, len(found.salient))),
            buffers,
            bias,
            dtype,
        )

    @classmethod
    def empty(cls, linear: nn.Linear, salient: int, block: int) -> OneBitLinear:
        """One to read a file into, in place of a linear layer, with so many salient columns."""
        out_features, in_features, device = linear.out_features, linear.in_features, linear.weight.device
        if not 0 < block <= max(128, in_features) or salient > in_features:
            raise ValueError(f"block must be 1 to {max(128, in_features)} and salient at most {in_features}")
        width, parts = -(-in_features // 8), (4, out_features, -(-in_features // block))
        shapes = {"positive": (out_features, width), "high": (out_features, width), "salient": (width,)}
        shapes["second"] = (out_features, -(-salient // 8))
        buffers = {name: torch.empty(shape, dtype=torch.uint8, device=device) for name, shape in shapes.items()}
        buffers |= {name: torch.empty(parts, dtype=torch.float16, device=device) for name in ("mean", "scale")}
        return cls(in_features, salient, block, buffers, linear.bias, linear.weight.dtype)

    def check(self) -> None:
        columns = bools_of(self.salient, 8 * len(self.salient))
        number = int(columns.sum())
        if bool(columns[self.in_features :].any()) or number != self.columns:
            raise ValueError(f"it has {number} salient columns, and second signs of {self.columns}")
        if not bool(self.mean.isfinite().all() and self.scale.isfinite().all()):
            raise ValueError("its means and scales are not finite")
        for name in ("positive", "high"):
            if bool(bools_of(getattr(self, name), 8 * self.positive.shape[1])[:, self.in_features :].any()):
                raise ValueError(f"its {name} bits go beyond the inputs")

    @property
    def weight(self) -> Tensor:
        salient, made = bools_of(self.salient, self.in_features), []
        second, positive, high = (
            bools_of(bits, number)
            for bits, number in (
                (self.second, self.columns),
                (self.positive, self.in_features),
                (self.high, self.in_features),
            )
        )
        for n in range(self.mean.shape[2]):  # a block at a time: in fp32 groups and signs take many times the weight
            here = slice(n * self.block, min((n + 1) * self.block, self.in_features))
            columns, before = salient[here], int(salient[: here.start].sum())
            twice = torch.zeros(self.out_features, len(columns), dtype=torch.bool, device=salient.device)
            twice[:, columns] = second[:, before : before + int(columns.sum())]
            mean, scale = (x[..., n : n + 1].float() for x in (self.mean, self.scale))
            part = Binarised(positive[:, here], high[:, here], columns, twice, mean, scale, self.block)
            made.append(part.dequantised().to(self.dtype))
        return torch.cat(made, dim=1)
