"""Per head: any method for each layer and head, their plans merged into one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

from gossamer.call import AttentionCall
from gossamer.methods.base import Method
from gossamer.methods.denoising import Kept
from gossamer.methods.head_tables import of_layer
from gossamer.methods.merging import merge_plans
from gossamer.methods.ranks import heads_of_rank
from gossamer.plan import SparsePlan

__all__ = ["PerHead", "needs_of"]

_MERGED = "plans of heads, merged"  # of a layer, in its state


@dataclass(frozen=True)
class PerHead(Method):
    """A method of its own for each query head of each layer: what a search chose for one model.

    Heads of one method that differ in its `Method.per_head` fields alone are planned together, others apart, each with
    the key/value heads that it is for and no others (where `Method.apart` allows), and of these with all query heads,
    or where `Method.alone` allows with as many as it is for; the plans are merged, with their blocks refined to the
    common divisor. A plan whose heads are key/value heads gives each of its query heads the same row.

    Fields:
        layers: ``[layer][head]`` of methods, for query heads; the same number in each layer.
    """

    name: ClassVar[str] = "per_head"
    layers: Sequence[Sequence[Method]] = ()

    def __post_init__(self) -> None:
        layers = tuple(tuple(layer) for layer in self.layers)
        object.__setattr__(self, "layers", layers)
        for method in (method for layer in layers for method in layer):
            if not isinstance(method, Method) or isinstance(method, PerHead):
                raise TypeError(f"{self.name}.layers must hold methods for single heads, got {type(method).__name__}")
        heads = {len(layer) for layer in layers}
        if len(heads) > 1 or 0 in heads:
            raise ValueError(f"{self.name}.layers must have the same number of heads in each, got {sorted(heads)}")

    def lacks(self, call: AttentionCall) -> str | None:
        if not self.layers:
            return None
        lacking = (method.lacks(call) for method in self.layer(call.layer, call.heads))
        return next((need for need in lacking if need is not None), None)

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"layers": [[method.to_dict() for method in layer] for layer in self.layers]}

    def plan(self, call: AttentionCall) -> SparsePlan:
        chosen = self.layer(call.layer, call.heads)
        plans, owner, sources = [], [0] * call.heads, []
        for number, heads in enumerate(planned_together(chosen)):
            first = chosen[heads[0]]
            planned = _planned(heads, call.share, alone=first.alone) if first.apart else list(range(call.heads))
            part = call if "values" in first.needs else replace(call, v=None)
            plans.append(_stacked(chosen, heads, planned).plan(part.of_heads(planned)))
            share = len(planned) // plans[-1].heads
            sources.append([planned.index(head) // share if head in planned else 0 for head in range(call.heads)])
            for head in heads:
                owner[head] = number
        return plans[0] if len(plans) == 1 else self._merged(call, plans, owner, sources)

    def _merged(
        self, call: AttentionCall, plans: Sequence[SparsePlan], owner: Sequence[int], sources: Sequence[Sequence[int]]
    ) -> SparsePlan:
        """The plans merged; where all are those that were kept of a call before, as they were merged then.

        They are kept where the methods keep every part: plans that are made anew in each call are never met again,
        and would stay in memory for as long as the state.
        """
        state = call.state[0] if call.state else {}
        before, merged = state.get(_MERGED, ((), None))
        if merged is None or len(before) != len(plans) or any(a is not b for a, b in zip(before, plans, strict=True)):
            state.pop(_MERGED, None)  # before another is made: of those parts, or of none
            merged = merge_plans(plans, owner, sources)
            found = {id(one.plan) for one in state.values() if isinstance(one, Kept)}
            if all(id(plan) in found for plan in plans):
                state[_MERGED] = tuple(plans), merged
        return merged

    def of_rank(self, rank: int, ranks: int, heads: int, groups: int) -> PerHead:
        layers = [
            [
                method.of_rank(rank, ranks, heads, groups)
                for method in layer[heads_of_rank(len(layer), rank, ranks, heads, groups)]
            ]
            for layer in self.layers
        ]
        return replace(self, layers=layers)

    def layer(self, index: int | None, heads: int) -> Sequence[Method]:
        """The methods of one layer's heads.

        Raises:
            ValueError: no layer was given, there is none such, or the number of heads differs.
        """
        return of_layer(self.layers, index, [heads])


def needs_of(method: Method) -> frozenset[str]:
    """What some call of a method must offer; of methods per head, what any of them needs."""
    parts = (part for layer in method.layers for part in layer) if isinstance(method, PerHead) else ()
    return method.needs.union(*(part.needs for part in parts))


def planned_together(methods: Sequence[Method]) -> list[list[int]]:
    """Heads whose methods plan them at once, in as few parts as may be."""
    groups: dict[Any, list[int]] = {}
    for head, method in enumerate(methods):
        shared = tuple((f.name, getattr(method, f.name)) for f in fields(method) if f.name not in method.per_head)
        groups.setdefault((type(method), shared), []).append(head)
    return list(groups.values())


def _planned(heads: Sequence[int], share: int, *, alone: bool) -> list[int]:
    """Which query heads are planned for some of them: as many of each key/value head.

    Args:
        alone: as many as the key/value head with the most of them has, and not all.
    """
    of_group: dict[int, list[int]] = {}
    for head in heads:
        of_group.setdefault(head // share, []).append(head)
    many = max(map(len, of_group.values())) if alone else share
    planned = []
    for group, own in of_group.items():
        others = (head for head in range(group * share, (group + 1) * share) if head not in own)
        planned += [*own, *others][:many]
    return sorted(planned)


def _stacked(methods: Sequence[Method], heads: Sequence[int], planned: Sequence[int]) -> Method:
    """One method for some heads, in a call of the ``planned`` ones.

    Where a field differs it holds a tuple; heads of other methods get the first value.
    """
    first = methods[heads[0]]
    differing = [name for name in first.per_head if len({getattr(methods[head], name) for head in heads}) > 1]
    if not differing:
        return first
    stacked = object.__new__(type(first))
    for part in fields(first):
        value = getattr(first, part.name)
        if part.name in differing:
            value = tuple(getattr(methods[head], part.name) if head in heads else value for head in planned)
        object.__setattr__(stacked, part.name, value)
    return stacked
