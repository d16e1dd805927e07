"""`AttentionCall`: one attention call, validated once at the door and handed down whole."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypedDict, TypeVar, overload

import torch
from torch import Tensor

from gossamer.layout import DenoisingStep, ModalityLayout, TokenLayout
from gossamer.plan import Extent, SparsePlan
from gossamer.plan.checks import checks_numbers
from gossamer.rotary import Rotary
from gossamer.summaries import Summary
from gossamer.unread import Unread

__all__ = ["AttentionCall", "CallFields", "Store"]

_FLOAT32 = torch.finfo(torch.float32)
T = TypeVar("T")


class Store(Protocol):
    """What a layer's cache knows of its keys besides the keys: for methods that choose what a decode step reads.

    It belongs to one layer, and is about the keys of the call that it comes with: pages and positions are counted as
    `Extent` counts, from each row's first live key. Methods read it and never change it; what it has not worked out
    yet, it works out when it is asked, and keeps up from then on. `gossamer.cache` has the stores.

    Attributes:
        sinks, recent: so many first and last tokens of each row are in every choice, whatever a method scores; the
            page that holds the newest token always is.
    """

    @property
    def sinks(self) -> int: ...

    @property
    def recent(self) -> int: ...

    def summary(self, kind: Summary[T]) -> T:
        """What a kind of summary says of the keys, such as ``PageBounds(16)``; see `gossamer.summaries`.

        By position, as `Extent` counts: N entries are those of the row with the most live keys.

        Raises:
            ValueError: a layer that has no summaries.
        """
        ...


class CallFields(TypedDict, total=False):
    """The keywords by which `gossamer.sparse_attention` describes a call; see `AttentionCall`.

    ``causal`` and ``limit`` make the extent where none is given.
    """

    extent: Extent | None
    causal: bool
    limit: int | None
    scale: float | None
    sinks: Tensor | None
    softcap: float | None
    layer: int | None
    store: Store | None
    layout: TokenLayout | ModalityLayout | None
    step: DenoisingStep | None
    state: Sequence[dict[str, Any]] | None
    rotary: Rotary | None
    bias: Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class AttentionCall:
    """What is asked of one attention layer.

    Fields:
        q: ``[B, H, S, D]``; k: ``[B, G, T, D]``; v: ``[B, G, T, Dv]``, None while only planning. H is a multiple of G.
        extent: which pairs the model allows; default: causal, all keys live, the queries the last S.
        scale: factor of the logits ``q . k``; default ``D ** -0.5``.
        sinks: ``[H]``, one extra logit a head in the softmax denominator, with no value (gpt-oss).
        softcap: logits become ``softcap * tanh(logits / softcap)`` before the mask (Gemma 2).
        layer: the model's index of the layer, for methods that differ between layers.
        store: the layer's cache, where it knows more than k and v; see `Store`.
        layout: which tokens are text, and how the others lie in an image or a video, where a denoising model says so;
            or of which modality each is, where a model that reads several does.
        step: of the denoising.
        state: one mapping for each batch row, which an integration keeps over the calls of a request.
        rotary: how the model turned q and k by position, for methods that look at them before that.
        bias: ``[B, G, T]``, added to the logits of each key, after the soft-cap (Dynamic Mask Attention, 2508.02124).
            Methods do not look at it. What dead slots have is never read.

    Raises:
        ValueError, TypeError: at construction: what was given, what was expected, what to do.
    """

    q: Tensor
    k: Tensor
    v: Tensor | None = None
    extent: Extent = None  # type: ignore[assignment]  # set in __post_init__
    scale: float = None  # type: ignore[assignment]
    sinks: Tensor | None = None
    softcap: float | None = None
    layer: int | None = None
    store: Store | None = None
    layout: TokenLayout | ModalityLayout | None = None
    step: DenoisingStep | None = None
    state: Sequence[dict[str, Any]] | None = None
    rotary: Rotary | None = None
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        _check_tensors(self.q, self.k, self.v)
        for name in ("q", "k", "v", "sinks", "bias"):
            # A view may be negated on reading (x.conj().imag is); kernels read the numbers that are stored.
            tensor = getattr(self, name)
            if isinstance(tensor, Tensor) and tensor.is_neg():
                object.__setattr__(self, name, tensor.resolve_neg())
        if self.extent is None:
            object.__setattr__(self, "extent", Extent.full(self.batch, self.query_len, self.key_len))
        if self.extent.batch != self.batch:
            raise ValueError(f"the extent has {self.extent.batch} batch rows, but q has {self.batch}")
        self.extent.check(self.query_len, self.key_len)
        scale = self.scale if self.scale is not None else 1.0 / math.sqrt(self.q.shape[-1])
        if not abs(scale) <= _FLOAT32.max:
            raise ValueError(f"scale must be a finite number, got {scale} (kernels take it in float32)")
        object.__setattr__(self, "scale", float(scale))
        if self.softcap is not None and not _FLOAT32.tiny <= self.softcap <= _FLOAT32.max:
            raise ValueError(
                f"softcap must be above 0 and finite, or None, got {self.softcap} (kernels take it in float32)"
            )
        if self.sinks is not None and not isinstance(self.sinks, Tensor):
            raise TypeError(f"sinks must be a tensor, got {type(self.sinks).__name__}")
        if self.sinks is not None and (self.sinks.shape != (self.heads,) or self.sinks.device != self.q.device):
            raise ValueError(
                f"sinks must have shape ({self.heads},), one logit a query head, on {self.q.device}, "
                f"got {tuple(self.sinks.shape)} on {self.sinks.device}"
            )
        if self.bias is not None:
            self._check_bias(self.bias)
        if self.layout is not None and not isinstance(self.layout, TokenLayout | ModalityLayout):
            raise TypeError(
                "layout must be a gossamer.layout.TokenLayout or a gossamer.layout.ModalityLayout, "
                f"got {type(self.layout).__name__}"
            )
        if self.step is not None and not isinstance(self.step, DenoisingStep):
            raise TypeError(f"step must be a gossamer.layout.DenoisingStep, got {type(self.step).__name__}")
        if self.layout is not None and self.layout.batch != self.batch:
            raise ValueError(f"the layout is of {self.layout.batch} batch rows, but q has {self.batch}")
        if self.rotary is not None and self.rotary.channels > self.q.shape[-1]:
            raise ValueError(
                f"rotary turns {self.rotary.channels} channels, but the head dimension is {self.q.shape[-1]}"
            )

    def _check_bias(self, bias: Tensor) -> None:
        if not isinstance(bias, Tensor) or not bias.is_floating_point():
            given = bias.dtype if isinstance(bias, Tensor) else type(bias).__name__
            raise TypeError(f"bias must be a tensor of floating point, got {given}")
        if bias.shape != self.k.shape[:3] or bias.device != self.k.device:
            raise ValueError(
                f"bias must have shape {tuple(self.k.shape[:3])}, one number a key and key/value head, on "
                f"{self.k.device}, got {tuple(bias.shape)} on {bias.device}"
            )

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor | None = None,
        *,
        extent: Extent | None = None,
        causal: bool = True,
        limit: int | None = None,
        **fields: Any,
    ) -> AttentionCall:
        """A call from `CallFields`: ``causal`` and ``limit`` make the extent, and stand in one that is given.

        Raises:
            ValueError: an extent that says otherwise than ``causal`` or ``limit``.
        """
        _check_tensors(q, k, v)
        if extent is None:
            extent = Extent.full(q.shape[0], q.shape[2], k.shape[2], causal=causal, limit=limit)
        elif (not causal and extent.causal) or (limit is not None and limit != extent.limit):
            raise ValueError(
                f"causal={causal} and limit={limit} do not fit the extent, which has causal={extent.causal} and "
                f"limit={extent.limit}; say them where the extent is made"
            )
        return cls(q, k, v, extent, **fields)

    @property
    def batch(self) -> int:
        return self.q.shape[0]

    @property
    def heads(self) -> int:
        """H, query heads."""
        return self.q.shape[1]

    @property
    def groups(self) -> int:
        """G, key/value heads."""
        return self.k.shape[1]

    @property
    def share(self) -> int:
        """Query heads that share a key/value head."""
        return self.heads // self.groups

    @property
    def query_len(self) -> int:
        return self.q.shape[2]

    @property
    def key_len(self) -> int:
        return self.k.shape[2]

    @property
    def device(self) -> torch.device:
        return self.q.device

    @property
    def values(self) -> Tensor:
        """v.

        Raises:
            ValueError: the call has none.
        """
        if self.v is None:
            raise ValueError("this call has no values: it was made for planning; make it with v to attend")
        return self.v

    @property
    def needs_gradient(self) -> bool:
        tensors = (self.q, self.k, self.v, self.sinks, self.bias)
        return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)

    def refuse_bias(self, backend: str) -> None:
        """Raise where there is a bias, for a backend that has none.

        Raises:
            ValueError: there is one.
        """
        if self.bias is not None:
            raise ValueError(f"{backend} knows no bias; use gossamer.backends.attend, which finds a backend that does")

    def of_groups(self, groups: Sequence[int]) -> AttentionCall:
        """The call of some key/value heads and their query heads, in ascending order. Neighbours are not copied."""
        if len(groups) == self.groups:
            return self
        q = _of_heads(self.q.unflatten(1, (self.groups, self.share)), groups).flatten(1, 2)
        sinks = None if self.sinks is None else self.sinks.view(self.groups, -1)[list(groups)].flatten()
        k, v, bias = (_of_heads(x, groups) for x in (self.k, self.v, self.bias))
        return replace(self, q=q, k=k, v=v, sinks=sinks, bias=bias)

    def of_heads(self, heads: Sequence[int]) -> AttentionCall:
        """The call of some query heads and the key/value heads that they read, as many of each; in ascending order."""
        groups = sorted({head // self.share for head in heads})
        if len(heads) == len(groups) * self.share:
            return self.of_groups(groups)
        sinks = None if self.sinks is None else self.sinks[list(heads)]
        k, v, bias = (_of_heads(x, groups) for x in (self.k, self.v, self.bias))
        return replace(self, q=self.q[:, list(heads)], k=k, v=v, sinks=sinks, bias=bias)

    def before_rotary(self) -> AttentionCall:
        """The call with q and k as they were before the model turned them; exact but for rounding.

        Raises:
            ValueError: nobody said how they were turned.
        """
        if self.rotary is None:
            raise ValueError("this call does not say how q and k were turned by position: make it with rotary")
        extent = self.extent
        queries = extent.query_positions(self.query_len, self.device)
        keys = extent.key_positions(self.key_len, self.device)
        q = self.rotary.turn(self.q, queries, back=True)
        return replace(self, q=q, k=self.rotary.turn(self.k, keys, back=True), rotary=None)

    def lacks(self, needs: Collection[str]) -> str | None:
        """The first of a method's `Method.needs` that this call does not offer, or None.

        Raises:
            ValueError: a need that no call could offer.
        """
        offers = {
            "causal": self.extent.causal,
            "values": self.v is not None,
            "store": self.store is not None,
            "layout": isinstance(self.layout, TokenLayout),
            "step": self.step is not None,
            "layer": self.layer is not None,
            "state": self.state is not None,
            "rotary": self.rotary is not None,
            "one query": self.query_len == 1,
            "whole prompt": "whole prompt" in needs and not bool((self.extent.first_position > 0).any()),
        }
        for need in sorted(needs):
            if need not in offers:
                raise ValueError(f"a method needs {need!r}, which is none of {', '.join(offers)}")
            if not offers[need]:
                return need
        return None

    def check_plan(self, plan: SparsePlan) -> None:
        """Validate that a plan is for this call; with ``GOSSAMER_CHECK=1``, all of the plan too.

        Raises:
            ValueError: another batch, length or number of heads; what `SparsePlan.check` finds.
        """
        if (plan.batch, plan.query_len, plan.key_len) != (self.batch, self.query_len, self.key_len):
            raise ValueError(
                f"the plan is for batch {plan.batch}, {plan.query_len} queries and {plan.key_len} keys, "
                f"but q and k have batch {self.batch}, {self.query_len} queries and {self.key_len} keys"
            )
        if plan.heads not in (self.heads, self.groups):
            raise ValueError(
                f"the plan has {plan.heads} heads; q has {self.heads} and k has {self.groups}: plan for either of "
                "these numbers"
            )
        if checks_numbers():
            plan.check()


@overload
def _of_heads(x: Tensor, heads: Sequence[int]) -> Tensor: ...
@overload
def _of_heads(x: Tensor | None, heads: Sequence[int]) -> Tensor | None: ...
def _of_heads(x: Tensor | None, heads: Sequence[int]) -> Tensor | None:
    """Some heads, in ascending order, of ``[B, heads, ...]``. Neighbours are not copied."""
    if x is None:
        return None
    first, last = (heads[0], heads[-1] + 1) if heads else (0, 0)
    if last - first != len(heads):
        return x[:, list(heads)]
    return x.of_heads(first, last) if isinstance(x, Unread) else x[:, first:last]


def _check_tensors(q: Tensor, k: Tensor, v: Tensor | None) -> None:
    given = {"q": q, "k": k} | ({} if v is None else {"v": v})
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.is_nested or tensor.layout != torch.strided:
            kind, remedy = (
                ("a nested tensor", "pad it, and say where the tokens sit by extent")
                if tensor.is_nested
                else (f"layout {tensor.layout}", "convert it with to_dense()")
            )
            raise TypeError(f"{name} must be a plain tensor of layout torch.strided, got {kind}; {remedy}")
    shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in given.items())
    if any(tensor.ndim != 4 for tensor in given.values()):
        raise ValueError(f"q, k and v must be [batch, heads, tokens, head_dim], got {shapes}")
    heads, groups = q.shape[1], k.shape[1]
    fits = k.shape[0] == q.shape[0] and k.shape[3] == q.shape[3] and (v is None or v.shape[:3] == k.shape[:3])
    if not fits or any(tensor.shape[3] == 0 for tensor in given.values()):
        raise ValueError(
            f"{shapes} do not fit: batch and head_dim of q and k must agree, v must have k's batch, heads and "
            "tokens, and no head_dim may be 0"
        )
    if groups == 0 or heads % groups:
        raise ValueError(f"the {heads} query heads must be a multiple of the {groups} key/value heads")
    if any(tensor.dtype != q.dtype for tensor in given.values()):
        dtypes = ", ".join(str(tensor.dtype) for tensor in given.values())
        raise TypeError(f"q, k and v must share a dtype, got {dtypes}; convert them first")
    if not q.is_floating_point() or q.element_size() < 2:
        raise TypeError(f"q, k and v must be floating point of at least 16 bits, got {q.dtype}; convert them first")
    if any(tensor.device != q.device for tensor in given.values()):
        devices = ", ".join(str(tensor.device) for tensor in given.values())
        raise ValueError(f"q, k and v must share a device, got {devices}")
