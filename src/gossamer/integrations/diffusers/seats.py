"""A seat: one attention module of an enabled model, whose attention comes here and is described as a call.

Nothing of diffusers is patched. A module gets a copy of its own processor, which keeps the model's projections, norms
and rotary embedding. Where the processor asks diffusers for a backend, the copy asks for one that is registered for
this module; where it calls torch's ``scaled_dot_product_attention`` itself, a function mode around the processor takes
that call.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gossamer.attention import CallRecord, attend
from gossamer.call import AttentionCall
from gossamer.integrations.diffusers.layouts import is_first
from gossamer.integrations.diffusers.masks import NotPlain, ordered_by_life
from gossamer.integrations.diffusers.runs import Run
from gossamer.integrations.stats import Observation
from gossamer.layout import TokenLayout
from gossamer.methods import Dense
from gossamer.plan import Extent

__all__ = ["Seat", "seat_of"]

_seats: weakref.WeakKeyDictionary[nn.Module, Seat] = weakref.WeakKeyDictionary()
_numbers = itertools.count()
# What our copy of a processor has otherwise than its original.
_OURS = ("_attention_backend", "_gossamer_seat")


def seat_of(module: nn.Module) -> Seat | None:
    return _seats.get(module)


@dataclass(frozen=True, slots=True, eq=False)
class _Asked:
    """What a processor asks for: ``[B, H, S, D]``, and how it would have been done without us."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    dropout: float
    causal: bool
    scale: float | None
    parallel: bool
    dense: Callable[[], Tensor]
    executor: str


