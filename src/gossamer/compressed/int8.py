"""Linear layers in int8 whose outliers are multiplied apart, in float (llm.npu, 2407.05858, section 3.3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gossamer.backends import cpu

__all__ = ["InputScale", "Int8Linear", "has_product", "int8_weight", "overflow", "product_by_definition", "row_scale"]

TOP = 127  # of a number in int8; -128 is not used, so that signs are alike
ZERO = 128  # what stands for 0 in uint8, which oneDNN multiplies by int8 on processors with VNNI
SHARE = 0.999  # of the numbers of an input, within its scale
BINS = 4096


class InputScale:
    """The largest numbers of a layer's inputs, added up batch by batch: what scale they need, and what is beyond it.

    Attributes:
        channels: fp32 ``[in]``, the largest magnitude of each feature.
    """

    def __init__(self, features: int, device: torch.device | str | None = None) -> None:
        self.channels = torch.zeros(features, device=device)
        self.counts = torch.zeros(BINS, dtype=torch.float64, device=device)  # of magnitudes, by their exponent

    def add(self, x: Tensor) -> None:
        """Count inputs ``[..., in]``."""
        rows = x.detach().reshape(-1, x.shape[-1]).float().abs()
        self.channels = torch.maximum(self.channels, rows.amax(0))
        self.counts += torch.bincount(_bin_of(rows.flatten()), minlength=BINS)

    @property
    def largest(self) -> float:
        return float(self.channels.max())

    def scale(self, share: float = SHARE) -> float:
        """Of int8 (magnitude of 127 over 127), such that at least ``share`` of the numbers are within it.

        Rounded up to a bin of 1/32 of an octave, and no larger than the largest number asks.

        Raises:
            ValueError: a share that is not in (0, 1].
        """
        if not 0.0 < share <= 1.0:
            raise ValueError(f"share must be above 0 and at most 1, got {share}")
        total = self.counts.cumsum(0)
        place = int(torch.searchsorted(total, share * float(total[-1])))
        limit = min(self.largest, float(_top_of(min(place, BINS - 1)))) if share < 1 else self.largest
        return (limit or 1.0) / TOP

    def importance(self, share: float = SHARE) -> float:
        """Of its outliers: the largest number over what the scale holds (llm.npu keeps those of 15% of the layers)."""
        return self.largest / (self.scale(share) * TOP) if self.largest else 1.0


def _bin_of(magnitude: Tensor) -> Tensor:
    return (magnitude.clamp(min=1e-38).log2() * 32 + BINS // 2).ceil().clamp(0, BINS - 1).long()


def _top_of(place: int) -> float:
    return 2.0 ** ((place - BINS // 2) / 32)


def overflow(x: Tensor, scale: float) -> Tensor:
    """What of inputs ``[..., in]`` is beyond int8: ``x = clip(x) + overflow``, exactly."""
    return x - x.clamp(-TOP * scale, TOP * scale)


def row_scale(weight: Tensor) -> Tensor:
    """fp32 ``[out]``, by which the rows of a weight ``[out, in]`` fit int8; above 0 also of a row of zeros."""
    return weight.detach().float().abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny * TOP) / TOP


def int8_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 ``[out, in]``, and a scale of each row fp32 ``[out]``."""
    w, scale = weight.detach().float(), row_scale(weight)
    return (w / scale[:, None]).round().clamp(-TOP, TOP).to(torch.int8), scale


