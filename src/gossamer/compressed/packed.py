"""Linear layers that store a weight's zeros as bits, or the whole weight as bits."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.backends.cpu import linear as kernels
from gossamer.compressed.billm import Binarised
from gossamer.compressed.int8 import TOP

__all__ = ["OneBitLinear", "PackedLinear", "SparseLinear", "bits_of", "bools_of"]

# Inputs that are multiplied by the packed weight; of more, it is cheaper to make the weight whole, a tile at a time.
MOST_ROWS = 16
TILE_BYTES = 4 << 20
SLOTS = 128  # columns whose codes lie together


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

    On the CPU, few inputs, as in decoding, are multiplied by the weight as it is stored, and many by tiles of it that
    are made whole in turn; see `gossamer.backends.cpu.linear`. Elsewhere, without the compiled kernels, and where a
    gradient is asked for, the whole weight is made in each call.

    Attributes:
        in_features, out_features, dtype: of the weight.
    """

    _kept: tuple[str, ...] = ()  # buffers that keep their dtype, whatever the model becomes

    def __init__(self, out_features: int, in_features: int, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features, self.dtype = out_features, in_features, dtype
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self._view: tuple[Any, Any] = (None, None)  # of the buffers for the kernels, and where they were

    @property
    def weight(self) -> Tensor:
        """``[out, in]``, made anew each time."""
        raise NotImplementedError

    def view(self) -> Any:
        """The weight as `gossamer.backends.cpu.linear` takes it."""
        raise NotImplementedError

    def _apply(self, fn: Any, recurse: bool = True) -> PackedLinear:
        """Move; scales and levels are what they were, and values become what the model is."""
        before = {name: self._buffers[name] for name in self._kept if self._buffers.get(name) is not None}
        like = next((x for x in self._buffers.values() if x is not None), torch.empty(0, device="cpu"))
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=like.device)).dtype
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = getattr(self, name)
            assert old is not None
            self._buffers[name] = torch.empty_like(new, dtype=old.dtype) if old.is_meta else old.to(new.device)
        return self

    def check(self) -> None:
        """Raise ValueError where what was read from a file is no such weight."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Of what is stored, without the bias."""
        return sum(x.numel() * x.element_size() for x in self.buffers())

    def forward(self, x: Tensor) -> Tensor:
        """``[..., out]`` of inputs ``[..., in]``, in their dtype; forward only."""
        bias, numbers = self.bias, x.numel()
        trained = bias is not None and bias.requires_grad and torch.is_grad_enabled()
        if numbers and x.shape[-1] == self.in_features and kernels.takes(x) and not trained:
            if numbers <= MOST_ROWS * self.in_features:
                return kernels.multiply(x, self._seen(), self.out_features, bias)
            if x.dtype != torch.float16:
                return self._by_tiles(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)
        return F.linear(x, self.weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    def _seen(self) -> Any:
        """`view`, made again where a buffer has moved."""
        state = [None if x is None else (x.data_ptr(), x.dtype, x.nbytes) for x in self._buffers.values()]
        if self._view[1] != state:
            self._view = self.view(), state
        return self._view[0]

    def _by_tiles(self, rows: Tensor) -> Tensor:
        """``[n, out]`` of inputs ``[n, in]``; no more of the weight than a tile of it is whole at any time."""
        step = min(self.out_features, max(16, TILE_BYTES // (self.in_features * rows.element_size())))
        tile = torch.empty(step, self.in_features, dtype=rows.dtype, device="cpu")
        bias, view = None if self.bias is None else self.bias.to(rows.dtype), self._seen()
        out = torch.empty(len(rows), self.out_features, dtype=rows.dtype, device="cpu")
        for first in range(0, self.out_features, step):
            here = slice(first, min(first + step, self.out_features))
            part = kernels.make_whole(view, first, tile[: here.stop - first])
            out[:, here] = F.linear(rows, part, None if bias is None else bias[here])
        return out

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_view": (None, None)}  # which cannot be copied or saved

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bytes={self.nbytes}"


class SparseLinear(PackedLinear):
    """A weight with zeros: a bit for each number, and those that are not 0.

    Buffers: ``bitmap`` uint8 ``[out, ceil(in / 8)]``; ``values`` ``[n]`` of the weight's dtype, or int8, row by row;
    ``starts`` int64 ``[out + 1]``, where each row's begin; ``scale`` fp32 ``[out]``, that values in int8 are multiplied
    by, else None.
    """

    bitmap: Tensor
    values: Tensor
    starts: Tensor
    scale: Tensor | None
    _kept = ("scale",)

    def __init__(
        self,
        in_features: int,
        bitmap: Tensor,
        values: Tensor,
        starts: Tensor,
        bias: Tensor | None,
        scale: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(len(bitmap), in_features, bias, values.dtype if dtype is None else dtype)
        self.register_buffer("bitmap", bitmap)
        self.register_buffer("values", values)
        self.register_buffer("starts", starts)
        self.register_buffer("scale", scale)

    @classmethod
    def of(
        cls,
        weight: Tensor,
        bias: Tensor | None = None,
        scale: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> SparseLinear:
        """Of a weight ``[out, in]``, in a dtype that need not be its own; with a scale ``[out]`` in int8, rounded to
        multiples of it.

        Raises:
            ValueError: a scale of another shape, or one that is not above 0.
        """
        w = weight.detach().to(weight.dtype if dtype is None or scale is not None else dtype)
        dtype = dtype or weight.dtype
        if scale is not None:
            if scale.shape != w.shape[:1] or not bool((scale > 0).all() and scale.isfinite().all()):
                raise ValueError(f"scale must be above 0 and [{len(w)}], one a row; got {list(scale.shape)}")
            scale = scale.detach().float()
            w = (w.float() / scale[:, None]).round().clamp(-TOP, TOP).to(torch.int8)
        kept = w != 0
        starts = F.pad(kept.sum(1).cumsum(0), (1, 0))
        return cls(w.shape[1], bits_of(kept), w[kept], starts, bias, scale, dtype)

    @classmethod
    def empty(cls, linear: nn.Linear, values: int, bits: int = 0) -> SparseLinear:
        """One to read a file into, in place of a linear layer, with so many numbers that are not 0; ``bits`` is 8 where
        they are int8."""
        if bits not in (0, 8):
            raise ValueError(f"bits must be 8, or not given; got {bits}")
        out_features, in_features, device = linear.out_features, linear.in_features, linear.weight.device
        if values > out_features * in_features:
            raise ValueError(f"a weight [{out_features}, {in_features}] has no {values} numbers")
        bitmap = torch.empty(out_features, -(-in_features // 8), dtype=torch.uint8, device=device)
        starts = torch.empty(out_features + 1, dtype=torch.int64, device=device)
        dtype = linear.weight.dtype
        numbers = torch.empty(values, dtype=torch.int8 if bits else dtype, device=device)
        scale = torch.empty(out_features, dtype=torch.float32, device=device) if bits else None
        return cls(in_features, bitmap, numbers, starts, linear.bias, scale, dtype)

    def check(self) -> None:
        counts = bools_of(self.bitmap, 8 * self.bitmap.shape[1])
        beyond = bool(counts[:, self.in_features :].any())
        starts = F.pad(counts.sum(1).cumsum(0), (1, 0))
        if beyond or not torch.equal(starts, self.starts) or int(starts[-1]) != len(self.values):
            raise ValueError(f"its bitmap has {int(starts[-1])} numbers, and {len(self.values)} are there")
        if not bool(self.values.isfinite().all()):
            raise ValueError("its numbers are not finite")
        if self.scale is not None and bool((self.values == -TOP - 1).any()):
            raise ValueError(f"its weight has numbers below {-TOP}")
        if self.scale is not None and not bool((self.scale > 0).all() and self.scale.isfinite().all()):
            raise ValueError("its scales are not above 0 and finite")

    @property
    def weight(self) -> Tensor:
        kept = bools_of(self.bitmap, self.in_features)
        whole = torch.zeros(kept.shape, dtype=self.values.dtype, device=kept.device)
        whole = whole.masked_scatter_(kept, self.values)
        return whole if self.scale is None else (whole.float() * self.scale[:, None]).to(self.dtype)

    def view(self) -> Any:
        return kernels.sparse_weight(self.in_features, self.bitmap, self.values, self.starts, self.scale)


class OneBitLinear(PackedLinear):
    """A weight of `binarise`: two bits for each number, and eight levels of each row and block.

    A number is one of four levels. Its lower bit is the sign; the upper one is the group, or in salient columns, which
    have four levels of their own, the second sign. At a block of 128 the levels are one more bit a weight: three.

    Columns are stored in slots: those of a block, and none up to a multiple of 128. Of 128 slots, byte j has those of
    the numbers j, 32 + j, 64 + j and 96 + j, from its lowest bits on.

    Buffers: ``codes`` uint8 ``[out, slots / 4]``; ``levels`` fp16 ``[out, blocks, 8]``, of codes 0 to 3 and then of the
    same in salient columns; ``salient`` uint8 ``[slots / 8]``, bits.
    """

    codes: Tensor
    levels: Tensor
    salient: Tensor
    _kept = ("levels",)

    def __init__(
        self,
        in_features: int,
        block: int,
        codes: Tensor,
        levels: Tensor,
        salient: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(len(codes), in_features, bias, dtype)
        self.block = block
        self.register_buffer("codes", codes)
        self.register_buffer("levels", levels)
        self.register_buffer("salient", salient)

    @classmethod
    def of(cls, found: Binarised, bias: Tensor | None = None, dtype: torch.dtype = torch.float32) -> OneBitLinear:
        """Of what `binarise` found; a block is at most as long as the inputs, or 128."""
        features = found.positive.shape[1]
        block = min(found.block, max(SLOTS, features))
        upper = torch.where(found.salient, found.second, found.high)
        numbers = _slots(found.positive.to(torch.uint8) + 2 * upper.to(torch.uint8), block)
        quarters = numbers.unflatten(-1, (-1, 4, SLOTS // 4)) << _places(numbers.device)[:8:2, None]
        codes = quarters.sum(-2, dtype=torch.uint8).flatten(-2)
        first = [found.mean[n] + sign * found.scale[n] for n in (0, 1, 2) for sign in (-1, 1)]
        second = [found.mean[3] + sign * found.scale[3] for sign in (-1, 1)]
        levels = torch.stack([*first[:4], *(one + two for two in second for one in first[4:])], dim=-1).half()
        return cls(features, block, codes, levels, bits_of(_slots(found.salient, block)), bias, dtype)

    @classmethod
    def empty(cls, linear: nn.Linear, block: int) -> OneBitLinear:
        """One to read a file into, in place of a linear layer."""
        out_features, in_features, device = linear.out_features, linear.in_features, linear.weight.device
        if not 0 < block <= max(SLOTS, in_features):
            raise ValueError(f"block must be 1 to {max(SLOTS, in_features)}, got {block}")
        blocks = -(-in_features // block)
        slots = blocks * (block + -block % SLOTS)
        codes = torch.empty(out_features, slots // 4, dtype=torch.uint8, device=device)
        levels = torch.empty(out_features, blocks, 8, dtype=torch.float16, device=device)
        salient = torch.empty(slots // 8, dtype=torch.uint8, device=device)
        return cls(in_features, block, codes, levels, salient, linear.bias, linear.weight.dtype)

    def check(self) -> None:
        if not bool(self.levels.isfinite().all()):
            raise ValueError("its levels are not finite")
        live = bits_of(_slots(torch.ones(self.in_features, dtype=torch.bool, device=self.codes.device), self.block))
        none = ~bools_of(live, 8 * len(live))
        if bool(bools_of(self.salient, 8 * len(self.salient))[none].any()):
            raise ValueError("its salient columns go beyond the inputs")
        if bool(_numbers(self.codes)[:, none].any()):
            raise ValueError("its codes go beyond the inputs")

    @property
    def weight(self) -> Tensor:
        columns, levels = bools_of(self.salient, 8 * len(self.salient)), self.levels.to(self.dtype)
        wide = len(columns) // self.levels.shape[1]
        made = []
        for n in range(self.levels.shape[1]):  # a block at a time: indices take many times the weight
            here = slice(n * wide, n * wide + min(self.block, self.in_features - n * self.block))
            codes = _numbers(self.codes[:, n * wide // 4 : (n + 1) * wide // 4])[:, : here.stop - here.start]
            made.append(levels[:, n].gather(1, codes.long() + 4 * columns[here]))
        return torch.cat(made, dim=1)

    def view(self) -> Any:
        rounded = self.dtype == torch.bfloat16
        parts = (self.codes, self.levels, self.salient)
        return kernels.level_weight(self.in_features, self.block, *parts, rounded=rounded)


def _slots(x: Tensor, block: int) -> Tensor:
    """``[..., slots]`` of ``[..., in]``: 0 behind each block up to a multiple of 128."""
    blocks = F.pad(x, (0, -x.shape[-1] % block)).unflatten(-1, (-1, block))
    return F.pad(blocks, (0, -block % SLOTS)).flatten(-2)


def _numbers(codes: Tensor) -> Tensor:
    """0 to 3 of codes ``[out, slots / 4]``, ``[out, slots]``."""
    bytes_of = codes.unflatten(-1, (-1, 1, SLOTS // 4))
    return (bytes_of >> _places(codes.device)[:8:2, None] & 3).flatten(-3)
