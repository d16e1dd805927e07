"""What a method is: a frozen dataclass of hyperparameters with one verb, ``plan``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

from gossamer.call import AttentionCall
from gossamer.methods.ranks import heads_of_rank
from gossamer.plan import SparsePlan
from gossamer.plan.integers import MOST
from gossamer.summaries import Summary

__all__ = ["Method", "Settings", "require_above", "require_at_least", "require_flag", "require_share"]


Settings = tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Method(ABC):
    """Turns a call into a `SparsePlan`. Subclasses are frozen dataclasses; their fields are the configuration.

    Class attributes:
        name: what `gossamer.methods.create`, ``enable`` and the command line know it by.
        needs: what a call must offer (`AttentionCall.lacks`): ``causal``, ``values``, ``store``, ``layout``,
            ``step``, ``layer``, ``state``, ``rotary``, ``one query``, ``whole prompt``. A call that lacks one runs
            dense; the reason is counted.
        per_head: fields that may differ between heads that are planned together (`gossamer.methods.PerHead`). Where
            they do, ``plan`` finds a tuple of one value a head in them, which rules take as it is.
        apart: a key/value head with its query heads is planned as it would be in a call of its own. False where numbers
            of a method belong to heads by their place.
        alone: a query head is planned as it would be without the others of its key/value head.
        tables: fields that hold numbers by layer and head, made for one model (`gossamer.profiles.read_table`).
        files: fields that name a file, read when the method plans.
        decodes: it plans calls of one query on a cache with a store: what a decode step reads (`Policy.decode`).
        extends: what it computes is no approximation of the call, whose tokens it gives other distances: no call is too
            short for it, or too dense, and it reads prompts and steps alike.
        modal: it looks at a call's `gossamer.layout.ModalityLayout`, where there is one.
        settings: fields that `gossamer compare` tries, from the sparsest to the densest; empty: the defaults alone.
        candidates: fields that `gossamer calibrate` tries for each head; empty: `settings`.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()
    per_head: ClassVar[tuple[str, ...]] = ()
    settings: ClassVar[Settings] = ()
    candidates: ClassVar[Settings] = ()
    apart: ClassVar[bool] = True
    alone: ClassVar[bool] = False
    tables: ClassVar[tuple[str, ...]] = ()
    files: ClassVar[tuple[str, ...]] = ()
    decodes: ClassVar[bool] = False
    extends: ClassVar[bool] = False
    modal: ClassVar[bool] = False

    @abstractmethod
    def plan(self, call: AttentionCall) -> SparsePlan:
        """Choose what to compute, for all heads and rows at once.

        Returns:
            A plan that leaves no live query without a key; in causal self-attention each attends at least itself.
        """

    def lacks(self, call: AttentionCall) -> str | None:
        """The first of `needs` that the call does not offer, or None."""
        return call.lacks(self.needs)

    def least_density(self, call: AttentionCall) -> float:
        """A share of the pairs that any plan for the call computes, known before a value is looked at; 0 if none is.

        `Policy.max_density` is held to it first, so that budgets above a short prompt's length cost no planning.
        """
        del call
        return 0.0

    def watches(self, call: AttentionCall) -> tuple[Summary[Any], ...]:
        """Summaries of a cache that want to see the queries of a call, before this method first chooses of it."""
        del call
        return ()

    def summaries(self) -> tuple[Summary[Any] | type[Summary[Any]], ...]:
        """What it asks of a call's store: a summary, or a kind of them where the call says which."""
        return ()

    def beside(self, dim: int, itemsize: int) -> float:
        """Bytes that a decode step reads before it chooses, for each token of the cache and key/value head: of what is
        kept beside keys and values, or of keys; on average over steps.

        Args:
            dim: channels of a head.
            itemsize: bytes of a number of the cache.
        """
        del dim, itemsize
        return 0.0

    def parts(self) -> Iterator[Method]:
        """The method itself, and those that its fields hold, however deep."""
        yield self
        held = [getattr(self, f.name) for f in fields(self)]
        while held:
            one = held.pop()
            if isinstance(one, Method):
                yield from one.parts()
            elif isinstance(one, (list, tuple)):
                held.extend(one)

    def of_rank(self, rank: int, ranks: int, heads: int, groups: int) -> Method:
        """The same for the heads that one rank of a tensor-parallel model has: its part of each of `tables`.

        Args:
            rank: 0 to ``ranks - 1``.
            heads, groups: query heads and key/value heads of the whole model.

        Raises:
            ValueError: numbers that do not divide, or a table for other heads.
        """
        if ranks > 1 and not self.apart and not self.tables:
            raise ValueError(
                f"what {self.name} has learned belongs to the heads of the whole model by their place, and cannot be "
                "split over ranks; use another method, or one rank"
            )
        parts = {}
        for name in self.tables:
            rows = getattr(self, name)
            parts[name] = tuple(row[heads_of_rank(len(row), rank, ranks, heads, groups)] for row in rows)
        return replace(self, **parts) if parts else self

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON types, with the discriminator ``method``."""
        return {"method": self.name} | {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def from_fields(cls, values: dict[str, Any]) -> Method:
        """Build from field values.

        Raises:
            ValueError: an unknown field, with the known ones; or a value out of range.
        """
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(
                f"method {cls.name!r} has no field {unknown[0]!r}; its fields are: {', '.join(known) or 'none'}"
            )
        return cls(**values)


def require_at_least(method: Method, minimum: int, *names: str) -> None:
    """Validate integer fields of a method.

    Raises:
        TypeError: a field is no integer.
        ValueError: a field is below the minimum, or 2^31 or more.
    """
    for name in names:
        value = getattr(method, name)
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{method.name}.{name} must be an integer, got {value!r}")
        if value < minimum:
            raise ValueError(f"{method.name}.{name} must be at least {minimum}, got {value}")
        if value > MOST:
            raise ValueError(f"{method.name}.{name} must be at most {MOST}, got {value}")


def require_above(method: Method, bound: float, *names: str) -> None:
    """Validate fields of a method that are finite numbers above a bound.

    Raises:
        TypeError: a field is no number.
        ValueError: a field is the bound or below, or not finite.
    """
    for name in names:
        value = getattr(method, name)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise TypeError(f"{method.name}.{name} must be a number, got {value!r}")
        if not bound < value < float("inf"):
            raise ValueError(f"{method.name}.{name} must be above {bound:g} and finite, got {value}")


def require_flag(method: Method, *names: str) -> None:
    """Validate fields of a method that are true or false.

    Raises:
        TypeError: a field is neither.
    """
    for name in names:
        if not isinstance(getattr(method, name), bool):
            raise TypeError(f"{method.name}.{name} must be true or false, got {getattr(method, name)!r}")


def require_share(method: Method, *names: str) -> None:
    """Validate fields of a method that lie in [0, 1].

    Raises:
        TypeError: a field is no number.
        ValueError: a field lies outside.
    """
    for name in names:
        value = getattr(method, name)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise TypeError(f"{method.name}.{name} must be a number, got {value!r}")
        if not 0 <= value <= 1:
            raise ValueError(f"{method.name}.{name} must lie in [0, 1], got {value}")
