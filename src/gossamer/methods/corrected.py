"""Corrected: any method's plan, computed with what the plan's attributes offer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from gossamer.call import AttentionCall
from gossamer.methods.base import Method
from gossamer.methods.max_relative import MaxRelative
from gossamer.plan import SparsePlan
from gossamer.plan.checks import SKIP_TILE, check_attributes

__all__ = ["Corrected"]


@dataclass(frozen=True)
class Corrected(Method):
    """The blocks that another method chooses; those that it prunes count by their mean, tiles are skipped, or queries
    and keys are multiplied in int8.

    ``pruned_mean`` is FlashPrefill V2's zero-order correction (2608.19758), ``skip`` BLASST's threshold (2512.12087) in
    nats below a row's maximum; `SparsePlan` says what they compute. BLASST's threshold on a weight, ``lambda``, is
    ``skip = -ln(lambda)``; its authors make it proportional to the inverse of the length. ``quantised`` is
    SageAttention's int8 product (2410.02367) where the executor has one; it goes with plans of any kind, and not with
    ``pruned_mean``. Plans that the base makes ``quantised`` stay so; ``pruned_mean`` and ``skip`` take the place of the
    base's own.

    Deviation from BLASST: each row decides for itself, where the authors keep a tile for all rows of a kernel's tile if
    one of them needs it.

    Fields:
        base: the method; for ``pruned_mean`` and ``skip`` one whose plans are blocks alone (with ``skip``, of multiples
            of 64 keys), and with ``pruned_mean`` are not quantised, else planning raises a ValueError.
    """

    name: ClassVar[str] = "corrected"
    base: Method = MaxRelative()  # noqa: RUF009  # frozen
    pruned_mean: bool = True
    skip: float | None = None
    quantised: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.base, Method):
            raise TypeError(f"{self.name}.base must be a method, got {type(self.base).__name__}")
        check_attributes(self.pruned_mean, self.skip, SKIP_TILE, self.name, quantised=self.quantised)

    @property
    def needs(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.base.needs

    @property
    def apart(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.base.apart

    def lacks(self, call: AttentionCall) -> str | None:
        return self.base.lacks(call)

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"base": self.base.to_dict()}

    def of_rank(self, rank: int, ranks: int, heads: int, groups: int) -> Method:
        return replace(self, base=self.base.of_rank(rank, ranks, heads, groups))

    def plan(self, call: AttentionCall) -> SparsePlan:
        plan = self.base.plan(call)
        return plan.with_attributes(
            pruned_mean=self.pruned_mean, skip=self.skip, quantised=self.quantised or plan.quantised
        )