class Seat:
    """Takes what one module asks for, until `leave`."""

    def __init__(self, run: Run, module: nn.Module) -> None:
        self.run = run
        self._module = weakref.ref(module)
        self._former: Any = module.processor
        self._layer: int | None = None
        self._hidden: Tensor | None = None
        self._text: Tensor | None = None
        self._inside = self._came = False
        self._name: str | None = None
        own = self._copied(self._former)
        self._processor = weakref.ref(own)
        self._was = {name: value for name, value in _fields(own).items() if name not in _OURS}
        cast(Any, module).processor = own
        self._hooks = [
            module.register_forward_pre_hook(self._enter, with_kwargs=True),
            module.register_forward_hook(self._exit, always_call=True),
        ]
        _seats[module] = self

    def __deepcopy__(self, memo: Any) -> Seat:
        """A copy of an enabled model sits in no seat: its calls run as they would have."""
        return self

    def _copied(self, processor: Any) -> Any:
        own = copy.copy(processor)
        if hasattr(processor, "_attention_backend"):
            self._name = f"gossamer-{next(_numbers)}"
            own._attention_backend = _registered(self._name, _dispatched(self, processor._attention_backend))
            return own
        own.__class__ = _intercepted(type(processor))
        own._gossamer_seat = self
        return own

    @property
    def taken(self) -> bool:
        """Whether the module's attention comes here: nobody set another processor or backend since."""
        module, own = self._module(), self._processor()
        return module is not None and own is not None and module.processor is own and self._asks_here(own)

    def _asks_here(self, own: Any) -> bool:
        return self._name is None or getattr(own._attention_backend, "value", None) == self._name

    def leave(self) -> None:
        """Give the module its processor back, unless it has got another since.

        What was set on our copy stays, and the copy, which somebody may have saved, runs as its original.
        """
        for hook in self._hooks:
            hook.remove()
        self._inside = False
        self._hidden = self._text = None
        module, own = self._module(), self._processor()
        if module is not None:
            _seats.pop(module, None)
        if own is None:
            return
        if self._name is None:
            own.__class__ = type(self._former)
            del own._gossamer_seat
        elif self._asks_here(own):
            own._attention_backend = self._former._attention_backend
        if module is None or module.processor is not own:
            return
        for name, value in _fields(own).items():
            if name == "_attention_backend" or name not in self._was or self._was[name] is not value:
                setattr(self._former, name, value)
        cast(Any, module).processor = self._former

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module is not self._module():
            self._inside = False
            return
        hidden = args[0] if args else kwargs.get("hidden_states")
        text = args[1] if len(args) > 1 else kwargs.get("encoder_hidden_states")
        self._hidden = hidden if isinstance(hidden, Tensor) and hidden.ndim == 3 else None
        self._text = text if isinstance(text, Tensor) and text.ndim == 3 and text is not hidden else None
        self._inside, self._came = True, False

    def _exit(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        failed = output is None
        if self._inside and not self._came and self._hidden is not None and not failed:
            tokens = self._hidden.shape[1]
            record = CallRecord(None, "dense", "attention of its own", 1.0, 0.0, 0.0, "model", tokens, tokens)
            self.run.record(record)
        self._hidden = self._text = None
        self._inside = False

    def attend(self, asked: _Asked) -> Tensor:
        """``[B, H, S, Dv]``."""
        if not self._inside:  # a copy of the module, or a call beside its forward
            return asked.dense()
        self._came = self.run.reached = True
        run, policy = self.run, self.run.policy
        described = self._described(asked)
        if isinstance(described, str):
            return self._densely(asked, described)
        call, order = described
        reason = policy.why_dense(call)
        if reason is not None or policy.method == Dense():  # one that names our kernel runs there
            out = self._densely(asked, reason)
            if run.observe is not None:
                run.observe(Observation(call, out if order is None else _taken(out, order)))
            return out
        out = cast(Tensor, attend(call, policy, record=run.record))
        if run.observe is not None:
            run.observe(Observation(call, out))
        if order is None:
            return out
        index = order.to(out.device)[:, None, :, None].expand_as(out)
        return torch.empty_like(out).scatter_(2, index, out)

    def _densely(self, asked: _Asked, reason: str | None) -> Tensor:
        started = time.perf_counter()
        out = asked.dense()
        seconds = time.perf_counter() - started
        lengths = asked.query.shape[2], asked.key.shape[2]
        self.run.record(CallRecord(self._layer, "dense", reason, 1.0, 0.0, seconds, asked.executor, *lengths))
        return out

    def _described(self, asked: _Asked) -> tuple[AttentionCall, Tensor | None] | str:
        """The call, and the order of its tokens where it is not theirs; or why there is none."""
        batch, _, tokens, _ = asked.query.shape
        if asked.parallel:
            return "context parallelism"
        if asked.dropout > 0:
            return "training: dropout"
        hidden = None if self._hidden is None else self._hidden.shape[1]
        crosses = self._text is not None and tokens == hidden
        if asked.key.shape[2] != tokens or crosses:
            return "cross-attention"
        patches = None if self.run.grid is None else math.prod(self.run.grid)
        text_alone = tokens == self.run.words and tokens != patches and self._text is None
        if text_alone or (patches is not None and tokens < patches):
            return "not all of the image or video"
        try:
            live = self.run.live(asked.mask, batch, tokens)
        except NotPlain:
            return "mask is not plain"
        if asked.causal and live is not None:
            return "mask is not plain"
        if self._layer is None:
            self._layer = self.run.number()
        layout = None if patches is None else self._layout(asked, tokens - patches, live)
        order = None
        q, k, v = _of_one_dtype(asked.query, asked.key, asked.value)
        if live is None:
            extent = Extent.full(batch, tokens, tokens, causal=asked.causal)
        else:
            extent, order = ordered_by_life(live)
            if order is not None:
                q, k, v = (_taken(x, order) for x in (q, k, v))
        sizes = (batch, tokens, *q.shape[1:2], *extent.key_count.tolist())
        state = self.run.steps.state(self._layer, sizes)
        fields: dict[str, Any] = {"scale": asked.scale, "layer": self._layer, "state": state}
        return AttentionCall(q, k, v, extent, layout=layout, step=self.run.steps.now, **fields), order

    def _layout(self, asked: _Asked, words: int, live: Tensor | None) -> TokenLayout | None:
        """None where it is not known on which side of the patches text stands, or where a patch is dead."""
        first = self.run.text_first
        if words and first is None and self._text is not None:
            first = is_first(self._module(), self._text, asked.value, asked.query.shape[2] - words)
            self.run.text_first = first
        if words and first is None:
            return None
        before = words if first and words else 0
        rows = asked.query.shape[0]
        if live is None:
            return TokenLayout((before,) * rows, *cast(Any, self.run.grid))
        patches = live[:, before : before + asked.query.shape[2] - words]
        if not bool(patches.all()):
            return None
        return TokenLayout(tuple(live[:, :before].sum(dim=1).tolist()), *cast(Any, self.run.grid))


def _fields(processor: Any) -> dict[str, Any]:
    return dict(vars(processor))


def _registered(name: str, attention: Callable[..., Tensor]) -> AttentionBackendName:
    """A name beside diffusers' closed list, known to it for as long as some processor has it: copies may."""
    member, key = _member(name), _member(name)
    _AttentionBackendRegistry.register(key, supports_context_parallel=True)(attention)
    weakref.finalize(member, _unregister, key).atexit = False
    return member


def _member(name: str) -> AttentionBackendName:
    member = str.__new__(AttentionBackendName, name)
    member._name_, member._value_ = name, name
    return member


def _dispatched(seat: Seat, former: Any) -> Callable[..., Tensor]:
    """The backend of one seat, as diffusers calls it: ``[B, S, H, D]``.

    Args:
        former: the backend that the processor had, None for the active one.
    """
    there = weakref.ref(seat)

    @torch.compiler.disable
    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        _parallel_config: Any = None,
    ) -> Tensor:
        own = there()

        def dense() -> Tensor:
            given = (query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
            out = dispatch_attention_fn(*given, backend=former, parallel_config=_parallel_config)
            return out.transpose(1, 2)

        if own is None:
            return dense().transpose(1, 2)
        name = AttentionBackendName(former or _AttentionBackendRegistry.get_active_backend()[0])
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        parallel = _parallel_config is not None
        asked = _Asked(q, k, v, attn_mask, dropout_p, is_causal, scale, parallel, dense, str(name.value))
        return own.attend(asked).transpose(1, 2)

    return cast(Callable[..., Tensor], attention)


class _Intercept(TorchFunctionMode):
    """Takes the calls of torch's attention inside a processor."""

    def __init__(self, seat: Seat) -> None:
        super().__init__()
        self._seat = seat

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _asked_of_torch(self._seat, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _asked_of_torch(
    seat: Seat,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    def dense() -> Tensor:
        fields = {"scale": scale, "enable_gqa": enable_gqa}
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **fields)

    return seat.attend(
        _Asked(query, key, value, attn_mask, dropout_p, is_causal, scale, False, dense, "sdpa"),
    )


@functools.cache
def _intercepted(kind: type) -> type:
    """The class of a processor, with its attention taken. By name and signature it is the same: models look at both."""

    @functools.wraps(kind.__call__)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        seat = getattr(self, "_gossamer_seat", None)
        if seat is None:  # made anew from the class of ours, as diffusers does where it loads an IP-Adapter
            return kind.__call__(self, *args, **kwargs)
        with _Intercept(seat):
            return kind.__call__(self, *args, **kwargs)

    return type(kind.__name__, (kind,), {"__call__": torch.compiler.disable(run), "__module__": kind.__module__})


def _unregister(member: AttentionBackendName) -> None:
    registry = _AttentionBackendRegistry
    for entries in (registry._backends, registry._constraints, registry._supported_arg_names):
        entries.pop(member, None)
    registry._supports_context_parallel.discard(member.value)


def _of_one_dtype(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As autocast would have it for torch's own attention."""
    kind = query.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return query, key, value
    dtype = torch.get_autocast_dtype(kind)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def _taken(x: Tensor, order: Tensor) -> Tensor:
    """Tokens of ``[B, H, S, D]`` in an order ``[B, S]``."""
    return x.gather(2, order.to(x.device)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
