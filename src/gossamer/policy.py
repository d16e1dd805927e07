"""`Policy`: dense or sparse, and why."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor

from gossamer import backends, methods
from gossamer.call import AttentionCall, Store
from gossamer.encoded import EncodedTokens
from gossamer.methods import Dense, Method, PerHead, Reduced, Reducing
from gossamer.methods.per_head import needs_of
from gossamer.plan import SparsePlan
from gossamer.profiles import Profile
from gossamer.profiles.costs import MIN_TOKENS, Kernel, at_hand

__all__ = ["TOO_DENSE", "TRAINING", "Decision", "Policy"]

# With fewer queries than this a plan costs more than it saves, whatever the keys.
FEW_QUERIES = 32
# With fewer keys than this torch's SDPA decodes faster than our kernel (measured on AMD Zen 5): what a call costs by
# itself decides. By bytes of an element; SDPA is slow at decoding in 16 bits.
STREAMED_KEYS = {2: 512, 4: 4096}
# The reason of a call in training; of a layer in training mode too, whose own tensors may need no gradient.
TRAINING = "training: dense unless asked for"
# The reason of a call whose plan would compute nearly every pair: our own kernel then runs dense.
TOO_DENSE = "plan too dense to pay"
# The reason of a call in which a method that gives far keys another distance finds none.
NEAR = "no key is far"


@dataclass(frozen=True, slots=True, eq=False)
class Decision:
    """What a call computes: a plan, all of a smaller call, or everything.

    Fields:
        plan: None for dense, and where there is a smaller call.
        density: computed pairs over allowed pairs; of a smaller call its keys over those of the call.
        reason: why dense where it was not asked for, else None.
        reduced: what to attend in place of the call that was asked (`gossamer.methods.Reducing`).
    """

    plan: SparsePlan | None
    density: float = 1.0
    reason: str | None = None
    reduced: Reduced | None = None

    @property
    def is_dense(self) -> bool:
        return self.plan is None and self.reduced is None


class Kept(Protocol):
    """What a cache keeps, and how: a `gossamer.cache.CachePolicy`."""

    name: ClassVar[str]

    def to_dict(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Policy:
    """A method, and when to use it.

    Fields:
        method: makes the plans.
        min_tokens: below this many live keys (or a model's own window below it) attention is dense. None: the length
            from which the method was faster than dense attention when ``gossamer bench --cost-model`` measured it on
            this machine, with the same fields, kernel, dtype and head dimension; 2048 if it did not, and for methods
            per head. `resolved` says which number that is.
        max_density: a plan that computes more than this share of the dense pairs is not worth it: dense.
        training: whether a call that needs a gradient is planned like any other; else it is dense.
        keep_plans: whether what a plan names is kept in memory until the gradient is computed; else the method makes
            the plan again then, from the same tensors. Methods that keep something over calls keep the plan, too.
        profile: name of the profile that the method is from, if of one. Labels have it in place of the method's name.
        decode: chooses what a decode step reads of a cache with a store (`gossamer.methods.decoding`); None: all of it.
        cache: what a model's caches keep, for whoever makes them (``gossamer.enable``); None: everything, as it is.
    """

    method: Method
    min_tokens: int | None = None
    max_density: float = 0.9
    profile: str = field(default="", compare=False)
    training: bool = True
    keep_plans: bool = True
    decode: Method | None = None
    cache: Kept | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.method, Method):
            raise TypeError(
                f"Policy.method must be a gossamer.methods.Method, got {type(self.method).__name__}; "
                "build one with gossamer.methods.create(name)"
            )
        if self.min_tokens is not None:
            if not isinstance(self.min_tokens, int) or isinstance(self.min_tokens, bool):
                raise TypeError(f"Policy.min_tokens must be an integer or None, got {self.min_tokens!r}")
            if self.min_tokens < 0:
                raise ValueError(f"Policy.min_tokens must not be negative, got {self.min_tokens}")
        if not isinstance(self.max_density, int | float) or isinstance(self.max_density, bool):
            raise TypeError(f"Policy.max_density must be a number, got {self.max_density!r}")
        for name in ("training", "keep_plans"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"Policy.{name} must be True or False, got {getattr(self, name)!r}")
        if self.decode is not None and not (isinstance(self.decode, Method) and self.decode.decodes):
            given = self.decode.name if isinstance(self.decode, Method) else repr(self.decode)
            raise ValueError(
                f"Policy.decode must be a method that chooses what a decode step reads, got {given}; "
                f"build one with gossamer.methods.create(name), by one of the names {', '.join(methods.decoding())}"
            )
        if self.decode is None and self.method.extends:
            object.__setattr__(self, "decode", self.method)
        if self.decode != self.method and (self.method.extends or (self.decode is not None and self.decode.extends)):
            name = self.method.name if self.method.extends else cast(Method, self.decode).name
            raise ValueError(
                f"{name} gives tokens other distances than the model does, in prompts as in steps: give it as the "
                "method, and leave decode out"
            )
        if "one query" in needs_of(self.method):
            raise ValueError(
                f"{self.method.name} plans no prompt, since it chooses what a decode step reads: give such a method as "
                "decode=, beside one for prompts, such as 'dense'"
            )
        if not self.max_density > 0:
            raise ValueError(f"Policy.max_density must be above 0, got {self.max_density}")

    @classmethod
    def of(cls, method: Policy | Method | Profile | str) -> Policy:
        """A policy as it is, or one with default thresholds for a method, a profile with its `decode`, or a name."""
        if isinstance(method, Policy):
            return method
        if isinstance(method, Profile):
            return cls(method.method, profile=method.name, decode=method.decode)
        return cls(methods.create(method) if isinstance(method, str) else method)

    @property
    def name(self) -> str:
        """The profile's, or the method's; and what steps are read by, and what caches keep: ``dense+quest+int8``."""
        more = (part.name for part in (self.decode, self.cache) if part is not None)
        return "+".join([self.profile or self.method.name, *more])

    def resolved(self, subject: AttentionCall | Tensor) -> Policy:
        """The same with the number that ``min_tokens`` stands for, for a call or queries like these."""
        return self if self.min_tokens is not None else replace(self, min_tokens=self._least(subject))

    def _least(self, subject: AttentionCall | Tensor) -> int:
        if self.min_tokens is not None:
            return self.min_tokens
        if isinstance(self.method, Dense | PerHead):
            return MIN_TOKENS
        costs, _ = at_hand()
        known = None if costs is None else costs.pays_from(self.method.to_dict(), Kernel.of(subject))
        return MIN_TOKENS if known is None else known

    def decide(self, call: AttentionCall) -> Decision:
        """Plan a call, or say why it runs dense. Dense or sparse holds for the call as a whole.

        Raises:
            ValueError: there is something to plan, on the meta device.
        """
        reason, method = self.why_dense(call), self.planner(call)
        if reason is not None or isinstance(method, Dense):
            return Decision(None, reason=reason)
        backends.refuse_transforms(call)
        if call.device.type == "meta":
            raise ValueError(
                f"{method.name} chooses by values, but tensors on the meta device hold no values; give tensors "
                "with values, or the method 'dense', which needs shapes alone"
            )
        most = float("inf") if method.extends else self.max_density
        if method.least_density(call) > most:
            return Decision(None, reason=TOO_DENSE)
        with torch.no_grad():  # a selection is a constant
            if isinstance(method, Reducing):
                made = method.reduce(call)
                if made is None or made.density > most:
                    return Decision(None, reason=NEAR if method.extends else TOO_DENSE)
                return Decision(None, made.density, reduced=made)
            plan = method.plan(call)
        density = plan.density()
        return Decision(None, reason=TOO_DENSE) if density > self.max_density else Decision(plan, density)

    def planner(self, call: AttentionCall) -> Method:
        """The method that a call is for: `decode` of a causal query by itself, where there is one."""
        return self.method if self.decode is None or not _is_step(call) else self.decode

    def why_dense(self, call: AttentionCall) -> str | None:
        """Why no plan is even tried, or None; None under a method that is itself dense."""
        method = self.planner(call)
        if isinstance(method, Dense):
            return None
        if call.needs_gradient and (not self.training or backends.is_transformed(call)):
            return TRAINING
        if isinstance(method, Reducing) and call.needs_gradient:
            return TRAINING  # its keys are copies, through which none passes
        if method is self.decode and _is_step(call):
            return self._why_whole(method, call)
        if _is_step(call):
            return "decode"
        if method.extends:
            lacking = method.lacks(call)
            return None if lacking is None else f"{method.name} needs {lacking}"
        limit, keys, least = call.extent.limit, call.extent.longest, self._least(call)
        if min(limit or keys, keys) < least:
            return "short prompt" if limit is None or limit >= keys else "short model window"
        if call.query_len < min(FEW_QUERIES, least):
            return "few queries"
        lacking = self.method.lacks(call)
        return None if lacking is None else f"{self.method.name} needs {lacking}"

    def why_undescribed(self, store: Store | None) -> str:
        """Why a decode step is dense for which nobody asks `decide`: its mask is for torch alone."""
        if self.decode is None:
            return "decode"
        return f"{self.decode.name} needs store" if store is None else "mask is not plain"

    def _why_whole(self, method: Method, call: AttentionCall) -> str | None:
        """Why a decode step reads the whole cache, before a plan is tried."""
        if call.store is None:
            return f"{method.name} needs store"
        if call.extent.limit is not None:
            return f"{method.name} needs a cache without the model's own window"
        if isinstance(method, Reducing) and call.bias is not None:
            return f"{method.name} needs a call without a bias"
        lacking = method.lacks(call)
        return None if lacking is None else f"{method.name} needs {lacking}"

    def attends_on_kernel(self, call: AttentionCall, reason: str | None) -> bool:
        """Whether dense attention runs on our own kernel where torch's SDPA could do it too.

        Few queries of encoded keys always do, where there is one: it reads them as they are.
        """
        encoded = isinstance(call.k, EncodedTokens) or isinstance(call.v, EncodedTokens)
        if encoded and call.query_len < FEW_QUERIES and reason != TRAINING:
            return backends.name_of(call) != "torch"
        if isinstance(self.method, Dense) and (self.method.kernel == "gossamer" or self.decode is None):
            return self.method.kernel == "gossamer"
        if _is_step(call) and reason != TRAINING:
            return self.decodes_on_kernel(call.q, call.key_len)
        if reason == TOO_DENSE:
            return call.device.type == "cpu" and backends.name_of(call) != "torch"
        return reason in ("decode", "few queries") and self.decodes_on_kernel(call.q, call.key_len)

    def decodes_on_kernel(self, q: Tensor, key_len: int) -> bool:
        """Whether few queries like ``q`` against so many keys run on our own kernel: on CPUs, where it splits the keys.

        Not under plain dense attention without a method for steps, nor against short caches.
        """
        plain = isinstance(self.method, Dense) and self.method.kernel == "torch" and self.decode is None
        if q.device.type != "cpu" or plain:
            return False
        least = STREAMED_KEYS.get(q.element_size())
        return least is not None and key_len >= least and backends.name_of(q) != "torch"


def _is_step(call: AttentionCall) -> bool:
    """A decode step: one query, the newest token's."""
    return call.query_len == 1 and call.extent.causal