def product_by_definition(inputs: Tensor, scale: float, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """``[n, out]`` fp32 of inputs uint8 ``[n, in]`` about `ZERO` and a weight int8 ``[out, in]``, in float."""
    return ((inputs.float() - ZERO) * scale) @ (weight.float() * weight_scale[:, None]).T


def has_product(device: torch.device) -> bool:
    """Whether oneDNN multiplies uint8 by int8 with instructions for it, through torch."""
    known = getattr(torch.cpu, "_is_vnni_supported", None)
    there = hasattr(torch.ops.onednn, "qlinear_pointwise") and torch.backends.mkldnn.is_available()
    return device.type == "cpu" and there and known is not None and known()


class Int8Linear(nn.Module):
    """``x W^T + b`` with W and x in int8: x by one fixed scale, W by one for each output.

    Inputs beyond the scale are clipped; what is cut off, in the few features that have such numbers, is multiplied by
    their columns in float and added: ``x = clip(x) + overflow`` is exact, so nothing but rounding is lost. With
    ``outliers=False`` it is dropped, as llm.npu does in the layers where it matters least.

    The product is oneDNN's through torch where it has a fast one (uint8 by int8: VNNI, AMX); elsewhere the weight is
    multiplied in float.

    Buffers: ``quantised`` int8 ``[out, in]``; ``by_row`` fp32 ``[out]``; ``scale`` fp32, of the inputs.
    """

    quantised: Tensor
    by_row: Tensor
    scale: Tensor

    def __init__(self, quantised: Tensor, by_row: Tensor, scale: Tensor, bias: Tensor | None, outliers: bool) -> None:
        super().__init__()
        self.out_features, self.in_features = quantised.shape
        self.outliers = outliers
        self.register_buffer("quantised", quantised)
        self.register_buffer("by_row", by_row)
        self.register_buffer("scale", scale)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self._packed: tuple[Any, Any] = (None, None)  # the weight as oneDNN reads it, and of which state it is

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, scale: float, outliers: bool = True) -> Int8Linear:
        """Of a weight ``[out, in]``, a bias ``[out]`` or None, and a scale of the inputs, from `InputScale`.

        Raises:
            ValueError: another shape, or a scale that is not above 0.
        """
        if not 0.0 < scale < float("inf"):
            raise ValueError(f"scale must be above 0 and finite, got {scale}")
        if weight.ndim != 2:
            raise ValueError(f"weight must be [out, in], got {list(weight.shape)}")
        of_inputs = torch.tensor(scale, dtype=torch.float32, device=weight.device)
        return cls(*int8_weight(weight), of_inputs, bias, outliers)

    @classmethod
    def empty(cls, linear: nn.Linear, outliers: bool) -> Int8Linear:
        """One to read a file into, in place of a linear layer."""
        out_features, in_features, device = linear.out_features, linear.in_features, linear.weight.device
        by_row, scale = torch.empty(out_features, device=device), torch.empty((), device=device)
        quantised = torch.empty(out_features, in_features, dtype=torch.int8, device=device)
        return cls(quantised, by_row, scale, linear.bias, outliers)

    def check(self) -> None:
        """Raise ValueError where what was read from a file is no such weight."""
        scales = bool(self.by_row.isfinite().all()) and bool((self.by_row > 0).all())
        if bool((self.quantised == -TOP - 1).any()):
            raise ValueError(f"its weight has numbers below {-TOP}")
        if not (scales and 0.0 < float(self.scale) < float("inf")):
            raise ValueError("its scales are not above 0 and finite")

    @property
    def weight(self) -> Tensor:
        """What it multiplies by, fp32 ``[out, in]``."""
        return self.quantised.float() * self.by_row[:, None]

    def forward(self, x: Tensor) -> Tensor:
        """``[..., out]`` of inputs ``[..., in]``, in their dtype. Rows that are not finite give NaN.

        Raises:
            ValueError: another width.
            RuntimeError: a gradient is asked for.
        """
        if x.shape[-1:] != (self.in_features,):
            raise ValueError(f"inputs must be [..., {self.in_features}], got {list(x.shape)}")
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "int8 layers have no gradient: run under torch.no_grad(), or train the model that they were made from"
            )
        rows = x.detach().reshape(-1, self.in_features)
        fast = len(rows) > 0 and has_product(rows.device)
        if fast and cpu.is_available() and rows.dtype in (torch.float32, torch.bfloat16, torch.float16):
            out = self._by_kernels(rows)
        else:
            out = self._by_definition(rows, fast)
        return out.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def _by_kernels(self, rows: Tensor) -> Tensor:
        scale = float(self.scale)
        given = cpu.QuantisedInputs(rows, scale)
        # oneDNN writes bf16 itself; fp16 not everywhere.
        out = self._product(given.numbers, scale, torch.float32 if rows.dtype == torch.float16 else rows.dtype)
        if self.outliers and given.beyond:
            given.add_to(out, self.quantised, self.by_row)
        if given.lost:
            out[given.lost] = float("nan")
        return out

    def _by_definition(self, rows: Tensor, fast: bool) -> Tensor:
        scale = float(self.scale)
        wide = rows.float()
        lost = ~wide.isfinite().all(1)
        wide = wide.masked_fill(lost[:, None], 0.0)
        inputs = (wide / scale).round_().clamp_(-TOP, TOP).add_(ZERO).to(torch.uint8)
        if fast:
            out = self._product(inputs, scale)
        else:
            out = product_by_definition(inputs, scale, self.quantised, self.by_row)
            if self.bias is not None:
                out += self.bias
        beyond = overflow(wide, scale)
        features = beyond.any(0).nonzero()[:, 0]
        if self.outliers and len(features):
            out.addmm_(beyond[:, features], (self.quantised[:, features].float() * self.by_row[:, None]).T)
        return out.masked_fill(lost[:, None], float("nan"))

    def _product(self, inputs: Tensor, scale: float, dtype: torch.dtype = torch.float32) -> Tensor:
        """By oneDNN, bias and all."""
        # A tensor of inference mode counts no changes.
        state = (self.quantised.data_ptr(), None if self.quantised.is_inference() else self.quantised._version)
        if self._packed[1] != state:
            self._packed = torch.ops.onednn.qlinear_prepack(self.quantised, None), state
        bias = None if self.bias is None else self.bias.float()
        zero = torch.zeros(self.out_features, dtype=torch.int32, device="cpu")
        more = (bias, 1.0, 0, dtype, "none", [], "")
        return torch.ops.onednn.qlinear_pointwise(inputs, scale, ZERO, self._packed[0], self.by_row, zero, *more)

    def _apply(self, fn: Any, recurse: bool = True) -> Int8Linear:
        """Move; the scales stay in fp32, which their product asks for."""
        before = self.by_row, self.scale  # rounded to a model's dtype and back they would be others
        super()._apply(fn, recurse)
        for name, old in zip(("by_row", "scale"), before, strict=True):
            new = getattr(self, name)
            setattr(self, name, torch.empty_like(new, dtype=old.dtype) if old.is_meta else old.to(new.device))
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_packed": (None, None)}  # which cannot be copied or saved

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, outliers={self.outliers}"
